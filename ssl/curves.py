"""curves.png: what the metrics of a run look like over its steps."""

from pathlib import Path

from sslus.engine.atomic import atomic_file


def draw(metrics: list[dict], path: Path) -> None:
    """Loss and its terms, learning rate and gradient, health, speed; one picture.

    metrics: lines of metrics.jsonl. Keys that are not known here count as terms of the loss.
    """
    from matplotlib.figure import Figure  # 0.5 s, and not needed before the first picture

    known = {
        "step", "epoch", "loss", "lr", "grad_norm", "rankme", "feature_std", "uniformity",
        "alignment", "samples_per_second", "data_wait", "gpu_memory_gib",
    }  # fmt: skip
    first = next((m for m in metrics if "loss" in m), {})
    terms = [k for k in first if k not in known]
    online = [k for k in ("knn_macro_f1", "probe_macro_f1") if any(k in m for m in metrics)]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, rate), (alive, speed) = figure.subplots(2, 2)

    def line(axes, key, label, **style):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        if points:
            marker = "." if len(points) < 40 else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, **style)

    def two(axes, left, right, title):
        """Two quantities with an axis each, coloured like their lines."""
        other = axes.twinx()
        for a, (key, label), colour in ((axes, left, "C0"), (other, right, "C1")):
            line(a, key, label, color=colour)
            a.set_ylabel(label, color=colour)
            a.set_ylim(bottom=0)
        axes.set_title(title)

    line(loss, "loss", "loss", color="black")
    for term in terms:
        line(loss, term, term)
    loss.set_title("Loss and its unweighted terms")
    loss.set_yscale("log")
    loss.set_ylabel("mean since the line before")
    if metrics:
        loss.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    two(rate, ("lr", "learning rate"), ("grad_norm", "gradient norm"), "Optimisation")
    two(alive, ("rankme", "RankMe"), ("feature_std", "mean std of a feature"), "Health")
    two(
        speed, ("samples_per_second", "samples/s"), ("data_wait", "share waiting for data"), "Speed"
    )
    for key in online:  # both are shares, as is the axis of the std
        line(alive.twinx(), key, key)
    for axes in (loss, rate, alive, speed):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    with atomic_file(path) as f:
        figure.savefig(f, format="png", dpi=110)
