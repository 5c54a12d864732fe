"""The files to shard: videos, ultrasound DICOM files and, on demand, pictures."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sslus.engine import dicom, picture, video
from sslus.engine.dicom_header import is_dicom, is_ultrasound
from sslus.engine.errors import InputError
from sslus.engine.video import VideoInfo

# A file in a folder counts as a video if it has one of these extensions. A file named by the user
# is always tried.
EXTENSIONS = frozenset(
    ".264 .265 .3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2p .m2ts"
    " .m2v .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpe .mpeg .mpg .mts .mxf .nut .obu .ogm .ogv .qt .ts"
    " .vob .webm .wmv .y4m".split()
)
# Names under which find_videos counts what it leaves out.
FOLDER_LINKS = "links to folders"
FILE_LINKS = "further links to a file"
HIDDEN_FOLDERS = "hidden folders"
UNKNOWN = "unknown"
OTHER_DICOM = "DICOM without ultrasound"  # other modalities, reports, a DICOMDIR


@dataclass(frozen=True)
class Source:
    path: Path  # absolute
    name: str  # relative to the searched folder; the video's id is made from it


def find_videos(
    paths: Iterable[Path], skip: Path | None = None, pictures: bool = False
) -> tuple[list[Source], Counter]:
    """The videos under `paths` (files and folders, searched recursively), sorted by name.

    DICOM files count as videos if they hold ultrasound, or cannot be read and so may do, and with
    `pictures` pictures do. Returns the sources and a count, by extension or kind, of the files that
    were skipped. Links to folders are counted under FOLDER_LINKS but not followed, since they may
    lead in a circle or to a folder that is searched anyway; links in `paths` itself are followed. A
    file that links give several names is taken under the first; the others are counted under
    FILE_LINKS. Folders whose names begin with a dot (a trash, snapshots) are counted under
    HIDDEN_FOLDERS. `skip` is a folder that is not searched. Raises InputError if a path does not
    exist, if no video is found, or if two paths lead to different files of the same name, which
    would get the same id.
    """
    sources: dict[str, Source] = {}
    ignored: Counter = Counter()
    places: set[str] = set()
    seen: set[str] = set()

    def refuse(e: OSError) -> None:  # os.walk would silently skip the folder
        raise InputError(
            f"{e.filename}: the folder cannot be read ({e.strerror}); make it readable or move it"
        )

    def add(path: Path, name: str) -> None:
        if (place := os.path.normpath(path.absolute())) in places:  # a folder that was named twice
            return
        places.add(place)
        real = os.path.realpath(path)  # Path.resolve raises where a link leads to itself
        if real in seen:
            ignored[FILE_LINKS] += 1
            return
        seen.add(real)
        if name in sources:
            raise InputError(
                f"{path}: {sources[name].path} has the same name {name!r} in its folder;"
                " shard the folder that holds both instead"
            )
        sources[name] = Source(path.absolute(), name)

    paths = [Path(p) for p in paths]
    for root in paths:
        if root.is_file():
            add(root, root.name)
            continue
        if not root.is_dir():
            why = "not a regular file" if root.exists() else "no such file or folder"
            raise InputError(f"{root}: {why}")
        for folder, folders, files in os.walk(root, onerror=refuse):
            here = Path(folder)
            ignored[HIDDEN_FOLDERS] += sum(f.startswith(".") for f in folders)
            folders[:] = sorted(f for f in folders if f[0] != "." and (here / f).resolve() != skip)
            ignored[FOLDER_LINKS] += sum((here / f).is_symlink() for f in folders)
            for file in sorted(files):
                path = here / file
                if other := _other_kind(path, pictures):
                    ignored[other] += 1
                else:
                    add(path, path.relative_to(root).as_posix())
    if not sources:
        where = ", ".join(str(p) for p in paths)
        links, hidden = ignored.pop(FOLDER_LINKS, 0), ignored.pop(HIDDEN_FOLDERS, 0)
        seen_there = [f"{sum(ignored.values())} files of other kinds"] if ignored.total() else []
        seen_there += [f"{links} links to folders, not followed"] if links else []
        seen_there += [f"{hidden} hidden folders, not searched"] if hidden else []
        other = f" ({', '.join(seen_there)})" if seen_there else ""
        num = num_pictures(ignored)
        hint = f"add --images to take the {num} pictures" if num else "name a folder with videos"
        raise InputError(f"{where}: no video found{other}; {hint}")
    return [sources[name] for name in sorted(sources)], +ignored


def num_pictures(ignored: Counter) -> int:
    """How many of the files that find_videos left out are pictures."""
    return sum(ignored[kind] for kind in picture.EXTENSIONS)


def probe(path: Path) -> VideoInfo:
    """Read what a file says about itself. Raises VideoError if it cannot be decoded."""
    kind = dicom if is_dicom(path) else picture if picture.is_picture(path) else video
    return kind.probe(path)


def _is_text(path: Path) -> bool:
    """As TypeScript is, which shares its extension with MPEG-TS. No text holds a zero byte, and the
    start of an MPEG-TS holds many, even if it is cut off in front."""
    try:
        if not path.is_file():  # a pipe could block forever
            return False
        with path.open("rb") as f:
            head = f.read(1 << 16)
    except OSError:
        return False
    return head != b"" and b"\0" not in head


def _other_kind(path: Path, pictures: bool) -> str | None:
    """The kind of a file that is neither a video nor ultrasound, nor one of the `pictures`; else
    None."""
    suffix = path.suffix.lower()
    if not path.name.startswith("."):
        if suffix in EXTENSIONS and not (suffix == ".ts" and _is_text(path)):
            return None
        if pictures and suffix in picture.EXTENSIONS:
            return None
        if is_dicom(path):  # its name tells nothing: archives use UIDs, or no extension
            return OTHER_DICOM if is_ultrasound(path) is False else None
    elif suffix in picture.EXTENSIONS:  # hidden, as thumbnails are: none that is taken on demand
        return UNKNOWN
    # A name without an extension, or with a long one, may be that of a patient.
    return suffix if suffix[1:].isalnum() and len(suffix) < 6 else UNKNOWN
