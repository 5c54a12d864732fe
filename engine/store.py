"""The frame store: every frame of the shards, decoded once, memory-mapped.

Ultrasound is small (8 bits, one channel: 115,000 frames of 256 x 256 are 7.5 GB), so decoding it
anew in every epoch is a waste that the training loop would pay for.
"""

import fcntl
import hashlib
import io
import json
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sslus.engine import tar
from sslus.engine.atomic import atomic_folder, remove_leftovers
from sslus.engine.errors import InputError
from sslus.engine.manifest import Manifest, read_manifest

FORMAT = 1
CHUNK_BYTES = 1 << 20  # pixels a task: one write of many frames costs a third less than one each
SYNC_BYTES = 16 << 20  # written on the side, so that the fsync at the end finds little to do
REMEDY = "make the shards again: sslus shard --force"
COLUMNS = ("video", "frame", "time_seconds", "label", "patient")


@dataclass(frozen=True)
class FrameStore:
    """N frames, ordered by video and time. Open it with FrameStore.open."""

    frames: np.ndarray  # (N, S, S) uint8, memory-mapped, read-only
    video: np.ndarray  # (N,) int32, index into video_ids
    frame: np.ndarray  # (N,) int32, the frame's number in its video
    time_seconds: np.ndarray  # (N,) float32, after the video's first frame
    label: np.ndarray  # (N,) int32, index into label_names; -1 without a label
    patient: np.ndarray  # (N,) int32; -1 unknown
    video_ids: list[str]
    label_names: list[str]
    mean: float  # of all pixels, 0 to 1
    std: float
    digest: str  # of the shards it was built from

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> int:
        """S: side of a frame in pixels."""
        return self.frames.shape[1]

    @property
    def num_videos(self) -> int:
        return len(self.video_ids)

    def fits_in_memory(self) -> bool:
        """Whether half of the memory that is available now holds all frames."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        facts = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        return self.frames.nbytes <= 512 * facts["MemAvailable"]

    def read_ahead(self, indices: np.ndarray | None = None) -> None:
        """Ask the system to have frames in memory soon: those of `indices`, or all.

        Returns at once; what is not there in time is read when it is used.
        """
        mapped = self.frames._mmap
        if indices is None:
            mapped.madvise(mmap.MADV_WILLNEED)
            return
        length = self.size**2
        for i in np.unique(indices).tolist():
            start = i * length // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, start, (i + 1) * length - start)

    @staticmethod
    def open(
        shards: Path,
        *,
        rebuild: bool = False,
        folder: Path | None = None,
        threads: int | None = None,
        report: Callable[[int, int, str], None] | None = None,
    ) -> "FrameStore":
        """The store of a folder of shards, built on the first call.

        It lies in `folder` (default: `shards`/store) and appears there only when it is complete;
        several processes may call this at once, one builds. One that is there may lie on a file
        system that cannot be written to. `threads` decode (default: one a core);
        `report(done, total, note)` counts frames. Raises InputError where the shards are
        unfinished, of another version or damaged, and where the store there belongs to other
        shards and `rebuild` is not given; OSError on a full disk.
        """
        shards = Path(shards)
        manifest = read_manifest(shards)
        folder = Path(folder) if folder else shards / "store"
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = folder.with_name(folder.name + ".lock").open("w")
        except OSError:  # where no lock can be written, nobody builds
            if rebuild or not folder.exists():
                raise
            return _load(folder, manifest)
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            remove_leftovers(folder)
            if rebuild or not folder.exists():
                _build(shards, manifest, folder, threads, report)
        return _load(folder, manifest)


def _load(folder: Path, manifest: Manifest) -> FrameStore:
    remedy = "; --rebuild-store makes it anew"
    try:
        facts = json.loads((folder / "store.json").read_text())
        if facts["format"] != FORMAT:
            raise InputError(f"{folder}: a store of another version of sslus{remedy}")
        if facts["digest"] != manifest.digest:
            raise InputError(
                f"{folder}: was built from other shards (digest {facts['digest'][:8]}, the shards"
                f" here have {manifest.digest[:8]}){remedy}"
            )
        index = (folder / "index.npz").read_bytes()
        if hashlib.sha256(index).hexdigest() != facts["index_sha256"]:
            raise InputError(f"{folder}/index.npz: damaged{remedy}")
        shape = tuple(facts["shape"])
        path = folder / "frames.u8"
        if path.stat().st_size != np.prod(shape):
            raise InputError(f"{path}: has not the size of {shape[0]} frames{remedy}")
        frames = np.memmap(path, np.uint8, "r", shape=shape)
        with np.load(folder / "index.npz", allow_pickle=False) as columns:
            arrays = {name: columns[name] for name in COLUMNS}
    except FileNotFoundError as e:
        raise InputError(f"{e.filename}: is missing{remedy}") from e
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise InputError(f"{folder}: damaged ({type(e).__name__}: {e}){remedy}") from e
    return FrameStore(
        frames, **arrays, video_ids=facts["videos"], label_names=manifest.labels,
        mean=manifest.mean, std=manifest.std, digest=manifest.digest,
    )  # fmt: skip


def _build(shards: Path, manifest: Manifest, folder: Path, threads, report) -> None:
    import simplejpeg

    num, size = manifest.num_frames, manifest.settings["size"]
    views = []
    for entry in manifest.shards:
        path = shards / entry["name"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise InputError(f"{path}: missing or not whole; {REMEDY}")
        with path.open("rb") as f:
            views.append(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)))

    def check(number: int) -> None:
        if hashlib.sha256(views[number]).hexdigest() != manifest.shards[number]["sha256"]:
            name = manifest.shards[number]["name"]
            raise InputError(f"{shards / name}: its digest is wrong; {REMEDY}")

    with (
        atomic_folder(folder) as new,
        (new / "frames.u8").open("wb") as f,
        ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool,
        ThreadPoolExecutor(1) as syncer,
    ):

        def decode(start: int, samples: list[_Sample]) -> int:
            pixels = np.empty((len(samples), size, size, 1), np.uint8)
            for image, sample in zip(pixels, samples, strict=True):
                offset, length = sample.jpg
                try:
                    jpeg = views[sample.shard][offset : offset + length]
                    shape = simplejpeg.decode_jpeg(jpeg, "GRAY", buffer=image).shape
                    if shape != image.shape:
                        raise ValueError(f"its size is {shape[:2]}")
                except ValueError as e:
                    name = manifest.shards[sample.shard]["name"]
                    raise InputError(
                        f"{shards / name}: {sample.key}.jpg is damaged ({e}); {REMEDY}"
                    ) from e
            # Not through a mapping: its page faults take four times as long, and a full disk
            # would kill the process instead of raising.
            written, flat = 0, memoryview(pixels).cast("B")
            while written < len(flat):
                written += os.pwrite(f.fileno(), flat[written:], start * size * size + written)
            return len(samples)

        def save(name: str, content: bytes) -> None:
            with (new / name).open("wb") as side:
                side.write(content)
                side.flush()
                os.fsync(side.fileno())

        try:
            # The space, all at once: cheaper than piece by piece, and a full disk shows now.
            os.posix_fallocate(f.fileno(), 0, num * size * size)
            samples = _samples(shards, manifest)
            chunk = max(1, CHUNK_BYTES // size**2)
            jobs = [
                pool.submit(decode, start, samples[start : start + chunk])
                for start in range(0, num, chunk)
            ]
            checks = [pool.submit(check, number) for number in range(len(views))]
            columns, videos = _read_facts(shards, manifest, samples, views)
            index = io.BytesIO()
            np.savez(index, **columns)
            facts = {
                "format": FORMAT,
                "digest": manifest.digest,
                "shape": [num, size, size],
                "index_sha256": hashlib.sha256(index.getbuffer()).hexdigest(),
                "videos": videos,
            }
            syncs = [
                syncer.submit(save, "index.npz", index.getbuffer()),
                syncer.submit(save, "store.json", json.dumps(facts).encode()),
            ]
            done = synced = 0
            for job in jobs:
                done += job.result()
                if (done - synced) * size * size >= SYNC_BYTES:
                    syncs.append(syncer.submit(os.fdatasync, f.fileno()))
                    synced = done
                if report:
                    report(done, num, "")
            syncs.append(syncer.submit(os.fsync, f.fileno()))
            for job in (*checks, *syncs):
                job.result()  # a write that failed is reported to one sync only
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Sample(NamedTuple):
    """Where a frame lies in the shards. Sorted, they are in the store's order."""

    video: str
    frame: int
    key: str
    shard: int
    jpg: tuple[int, int]  # offset, length
    json: tuple[int, int]


def _samples(shards: Path, manifest: Manifest) -> list[_Sample]:
    """All frames in the store's order, from the indexes alone: decoding can begin."""
    samples = []
    for number, entry in enumerate(manifest.shards):
        for key, members in tar.read_index(shards / entry["name"]):
            video, _, frame = key.rpartition("-")
            try:
                place = _Sample(video, int(frame), key, number, members["jpg"], members["json"])
            except (KeyError, ValueError) as e:
                raise InputError(
                    f"{shards / entry['name']}: its index is damaged at {key} ({e}); {REMEDY}"
                ) from e
            samples.append(place)
    if len(samples) != manifest.num_frames:
        raise InputError(
            f"{shards}: {len(samples)} frames in the indexes, {manifest.num_frames} in the"
            f" manifest; {REMEDY}"
        )
    return sorted(samples)


def _read_facts(
    shards: Path, manifest: Manifest, samples: list[_Sample], views: list[memoryview]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The index arrays and the videos' ids."""
    parts = [views[s.shard][s.json[0] : sum(s.json)] for s in samples]
    try:
        # One parse for all: 2 us a frame less than one each.
        facts = json.loads(b"[" + b",".join(parts) + b"]")
        if [(f["video"], f["frame"]) for f in facts] != [s[:2] for s in samples]:
            raise ValueError("names and facts of the frames differ")
        videos = sorted({f["video"] for f in facts})
        patients = sorted({f["patient"] for f in facts if f["patient"] is not None})

        def number(names: list[str], key: str) -> np.ndarray:
            place = {name: i for i, name in enumerate(names)} | {None: -1}
            return np.array([place[f[key]] for f in facts], np.int32)

        columns = {
            "video": number(videos, "video"),
            "frame": np.array([f["frame"] for f in facts], np.int32),
            "time_seconds": np.array([f["time_seconds"] for f in facts], np.float32),
            "label": number(manifest.labels, "label"),
            "patient": number(patients, "patient"),
        }
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f"{shards}: damaged shards ({e}); {REMEDY}") from e
    return columns, videos
