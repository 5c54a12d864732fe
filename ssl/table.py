"""A backbone's features of every video or frame, as a table for other programs."""

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.engine.labels import files_of
from sslus.engine.store import FrameStore
from sslus.ssl.features import FEATURE_BATCH, Pictures, Stage, build
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
    shards: Path | None = None,
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
    the shards have labels, `label` and `patient` (a number); and the features f0, f1, ...
    out: a .csv, or a .npz with an array for each column and `features` (rows, F) float32; default:
    features.csv in the run. shards: by default those the run was trained on.

    Raises InputError for a run, shards or a file that cannot be used.
    """
    run = Path(run)
    out = Path(out or run / "features.csv")
    check_table(out, per)
    source, folder = check(run, shards, (100,), 1)
    if threads:
        torch.set_num_threads(threads)
    files = files_of(folder) if names else None
    stage = stage or (lambda label, unit: contextlib.nullcontext(lambda *a: None))
    store, where = FrameStore.open(folder, threads=threads), pick_device(device)
    backbone = build(source, source.config["settings"]["method"])
    backbone.eval().to(where, memory_format=torch.channels_last)
    row = store.video if per == "video" else np.arange(len(store))
    _, first, num_frames = np.unique(row, return_index=True, return_counts=True)
    position = np.searchsorted(row[first], row)  # a video without a frame has no row
    features = None
    pictures = Pictures.of(source, store, where)
    with stage("features", "frames") as report, torch.inference_mode():
        for start in range(0, len(store), FEATURE_BATCH):
            index = np.arange(start, min(start + FEATURE_BATCH, len(store)))
            found = backbone(pictures(index)).float().cpu().numpy()
            if features is None:  # of a video, added up in float64
                kind = np.float64 if per == "video" else np.float32
                features = np.zeros((len(first), found.shape[1]), kind)
            np.add.at(features, position[index], found)
            report(int(index[-1]) + 1, len(store), "")
    features = (features / num_frames[:, None]).astype(np.float32)
    if not np.isfinite(features).all():
        raise InputError("the backbone's features are not finite; train it again")
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
