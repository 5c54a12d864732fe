"""Views: random crops, flips, intensity changes and blur of a frame, for two-view learning.

The random numbers are drawn first, into a table with one row a view and the columns COLUMNS,
and applied after. A row is a function of (seed, epoch, frame, view) alone, so a view does not
change with the batch it is in, the number of threads, or the number of processes.
"""

import collections
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

COLUMNS = (
    "top",  # crop in pixels of the stored frame, whole numbers
    "left",
    "height",
    "width",
    "flip",  # 1 = left and right exchanged
    "brightness",  # factor; 1 = as it is
    "contrast",  # factor about the view's mean
    "gamma",  # exponent
    "sigma",  # of the Gaussian blur, in pixels of the view; 0 = none
)


@dataclass(frozen=True)
class ViewConfig:
    """How strongly the views of one frame differ: the preset for ultrasound.

    No vertical flip: near and far field have a meaning. No hue, saturation or grayscale:
    they do nothing to a grey frame. Brightness is the machine's gain, gamma its dynamic range.
    """

    min_area: float = 0.2  # of the frame; the crop's share is uniform from here to 1
    max_aspect: float = 4 / 3  # log-uniform from its inverse; more would deform anatomy
    flip: float = 0.5  # probability: the probe can be held either way
    jitter: float = 0.8  # probability of the three intensity changes together
    brightness: float = 0.4  # factor 1 +- this
    contrast: float = 0.4
    gamma: float = 0.3  # exponent exp(+- this)
    blur: float = 0.5  # probability
    max_sigma: float = 0.009  # of the view's side: 2 px at 224, as in SimCLR; from a 20th of it


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10: (N, 4) uint32 counters -> (N, 4) uint32 random words.

    A counter-based generator: word i needs no word before it. Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"; the generator of Triton's `tl.rand` and of cuRAND.
    """
    a, b, c, d = (counter[:, i].astype(np.uint64) for i in range(4))
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (q >> np.uint64(32)) ^ b ^ np.uint64(k0),
            q & low,
            (p >> np.uint64(32)) ^ d ^ np.uint64(k1),
            p & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def draw(
    config: ViewConfig, frames: np.ndarray, view: int, epoch: int, seed: int, store: int, size: int
) -> np.ndarray:
    """The table of one view of each frame: (B, len(COLUMNS)) float32.

    frames: (B,) indices into the frame store. view: 0 or 1. store, size: side of a stored
    frame and of a view, in pixels.
    """
    counter = np.empty((3, len(frames), 4), np.uint32)  # 3 blocks of 4 words: 11 are needed
    counter[..., 0] = frames
    counter[..., 1] = view
    counter[..., 2] = epoch
    counter[..., 3] = np.arange(3)[:, None]
    words = philox(counter.reshape(-1, 4), seed).reshape(3, len(frames), 4)
    # 24 bits fill a float32's mantissa: uniform in [0, 1) and never rounded up to 1.
    u = ((words >> 8) * 2.0**-24).transpose(0, 2, 1).reshape(12, len(frames))
    c = config

    area = c.min_area + (1 - c.min_area) * u[0]
    aspect = np.exp(np.log(c.max_aspect) * (2 * u[1] - 1))
    height = np.clip(np.rint(np.sqrt(area / aspect) * store), 1, store)
    width = np.clip(np.rint(np.sqrt(area * aspect) * store), 1, store)
    top = np.floor(u[2] * (store - height + 1))
    left = np.floor(u[3] * (store - width + 1))
    jitter, blur = u[5] < c.jitter, u[9] < c.blur
    table = np.empty((len(frames), len(COLUMNS)), np.float32)
    for i, column in enumerate(
        (
            top,
            left,
            height,
            width,
            u[4] < c.flip,
            np.where(jitter, 1 + c.brightness * (2 * u[6] - 1), 1),
            np.where(jitter, 1 + c.contrast * (2 * u[7] - 1), 1),
            np.where(jitter, np.exp(c.gamma * (2 * u[8] - 1)), 1),
            np.where(blur, c.max_sigma * size * (0.05 + 0.95 * u[10]), 0),
        )
    ):
        table[:, i] = column
    return table


def identity(num_views: int, store: int) -> np.ndarray:
    """The table that changes nothing but the size."""
    return np.tile(np.float32([0, 0, store, store, 0, 1, 1, 1, 0]), (num_views, 1))


def apply(frames: np.ndarray, table: np.ndarray, size: int, out: Tensor) -> None:
    """Make one view of each frame: frames (V, S, S) uint8 -> out (V, 1, size, size) float32.

    In the order of COLUMNS: crop, resize (bilinear, antialiased), flip, brightness, contrast,
    gamma, blur; values 0..1. The frames are not changed.
    """
    for frame, row, view in zip(frames, table.tolist(), out, strict=True):
        top, left, height, width, flip, brightness, contrast, gamma, sigma = row
        top, left, height, width = int(top), int(left), int(height), int(width)
        x = torch.from_numpy(frame[None, top : top + height, left : left + width])
        x = F.resize(x.float().div_(255), [size, size], antialias=True)
        if flip:
            x = F.horizontal_flip(x)
        if brightness != 1:
            x = F.adjust_brightness(x, brightness)
        if contrast != 1:
            x = F.adjust_contrast(x, contrast)
        if gamma != 1:
            x = F.adjust_gamma(x, gamma)
        if sigma:
            # Rows, then columns: torchvision convolves with the full k x k kernel, which at
            # 224 px is 8 times the work. 3 sigma leaves out 0.3 % of the Gaussian.
            k = 2 * min(int(np.ceil(3 * sigma)), size - 1) + 1
            x = F.gaussian_blur(F.gaussian_blur(x, [k, 1], [sigma, sigma]), [1, k], [sigma, sigma])
        view.copy_(x)


class Loader:
    """Two views of every frame of every batch, made by threads while the last step runs.

    Iterating yields (va, vb), each (B, 1, size, size) float32, normalised by the store's mean
    and std, on `device`. The order and the values do not depend on `threads`.
    """

    AHEAD = 2  # batches in the making: one to hand over, one to keep the threads busy
    CHUNK = 16  # views a task: long enough to hide a task's cost, short enough to share out

    def __init__(
        self,
        store,
        batches: Iterator[tuple[int, np.ndarray]],
        config: ViewConfig,
        *,
        size: int,
        seed: int,
        device: torch.device,
        threads: int | None = None,
    ):
        """batches: (epoch, indices (B,) into the store) of each step, in order."""
        self.store, self.batches, self.config = store, batches, config
        self.size, self.seed, self.device = size, seed, device
        # One thread each: dozens of tiny operations, which more threads would only delay.
        self.pool = ThreadPoolExecutor(
            threads or max(1, (os.cpu_count() or 1) - 1),
            thread_name_prefix="views",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: collections.deque[tuple[Tensor, list[Future]]] = collections.deque()
        for epoch, indices in self.batches:
            waiting.append(self._submit(epoch, indices))
            if len(waiting) > self.AHEAD:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _submit(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, list[Future]]:
        indices = indices.copy()
        tables = [
            draw(self.config, indices, view, epoch, self.seed, self.store.size, self.size)
            for view in (0, 1)
        ]
        # Pinned memory lets the copy to the GPU run beside its work.
        out = torch.empty(
            (2, len(indices), 1, self.size, self.size), pin_memory=self.device.type == "cuda"
        )
        futures = [
            self.pool.submit(self._chunk, indices[i:j], tables[view][i:j], out[view, i:j])
            for view in (0, 1)
            for i in range(0, len(indices), self.CHUNK)
            for j in [i + self.CHUNK]
        ]
        return out, futures

    @torch.inference_mode()
    def _chunk(self, indices: np.ndarray, table: np.ndarray, out: Tensor) -> None:
        apply(self.store.frames[indices], table, self.size, out)
        out.sub_(self.store.mean).div_(self.store.std)

    def _finish(self, out: Tensor, futures: list[Future]) -> tuple[Tensor, Tensor]:
        for future in futures:
            future.result()
        va, vb = out.to(self.device, non_blocking=True)
        return (
            va.contiguous(memory_format=torch.channels_last),
            vb.contiguous(memory_format=torch.channels_last),
        )


@torch.inference_mode()
def whole(frames: np.ndarray, size: int, mean: float, std: float) -> Tensor:
    """Whole frames as a backbone wants them: (B, S, S) uint8 -> (B, 1, size, size) float32.

    Resized and normalised like a view, nothing else: what the evaluation looks at.
    """
    out = torch.empty((len(frames), 1, size, size))
    apply(frames, identity(len(frames), frames.shape[1]), size, out)
    return out.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
