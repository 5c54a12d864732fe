"""What was predicted for the tested frames and videos, how good it is, and where it is written."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sslus.engine.atomic import atomic_file
from sslus.ssl.splits import LabelledFrames


class Guess(NamedTuple):
    """What a fit says about T frames."""

    y: np.ndarray  # (T,) int64, the predicted classes
    probability: np.ndarray  # (T, classes) float64; 0 for a class that was not learned from


@dataclass(frozen=True)
class Videos:
    """What a backbone, at one share of the labels and one seed, says about the tested videos."""

    backbone: str
    percent: float
    seed: int
    video: np.ndarray  # (V,) index into the store's video_ids
    y: np.ndarray  # (V,) the true classes
    num_frames: np.ndarray  # (V,)
    probability: np.ndarray  # (V, classes) float64: the mean over the video's frames

    @property
    def guess(self) -> np.ndarray:
        """(V,) int64: the class with the highest mean probability; of equal ones, the first."""
        return self.probability.argmax(1)


def of_videos(
    backbone: str,
    percent: float,
    seed: int,
    frames: LabelledFrames,
    test: np.ndarray,
    probability: np.ndarray,
) -> Videos:
    """Average over the frames of each video; test: (T,) positions in `frames`, whole videos."""
    video, first, place, num_frames = np.unique(
        frames.video[test], return_index=True, return_inverse=True, return_counts=True
    )
    total = np.zeros((len(video), probability.shape[1]))
    np.add.at(total, place, probability)
    y = frames.y[test[first]]
    return Videos(backbone, percent, seed, video, y, num_frames, total / num_frames[:, None])


def auroc(y: np.ndarray, probability: np.ndarray) -> float:
    """Area under the ROC curve of each class against all others, averaged over the classes that
    have both positives and negatives in `y`; there must be one.

    y: (T,) int64; probability: (T, classes). 0.5 for probabilities that do not depend on the item.
    """
    from sklearn.metrics import roc_auc_score

    defined = [c for c in range(probability.shape[1]) if 0 < np.sum(y == c) < len(y)]
    return float(np.mean([roc_auc_score(y == c, probability[:, c]) for c in defined]))


def write(path: Path, parts: Iterable[Videos], ids: list[str], names: list[str]) -> None:
    """A CSV file with a line for each video of each part; ids: the store's, names: the classes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["backbone", "percent", "seed", "video", "label", "predicted", "num_frames"]
        + [f"probability_{name}" for name in names]
    )
    for part in parts:
        for video, y, guess, num_frames, probability in zip(
            part.video, part.y, part.guess, part.num_frames, part.probability, strict=True
        ):
            writer.writerow(
                [part.backbone, f"{part.percent:g}", part.seed]
                + [ids[video], names[y], names[guess], num_frames, *probability.tolist()]
            )
    with atomic_file(path, "w") as f:
        f.write(text.getvalue())
