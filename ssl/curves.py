"""curves.png: the metrics of a run over its steps."""

from pathlib import Path

from sslus.engine.atomic import atomic_file

KNOWN = {  # what the loop writes of every method; all else are terms of its loss
    "step", "epoch", "loss", "lr", "grad_norm", "rankme", "feature_std", "dead_features",
    "uniformity", "alignment", "samples_per_second", "data_wait", "gpu_memory_gib",
}  # fmt: skip
SHARES = ("dead_features", "data_wait")  # from 0 to 1, so that 1 % looks like little
ONLINE = ("knn_accuracy", "knn_macro_f1", "probe_macro_f1")


def draw(metrics: list[dict], path: Path) -> None:
    """Plot loss and terms, learning rate, gradient norm, health, speed, memory, online evaluation.

    metrics: lines of metrics.jsonl. Unknown keys count as terms of the loss. Panels without data
    are left out. Writes `path` as PNG.
    """
    figure = plot(metrics)
    with atomic_file(path) as f:
        figure.savefig(f, format="png", dpi=150)


def plot(metrics: list[dict]):
    """The matplotlib Figure of `draw`."""
    from matplotlib.figure import Figure  # takes 0.5 s, not needed before the first figure

    seen = {key for m in metrics for key in m}
    terms = [k for k in next((m for m in metrics if "loss" in m), {}) if k not in KNOWN]
    online = [k for k in ONLINE if k in seen]
    pairs = [
        ("Optimisation", ("lr", "learning rate"), ("grad_norm", "gradient norm")),
        ("Health", ("rankme", "RankMe"), ("feature_std", "mean std of a feature")),
        ("Dead features", ("dead_features", "share of the features"), None),
        ("Views", ("alignment", "alignment"), ("uniformity", "uniformity")),
        ("Speed", ("samples_per_second", "samples/s"), ("data_wait", "share waiting for data")),
        ("GPU", ("gpu_memory_gib", "memory, GiB"), None),
    ]
    pairs = [p for p in pairs if any(side and side[0] in seen for side in p[1:])]
    num = 1 + len(pairs) + bool(online)
    rows = (num + 1) // 2
    figure = Figure(figsize=(11, 3.5 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel().tolist()
    for axes in panels[num:]:
        axes.remove()
    loss, *others = panels[:num]

    def line(axes, key, **style):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        if points:
            marker = "." if len(points) < 40 else None
            axes.plot(*zip(*points, strict=True), marker=marker, **style)

    for name in ("loss", *terms):
        line(loss, name, label=name, **({"color": "black"} if name == "loss" else {}))
    legend_rows = (len(terms) + 4) // 4
    loss.set_title("Loss and its unweighted terms", pad=8 + 16 * legend_rows)
    values = [m[name] for name in ("loss", *terms) for m in metrics if m.get(name, 0) > 0]
    if values and max(values) > 10 * min(values):  # else a log scale has hardly a tick
        loss.set_yscale("log")
    loss.set_ylabel("mean since the previous point")
    if metrics:
        # Above the lines, which may be anywhere; beside them, it would narrow this panel alone.
        loss.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize="small"
        )
    for axes, (title, *sides) in zip(others, pairs, strict=False):
        axes.set_title(title)
        # Two quantities with an axis each, coloured like their lines; dashes tell them in print.
        own = None
        for side, colour, dashes in zip(sides, ("C0", "C1"), ("-", "--"), strict=True):
            if side and side[0] in seen:
                own = axes.twinx() if own else axes
                line(own, side[0], color=colour, linestyle=dashes, clip_on=False)
                own.set_ylabel(side[1], color=colour)
                own.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
                own.update_datalim([(0, 0)], updatex=False)  # else no margin above a flat line
                if side[0] in SHARES:
                    own.set_ylim(0, 1)
                elif side[0] == "uniformity":  # which is below 0
                    own.set_ylim(top=0)
                else:
                    own.set_ylim(bottom=0)
    if online:
        axes = others[-1]
        for key in online:
            line(axes, key, label=key.replace("_", " "))
        axes.set_title("Labelled frames, by patient")
        axes.set_ylim(0, 1)
        axes.legend(frameon=False)
    for axes in panels[:num]:
        axes.set_xlabel("step")
        axes.set_xlim(0, 1.02 * max([1, *(m["step"] for m in metrics)]))  # all panels alike
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure
