"""Batches of views, made while the step before them runs."""

import collections
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslus.engine.store import FrameStore
from sslus.kernels.augment import views
from sslus.ssl.views import ViewConfig, draw

# Share of the memory that is free which the whole store may take: the rest is the model's.
GPU_SHARE = 0.5


@dataclass(frozen=True)
class Batch:
    """The frames of one step. first, second: (B,) int64 indices into the store, which differ
    where a view comes from a nearby frame; weights: (B,) float32 of the pairs, or None."""

    epoch: int
    first: np.ndarray
    second: np.ndarray
    weights: np.ndarray | None = None


def tier(store: FrameStore, device: torch.device) -> tuple[str, str]:
    """Where the frames are kept during training, and why: ("gpu" | "ram" | "disk", reason).

    gpu: all of them in the GPU's memory, only indices and parameters cross the bus. ram: memory-
    mapped and read ahead at the start. disk: memory-mapped, each batch read ahead.
    """
    size = store.frames.nbytes
    gb = f"{size / 1e9:.1f} GB of frames"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size <= GPU_SHARE * free:
            return "gpu", f"{gb} fit into {free / 1e9:.0f} GB of free GPU memory"
    if store.fits_in_memory():
        return "ram", f"{gb} fit into memory"
    return "disk", f"{gb} do not fit into memory"


class Loader:
    """Iterating yields (va, vb, weights): two views of every frame of every batch.

    va, vb: (B, 1, size, size) float32, normalised by the store's mean and std, on `device`;
    weights: (B,) float32 or None. A background thread makes them AHEAD batches before they are
    asked for; order and values do not depend on `threads` or on the tier.
    """

    AHEAD = 2  # one to hand over, one in the making

    def __init__(
        self,
        store: FrameStore,
        batches: Iterator[Batch],
        presets: tuple[ViewConfig, ViewConfig],
        *,
        size: int,
        seed: int,
        device: torch.device,
        threads: int = 1,
    ):
        self.store, self.batches, self.presets = store, batches, presets
        self.size, self.seed, self.device, self.threads = size, seed, device, threads
        self.tier, self.why = tier(store, device)
        with warnings.catch_warnings():  # the map is read-only, which PyTorch cannot express
            warnings.simplefilter("ignore", UserWarning)
            self.frames = torch.from_numpy(store.frames)
        if self.tier == "gpu":
            self.frames = self.frames.to(device)
            self.stream = torch.cuda.Stream(device)
        elif self.tier == "ram":
            store.read_ahead()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="views")

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        waiting: collections.deque[Future] = collections.deque()
        for batch in self.batches:
            if self.tier == "disk":
                self.store.read_ahead(np.concatenate([batch.first, batch.second]))
            waiting.append(self.pool.submit(self._make, batch))
            if len(waiting) > self.AHEAD:
                yield self._hand_over(waiting.popleft().result())
        while waiting:
            yield self._hand_over(waiting.popleft().result())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, batch: Batch) -> tuple:
        table = np.concatenate(
            [
                draw(config, frames, view, batch.epoch, self.seed, self.store.size, self.size)
                for view, (config, frames) in enumerate(
                    zip(self.presets, (batch.first, batch.second), strict=True)
                )
            ]
        )
        index = torch.from_numpy(np.concatenate([batch.first, batch.second]).astype(np.int64))
        params = torch.from_numpy(table)
        grey = {"mean": self.store.mean, "std": self.store.std}
        weights = None if batch.weights is None else torch.from_numpy(batch.weights)
        if self.device.type == "cpu":
            out = views(self.frames, index, params, size=self.size, threads=self.threads, **grey)
            return out, weights, None
        if self.tier != "gpu":
            # Pinned memory lets the copy to the GPU run beside its work.
            shape = (len(index), 1, self.size, self.size)
            out = torch.empty(shape, pin_memory=True)
            views(self.frames, index, params, size=self.size, threads=self.threads, out=out, **grey)
            return out, weights, None
        with torch.cuda.stream(self.stream):  # beside the step that runs on the main stream
            index, params = (x.pin_memory().to(self.device, non_blocking=True)
                             for x in (index, params))  # fmt: skip
            out = views(self.frames, index, params, size=self.size, **grey)
            ready = self.stream.record_event()
        return out, weights, ready

    def _hand_over(self, made: tuple) -> tuple[Tensor, Tensor, Tensor | None]:
        out, weights, ready = made
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            out.record_stream(current)  # its memory is not given away before the step is done
        out = out.to(self.device, non_blocking=True)
        if weights is not None:
            weights = weights.to(self.device, non_blocking=True)
        va, vb = out.contiguous(memory_format=torch.channels_last).chunk(2)
        return va, vb, weights
