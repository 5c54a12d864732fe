"""labels.csv: which video shows what, in which patient."""

import csv
import json
import os
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sslus.engine.errors import InputError, naming
from sslus.engine.manifest import REMEDY

COLUMNS = ("path", "label", "patient", "split")
SPLITS = {  # as they may be written, in capitals too
    "train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip


@dataclass(frozen=True)
class Label:
    path: Path  # of the video, absolute
    label: str
    patient: str
    split: str | None = None  # "train", "test" or "val", where the file fixes the split

    @property
    def held_out(self) -> bool:
        """Whether nothing may learn the label: that of a video to test on, or to choose by."""
        return self.split in ("test", "val")


def read_labels(path: Path) -> list[Label]:
    """Read a CSV file with the columns `path,label,patient[,split]`.

    The file is UTF-8, with one row per video; other columns are ignored. Paths are relative to
    the folder of the file. Raises InputError, naming the line, for a missing or repeated column, a
    row with more or fewer cells than the header, an empty cell or one with a line break, a video
    listed twice, a split that is not one of SPLITS or is given for some rows only, and a patient
    in two parts of the split.
    """
    path = Path(path)
    (_, columns), *rows = _lines(path) or [(1, [])]
    wrong = [c for c in COLUMNS if columns.count(c) > 1 or (c not in columns and c != "split")]
    if wrong:
        got, hint = ",".join(columns), ""
        if ";" in got or "\t" in got:  # as spreadsheets in some languages write it
            hint = "; put commas between the cells"
        elif got and not {*wrong} & {*columns}:
            hint = "; rename yours, other columns may stay"
        raise InputError(
            f"labels {path}: want the columns path,label,patient[,split], each once,"
            f" got {got or 'an empty file'}{hint}"
        )
    if not rows:
        raise InputError(f"labels {path}: no rows under the header")
    labels, seen, side = [], {}, {}
    for line, row in rows:
        where = f"labels {path}, line {line}"
        # An unquoted comma shifts the cells after it: part of the label would become the patient.
        if len(row) != len(columns):
            raise InputError(
                f"{where}: want {len(columns)} cells like the header, got {len(row)}; put cells"
                " that contain a comma in double quotes"
            )
        cells = {"split": ""} | dict(zip(columns, row, strict=True))
        # Unicode has two ways to write é: José would be two patients, one on each side of a split.
        cells |= {c: unicodedata.normalize("NFC", cells[c]) for c in ("label", "patient")}
        for column in COLUMNS:
            if not cells[column] and column != "split":
                raise InputError(f"{where}: the {column} is empty")
            # Unmatched quotes merge two rows into one, and two patients into one.
            if any(c in cells[column] for c in "\n\r"):
                raise InputError(f"{where}: the {column} has a line break; are the quotes closed?")
        video = real(path.parent / cells["path"])
        # As `as_known` finds it: two spellings would be one video with the last row's patient.
        if (name := unicodedata.normalize("NFC", str(video))) in seen:
            raise InputError(f"{where}: {cells['path']} is already in line {seen[name]}")
        seen[name] = line
        split = SPLITS.get(cells["split"].lower())
        if cells["split"] and not split:
            raise InputError(
                f"{where}: split must be one of {', '.join(SPLITS)}, got {cells['split']!r}"
            )
        if split and (other := side.setdefault(cells["patient"], split)) != split:
            raise InputError(f"{where}: patient {cells['patient']} is in both {other} and {split}")
        labels.append(Label(video, cells["label"], cells["patient"], split))
    if len({x.split is None for x in labels}) == 2:
        raise InputError(
            f"labels {path}: split is given for some rows only; fill in all or drop it"
        )
    return labels


def labelled_videos(labels: Path, shards: Path) -> tuple[dict[str, Label], bool]:
    """The rows of labels.csv by the ids of their videos in the shards, looked up in local/.

    Videos that were all moved together are found by their position relative to labels.csv; the
    second value says whether they were. Raises InputError for rows without a video in the shards,
    and for a video whose file size has changed.
    """
    local, rows = shards / "local", read_labels(labels)
    ids = _ids(local / "ledger.jsonl")
    places = as_known([row.path for row in rows], ids)
    before = [] if any(place in ids for place in places) else _moved(places, labels, ids)
    found = before or places
    unknown = [place for place in found if place not in ids]
    if unknown:
        raise InputError(
            f"labels {labels}: {len(unknown)} of {len(rows)} videos are not in {shards}, the"
            f" first: {unknown[0]}; shard them too, or remove their rows. If they were moved,"
            " run the command that made the shards on their new folder, which records it"
        )
    # Another file may have taken a name since; what counts is what the shards hold.
    sizes = _sizes(local / "request.json")
    for path, was in zip(places, found, strict=True):
        size = sizes.get(ids[was])
        if size is not None and path.is_file() and path.stat().st_size != size:
            raise InputError(
                f"labels {labels}: {path} has another size than the file in {shards};"
                " are these the labels of those shards?"
            )
    return {ids[place]: row for row, place in zip(rows, found, strict=True)}, bool(before)


def real(path: Path | str) -> Path:
    """Path.resolve(), which raises where a link leads to itself: nobody's video, but no more."""
    return Path(os.path.realpath(path))


def as_known(paths: list[Path], known: Collection[Path]) -> list[Path]:
    """Each path as spelled in `known`: Unicode has two ways to write é, and the cells of labels.csv
    were stripped of spaces that a name may begin or end with.

    Raises InputError where spaces alone would tell which of two is meant.
    """

    def form(path: Path) -> str:
        return unicodedata.normalize("NFC", str(path))

    def bare(path: Path) -> tuple[str, ...]:
        return tuple(part.strip() for part in Path(form(path)).parts)

    spellings = {}
    for path in known:
        spellings.setdefault(bare(path), {})[form(path)] = path
    found = []
    for path in paths:
        same = list(spellings.get(bare(path), {}).values())
        if len(same) > 1:
            raise InputError(
                f"{str(same[0])!r} and {str(same[1])!r}: only spaces tell them apart, which"
                " labels.csv does not keep; rename one"
            )
        found.append(path if path in known or not same else same[0])
    return found


def files_of(shards: Path) -> dict[str, str]:
    """Where each video was when it was sharded, by its id. Raises InputError without local/."""
    return {key: str(path) for path, key in _ids(Path(shards) / "local" / "ledger.jsonl").items()}


def _ids(path: Path) -> dict[Path, str]:
    """The ids of the videos by where they were when sharded, from the ledger."""
    try:
        with naming(path):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {real(line["source"]): line["id"] for line in lines}
    except FileNotFoundError as e:
        raise InputError(
            f"{path}: is missing, and only this file tells which video a frame comes from;"
            " copy the local/ folder to the shards, or make the shards again here"
        ) from e
    except (ValueError, TypeError, KeyError) as e:
        why = f"a line has no {e}" if isinstance(e, KeyError) else e
        raise InputError(f"{path}: damaged ({why}); {REMEDY}") from e


def _moved(places: list[Path], labels: Path, ids: dict[Path, str]) -> list[Path]:
    """Where the videos were, if all lay below one folder as they do below `labels` now; else []."""
    below = [Path(os.path.relpath(place, Path(labels).parent.resolve())) for place in places]
    num = len(below[0].parts)
    before = {Path(*source.parts[:-num]) for source in ids if source.parts[-num:] == below[0].parts}
    found = [[root / path for path in below] for root in before]
    found = [were for were in found if all(place in ids for place in were)]
    return found[0] if len(found) == 1 else []


def _sizes(path: Path) -> dict[str, int]:
    """File sizes in bytes, by id, when the videos were sharded; {} if unknown."""
    try:
        sources = json.loads(path.read_text())["sources"]
        return {video_id: size for video_id, size, _ in sources.values()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(number of the last line, stripped cells) of each non-empty row, header first."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            # An unclosed quote is an error. Unless the space is skipped, the quotes of `a, "left"`
            # are part of the label.
            reader = csv.reader(f, strict=True, skipinitialspace=True)
            try:
                for row in reader:
                    if any("\0" in cell for cell in row):  # UTF-16 without a mark at its start
                        raise InputError(
                            f"labels {path}, line {reader.line_num}: has a NUL character, so it is"
                            " no UTF-8 text; save it as UTF-8"
                        )
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
