"""The frame store: every frame of the shards, decoded once and memory-mapped.

Ultrasound is small (8 bits, one channel: 115,000 frames of 256 x 256 are 7.5 GB), so decoding it
again in every epoch would slow training down for nothing.
"""

import hashlib
import io
import json
import mmap
import os
import resource
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslus.engine import _bus_error, tar
from sslus.engine.atomic import atomic_folder, remove_leftovers
from sslus.engine.errors import InputError, naming
from sslus.engine.jpeg import DamagedJpeg
from sslus.engine.jpeg import decode as decode_jpeg
from sslus.engine.lock import lock
from sslus.engine.manifest import REMEDY, Manifest, read_manifest
from sslus.engine.system import allocate, available_memory, sync_data, usable_cores, will_need

FORMAT = 1
CHUNK_BYTES = 1 << 20  # per task: writing many frames at once costs a third less than singly
SYNC_BYTES = 16 << 20  # synced in the background, so that little is left for the last fsync
OTHER_FILES = 512  # more than a training process opens beside the shards
# Of index.npz: their type, and the least value.
COLUMNS = {
    "video": (np.int32, 0), "frame": (np.int32, 0), "time_seconds": (np.float32, 0),
    "label": (np.int32, -1), "patient": (np.int32, -1),
}  # fmt: skip


@dataclass(frozen=True)
class FrameStore:
    """N frames, ordered by video and time. Open it with FrameStore.open."""

    frames: np.ndarray  # (N, S, S) uint8, memory-mapped, read-only
    video: np.ndarray  # (N,) int32, index into video_ids
    frame: np.ndarray  # (N,) int32, number of the frame in its video
    time_seconds: np.ndarray  # (N,) float32, since the first frame of the video
    label: np.ndarray  # (N,) int32, index into label_names; -1 without a label
    patient: np.ndarray  # (N,) int32; -1 if unknown
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
        """Whether all frames fit into half of the memory that is available now, or of what a
        container may use, if that is less."""
        return 2 * self.frames.nbytes <= available_memory()

    def read_ahead(self, indices: np.ndarray) -> None:
        """Ask the system to load these frames into memory, in which they are looked for first.

        Frames that are not loaded in time are read when they are used. If the disk is busy, this
        waits for it.
        """
        length = self.size**2
        with Path(self.frames.filename).open("rb") as f:
            for i in np.unique(indices).tolist():
                will_need(f, i * length, length)

    @staticmethod
    def open(
        shards: str | Path,
        *,
        rebuild: bool = False,
        folder: str | Path | None = None,
        threads: int | None = None,
        report: Callable[[int, int, str], None] | None = None,
    ) -> "FrameStore":
        """The store of a folder of shards, built on the first call.

        It is in `folder` (default: `shards`/store) and appears there only when it is complete;
        if several processes call this at once, one of them builds it. An existing store may be on
        a read-only file system. `threads` decode (default: one per core); `report(done, total,
        note)` counts frames. Raises InputError if the shards are unfinished, damaged or of another
        version, if the store is damaged or of other shards and `rebuild` is not given, or if one
        must be built where nothing can be written or a link is; OSError on a full disk.
        """
        shards = Path(shards)
        manifest = read_manifest(shards)
        folder = Path(folder) if folder else shards / "store"
        if folder.is_symlink() and (rebuild or not folder.exists()):
            raise InputError(
                f"{folder}: is a link, which a new frame store would replace; remove it, and once"
                " the store is built, move it to the other disk and link it again"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (rebuild or not folder.exists()) and not os.access(folder.parent, os.W_OK):
            raise InputError(
                f"{folder.parent}: has no frame store that can be used, and none can be written"
                " there; copy the shards to a folder of your own, or train with --tier stream"
            )
        try:
            lock_file = folder.with_name(folder.name + ".lock").open("w")
        except OSError:  # where no lock file can be written, nobody can be building
            if rebuild or not folder.exists():
                raise
            return _load(folder, manifest)
        with lock_file:
            lock(lock_file)
            remove_leftovers(folder)
            if rebuild or not folder.exists():
                _build(shards, manifest, folder, threads, report)
        return _load(folder, manifest)


def _load(folder: Path, manifest: Manifest) -> FrameStore:
    remedy = "; rebuild it with --rebuild-store"
    try:
        with naming(folder / "store.json"):
            facts = json.loads((folder / "store.json").read_text())
        if facts["format"] != FORMAT:
            raise InputError(f"{folder}: built by another version of sslus{remedy}")
        if facts["digest"] != manifest.digest:
            raise InputError(
                f"{folder}: was built from other shards (digest {facts['digest'][:8]}; the shards"
                f" here have {manifest.digest[:8]}){remedy}"
            )
        with naming(folder / "index.npz"):
            index = (folder / "index.npz").read_bytes()
        if hashlib.sha256(index).hexdigest() != facts["index_sha256"]:
            raise InputError(f"{folder}/index.npz: damaged{remedy}")
        size, videos = manifest.settings["size"], facts["videos"]
        shape = (manifest.num_frames, size, size)
        path = folder / "frames.u8"
        if path.stat().st_size != np.prod(shape):
            raise InputError(f"{path}: does not have the size of {shape[0]} frames{remedy}")
        _bus_error.install()
        frames = np.memmap(path, np.uint8, "r", shape=shape)
        columns = _read_columns(index)
        _check_columns(columns, len(frames), len(videos), len(manifest.labels))
        if not all(isinstance(video, str) for video in videos):
            raise ValueError("want names as videos")
    except FileNotFoundError as e:
        raise InputError(f"{e.filename}: is missing{remedy}") from e
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{folder}: damaged ({type(e).__name__}: {e}){remedy}") from e
    return FrameStore(
        frames, **columns, video_ids=videos, label_names=manifest.labels,
        mean=manifest.mean, std=manifest.std, digest=manifest.digest,
    )  # fmt: skip


def _read_columns(index: bytes) -> dict[str, np.ndarray]:
    """The columns in the content of index.npz. Raises ValueError."""
    try:
        with np.load(io.BytesIO(index), allow_pickle=False) as columns:
            return {name: columns[name] for name in COLUMNS}
    except Exception as e:  # those of zipfile, of each compression and of numpy's headers
        raise ValueError(f"index.npz: {type(e).__name__}: {e}") from e


def _check_columns(
    columns: dict[str, np.ndarray], num: int, num_videos: int, num_labels: int
) -> None:
    """Raise ValueError for columns that no store has: what looks frames up would fail or, where
    videos are not in order, find wrong ones."""
    below = {"video": num_videos, "time_seconds": np.inf, "label": num_labels, "patient": num}
    for name, (kind, least) in COLUMNS.items():
        column, end = columns[name], below.get(name, 2**31)
        if not isinstance(column, np.ndarray) or column.dtype != kind or column.shape != (num,):
            raise ValueError(f"index.npz: want {num} {kind.__name__} as {name}")
        if not ((column >= least) & (column < end)).all():  # NaN too
            raise ValueError(f"index.npz: want numbers from {least}, below {end}, as {name}")
    if (np.diff(columns["video"]) < 0).any():
        raise ValueError("index.npz: want videos in order")


def _build(shards: Path, manifest: Manifest, folder: Path, threads, report) -> None:
    num, size = manifest.num_frames, manifest.settings["size"]
    views = _mapped(shards, manifest)

    def check(number: int) -> None:
        if hashlib.sha256(views[number]).hexdigest() != manifest.shards[number]["sha256"]:
            name = manifest.shards[number]["name"]
            raise InputError(f"{shards / name}: its digest is wrong; {REMEDY}")

    with (
        atomic_folder(folder) as new,
        (new / "frames.u8").open("wb") as f,
        ThreadPoolExecutor(threads or usable_cores()) as pool,
        ThreadPoolExecutor(1) as syncer,
    ):

        def decode(start: int, stop: int) -> int:
            pixels = np.empty((stop - start, size, size), np.uint8)
            try:
                decode_jpeg(_parts(views, places.shard, places.jpg, start, stop), pixels)
            except DamagedJpeg as e:
                where = places.name(start + e.number, manifest)
                raise InputError(f"{shards / where}.jpg is damaged ({e}); {REMEDY}") from e
            # Not through a memory map: page faults would take four times as long, and a full disk
            # would kill the process instead of raising an error.
            written, flat = 0, memoryview(pixels).cast("B")
            while written < len(flat):
                written += os.pwrite(f.fileno(), flat[written:], start * size * size + written)
            return stop

        try:
            places = _places(shards, manifest)
            allocate(f, num * size * size)  # at once: this is cheaper, too
            chunk = max(1, CHUNK_BYTES // size**2)
            jobs = [
                pool.submit(decode, start, min(start + chunk, num))
                for start in range(0, num, chunk)
            ]
            checks = [pool.submit(check, number) for number in range(len(views))]
            facts, syncs = _Facts(shards, manifest, places, views), []
            done = synced = 0
            for job in jobs:
                facts.read(done, min(done + chunk, num))  # while the pool decodes
                done = job.result()
                if (done - synced) * size * size >= SYNC_BYTES:
                    syncs.append(syncer.submit(sync_data, f))
                    synced = done
                if report:
                    report(done, num, "")
            index = io.BytesIO()
            np.savez(index, **facts.columns())
            told = {
                "format": FORMAT,
                "digest": manifest.digest,
                "shape": [num, size, size],
                "index_sha256": hashlib.sha256(index.getbuffer()).hexdigest(),
                "videos": places.videos,
            }
            syncs += [
                syncer.submit(_save, new / "index.npz", index.getbuffer()),
                syncer.submit(_save, new / "store.json", json.dumps(told).encode()),
            ]
            syncs.append(syncer.submit(os.fsync, f.fileno()))
            for job in (*checks, *syncs):
                job.result()  # all of them: a failed write is reported to only one of the syncs
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _mapped(shards: Path, manifest: Manifest) -> list[memoryview]:
    _allow_open_files(len(manifest.shards))
    _bus_error.install()
    views = []
    for entry in manifest.shards:
        path = shards / entry["name"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise InputError(f"{path}: missing or incomplete; {REMEDY}")
        with path.open("rb") as f:
            views.append(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)))
    return views


def _save(path: Path, content: bytes) -> None:
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _allow_open_files(num: int) -> None:
    """Raise the limit of open files for `num` shards, as far as the hard limit allows.

    Python keeps the file of a memory mapping open, and the usual limit of 1024 is reached at a
    million frames.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True)
class _Places:
    """Where the frames are in the shards, in the order of the store. In arrays: a tuple for each
    frame would take ten times as much."""

    videos: list[str]  # the ids, sorted
    video: np.ndarray  # (N,) int32, index into them
    frame: np.ndarray  # (N,) int32
    shard: np.ndarray  # (N,) int32
    jpg: np.ndarray  # (N, 2) int64: offset, length
    json: np.ndarray  # the same

    def name(self, i: int, manifest: Manifest) -> str:
        """Of a frame, for the eye."""
        shard = manifest.shards[self.shard[i]]["name"]
        return f"{shard}: {self.videos[self.video[i]]}-{self.frame[i]:06d}"


def _places(shards: Path, manifest: Manifest) -> _Places:
    """From the indexes alone, so that decoding can begin."""
    seen, numbers, offsets = {}, array("i"), array("q")
    for number, entry in enumerate(manifest.shards):
        for key, members in tar.read_index(shards / entry["name"]):
            video, _, frame = key.rpartition("-")
            try:
                numbers.extend((seen.setdefault(video, len(seen)), int(frame), number))
                offsets.extend((*members["jpg"], *members["json"]))
            except (KeyError, ValueError, OverflowError) as e:
                raise InputError(
                    f"{shards / entry['name']}: its index is damaged at {key} ({e}); {REMEDY}"
                ) from e
    table = np.array(numbers, np.int32).reshape(-1, 3)
    places = np.array(offsets, np.int64).reshape(-1, 2, 2)
    if len(table) != manifest.num_frames:
        raise InputError(
            f"{shards}: {len(table)} frames in the indexes, {manifest.num_frames} in the"
            f" manifest; {REMEDY}"
        )
    videos = sorted(seen)
    video = _ranks(seen, videos)[table[:, 0]]
    order = np.lexsort((table[:, 1], video))
    return _Places(
        videos, video[order], table[order, 1], table[order, 2],
        jpg=places[order, 0], json=places[order, 1],
    )  # fmt: skip


def _ranks(seen: dict[str, int], names: list[str]) -> np.ndarray:
    """(len(names) + 1,) int32: where the name that `seen` has numbered i is in `names`; at the end,
    so for -1, it is -1."""
    ranks = np.full(len(names) + 1, -1, np.int32)
    ranks[[seen[name] for name in names]] = np.arange(len(names))
    return ranks


def _parts(views: list, shard: np.ndarray, at: np.ndarray, start: int, stop: int) -> list:
    where = zip(shard[start:stop].tolist(), at[start:stop].tolist(), strict=True)
    return [views[number][offset : offset + length] for number, (offset, length) in where]


class _Facts:
    """What the frames' .json say, read some at a time: all at once would take 1 kB for each."""

    def __init__(self, shards: Path, manifest: Manifest, places: _Places, views: list[memoryview]):
        self.shards, self.manifest, self.places, self.views = shards, manifest, places, views
        self.classes = {name: i for i, name in enumerate(manifest.labels)} | {None: -1}
        self.patients: dict[str, int] = {}  # numbered as they come
        num = len(places.video)
        self.time_seconds = np.empty(num, np.float32)
        self.label, self.patient = np.empty(num, np.int32), np.empty(num, np.int32)

    def read(self, start: int, stop: int) -> None:
        """Of frames start to stop - 1. Raises InputError that names the damaged frame."""
        p = self.places
        parts = _parts(self.views, p.shard, p.json, start, stop)
        names = [p.videos[v] for v in p.video[start:stop].tolist()]
        try:
            # Parse all at once: this saves 2 us per frame.
            facts = json.loads(b"[" + b",".join(parts) + b"]")
            wanted = list(zip(names, p.frame[start:stop].tolist(), strict=True))
            if [(f["video"], f["frame"]) for f in facts] != wanted:
                raise ValueError("names and metadata of the frames differ")
            times = np.array([float(f["time_seconds"]) for f in facts])
            wrong = times[~((times >= 0) & (times <= np.finfo(np.float32).max))]  # NaN too
            if wrong.size:
                raise ValueError(f"want a time_seconds from 0, got {wrong[0]}")
            self.time_seconds[start:stop] = times
            self.label[start:stop] = [self.classes[f["label"]] for f in facts]
            self.patient[start:stop] = [self._patient(f["patient"]) for f in facts]
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as e:
            if stop - start > 1:  # which one? It raises
                for i in range(start, stop):
                    self.read(i, i + 1)
                where = f"{self.shards}: a frame's "
            else:
                where = f"{self.shards / p.name(start, self.manifest)}"
            raise InputError(f"{where}.json is damaged ({type(e).__name__}: {e}); {REMEDY}") from e

    def _patient(self, name: str | None) -> int:
        if name is None:
            return -1
        if not isinstance(name, str):
            raise ValueError("want a name as patient")
        return self.patients.setdefault(name, len(self.patients))

    def columns(self) -> dict[str, np.ndarray]:
        """Those of index.npz, once all frames are read."""
        return {
            "video": self.places.video, "frame": self.places.frame,
            "time_seconds": self.time_seconds, "label": self.label,
            "patient": _ranks(self.patients, sorted(self.patients))[self.patient],
        }  # fmt: skip
