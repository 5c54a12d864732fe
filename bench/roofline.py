"""Roofline plot: how fast VICReg and Barlow Twins multiply, and how fast the machine could.

    python bench/run.py --stage losses --json losses.json
    python bench/roofline.py losses.json                     writes losses.png beside it
    python bench/roofline.py losses.json -o roofline.png

Horizontal axis: arithmetic intensity, the operations of the chosen form's matrix products divided
by the bytes that its passes move. Vertical axis: those operations divided by the time. Operations
and bytes are counted, not measured: see form_flops and form_bytes in bench/stages/losses.py. The
roofs are measured in the same run: horizontal, the fastest bare product for that dtype; slanted, a
large copy (left out if the file has none).

Filled markers are sslus. Hollow ones are others, plotted with the same operations whatever they
compute, so that the distance is the ratio of the times. On a GPU, half precision and float32 have
separate panels.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.losses import FLOOR, floor_flops, form_bytes, form_flops

CASE = re.compile(r"(?P<name>vicreg|barlow) N=(?P<n>\d+) D=(?P<d>\d+)(?: (?P<dtype>fp32|bf16))?")
TITLES = {"vicreg": "VICReg", "barlow": "Barlow Twins"}
OURS = "sslus"
MARKERS = {  # colours that differ in greyscale too
    OURS: ("o", "#0b5394"), "sslus, CUDA graph": ("*", "#0b5394"), "definition": ("s", "#b45f06"),
    "definition, TF32": ("D", "#b45f06"), "definition, CUDA graph": ("P", "#b45f06"),
    "torch.compile": ("^", "#38761d"), "lightly": ("v", "#741b47"),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One implementation's loss and gradients for (N, D) views."""

    name: str
    n: int
    d: int
    dtype: str | None  # None: on a CPU
    implementation: str
    seconds: float
    device: str
    threads: int

    @property
    def flops(self) -> float:
        if self.implementation == FLOOR:
            return floor_flops(self.name, self.n, self.d, self.dtype)
        return form_flops(self.n, self.d, self.dtype)

    @property
    def rate(self) -> float:  # operations per second
        return self.flops / self.seconds

    @property
    def intensity(self) -> float:  # operations per byte
        work = form_flops(self.n, self.d, self.dtype)
        return work / form_bytes(self.n, self.d, self.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="of bench/run.py --json")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="PNG, PDF or SVG; default: RESULTS.png"
    )
    options = parser.parse_args()
    out = options.out or options.results.with_suffix(".png")
    try:
        points, bandwidth = read(options.results)
        draw(points, bandwidth, out)
    except (OSError, ValueError) as e:
        print(f"roofline: {e}", file=sys.stderr)
        return 1
    print(out)
    return 0


def read(path: Path) -> tuple[list[Point], float | None]:
    """The file's points and the bytes per second of its copy. ValueError if it has no points."""
    try:
        rows = json.loads(path.read_text())["rows"]
        rows = [row for row in rows if row["stage"] == "losses"]
        points = list(points_of(rows))
        copies = [row["median"] * 1e9 for row in rows if row["unit"] == "GB/s"]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is not what bench/run.py --json writes ({e!r})") from None
    if not any(p.implementation == OURS for p in points):
        raise ValueError(
            f"{path} has no rows of vicreg or barlow: measure with bench/run.py --stage losses"
        )
    return points, max(copies, default=None)


def points_of(rows: Iterable[dict]) -> Iterable[Point]:
    for row in rows:
        case = CASE.fullmatch(row["case"])
        if case and row["name"] == "forward and backward":
            yield Point(
                case["name"], int(case["n"]), int(case["d"]), case["dtype"], row["implementation"],
                row["median"], row["device"], row["threads"],
            )  # fmt: skip


def draw(points: list[Point], bandwidth: float | None, out: Path) -> None:
    """A panel for each dtype and loss, all with the same axes."""
    from matplotlib.figure import Figure  # not pyplot, which may open a window

    dtypes = sorted({p.dtype for p in points}, key=str)
    names = [name for name in TITLES if any(p.name == name for p in points)]
    figure = Figure(figsize=(0.6 + 5.7 * len(names), 1.4 + 4.2 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(names), sharex=True, sharey=True, squeeze=False)
    for row, dtype in zip(panels, dtypes, strict=True):
        roof = max(
            (p.rate for p in points if p.dtype == dtype and p.implementation == FLOOR), default=None
        )
        for axes, name in zip(row, names, strict=True):
            mine = [p for p in points if (p.name, p.dtype) == (name, dtype)]
            if not any(p.implementation == OURS for p in mine):  # the run was aborted before it
                axes.set_axis_off()
                continue
            axes.set(xscale="log", yscale="log")
            axes.set_title(TITLES[name] + (f", {dtype}" if dtype else ""))
            axes.grid(which="major", color="0.9")
            axes.margins(x=0.2, y=0.1)
            draw_points(axes, [p for p in mine if p.implementation != FLOOR])
            draw_roofs(axes, [p.intensity for p in mine], roof, bandwidth)
    for axes in panels[-1]:
        axes.set_xlabel("operations a byte")
    for axes in panels[:, 0]:
        axes.set_ylabel("operations a second")
    first = points[0]
    threads = "" if first.dtype else f", {first.threads} threads, float32"
    figure.suptitle(f"Loss and gradients, products of the chosen form: {first.device}{threads}")
    shown = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False
    )  # fmt: skip
    figure.savefig(out, dpi=150)


def draw_points(axes, points: list[Point]) -> None:
    for who in dict.fromkeys(p.implementation for p in points):
        some = [p for p in points if p.implementation == who]
        marker, colour = MARKERS.get(who, ("x", "0.4"))
        axes.scatter(
            [p.intensity for p in some], [p.rate for p in some], s=90 if marker == "*" else 36,
            marker=marker, edgecolors=colour, label=who, zorder=3,
            facecolors=colour if who == OURS else "none",
        )  # fmt: skip
    draw_labels(axes, [p for p in points if p.implementation == OURS], points)


def draw_labels(axes, ours: list[Point], points: list[Point]) -> None:
    """Labels N x D to the right of points of similar intensity, moved down so as not to overlap."""
    rates = [p.rate for p in points]
    line = max(1.05, (max(rates) / min(rates)) ** 0.035)  # height of a text line, as a factor
    groups: list[list[Point]] = []
    for p in sorted(ours, key=lambda p: p.intensity):
        if not groups or p.intensity > 1.7 * groups[-1][0].intensity:
            groups.append([])
        groups[-1].append(p)
    for group in groups:
        x = 1.2 * max(p.intensity for p in group)
        y = float("inf")
        for p in sorted(group, key=lambda p: -p.rate):
            y = min(p.rate, y / line)
            axes.annotate(
                f"{p.n} x {p.d}", (p.intensity, p.rate), (x, y), fontsize=8, va="center",
                color=MARKERS[OURS][1],
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.6", "shrinkB": 3},
            )  # fmt: skip


def draw_roofs(axes, at: list[float], roof: float | None, bandwidth: float | None) -> None:
    """Draws the roofs from half the lowest intensity to twice the highest."""
    low, high = min(at) / 2, max(at) * 2
    if roof:
        axes.plot([low, high], [roof, roof], color="black", lw=1, label="roof: bare products")
        axes.annotate(
            f"{roof / 1e12:.3g} TFLOP/s", (high, roof), (0, 3), textcoords="offset points",
            fontsize=8, ha="right",
        )  # fmt: skip
    if bandwidth:
        end = min(high, roof / bandwidth) if roof else high
        if end > low:
            axes.plot([low, end], [low * bandwidth, end * bandwidth], color="black", lw=1, ls="--",
                      label=f"roof: copy, {bandwidth / 1e9:,.0f} GB/s")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
