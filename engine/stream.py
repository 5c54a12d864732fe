"""Frames streamed from the shards, for data that outgrows the disk, without a frame store.

Shards are read whole, one after the other, from a folder or a URL; decoded frames are not kept.
webdataset's own pipeline is not used: it knows the order of an epoch only by reading it, so that a
resume would read and decode what it skips; and its URLs may be shell commands, its members pickles.
Here the order is computed from the manifest's frame counts, and only .jpg and .json are read.
"""

import hashlib
import importlib.util
import json
import math
import mmap
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sslus.engine import _bus_error
from sslus.engine import manifest as manifests
from sslus.engine.errors import InputError
from sslus.engine.jpeg import DamagedJpeg
from sslus.engine.jpeg import decode as decode_jpeg
from sslus.engine.manifest import REMEDY, Manifest, parse_manifest, read_manifest
from sslus.engine.plan import Plan
from sslus.engine.tar import Archive, Sample
from sslus.engine.urls import is_url, shown

BUFFER = 8192  # frames shuffled together: 160 MB as JPEG at 256 px
LANES = 8  # sequences of shards read in parallel, so that up to 8 ranks read only their own
FETCHES = 8  # shards fetched at a time
WAITS_SECONDS = (1, 5)  # before each retry of a URL
SILENT_SECONDS = 30  # how long an HTTP server may send nothing: meanwhile nothing stops training


@dataclass(frozen=True)
class StreamPlan(Plan):
    """A plan whose batches come from few shards at a time.

    In every epoch the shards, in a new random order, form one long sequence of frames. It is cut
    into LANES lanes of equal length, and every batch takes the same number of frames from each.
    Within a lane, frames are shuffled in blocks, which hold BUFFER frames over all lanes. As in
    every plan, a batch is global and depends only on (seed, epoch), not on the number of ranks.
    With 2, 4 or 8 ranks and a batch size that is a multiple of 8, each rank reads its own part of
    the shards; otherwise some shards are read by several ranks.
    """

    shards: tuple[int, ...] = ()  # number of frames in each

    def order(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch * batch_size,) int64: the frames of one epoch in their order."""
        return np.concatenate(list(replace(self, rank=0, world=1).epoch(epoch)))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """This rank's index arrays, (batch_size / world,) int64 each, from batch `start` on."""

        def words(counter: int, num: int) -> np.ndarray:
            generator = np.random.Philox(key=[self.seed, epoch], counter=[0, counter, 0, 0])
            return generator.random_raw(num)  # raw: see Plan.order

        counts = np.array(self.shards, np.int64)
        starts = np.cumsum(counts) - counts  # of each shard, in the manifest's order
        drawn = np.argsort(words(0, len(counts)), kind="stable")
        ends = np.cumsum(counts[drawn])  # in the drawn order
        lanes = math.gcd(self.batch_size, LANES)
        width, share = self.batch_size // lanes, self.batch_size // self.world
        lane_starts = np.arange(lanes)[:, None] * (self.steps_per_epoch * width)
        block = max(1, BUFFER // self.batch_size)  # steps
        for number in range(start // block, -(-self.steps_per_epoch // block)):
            first = number * block
            steps = min(block, self.steps_per_epoch - first)
            shuffled = words(1 + number, lanes * steps * width).reshape(lanes, steps * width)
            place = lane_starts + first * width + np.argsort(shuffled, axis=1, kind="stable")
            at = np.searchsorted(ends, place, "right")
            frames = starts[drawn[at]] + place - (ends - counts[drawn])[at]
            batches = frames.reshape(lanes, steps, width).transpose(1, 0, 2).reshape(steps, -1)
            for batch in batches[max(0, start - first) :]:
                yield batch[self.rank * share : (self.rank + 1) * share]


@dataclass(frozen=True)
class StreamStore:
    """What a folder or URL of shards holds; `Reader` reads its frames.

    A frame's number is its position in the shards, in the order of the manifest.
    """

    where: str
    manifest: Manifest
    why: str  # it is streamed

    @staticmethod
    def open(where: str | Path, why: str = "as asked") -> "StreamStore":
        """Raises InputError if there are no finished shards, or they cannot be read."""
        where = str(where)
        if not is_url(where):
            return StreamStore(where, read_manifest(Path(where)), why)
        text, path = _fetch(where, manifests.NAME), shown(_inside(where, manifests.NAME))
        return StreamStore(where, parse_manifest(text, path), why)

    def __len__(self) -> int:
        return self.manifest.num_frames

    @property
    def size(self) -> int:
        """S: side of a frame in pixels."""
        return self.manifest.settings["size"]

    @property
    def mean(self) -> float:
        return self.manifest.mean

    @property
    def std(self) -> float:
        return self.manifest.std

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def label_names(self) -> list[str]:
        return self.manifest.labels

    @property
    def num_videos(self) -> int:
        return self.manifest.num_videos

    def plan(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> StreamPlan:
        shards = tuple(entry["num_frames"] for entry in self.manifest.shards)
        return StreamPlan(len(self), batch_size, seed, rank, world, shards)


class Reader:
    """Reads frames of a StreamStore by their numbers, in any order; a plan's order is the fast one.

    A shard is fetched when `read_ahead` first names one of its frames, and dropped when all named
    frames are read. Frames and labels do not depend on `threads`, the number of decoder threads.
    `device`: "cpu" decodes on the CPU; "cuda" with nvJPEG on GPU `number`, whose values may
    differ by one grey level, if DALI is installed; otherwise `gpu` is None and the CPU decodes.
    Only one thread may use a Reader.
    """

    def __init__(self, store: StreamStore, threads: int = 1, device: str = "cpu", number: int = 0):
        self.store, self.threads = store, threads
        self.entries = store.manifest.shards
        counts = [entry["num_frames"] for entry in self.entries]
        self.ends = np.cumsum(counts)
        self.classes = {name: i for i, name in enumerate(store.label_names)} | {None: -1}
        self.label: dict[str, int] = {}  # of every video met so far: reading JSON takes 2 us
        self.shards: dict[int, Future[Archive]] = {}
        self.wanted: Counter[int] = Counter()
        self.checked: set[int] = set()
        self.frames = np.empty((0, store.size, store.size), np.uint8)
        on_gpu = device == "cuda" and _has_dali()
        self.gpu = _GpuDecoder(threads, number) if on_gpu else None
        self.fetching = ThreadPoolExecutor(FETCHES, thread_name_prefix="shards")
        self.decoding = ThreadPoolExecutor(threads, thread_name_prefix="jpeg")

    def close(self) -> None:
        """Stop; waits for fetches and decoding under way."""
        for pool in (self.fetching, self.decoding):
            pool.shutdown(wait=True, cancel_futures=True)

    def read_ahead(self, indices: np.ndarray) -> None:
        """Start fetching the shards of these frames; each frame must then be read once."""
        self.wanted.update(self._shard_of(indices).tolist())
        for number in self.wanted:
            if number not in self.shards:
                self.shards[number] = self.fetching.submit(self._open, number)

    def read(self, indices: np.ndarray):
        """Frames (B, S, S) uint8 and labels (B,) int64, -1 without one; `read_ahead` comes first.

        The frames' memory, or the GPU's, is used again by the next call.
        """
        numbers = self._shard_of(indices).tolist()
        shards = [self.shards[number].result() for number in numbers]
        places = indices - self.ends[numbers]  # from the end, below 0
        samples = [shard.samples[place] for shard, place in zip(shards, places, strict=True)]
        labels = np.full(len(indices), -1, np.int64)
        if self.store.label_names:
            labels[:] = [self._label(*x) for x in zip(shards, samples, strict=True)]
        frames = self._decode(shards, samples)
        self.wanted.subtract(numbers)
        for number in set(numbers):
            if self.wanted[number] <= 0:
                del self.wanted[number], self.shards[number]
        return frames, labels

    def _shard_of(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, indices, "right")

    def _open(self, number: int) -> Archive:
        # Verified only once: it costs a twentieth of the decoding.
        shard = fetch_shard(self.store.where, self.entries[number], number not in self.checked)
        self.checked.add(number)
        return shard

    def _label(self, shard: Archive, sample: Sample) -> int:
        video = sample.key.rpartition("-")[0]
        found = self.label.get(video)
        if found is not None:
            return found
        try:
            facts = json.loads(bytes(shard.part(sample.json)))
            self.label[video] = found = self.classes[facts["label"]]
            return found
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(
                f"{shard.name}: {sample.key}.json is damaged ({type(e).__name__}: {e}); {REMEDY}"
            ) from e

    def _decode(self, shards: list, samples: list):
        num = len(samples)
        if self.gpu:
            try:
                return self.gpu([s.part(x.jpg) for s, x in zip(shards, samples, strict=True)])
            except RuntimeError as e:
                failure = e  # DALI does not say which frame failed; the CPU will find it
        if len(self.frames) < num:
            self.frames = np.empty((num, *self.frames.shape[1:]), np.uint8)
        frames = self.frames[:num]

        def some(start: int, stop: int) -> None:
            pairs = zip(shards[start:stop], samples[start:stop], strict=True)
            try:
                decode_jpeg([shard.part(x.jpg) for shard, x in pairs], frames[start:stop])
            except DamagedJpeg as e:
                name, key = shards[start + e.number].name, samples[start + e.number].key
                raise InputError(f"{name}: {key}.jpg is damaged ({e}); {REMEDY}") from e

        if self.threads == 1:
            some(0, num)
        else:
            edges = np.linspace(0, num, self.threads + 1).astype(int).tolist()
            list(self.decoding.map(some, edges[:-1], edges[1:]))
        if self.gpu:
            raise InputError(f"nvJPEG: {str(failure).splitlines()[0]}; use --device cpu")
        return frames


def fetch_shard(where: str, entry: dict, verify: bool = True) -> Archive:
    """A shard in the folder or URL `where`, by its entry in the manifest.

    Raises InputError if it is missing, cut off or damaged; without `verify`, its digest is not
    compared.
    """
    name, data = shown(_inside(where, entry["name"])), _fetch(where, entry["name"])
    if len(data) != entry["bytes"]:
        raise InputError(
            f"{name}: has {len(data)} bytes, but the manifest says {entry['bytes']}; it was cut"
            f" off or replaced. Copy it again, or {REMEDY}"
        )
    if verify and hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise InputError(f"{name}: its digest is wrong; copy it again, or {REMEDY}")
    return Archive(name, data, entry["num_frames"])


def _inside(where: str, name: str) -> str:
    """The file `name` in the folder or URL `where`, whose query, as of a signature, stays last."""
    is_http = where.startswith(("http://", "https://"))
    path, *query = where.split("?", 1) if is_http else [where]
    return "?".join([f"{path.rstrip('/')}/{name}", *query])


def _fetch(where: str, name: str):
    """The content of a file in the folder or URL `where`, as bytes or a memory map."""
    full = _inside(where, name)
    if not is_url(where):
        try:
            with Path(full).open("rb") as f:
                _bus_error.install()
                return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:  # ValueError: it is empty
            why = getattr(e, "strerror", None) or e
            raise InputError(f"{full}: {why}; copy it again, or {REMEDY}") from e
    import fsspec

    told = shown(full)
    for wait in (*WAITS_SECONDS, None):
        try:
            files, path = fsspec.core.url_to_fs(full, **_patience(full))
            return files.cat_file(path)
        except ImportError as e:
            # What the extra of this package holds; gs:// and az:// want packages of their own.
            extra = str(where).startswith(("http://", "https://", "s3://"))
            remedy = "pip install 'sslus[url]'" if extra else "pip install it"
            raise InputError(f"{told}: {e}; {remedy}, or copy the shards to a disk") from e
        except FileNotFoundError as e:
            raise InputError(f"{told}: no such file; is it a URL of shards?") from e
        except Exception as e:  # every protocol has its own errors: botocore's, aiohttp's, ...
            if wait is None:
                why = shown(next(iter(str(e).splitlines()), "")) or "no reason given"
                raise InputError(
                    f"{told}: cannot be read ({type(e).__name__}: {why}); check the network and"
                    " your permissions"
                ) from e
            time.sleep(wait)


def _patience(url: str) -> dict:
    """Options of fsspec for a URL. By default it gives a server of HTTP five minutes for a file:
    too long where the connection is dead, too short for a large shard."""
    if not url.startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout

    each = {"sock_connect": SILENT_SECONDS, "sock_read": SILENT_SECONDS}
    return {"client_kwargs": {"timeout": ClientTimeout(total=None, **each)}}


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the `nvidia` folder exists
        return False


class _GpuDecoder:
    """DALI with nvJPEG: takes a list of JPEGs, gives (B, S, S, 1) uint8 on the GPU for from_dlpack.

    DALI's own shard reader has its own order and cannot start in the middle, so `Reader` reads
    and DALI only decodes.
    """

    def __init__(self, threads: int, number: int = 0, device: str = "mixed"):
        self.threads, self.number, self.device, self.pipes = threads, number, device, {}

    def __call__(self, jpegs: list[memoryview]):
        pipe = self.pipes.get(len(jpegs)) or self._build(len(jpegs))
        return pipe.run(jpegs=[np.frombuffer(x, np.uint8) for x in jpegs])[0].as_tensor()

    def _build(self, num: int):
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(
            batch_size=num, num_threads=self.threads, prefetch_queue_depth=1,
            device_id=self.number if self.device == "mixed" else None,
        )  # fmt: skip
        def pipeline():
            jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(jpegs, device=self.device, output_type=types.GRAY)

        self.pipes[num] = pipe = pipeline()
        pipe.build()
        return pipe
