"""Which frames are evaluated, and on which side of the split their patients are."""

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from sslus.engine.errors import InputError
from sslus.engine.labels import labelled_videos
from sslus.engine.store import FrameStore

NUM_FOLDS = 5  # fewer if a class has fewer patients
NUM_DEALS = 100  # attempts, at most: twenty classes of two patients each can need that many


@dataclass(frozen=True)
class LabelledFrames:
    """The frames of the labelled videos; the arrays have one entry per frame."""

    index: np.ndarray  # into the frame store
    y: np.ndarray  # index into names
    video: np.ndarray  # index into the store's video_ids
    patient: np.ndarray  # index into the sorted patients of labels.csv
    test: np.ndarray | None  # bool: the split given by labels.csv
    names: list[str]
    num_unlabelled: int  # videos in the shards that are not in labels.csv
    num_without_frames: int  # videos in labels.csv that gave no frame when sharded
    moved: bool = False  # the videos are not where they were when sharded
    num_val: int = 0  # videos in labels.csv that are neither trained nor tested on

    def __len__(self) -> int:
        return len(self.index)


def label_frames(store: FrameStore, shards: Path, labels: Path) -> LabelledFrames:
    """Join labels.csv to the store's frames by source file, through the shards' ledger.

    Videos whose split is val are left out: nothing is chosen by them here.
    """
    rows, moved = labelled_videos(labels, shards)
    fixed = any(row.split for row in rows.values())
    names = sorted({row.label for row in rows.values()})
    patients = sorted({row.patient for row in rows.values()})
    class_of, number_of = ({x: i for i, x in enumerate(each)} for each in (names, patients))
    place = {video_id: i for i, video_id in enumerate(store.video_ids)}
    of_video = {place[video]: row for video, row in rows.items() if video in place}
    used = [video for video, row in of_video.items() if row.split != "val"]
    index = np.flatnonzero(np.isin(store.video, used))
    video = store.video[index]

    def column(value: Callable) -> np.ndarray:
        table = np.zeros(len(store.video_ids), np.int64)
        for v, row in of_video.items():
            table[v] = value(row)
        return table[video]

    return LabelledFrames(
        index=index,
        y=column(lambda row: class_of[row.label]),
        video=video,
        patient=column(lambda row: number_of[row.patient]),
        test=column(lambda row: row.split == "test").astype(bool) if fixed else None,
        names=names,
        num_unlabelled=len(store.video_ids) - len(of_video),
        num_without_frames=len(rows) - len(of_video),
        moved=moved,
        num_val=sum(row.split == "val" for row in rows.values()),
    )


def copies(store: FrameStore, frames: LabelledFrames) -> list[list[str]]:
    """Videos that are the same but belong to several patients: their ids, a list for each video.

    Of such patients, some may be trained on and others tested. Videos count as the same if their
    middle frames are, pixel for pixel, and are not of one grey level: copies and remuxed copies
    are found, recompressed or cut ones are not.
    """
    found: dict[bytes, list[int]] = {}
    _, starts, lengths = np.unique(frames.video, return_index=True, return_counts=True)
    for first, num in zip(starts.tolist(), lengths.tolist(), strict=True):
        picture = store.frames[frames.index[first + num // 2]]
        if picture.min() < picture.max():
            found.setdefault(hashlib.sha256(picture).digest(), []).append(first)
    return [
        [store.video_ids[video] for video in frames.video[same]]
        for same in found.values()
        if len(np.unique(frames.patient[same])) > 1
    ]


def testable(frames: LabelledFrames) -> tuple[LabelledFrames, list[str]]:
    """The frames of the classes that can have patients on both sides of a split, and warnings.

    Without a fixed split, a class needs two patients for that. Raises InputError if fewer than
    two classes remain, or if a fixed split leaves one side empty.
    """
    if frames.test is not None and len({*frames.test.tolist()}) == 1:
        side, other = ("test", "train") if frames.test.all() else ("train", "test")
        but = " but those of val" if frames.num_val else ""
        raise InputError(
            f"labels: the split is {side} for all videos{but}; want some for {other} too"
        )
    kept, notes = [], []
    for c, name in enumerate(frames.names):
        of_class = frames.y == c
        if frames.test is not None:
            fits = (of_class & frames.test).any() and (of_class & ~frames.test).any()
            why = "it is not on both sides of the split"
        else:
            num_patients = len(np.unique(frames.patient[of_class]))
            fits = num_patients >= 2
            why = f"it has {num_patients} patient, and each side of a split needs one"
        if fits:
            kept.append(c)
        else:
            notes.append(f"class {name!r} is left out: {why}")
    if len(kept) < 2:
        each = "two patients each" if frames.test is None else "videos on both sides of the split"
        raise InputError(
            f"labels: want at least two classes with {each}, got {len(kept)} of"
            f" {len(frames.names)}; " + ("; ".join(notes) or "all videos have one label")
        )
    keep = np.isin(frames.y, kept)
    return dataclasses.replace(
        frames,
        index=frames.index[keep],
        y=np.searchsorted(kept, frames.y[keep]),
        video=frames.video[keep],
        patient=frames.patient[keep],
        test=None if frames.test is None else frames.test[keep],
        names=[frames.names[c] for c in kept],
    ), notes


def num_folds(frames: LabelledFrames) -> int:
    """As many as the rarest class has patients, at most NUM_FOLDS."""
    return min(
        NUM_FOLDS,
        *(len(np.unique(frames.patient[frames.y == c])) for c in range(len(frames.names))),
    )


def folds(frames: LabelledFrames, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) positions, (n,) int64 each; every patient is on one side only.

    Without a fixed split, the patients of each class are dealt to the folds in random order, the
    rarest class first. If patients have several classes, all patients of a class may end up in one
    fold, so that none is left to train on: of NUM_DEALS deals, the first without such a class is
    used, or the one with the fewest. (scikit-learn's StratifiedGroupKFold loses classes more
    often, and sorts patients by size, so that its seed hardly changes the folds.)
    """
    if frames.test is not None:
        pairs = [(np.flatnonzero(~frames.test), np.flatnonzero(frames.test))]
    else:
        fold = _deal(frames, num_folds(frames), seed)[frames.patient]
        pairs = [
            (np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(fold.max() + 1)
        ]
    for train, test in pairs:
        assert not np.intersect1d(frames.patient[train], frames.patient[test]).size
    return pairs


def _deal(frames: LabelledFrames, k: int, seed: int) -> np.ndarray:
    """The fold of each patient, (highest patient + 1,) int64; -1 for those without frames."""
    rng = np.random.default_rng(seed)
    of_class = [np.unique(frames.patient[frames.y == c]) for c in range(len(frames.names))]
    best, fewest = None, math.inf
    for _ in range(NUM_DEALS):
        fold = _deal_once(of_class, k, rng)
        num_lost = sum(len(np.unique(fold[patients])) == 1 for patients in of_class)
        if num_lost < fewest:
            best, fewest = fold, num_lost
        if num_lost == 0:
            break
    return best


def _deal_once(of_class: list[np.ndarray], k: int, rng: np.random.Generator) -> np.ndarray:
    fold = np.full(max(patients.max() for patients in of_class) + 1, -1)
    of_all = np.zeros(k, np.int64)
    for patients in sorted(of_class, key=len):
        dealt = fold[patients] >= 0
        of_this = np.bincount(fold[patients[dealt]], minlength=k)
        for patient in rng.permutation(patients[~dealt]):
            # The fold with the fewest patients of this class, then with the fewest patients.
            chosen = np.lexsort((rng.random(k), of_all, of_this))[0]
            fold[patient] = chosen
            of_this[chosen] += 1
            of_all[chosen] += 1
    return fold


def share(frames: LabelledFrames, train: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """The part of `train` whose labels a share of `percent` keeps; see `evaluate`."""
    rng = np.random.default_rng([seed, len(train)])
    order = rng.permutation(np.unique(frames.patient[train])).tolist()
    all_videos, first = np.unique(frames.video[train], return_index=True)
    whose = defaultdict(list)  # the videos of a class and patient, in ascending order
    facts = (all_videos, frames.y[train[first]], frames.patient[train[first]])
    for video, c, patient in zip(*(x.tolist() for x in facts), strict=True):
        whose[c, patient].append(video)
    kept = []
    for c in range(len(frames.names)):
        videos = []
        for patient in order:
            videos.extend(rng.permutation(whose.get((c, patient), [])).tolist())
        # Exact fractions: as floats, 7 % of 100 is a little more than 7, and 8 would be kept.
        kept.extend(videos[: math.ceil(Fraction(str(percent)) * len(videos) / 100)])
    return train[np.isin(frames.video[train], kept)]
