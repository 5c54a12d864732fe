"""A backbone's features of every video or frame, as a table for other programs."""

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sslus.engine.atomic import atomic_file
from sslus.engine.labels import files_of
from sslus.engine.store import FrameStore
from sslus.ssl.features import Pictures, Stage, build, computed
from sslus.ssl.runs import check, check_table
from sslus.ssl.world import pick_device


@dataclass(frozen=True)
class Table:
    """What was written."""

    path: Path
    per: str
    num_rows: int
    num_frames: int
    num_features: int


def write_features(
    run: Path,
    out: Path | None = None,
    *,
    shards: str | Path | None = None,
    per: str = "video",
    names: bool = False,
    device: str = "auto",
    threads: int | None = None,
    stage: Stage | None = None,
) -> Table:
    """Write what the backbone of `run` makes of whole frames at the run's image size.

    A row is a video, with the mean of its frames' features, or with `per` "frame" a frame. Columns:
    `video` (its id); with `names`, `path` (where it was when it was sharded: this needs the local/
    folder of the shards); `num_frames`, or `frame` and `time_seconds` (since the first frame); if
    the shards have labels, `label` and `patient` (a number; -1 if unknown); the features f0, ...
    out: a .csv, or a .npz with an array for each column and `features` (rows, F) float32; default:
    features.csv in the run. shards: by default those the run was trained on.

    Raises InputError for a run, shards or a file that cannot be used.
    """
    run = Path(run)
    out = Path(out or run / "features.csv")
    check_table(out, per)
    source, folder = check(run, shards)
    if threads:
        torch.set_num_threads(threads)
    files, where = files_of(folder) if names else None, pick_device(device)
    stage = stage or (lambda label, unit: contextlib.nullcontext(lambda *a: None))
    with stage("frame store", "frames") as report:
        store = FrameStore.open(folder, threads=threads, report=report)
    pictures = Pictures.of(source, store, where)
    backbone = build(source, source.config["settings"]["method"])
    row = store.video if per == "video" else np.arange(len(store))
    _, first, num_frames = np.unique(row, return_index=True, return_counts=True)
    position = np.searchsorted(row[first], row)  # a video without a frame has no row
    features, done = None, 0
    with stage("features", "frames") as report:
        for part in computed(backbone, pictures, np.arange(len(store))):
            if features is None:  # those of a video are added up in float64
                kind = np.float64 if per == "video" else np.float32
                features = np.zeros((len(first), part.shape[1]), kind)
            np.add.at(features, position[done : done + len(part)], part)
            done += len(part)
            report(done, len(store), "")
    features = (features / num_frames[:, None]).astype(np.float32)
    ids = np.array(store.video_ids)[store.video[first]]
    columns = {"video": ids}
    if files is not None:
        columns["path"] = np.array([files.get(video, "") for video in ids.tolist()])
    if per == "video":
        columns["num_frames"] = num_frames
    else:
        columns |= {"frame": store.frame, "time_seconds": store.time_seconds}
    if store.label_names:
        classes = np.array([*store.label_names, ""])  # -1: no label
        columns |= {"label": classes[store.label[first]], "patient": store.patient[first]}
    if out.suffix == ".npz":
        with atomic_file(out) as f:
            np.savez(f, **columns, features=features)
    else:
        with atomic_file(out, "w") as f:
            _write_csv(f, columns, features)
    return Table(out, per, len(features), len(store), features.shape[1])


def _write_csv(f, columns: dict[str, np.ndarray], features: np.ndarray) -> None:
    table = csv.writer(f, lineterminator="\n")
    table.writerow([*columns, *(f"f{i}" for i in range(features.shape[1]))])
    for *cells, numbers in zip(*(c.tolist() for c in columns.values()), features, strict=True):
        table.writerow([*cells, *(f"{x:.9g}" for x in numbers.tolist())])  # float32, exactly
