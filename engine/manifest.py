"""manifest.json: what a folder of shards holds. It is written last and so marks completion."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError, naming

FORMAT = 1
NAME = "manifest.json"
MOST_FRAMES = 2**40  # 72 PB of 256 x 256: a sample's id has no more bits for its number
REMEDY = (
    "make the shards again: sslus shard --force, or, if they were merged, delete them and run sslus"
    " merge"
)


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
        with naming(folder / NAME):
            text = (folder / NAME).read_bytes()
        return parse_manifest(text, folder / NAME)
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
        if manifest.with_digest().digest != manifest.digest:
            raise InputError(f"{path}: was changed after it was written; {REMEDY}")
        _check(manifest)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: damaged ({e}); {REMEDY}") from e
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError for what no shards have: a manifest may come from anybody, and files are
    opened and memory is allocated by what it says."""

    def want(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"want {what}")

    size, labels = manifest.settings["size"], manifest.labels
    want(type(size) is int and 1 <= size <= 4096, f"a size of 1 to 4096 pixels, got {size!r:.40}")
    want(0 <= manifest.mean <= 1 and 0 <= manifest.std <= 1, "mean and std from 0 to 1")
    want(isinstance(labels, list) and all(isinstance(x, str) for x in labels), "names as labels")
    decoders = manifest.decoders
    counted = isinstance(decoders, dict) and all(type(n) is int for n in decoders.values())
    want(counted, "a number of videos for each decoder")
    total = 0
    for entry in manifest.shards:
        name, num = entry["name"], entry["num_frames"]
        want(re.fullmatch(r"shard-\d+\.tar", name), f"names like shard-000000.tar, got {name!r}")
        want(type(num) is int and num > 0, f"1 frame or more in {name}, got {num!r:.40}")
        known = isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        want(known, f"the length and the digest of {name}")
        total += num
    num, num_videos = manifest.num_frames, manifest.num_videos
    want(type(num) is int and num == total, f"num_frames {total}, of all shards, got {num!r:.40}")
    want(num < MOST_FRAMES, "fewer frames than 2^40")
    want(type(num_videos) is int and 0 <= num_videos <= num, "0 to num_frames as num_videos")
