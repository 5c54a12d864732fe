"""manifest.json: what a folder of shards holds. It is written last and so marks completion."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError

FORMAT = 1
NAME = "manifest.json"
REMEDY = "make the shards again: sslus shard --force"


@dataclass(frozen=True)
class Manifest:
    settings: dict  # how the frames were made: size, select, quality, ...
    num_videos: int
    num_frames: int
    mean: float  # of all pixels, 0 to 1
    std: float
    labels: list[str]  # names, sorted; empty without labels
    decoders: dict[str, int]  # number of videos by decoder
    shards: list[dict]  # {"name", "num_frames", "bytes", "sha256"}
    digest: str = ""  # of everything above

    def with_digest(self) -> "Manifest":
        content = {k: v for k, v in vars(self).items() if k != "digest"}
        text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
        return Manifest(**content, digest=hashlib.sha256(text.encode()).hexdigest())

    def write(self, folder: Path) -> None:
        with atomic_file(folder / NAME, "w") as f:
            json.dump({"format": FORMAT, **vars(self)}, f, indent=1)
            f.write("\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards. Raises InputError if it is missing or damaged."""
    folder = Path(folder)
    try:
        return parse_manifest((folder / NAME).read_bytes(), folder / NAME)
    except FileNotFoundError as e:
        why = "no finished shards here" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {why}; make them with `sslus shard VIDEOS`") from e


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """The manifest in the content of the file `path`. Raises InputError if it is damaged."""
    try:
        content = json.loads(text)
        version = content.pop("format")
        if version != FORMAT:
            raise InputError(
                f"{path}: made by another version of sslus (format {version}, this one reads"
                f" {FORMAT}); {REMEDY}"
            )
        manifest = Manifest(**content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: damaged ({e}); {REMEDY}") from e
    if manifest.with_digest().digest != manifest.digest:
        raise InputError(f"{path}: was changed after it was written; {REMEDY}")
    return manifest
