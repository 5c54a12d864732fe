"""labels.csv: which video shows what, in which patient."""

import csv
from dataclasses import dataclass
from pathlib import Path

from sslus.engine.errors import InputError


@dataclass(frozen=True)
class Label:
    path: Path  # of the video, absolute
    label: str
    patient: str
    split: str | None = None  # "train" or "test", where the file fixes the split


def read_labels(path: Path) -> list[Label]:
    """The rows of a CSV file with the columns `path,label,patient[,split]`.

    Paths are relative to the file's own folder. One row a video. Raises InputError, naming
    the line, for a missing column, an empty cell, a video named twice, a split that is
    neither train nor test or is given for some rows only, and a patient on both sides of it.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(
            f"labels {path}: cannot be read: {getattr(e, 'strerror', None) or e}"
        ) from e
    missing = [c for c in ("path", "label", "patient") if c not in columns]
    if missing:
        raise InputError(
            f"labels {path}: want the columns path,label,patient[,split],"
            f" got {','.join(columns) or 'an empty file'}"
        )
    if not rows:
        raise InputError(f"labels {path}: no rows under the header")
    labels, seen, side = [], {}, {}
    for line, row in enumerate(rows, start=2):
        where = f"labels {path}, line {line}"
        cells = {c: (row.get(c) or "").strip() for c in ("path", "label", "patient", "split")}
        for column in ("path", "label", "patient"):
            if not cells[column]:
                raise InputError(f"{where}: the {column} is empty")
        video = (path.parent / cells["path"]).resolve()
        if video in seen:
            raise InputError(f"{where}: {cells['path']} stands already in line {seen[video]}")
        seen[video] = line
        split = cells["split"] or None
        if split not in (None, "train", "test"):
            raise InputError(f"{where}: split must be train or test, got {split!r}")
        if split and side.setdefault(cells["patient"], split) != split:
            raise InputError(f"{where}: patient {cells['patient']} is in train and in test")
        labels.append(Label(video, cells["label"], cells["patient"], split))
    if len({x.split is None for x in labels}) == 2:
        raise InputError(f"labels {path}: split is given for some rows only; fill or drop it")
    return labels
