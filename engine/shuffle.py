"""The second pass of sharding: the frames of all spools, shuffled across videos, become shards."""

import hashlib
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslus.engine import tar
from sslus.engine.errors import InputError
from sslus.engine.manifest import Manifest
from sslus.engine.settings import Settings
from sslus.engine.spool import jpegs_path, spool_path
from sslus.engine.workers import Workers


@dataclass(frozen=True)
class Video:
    """A video that has been decoded, with what the shards say about it."""

    id: str
    label: str | None
    patient: str | None  # a keyed hash
    record: dict  # of its spool


def write_all(
    videos: list[Video],
    settings: Settings,
    work: Path,
    workers: Workers,
    tell: Callable[[str], None],
) -> Manifest:
    """Shuffle the frames of the spools in `work` into shards in work/new; return their manifest.

    `tell(note)` is called after each shard.
    """
    facts = [(v.id, v.label, v.patient) for v in videos]
    tables = []  # 40 bytes per frame, all that is kept in memory
    for v in videos:
        frames = json.loads(spool_path(work, v.id).read_text())["frames"]
        tables.append(np.array(frames, np.float64))
    video = np.repeat(np.arange(len(videos), dtype=np.int32), [len(t) for t in tables])
    table = np.concatenate(tables)
    # Sorting by the hash of the key makes the order a function of the frames alone.
    hashes = (
        _hash64(_frame_key(videos[v].id, int(frame)))
        for v, frame in zip(video, table[:, 0], strict=True)
    )
    rank = np.fromiter(hashes, np.uint64, len(table))
    order = np.lexsort((table[:, 0], video, rank))
    num_shards = -(-len(order) // settings.frames_per_shard)
    new = work / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    names = [f"shard-{i:06d}.tar" for i in range(num_shards)]
    parts = np.array_split(order, num_shards)

    def tasks() -> Iterator[tuple]:
        for name, part in zip(names, parts, strict=True):
            rows = [
                (int(v), int(frame), at, int(offset), int(size))
                for v, (frame, at, offset, size) in zip(
                    video[part], table[part].tolist(), strict=True
                )
            ]
            used = {v: facts[v] for v in {r[0] for r in rows}}
            yield new / name, work, used, rows

    entries = [None] * num_shards
    for done, (number, result) in enumerate(workers.map(_write_shard, tasks()), 1):
        if isinstance(result, BrokenProcessPool):
            raise InputError(
                f"{new}: a worker process was killed while it wrote there, perhaps for lack of"
                " memory; the same command goes on from here, with a smaller --jobs if need be"
            ) from result
        entries[number] = {"name": names[number], "num_frames": len(parts[number]), **result}
        tell(f"{done:,} of {num_shards:,} shards written")
    return _manifest(videos, settings, entries)


def _manifest(videos: list[Video], settings: Settings, shards: list[dict]) -> Manifest:
    return Manifest(
        **facts([v.record for v in videos], settings),
        labels=sorted({v.label for v in videos if v.label is not None}),
        shards=shards,
    ).with_digest()


def facts(records: list[dict], settings: Settings) -> dict:
    """The part of a manifest that follows from the records of the videos with frames."""
    num_frames = sum(r["kept_frames"] for r in records)
    pixels = num_frames * settings.size**2
    mean = sum(r["sum"] for r in records) / pixels
    variance = sum(r["squares"] for r in records) / pixels - mean**2
    return {
        "settings": {"size": settings.size, "select": _selection(settings),
                     "quality": settings.quality, "region": settings.region,
                     "frames_per_shard": settings.frames_per_shard},
        "num_videos": len(records),
        "num_frames": num_frames,
        "mean": round(mean / 255, 9),
        "std": round(max(variance, 0.0) ** 0.5 / 255, 9),
        "decoders": dict(sorted(Counter(r["decoder"] for r in records).items())),
    }  # fmt: skip


def _selection(settings: Settings) -> str:
    if settings.rate_hz is not None:
        return f"at most {settings.rate_hz:g} frames a second"
    return "all frames" if settings.stride == 1 else f"1 of every {settings.stride} frames"


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _frame_key(video_id: str, frame: int) -> str:
    return f"{video_id}-{frame:06d}"


def _write_shard(path: Path, work: Path, facts: dict, rows: list[tuple]) -> dict:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: none
    spools, most = {}, max(1, min(256, limit // 4))

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for v, frame, time_seconds, offset, size in rows:
            video_id, label, patient = facts[v]
            if v not in spools:
                if len(spools) >= most:
                    os.close(spools.pop(next(iter(spools))))
                spools[v] = os.open(jpegs_path(work, video_id), os.O_RDONLY)
            jpeg = os.pread(spools[v], size, offset)
            if len(jpeg) != size:
                raise InputError(f"{work}: a spool was cut off; delete this folder and start again")
            fact = {"video": video_id, "frame": frame, "time_seconds": time_seconds,
                    "label": label, "patient": patient}  # fmt: skip
            yield (
                _frame_key(video_id, frame),
                {"jpg": jpeg, "json": json.dumps(fact).encode()},
            )

    try:
        length, sha256 = tar.write_shard(path, samples())
    finally:
        for fd in spools.values():
            os.close(fd)
    return {"bytes": length, "sha256": sha256}
