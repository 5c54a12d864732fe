"""The results of an evaluation, as a table, a page and a figure."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslus.engine.atomic import atomic_file

PROTOCOLS = {  # -> its name in reports
    "linear": "Linear probe", "knn": "Nearest neighbours", "finetune": "Fine-tuning",
}  # fmt: skip
SCORES = {  # of the table, in words
    "Macro-F1": "the mean of the classes' F1 over frames.",
    "Macro-F1 per video": "the same over videos; a video's prediction is the class with the"
    " highest mean probability over its frames.",
    "Balanced accuracy": "the mean over classes of the share of frames predicted correctly.",
    "AUROC per video": "the area under the ROC curve of each class against all others, from the"
    " mean probabilities of the videos, averaged over the classes that have both positives and"
    " negatives among the tested videos; AUROC over frames is in results.json.",
}
LONGEST = 60  # characters of a class's name in the figure; the tables have it whole
MOST_WRITTEN = 30  # classes whose confusion matrix is drawn with numbers


@dataclass(frozen=True)
class Row:
    """One line of the table: a backbone at one share of the labels."""

    backbone: str
    percent: float  # of the training videos of each class
    macro_f1: float  # mean over seeds
    macro_f1_std: float | None  # over seeds; None for one seed
    macro_f1_per_video: float
    macro_f1_per_video_std: float | None
    balanced_accuracy: float
    balanced_accuracy_std: float | None
    auroc: float  # macro, one class against the rest
    auroc_std: float | None
    auroc_per_video: float
    auroc_per_video_std: float | None
    num_seeds: int  # 1 where all seeds make the same: a fixed split and all labels, for example
    num_train_videos: float  # mean over folds and seeds
    num_train_patients: float
    num_test_frames: int  # per seed; with folds, every frame is tested once
    num_test_videos: int
    num_test_patients: int
    per_class_f1: dict[str, float]
    confusion: list[list[float]]  # frames, mean over seeds; rows: truth, columns: prediction
    macro_f1_of_seeds: list[float]


@dataclass(frozen=True)
class Evaluation:
    protocol: str
    settings: dict  # of the protocol
    rows: list[Row]
    out: Path
    shards: Path
    names: list[str]
    num_frames: int
    num_videos: int
    num_patients: int
    split: str  # how patients were split, in words
    warnings: list[str]

    @property
    def spread(self) -> str:
        """What the table's ± is, in words."""
        num_seeds = max(row.num_seeds for row in self.rows)
        if num_seeds == 1:
            return "one seed"
        alone = any(row.num_seeds == 1 for row in self.rows)
        return f"mean ± standard deviation over {num_seeds} seeds" + (
            "; numbers without ± are those of one seed, as all make the same" if alone else ""
        )

    @property
    def tested(self) -> str:
        """What every line of the table was tested on, in words."""
        row = self.rows[0]
        return (
            f"{row.num_test_frames:,} frames, {row.num_test_videos} videos,"
            f" {row.num_test_patients} patients"
        )


def table(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, as text; the header has line breaks."""

    def with_std(mean: float, std: float | None) -> str:
        return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"

    header = [
        "backbone", "labels", "macro-F1", "macro-F1\nper video", "balanced\naccuracy",
        "AUROC\nper video", "trained on\nvideos\n(patients)",
    ]  # fmt: skip
    cells = [
        [
            row.backbone,
            f"{row.percent:g} %",
            with_std(row.macro_f1, row.macro_f1_std),
            with_std(row.macro_f1_per_video, row.macro_f1_per_video_std),
            with_std(row.balanced_accuracy, row.balanced_accuracy_std),
            with_std(row.auroc_per_video, row.auroc_per_video_std),
            f"{row.num_train_videos:.0f} ({row.num_train_patients:.0f})",
        ]
        for row in result.rows
    ]
    return header, cells


def markdown(result: Evaluation, settings: dict) -> str:
    header, cells = table(result)
    header = [name.replace("\n", " ") for name in header]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
    *judged, majority = result.rows
    per_class = [*(row for row in judged if row.percent == judged[-1].percent), majority]
    names = [_plain(name) for name in result.names]
    return "\n".join(
        [
            f"# {PROTOCOLS[result.protocol]} of {settings['method']}: {settings['backbone']} at"
            f" {settings['image_size']} px",
            "",
            f"{result.num_frames:,} frames, {result.num_videos} videos, {result.num_patients}"
            f" patients; {result.split}; {result.spread}. Tested in each seed: {result.tested}."
            " Labels: the share of the training videos of each class, at least one, whose labels"
            " are used.",
            *_in_words(result),
            "",
            *lines,
            "",
            *(f"- {name}: {words}" for name, words in SCORES.items()),
            "",
            "Each video's prediction and probabilities are in predictions.csv, by its id in the"
            " shards.",
            "",
            "F1 of each class, over frames:",
            "",
            f"| backbone | labels | {' | '.join(names)} |",
            f"| {' | '.join(['---'] * (2 + len(result.names)))} |",
            *(
                f"| {row.backbone} | {row.percent:g} % |"
                f" {' | '.join(f'{v:.3f}' for v in row.per_class_f1.values())} |"
                for row in per_class
            ),
            "",
            "![confusion matrices](confusion.png)",
            "",
            *(f"Warning: {_plain(line)}" for line in result.warnings),
        ]
    )


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: a class <left> would be taken for HTML and vanish."""
    return re.sub(r"[|<\\`*]", r"\\\g<0>", text)


def _in_words(result: Evaluation) -> list[str]:
    """An explanation of the protocol, unless its name says it all."""
    s = result.settings
    if result.protocol == "knn":
        return [
            "",
            f"A frame gets the class of the {s['neighbours']} training frames whose features are"
            f" nearest by cosine, each with the weight exp(cosine / {s['temperature']}).",
        ]
    if result.protocol == "finetune":
        return [
            "",
            f"Backbone and linear head learn for {s['steps']} steps of {s['batch_size']} frames at"
            " every share of the labels, from the run's weights or from random ones:"
            f" {s['num_trainings']} trainings.",
        ]
    return []


def draw(result: Evaluation, path: Path) -> None:
    """The confusion matrices of the two backbones at the largest share, side by side; of more than
    MOST_WRITTEN classes without numbers in the cells."""
    from matplotlib.figure import Figure

    backbones_rows = result.rows[:-1]  # the last is the majority class
    largest = max(row.percent for row in backbones_rows)
    shown = [row for row in backbones_rows if row.percent == largest]
    k = len(result.names)
    side = 0.8 * min(k, MOST_WRITTEN)  # inches: a matrix of 100 classes would take 8 GB to draw
    small = {"fontsize": min(10, 30 * side / k), "parse_math": False}  # no $ starts math mode
    names = [n if len(n) <= LONGEST else n[: LONGEST - 1] + "…" for n in result.names]
    # Inches that a name takes beside the matrix (in capitals), and turned by 45 degrees below it.
    beside = 0.01 * small["fontsize"] * max(map(len, names))
    width, height = max(2.2, 1 + beside), max(1.8, 1 + 0.71 * beside)
    figure = Figure(figsize=(2 * (width + side), height + side), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(shown)), shown, strict=True):
        counts = np.array(row.confusion)
        part = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(k, k) if k <= MOST_WRITTEN else ():
            axes.text(
                j, i, f"{100 * part[i, j]:.0f} %", ha="center", va="center",
                color="white" if part[i, j] > 0.5 else "black",
            )  # fmt: skip
        axes.set_xticks(range(k), names, rotation=45, ha="right", **small)
        sums = counts.sum(axis=1)
        axes.set_yticks(
            range(k),
            [f"{n}\n{s:,.0f} frames" for n, s in zip(names, sums, strict=True)],
            **small,
        )
        axes.set_xlabel("prediction")
        axes.set_ylabel("truth")
        axes.set_title(f"{row.backbone}, {largest:g} % of labels\nmacro-F1 {row.macro_f1:.3f}")
    with atomic_file(path) as f, warnings.catch_warnings():
        # A class named in a script that the font lacks has boxes here; the tables have its name.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(f, format="png", dpi=150)
