"""Batches of views, prepared in the background while the previous step runs."""

import math
import shutil
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslus.engine.errors import InputError
from sslus.engine.manifest import read_manifest
from sslus.engine.plan import Plan
from sslus.engine.store import FrameStore
from sslus.engine.stream import BUFFER, Reader, StreamStore
from sslus.engine.urls import is_url, shown
from sslus.kernels.augment import SMALLEST_STD, views
from sslus.kernels.mask import sample_ids
from sslus.ssl.memory import large_pages
from sslus.ssl.views import ViewConfig, draw

# Share of the free GPU memory that the whole store may take; the rest is for the model.
GPU_SHARE = 0.5
DISK_SHARE = 0.9  # share of the free disk space that a new frame store may take
DRAWN = 2048  # view parameters are drawn for this many frames at a time; 512 take half as long
TIERS = ("auto", "gpu", "ram", "disk", "stream")

Store = FrameStore | StreamStore


@dataclass(frozen=True)
class Batch:
    """The frames of one batch. first, second: (B,) int64 indices into the store, which differ if
    the second view comes from a nearby frame; weights: (B,) float32 of the pairs, or None."""

    epoch: int
    first: np.ndarray
    second: np.ndarray
    weights: np.ndarray | None = None


class Views(NamedTuple):
    """Two views of the frames of one batch, on the training device."""

    va: Tensor  # (B, 1, h, w) float32, normalised by the store's mean and std
    vb: Tensor  # the same; va itself where a method uses only one view
    weights: Tensor | None  # (B,) float32, of the pairs
    ids: Tensor  # (B,) int64, `sample_ids`
    labels: Tensor  # (B,) int64, of the first view's frame; -1 without a label


class _Drawn(NamedTuple):
    """A batch whose views are drawn but not made yet."""

    batch: Batch
    index: Tensor  # (VB,) int64, the frames of the first views, then those of the second ones
    params: Tensor  # (VB, P) float32, of these views
    ids: Tensor  # (B,) int64
    labels: Tensor | None  # (B,) int64; None if the frames are streamed, and labels with them


def open_store(shards: str | Path, tier: str = "auto", pairs: str = "same", **options) -> Store:
    """The frames of a folder or URL of shards: decoded once or, if that cannot be, streamed.

    tier: one of TIERS; "auto" streams URLs, and shards whose frames do not fit on the disk.
    options: rebuild, threads and report of FrameStore.open. Raises InputError if the tier or
    `pairs` "nearby" is impossible or all frames are blank, and the errors of FrameStore.open.
    """
    if tier not in TIERS:
        raise InputError(f"--tier {tier!r}: want one of {', '.join(TIERS)}")
    why = None
    if is_url(shards):
        why = "the shards are at a URL"
    elif tier == "stream":
        why = "as asked"
    elif options.get("rebuild") or not (Path(shards) / "store").exists():
        manifest = read_manifest(Path(shards))
        size = manifest.num_frames * manifest.settings["size"] ** 2
        free = shutil.disk_usage(shards).free
        if size > DISK_SHARE * free:
            why = f"{_bytes(size)} of frames do not fit on the disk, {_bytes(free)} are free"
    if why is None:
        store = FrameStore.open(Path(shards), **options)
        if pairs == "nearby" and len(np.unique(store.video)) == len(store):
            raise InputError("--pairs nearby: no video has two frames; use --pairs same")
    elif tier not in ("auto", "stream"):
        raise InputError(f"--tier {tier}: {why}; use --tier stream, or copy the shards to a disk"
                         " with room")  # fmt: skip
    elif pairs == "nearby":
        raise InputError(
            f"--pairs nearby: frames are streamed ({why}), but those of a video are spread over all"
            " shards; use --pairs same, or copy the shards to a disk with room for the frames"
        )
    else:
        store = StreamStore.open(shards, why)
    if store.std < SMALLEST_STD:
        raise InputError(
            f"{shown(shards)}: all frames are blank, of one grey level, so there is nothing to"
            " learn; look at them (sslus views), and make the shards again from other videos"
        )
    return store


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def plan_of(store: Store, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> Plan:
    """The plan (order of frames) that is fast for this kind of store."""
    if isinstance(store, StreamStore):
        return store.plan(batch_size, seed, rank, world)
    return Plan(len(store), batch_size, seed, rank, world)


def tier(store: Store, device: torch.device, wanted: str = "auto") -> tuple[str, str]:
    """Where the frames are kept during training, and why: ("gpu" | "ram" | "disk" | "stream", ...).

    gpu: all in GPU memory, so that only indices and parameters cross the bus. ram: memory-mapped,
    and read ahead at the start. disk: memory-mapped, and read ahead batch by batch. stream: not
    kept, but decoded each time. Raises InputError if the `wanted` tier is impossible.
    """
    if wanted not in TIERS:
        raise InputError(f"--tier {wanted!r}: want one of {', '.join(TIERS)}")
    if isinstance(store, StreamStore):
        if wanted not in ("auto", "stream"):
            raise InputError(f"--tier {wanted}: the frames are streamed: {store.why}")
        return "stream", store.why
    size = store.frames.nbytes
    on_gpu, in_ram = False, store.fits_in_memory()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What earlier work of this process has freed, PyTorch keeps for it.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        on_gpu = size <= GPU_SHARE * free
    if wanted == "gpu" and not on_gpu:
        why = f"{_bytes(size)} of frames do not fit" if device.type == "cuda" else "there is no GPU"
        raise InputError(f"--tier gpu: {why}; use --tier auto")
    if wanted == "ram" and not in_ram:
        raise InputError(
            f"--tier ram: {_bytes(size)} of frames do not fit into memory; use --tier auto"
        )
    if wanted == "stream":
        raise ValueError("tier: a frame store is not streamed; open_store(shards, 'stream')")
    if wanted != "auto":
        return wanted, f"as asked, {_bytes(size)} of frames"
    if on_gpu:
        return "gpu", f"{_bytes(size)} of frames fit into {_bytes(free)} of free GPU memory"
    if in_ram:
        return "ram", f"{_bytes(size)} of frames fit into memory"
    return "disk", f"{_bytes(size)} of frames do not fit into memory"


class Loader:
    """Iterating yields `Views`: two views of every frame of every batch, on `device`.

    presets: of the views, (first, second) or (first,), which makes only one view. The first views
    are the same in either case.

    A background thread makes them `ahead` batches early (by default one that is ready and one in
    progress); its exceptions are raised when the next batch is requested. Order and values do not
    depend on `threads` or `ahead`, nor on the tier, except that a streamed frame has another
    number than in a frame store, hence other views. Leaving the loop or the `with` block ends the
    thread's work. The memory of a batch is reused once nothing refers to it.
    """

    def __init__(
        self,
        store: Store,
        batches: Iterator[Batch],
        presets: tuple[ViewConfig, ...],
        *,
        size: int,
        seed: int,
        device: torch.device,
        threads: int = 1,
        ahead: int = 2,
        wanted_tier: str = "auto",
    ):
        if ahead < 1:
            raise ValueError(f"loader: want ahead >= 1, got {ahead}")
        self.store, self.batches, self.presets = store, batches, presets
        self.size, self.seed, self.device, self.threads = size, seed, device, threads
        self.ahead = ahead
        self.tier, self.why = tier(store, device, wanted_tier)
        self.memory = _Memory()
        self._gpu_waits: list[tuple] = []
        self.reader = None
        if device.type == "cuda":
            # PyTorch hands out the same 32 streams in turn: with priority, from a pool that the
            # step and the capture of its graph do not use.
            self.stream = torch.cuda.Stream(device, priority=-1)
        if self.tier == "stream":
            self.reader = Reader(store, threads, device.type, device.index or 0)
            if device.type == "cuda" and not self.reader.gpu:
                self.why += "; DALI is not installed: decoded on the CPU"
        else:
            with warnings.catch_warnings():  # the memory map is read-only, unlike PyTorch tensors
                warnings.simplefilter("ignore", UserWarning)
                self.frames = torch.from_numpy(store.frames)
        if self.tier == "gpu":
            self.frames = self.frames.to(device)
        # A new thread's device is the first GPU, where each rank would reserve memory.
        here = (torch.cuda.set_device, (self.stream.device,)) if device.type == "cuda" else ()
        self.pool = ThreadPoolExecutor(1, "views", *here)
        self.advising = ThreadPoolExecutor(1, "read-ahead")  # a busy disk may make it wait
        self.advice: deque[Future] = deque()
        if self.tier == "ram":
            for start in range(0, len(store), DRAWN):  # in pieces, so that it can be stopped
                self._advise(np.arange(start, min(start + DRAWN, len(store))))

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.advising.shutdown(wait=True, cancel_futures=True)
        if self.reader:
            self.reader.close()

    def __iter__(self) -> Iterator[Views]:
        made = self._make_all()
        jobs = deque(self.pool.submit(next, made, None) for _ in range(self.ahead))
        try:
            while True:
                for job in jobs:
                    if job.done():
                        job.result()  # raise the errors of later batches at once
                batch = jobs.popleft().result()
                if batch is None:
                    return
                jobs.append(self.pool.submit(next, made, None))
                yield self._hand_over(*batch)
        finally:
            for job in jobs:
                job.cancel()

    def at_once(self, batch: Batch) -> Views:
        """The views of one batch, made immediately, for a trial."""
        return self._hand_over(*self.pool.submit(self._make_one, batch).result())

    # ------------------------------------------------------------ in the background thread

    def _make_all(self) -> Iterator[tuple]:
        for group in self._groups():
            for drawn in self._draw(group):
                yield self._make(drawn)

    def _make_one(self, batch: Batch) -> tuple:
        if self.tier == "stream":
            self.reader.read_ahead(batch.first)
        return self._make(*self._draw([batch]))

    def _groups(self) -> Iterator[list[Batch]]:
        """Groups of batches with DRAWN frames or more, announced to the read-ahead in advance."""
        horizon = {"disk": DRAWN, "stream": BUFFER}.get(self.tier, 0)  # frames
        waiting: deque[list[Batch]] = deque()
        num_waiting = 0
        for group in _grouped(self.batches):
            if self.tier == "disk":
                self._advise(np.concatenate([x for b in group for x in self._frames_of(b)]))
            elif self.tier == "stream":
                self.reader.read_ahead(np.concatenate([b.first for b in group]))
            most = 2 if self.tier == "disk" else math.inf  # it must not fall behind
            while self.advice and (self.advice[0].done() or len(self.advice) > most):
                self.advice.popleft().result()  # raises what went wrong
            waiting.append(group)
            num_waiting += _num_frames(group)
            while num_waiting > horizon:
                num_waiting -= _num_frames(waiting[0])
                yield waiting.popleft()
        yield from waiting

    def _frames_of(self, batch: Batch) -> tuple[np.ndarray, ...]:
        return (batch.first, batch.second)[: len(self.presets)]

    def _advise(self, frames: np.ndarray) -> None:
        self.advice.append(self.advising.submit(self.store.read_ahead, frames))

    def _draw(self, group: list[Batch]) -> list[_Drawn]:
        """Together for the group: between two batches of views, Python's own data is in no cache,
        and each of its steps takes some ten times as long as usual.

        The draws of both views belong to the first frame, so that a frame which is the partner of
        two others gives each of them a different view.
        """
        lengths = [len(batch.first) for batch in group]
        first = np.concatenate([batch.first for batch in group])
        epoch = np.repeat([batch.epoch for batch in group], lengths)
        tables = [
            draw(config, first, view, epoch, self.seed, self.store.size, self.size)
            for view, config in enumerate(self.presets)
        ]
        all_ids = sample_ids(
            torch.from_numpy(first), seed=self.seed, epoch=torch.from_numpy(epoch)
        ).split(lengths)
        all_labels = [None] * len(group)
        if self.tier != "stream":
            labels = self.store.label[first].astype(np.int64)
            all_labels = torch.from_numpy(labels).split(lengths)
        drawn, end = [], 0
        for batch, ids, labels in zip(group, all_ids, all_labels, strict=True):
            start, end = end, end + len(batch.first)
            index = np.concatenate(self._frames_of(batch))
            params = np.concatenate([table[start:end] for table in tables])
            drawn.append(
                _Drawn(batch, torch.from_numpy(index), torch.from_numpy(params), ids, labels)
            )
        return drawn

    def _make(self, drawn: _Drawn) -> tuple:
        batch, index, params, ids, labels = drawn
        on_gpu = self.device.type == "cuda"
        if self.tier == "stream":
            if batch.second is not batch.first and (batch.second != batch.first).any():
                raise ValueError("loader: in the stream tier, both views must be of the same frame")
            frames, labels = self.reader.read(batch.first)
            frames = self._on_gpu(frames) if self.reader.gpu else torch.from_numpy(frames)
            index = torch.arange(len(labels)).repeat(len(self.presets))
            labels = torch.from_numpy(labels)
        else:
            frames = self.frames
        weights = None if batch.weights is None else torch.from_numpy(batch.weights)
        rest = (weights, ids, labels)
        if on_gpu:
            with torch.cuda.stream(self.stream):
                rest = tuple(x if x is None else self._send(x) for x in rest)
        options = {"size": self.size, "mean": self.store.mean, "std": self.store.std}
        if not frames.is_cuda:
            shape = (len(index), 1, self.size, self.size)
            # Pinned memory lets the copy overlap with the GPU's work.
            out = torch.empty(shape, pin_memory=True) if on_gpu else self.memory.tensor(shape)
            views(frames, index, params, out=out, threads=self.threads, **options)
            if not on_gpu:
                return out, rest, None
        with torch.cuda.stream(self.stream):  # concurrent with the step on the main stream
            if frames.is_cuda:
                out = views(frames, self._send(index), self._send(params), **options)
            else:
                out = out.to(self.device, non_blocking=True)
            ready = self.stream.record_event()
        return out, rest, ready

    def _send(self, x: Tensor) -> Tensor:
        """Copy to the GPU asynchronously, which needs pinned memory."""
        return x.pin_memory().to(self.device, non_blocking=True)

    def _on_gpu(self, frames) -> Tensor:
        """A copy of frames that DALI has decoded, since it will reuse their memory."""
        with torch.cuda.stream(self.stream):
            frames = torch.from_dlpack(frames)[..., 0].clone()
        self.stream.synchronize()
        return frames

    # ------------------------------------------------------------ in the caller's thread

    def gpu_waits(self) -> list[tuple]:
        """Pairs of CUDA events since the last call, between which the GPU waited for views."""
        waits, self._gpu_waits = self._gpu_waits, []
        return waits

    def _hand_over(self, out: Tensor, rest: tuple, ready) -> Views:
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(current)
            current.wait_event(ready)
            after.record(current)
            self._gpu_waits.append((before, after))
            for x in (out, *rest):
                if x is not None:
                    x.record_stream(current)  # keeps its memory until the step is done
        made = out.chunk(len(self.presets))  # with one channel this is channels_last too
        return Views(made[0], made[-1], *rest)


def _grouped(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if _num_frames(group) >= DRAWN:
            yield group
            group = []
    if group:
        yield group


def _num_frames(group: list[Batch]) -> int:
    return sum(len(batch.first) for batch in group)


class _Memory:
    """Reuses memory for batches: page faults in new blocks cost up to four times the views."""

    def __init__(self):
        self.blocks: list[tuple[weakref.ref, np.ndarray]] = []  # what its tensor keeps alive

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor; its memory comes back when no tensor refers to it."""
        length = math.prod(shape)
        place, block = len(self.blocks), None
        for i, (lent, unused) in enumerate(self.blocks):
            if lent() is None:
                place, block = i, unused
                break
        if block is None or len(block) < length:
            block = large_pages(length)
        view = block[:length].reshape(shape)  # an object of its own, kept alive by the tensor
        self.blocks[place : place + 1] = [(weakref.ref(view), block)]
        return torch.from_numpy(view)
