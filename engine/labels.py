"""labels.csv: which video shows what, in which patient."""

import csv
import json
import os
import unicodedata
from collections.abc import Collection
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


def labelled_videos(labels: Path, shards: Path) -> tuple[dict[str, Label], bool]:
    """The rows of labels.csv by the ids that their videos have in the shards, through local/.

    Videos that were moved all together are found by where they lie below labels.csv; the second
    value says that they were. Raises InputError for rows without a video in the shards, and for a
    video of another size than it had.
    """
    local, rows = shards / "local", read_labels(labels)
    ids = {Path(line["source"]).resolve(): line["id"] for line in _ledger(local / "ledger.jsonl")}
    places = as_known([row.path for row in rows], ids)
    before = [] if any(place in ids for place in places) else _moved(places, labels, ids)
    found = before or places
    unknown = [place for place in found if place not in ids]
    if unknown:
        raise InputError(
            f"labels {labels}: {len(unknown)} of {len(rows)} videos are not in {shards}, the"
            f" first: {unknown[0]}; shard them too, or take out their rows. If they were moved,"
            " the command that made the shards, on their new folder, takes down where they are"
        )
    # Names may be given to other files; training has seen what the shards hold.
    sizes = _sizes(local / "request.json")
    for path, was in zip(places, found, strict=True):
        size = sizes.get(ids[was])
        if size is not None and path.is_file() and path.stat().st_size != size:
            raise InputError(
                f"labels {labels}: {path} is another file than the one in {shards}, by its size;"
                " are these the labels of those shards?"
            )
    return {ids[place]: row for row, place in zip(rows, found, strict=True)}, bool(before)


def as_known(paths: list[Path], known: Collection[Path]) -> list[Path]:
    """Each path as it is in `known`, if only accents differ: Unicode writes é in two ways."""

    def form(path: Path) -> str:
        return unicodedata.normalize("NFC", str(path))

    forms = {form(path): path for path in known}
    return [path if path in known else forms.get(form(path), path) for path in paths]


def _ledger(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError as e:
        raise InputError(
            f"{path}: is missing, and only it says which video a frame is from; copy the"
            " local/ folder beside the shards, or make the shards again here"
        ) from e
    except ValueError as e:
        raise InputError(
            f"{path}: damaged ({e}); make the shards again: sslus shard --force"
        ) from e


def _moved(places: list[Path], labels: Path, ids: dict[Path, str]) -> list[Path]:
    """Where the videos were, if one folder had all of them as that of `labels` has now; else []."""
    below = [Path(os.path.relpath(place, Path(labels).parent.resolve())) for place in places]
    num = len(below[0].parts)
    before = {Path(*source.parts[:-num]) for source in ids if source.parts[-num:] == below[0].parts}
    found = [[root / path for path in below] for root in before]
    found = [were for were in found if all(place in ids for place in were)]
    return found[0] if len(found) == 1 else []


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each video by its id, when it was sharded; {} where that is not known."""
    try:
        sources = json.loads(path.read_text())["sources"]
        return {video_id: size for video_id, size, _ in sources.values()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
