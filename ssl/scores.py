"""From the predictions for each fold to the rows of the table."""

from dataclasses import dataclass

import numpy as np

from sslus.ssl.predictions import Guess, Videos, auroc, of_videos
from sslus.ssl.report import Row
from sslus.ssl.splits import LabelledFrames

MAJORITY = "majority class"


@dataclass(frozen=True)
class Task:
    """What one fit is trained and tested on, as positions in LabelledFrames."""

    backbone: str
    percent: float
    seed: int
    train: np.ndarray  # (n,) int64, a share of the training part
    test: np.ndarray  # (T,) int64


def confusion_matrix(y: np.ndarray, guess: np.ndarray, num_classes: int) -> np.ndarray:
    """(classes, classes) int64 counts; rows: truth, columns: prediction."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (y, guess), 1)
    return confusion


def scores(confusion: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Macro-F1, balanced accuracy and per-class F1 of a confusion matrix (truth, prediction)."""
    hit, truth, guess = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * hit / np.maximum(truth + guess, 1)
    return float(f1.mean()), float((hit / np.maximum(truth, 1)).mean()), f1


def rows(
    frames: LabelledFrames, tasks: list[Task], guesses: list[Guess], deals
) -> tuple[list[Row], list[Videos]]:
    """The table: folds of a seed pooled, grouped by backbone, the majority class last. And what
    the backbones predicted for each video."""
    num_classes, num_seeds = len(frames.names), len(deals)
    cells: dict[tuple[str, float], list] = {}
    for t, guess in zip(tasks, guesses, strict=True):
        cells.setdefault((t.backbone, t.percent), []).append((t, guess))
    cells[MAJORITY, 100.0] = []
    for seed, pairs in enumerate(deals):
        for train, test in pairs:
            # One class for all folds: a fold's majority in training is rare in its test part.
            seen = train if frames.test is not None else slice(None)
            guess = np.full(len(test), np.bincount(frames.y[seen]).argmax())
            task = Task(MAJORITY, 100.0, seed, train, test)
            cells[MAJORITY, 100.0].append((task, Guess(guess, np.eye(num_classes)[guess])))
    tested = np.concatenate([test for _, test in deals[0]])
    table, all_videos = [], []
    for (name, p), found in cells.items():
        row, videos = _row(name, p, found, frames, tested, num_seeds)
        table.append(row)
        if name != MAJORITY:
            all_videos += videos
    return table, all_videos


def _row(
    name: str,
    percent: float,
    found: list[tuple[Task, Guess]],
    frames: LabelledFrames,
    tested: np.ndarray,
    num_seeds: int,
) -> tuple[Row, list[Videos]]:
    """A line of the table from the fits of all folds and seeds, and the videos of each seed."""
    num_classes = len(frames.names)
    used = [[len(np.unique(a[t.train])) for a in (frames.video, frames.patient)] for t, _ in found]
    num_train_videos, num_train_patients = np.mean(used, axis=0).tolist()
    confusions, per_class, of_seeds, all_videos = [], [], [], []
    for seed in range(1 if _is_one_fit(found) else num_seeds):
        mine = [(t, guess) for t, guess in found if t.seed == seed]
        test = np.concatenate([t.test for t, _ in mine])
        guess = Guess(*map(np.concatenate, zip(*(guess for _, guess in mine), strict=True)))
        y, videos = frames.y[test], of_videos(name, percent, seed, frames, test, guess.probability)
        all_videos.append(videos)
        confusions.append(confusion_matrix(y, guess.y, num_classes))
        f1, accuracy, f1_of_classes = scores(confusions[-1])
        per_class.append(f1_of_classes)
        f1_of_videos, *_ = scores(confusion_matrix(videos.y, videos.guess, num_classes))
        of_seeds.append(
            {
                "macro_f1": f1,
                "macro_f1_per_video": f1_of_videos,
                "balanced_accuracy": accuracy,
                "auroc": auroc(y, guess.probability),
                "auroc_per_video": auroc(videos.y, videos.probability),
            }
        )
    values = {key: [each[key] for each in of_seeds] for key in of_seeds[0]}
    count = len(of_seeds)
    row = Row(
        backbone=name,
        percent=percent,
        **{key: float(np.mean(v)) for key, v in values.items()},
        **{
            f"{key}_std": float(np.std(v, ddof=1)) if count > 1 else None
            for key, v in values.items()
        },
        num_seeds=count,
        num_train_videos=num_train_videos,
        num_train_patients=num_train_patients,
        num_test_frames=len(tested),
        num_test_videos=len(np.unique(frames.video[tested])),
        num_test_patients=len(np.unique(frames.patient[tested])),
        per_class_f1=dict(zip(frames.names, np.mean(per_class, axis=0).tolist(), strict=True)),
        confusion=np.mean(confusions, axis=0).tolist(),
        macro_f1_of_seeds=values["macro_f1"],
    )
    return row, all_videos


def _is_one_fit(found: list[tuple[Task, Guess]]) -> bool:
    """Whether every seed's (task, guess) are the same, in whatever order of its folds: with a fixed
    split and all labels, or with so few patients that there is one way to deal them. Then seeds
    are repetitions, which say nothing about the spread."""
    seeds: dict[int, list] = {}
    for t, guess in sorted(found, key=lambda each: each[0].test[0]):
        seeds.setdefault(t.seed, []).append((t, guess))
    first, *others = seeds.values()
    return all(
        np.array_equal(t.train, u.train) and np.array_equal(t.test, u.test)
        and np.array_equal(g.y, h.y) and np.allclose(g.probability, h.probability)
        for other in others
        for (t, g), (u, h) in zip(first, other, strict=True)
    )  # fmt: skip
