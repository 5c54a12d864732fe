"""labels.csv: which video shows what, in which patient."""

import csv
from dataclasses import dataclass
from pathlib import Path

from sslus.engine.errors import InputError

COLUMNS = ("path", "label", "patient", "split")


@dataclass(frozen=True)
class Label:
    path: Path  # of the video, absolute
    label: str
    patient: str
    split: str | None = None  # "train" or "test", where the file fixes the split


def read_labels(path: Path) -> list[Label]:
    """The rows of a CSV file with the columns `path,label,patient[,split]`.

    UTF-8; further columns are ignored. Paths are relative to the file's own folder. One row a
    video. Raises InputError, naming the line, for a column that is missing or there twice, a row
    of more or fewer cells than the header, an empty cell or one with a line break, a video named
    twice, a split that is neither train nor test or is given for some rows only, and a patient on
    both sides of it.
    """
    path = Path(path)
    (_, columns), *rows = _lines(path) or [(1, [])]
    wrong = [c for c in COLUMNS if columns.count(c) > 1 or (c not in columns and c != "split")]
    if wrong:
        raise InputError(
            f"labels {path}: want the columns path,label,patient[,split], each once,"
            f" got {','.join(columns) or 'an empty file'}"
        )
    if not rows:
        raise InputError(f"labels {path}: no rows under the header")
    labels, seen, side = [], {}, {}
    for line, row in rows:
        where = f"labels {path}, line {line}"
        # A comma without quotes moves all that follows: a part of the label would be the patient.
        if len(row) != len(columns):
            raise InputError(
                f"{where}: want {len(columns)} cells like the header, got {len(row)}; put a cell"
                " with a comma in double quotes"
            )
        cells = {"split": ""} | dict(zip(columns, row, strict=True))
        for column in COLUMNS:
            if not cells[column] and column != "split":
                raise InputError(f"{where}: the {column} is empty")
            # Quotes that do not match make one row of two, and one patient of two.
            if any(c in cells[column] for c in "\n\r\0"):
                raise InputError(f"{where}: the {column} has a line break; are the quotes closed?")
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


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(number of its last line, stripped cells) of each row that is not empty, header first."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, strict=True)  # a quote that is never closed is an error
            try:
                for row in reader:
                    cells = [cell.strip() for cell in row]
                    if any(cells):
                        rows.append((reader.line_num, cells))
            except csv.Error as e:
                raise InputError(
                    f"labels {path}, line {reader.line_num}: {e}; are the quotes closed?"
                ) from e
    except UnicodeDecodeError as e:
        raise InputError(f"labels {path}: is not UTF-8 ({e.reason}); save it as UTF-8") from e
    except OSError as e:
        raise InputError(f"labels {path}: cannot be read: {e.strerror or e}") from e
    return rows
