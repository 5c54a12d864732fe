"""New shards from old ones: frames of videos that did not change are not decoded again.

So adding videos or labels to finished shards costs little more than copying them.
"""

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

from sslus.engine.errors import naming
from sslus.engine.manifest import read_manifest
from sslus.engine.settings import Settings
from sslus.engine.shard_folder import ShardFolder, frames_by
from sslus.engine.shuffle import facts
from sslus.engine.spool import jpegs_path, keep_record, without_frames
from sslus.engine.tar import Archive

OF_RECORD = {"sum", "squares", "kept_frames"}  # what a ledger line must have to become a record


def unchanged(folder: ShardFolder, request: dict) -> dict[str, dict]:
    """The ledger lines, by id, of the videos whose frames in the shards there are those that the
    request wants, with the stamps of their files. {} if what is there cannot be used."""
    was = folder.request()
    try:
        if frames_by(was) != frames_by(request):
            return {}
        ledger = folder.ledger()
        # A local/ of other shards, copied here, would give their settings to these frames.
        here = facts([x for x in ledger if x["kept_frames"]], Settings(**was["settings"]))
        if not here.items() <= vars(read_manifest(folder.out)).items():
            return {}
        stamps = {video_id: stamp for video_id, *stamp in was["sources"].values()}
        wanted = {video_id: stamp for video_id, *stamp in request["sources"].values()}
        return {
            line["id"]: line | {"stamp": wanted[line["id"]]} for line in ledger
            if line["status"] == "ok" and line.keys() >= OF_RECORD
            and line["id"] in wanted and wanted[line["id"]] == stamps[line["id"]]
        }  # fmt: skip
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return {}


def respool(
    folder: ShardFolder,
    lines: dict[str, dict],
    done: Callable[[str, dict], None],
    report: Callable[[str], None],
) -> list[str]:
    """Write the spools of these videos, which `unchanged` found, from the shards there.

    `done(video_id, record)` is called for each one, after all shards are read. Videos with a frame
    in a shard that is missing or damaged are left out; returns the names of these shards.
    `report(note)` is called before each shard is read.
    """
    shards = read_manifest(folder.out).shards if lines else []
    broken = []
    spools = {video_id: _Spool(_half(folder.work, video_id)) for video_id in lines}
    for number, entry in enumerate(shards):
        report(f"shard {number + 1} of {len(shards)} is used again")
        try:
            data = (folder.out / entry["name"]).read_bytes()
        except PermissionError:
            raise
        except OSError:  # it is gone, or the disk cannot read it
            data = b""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            broken.append(entry["name"])
            continue
        archive, used = Archive(entry["name"], data, entry["num_frames"]), set()
        for sample in archive.samples:
            fact = json.loads(bytes(archive.part(sample.json)))
            if spool := spools.get(fact["video"]):
                spool.add(fact, archive.part(sample.jpg))
                used.add(spool)
        for spool in used:
            spool.flush()
    for video_id, spool in spools.items():
        line = lines[video_id]
        frames = spool.frames()
        if len(frames) == line["kept_frames"]:
            spool.path.replace(jpegs_path(folder.work, video_id))
            record = {k: v for k, v in line.items() if k not in ("source", "id")} | {
                "crc32": spool.crc32, "frames": frames,
            }  # fmt: skip
            keep_record(folder.work, video_id, record)
            done(video_id, without_frames(record))
    return broken


def _half(work: Path, video_id: str) -> Path:
    path = jpegs_path(work, video_id)
    return path.with_name(path.name + ".tmp")


class _Spool:
    """The JPEGs of one video, collected from the shards and appended to its file."""

    def __init__(self, path: Path):
        self.path, self.table = path, array("d")  # tuples would take 200 bytes a frame
        self.waiting: list[memoryview] = []
        self.length = self.crc32 = 0

    def add(self, fact: dict, jpeg: memoryview) -> None:
        self.table.extend((fact["frame"], fact["time_seconds"], self.length, len(jpeg)))
        self.waiting.append(jpeg)
        self.length += len(jpeg)
        self.crc32 = zlib.crc32(jpeg, self.crc32)

    def frames(self) -> list[tuple[int, float, int, int]]:
        rows = zip(*[iter(self.table)] * 4, strict=True)
        return [(int(frame), at, int(offset), int(size)) for frame, at, offset, size in rows]

    def flush(self) -> None:
        with naming(self.path), self.path.open("ab") as f:  # too many videos to keep all open
            f.write(b"".join(self.waiting))
        self.waiting.clear()
