"""Which frames form which batch: a pure function of the seed, so there is no state to save."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sslus.engine.errors import InputError

ROUNDING = 1e-4  # seconds; well above the 1e-6 to which shards round timestamps


@dataclass(frozen=True)
class Plan:
    """Every frame once per epoch, in an order that depends only on (seed, epoch).

    A batch is the GLOBAL batch: each of `world` processes takes a slice of it, so the order does
    not depend on the number of processes. The last, partial batch of an epoch is dropped, because
    losses over the batch (variances, correlations) change with its size.

    >>> plan = Plan(num_frames=10, batch_size=4, seed=0)
    >>> plan.steps_per_epoch, [len(batch) for batch in plan.epoch(0)]
    (2, [4, 4])
    """

    num_frames: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if self.batch_size < 2:
            raise InputError(
                f"batch size {self.batch_size}: the losses compare samples; give at least 2"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed {self.seed}: want a whole number from 0 to 2**63 - 1")
        if self.num_frames < self.batch_size:
            smaller = f"--batch-size {self.num_frames} or less, or " * (self.num_frames > 1)
            raise InputError(
                f"{self.num_frames} frames are fewer than one batch of {self.batch_size}:"
                f" give {smaller}more frames"
            )
        if self.batch_size % self.world or not 0 <= self.rank < self.world:
            raise ValueError(
                f"plan: want a batch that {self.world} ranks share evenly and a rank below"
                f" {self.world}, got batch {self.batch_size} and rank {self.rank}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_frames // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """(num_frames,) int64: the frames of one epoch in their order."""
        # Raw Philox words, sorted: numpy may change Generator.permutation between releases, but
        # not the stream of a bit generator, and a run must be able to resume under another numpy.
        words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_frames)
        return np.argsort(words, kind="stable")

    def epoch(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """This rank's index arrays, (batch_size / world,) int64 each, from batch `start` on."""
        order = self.order(epoch)
        share = self.batch_size // self.world
        for step in range(start, self.steps_per_epoch):
            first = step * self.batch_size + self.rank * share
            yield order[first : first + share]


def nearby(
    video: np.ndarray,
    time_seconds: np.ndarray,
    indices: np.ndarray,
    max_seconds: float,
    seed: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A partner from the same video, at most max_seconds away, for each frame of a batch.

    video (N,), time_seconds (N,): of all frames, in the store's order (by video, then time).
    indices: (B,). Returns the partners (B,) int64, drawn uniformly from the other frames in reach
    (a frame without neighbours is its own partner, so clips of one frame work), and the weights
    (B,) float32 of the pairs, (D - d + 1) / (D + 1), where d is the distance of the pair in stored
    frames and D the largest possible one: VanBerlo et al. 2024, IVPP (arXiv:2403.07715).
    A frame's partner depends only on (seed, epoch, frame). Raises InputError if max_seconds is
    not above 0.
    """
    if not max_seconds > 0:  # NaN too
        raise InputError(f"--max-seconds: want more than 0, got {max_seconds}")
    first = np.searchsorted(video, video[indices], "left")
    last = np.searchsorted(video, video[indices], "right")

    def beyond(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether frames b are out of reach of the earlier frames a."""
        return _beyond(time_seconds[a], time_seconds[b], max_seconds)

    low = _bisect(first, indices, lambda at: ~beyond(at, indices))
    high = _bisect(indices + 1, last, lambda at: beyond(indices, at))
    others = high - low - 1
    words = _words(seed, epoch, len(video))[indices]
    partners = low + (words % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
    partners += partners >= indices  # skips the frame itself
    partners = np.where(others > 0, partners, indices)
    reach = np.maximum(indices - low, high - 1 - indices)
    weights = (reach - np.abs(partners - indices) + 1) / (reach + 1)
    return partners, weights.astype(np.float32)


def have_nearby(video: np.ndarray, time_seconds: np.ndarray, max_seconds: float) -> np.ndarray:
    """(N,) bool: which frames have another one of their video in reach, as in `nearby`."""
    reached = ~_beyond(time_seconds[:-1], time_seconds[1:], max_seconds)
    reached &= video[:-1] == video[1:]
    return np.append(reached, False) | np.append(False, reached)


def _beyond(early: np.ndarray, late: np.ndarray, max_seconds: float) -> np.ndarray:
    # Both are off by up to half a step of float32, which after an hour is above ROUNDING.
    return late - early - np.spacing(late) > max_seconds + ROUNDING


def _bisect(low: np.ndarray, high: np.ndarray, holds) -> np.ndarray:
    """The first position in low..high - 1 from which `holds` is true, else high; all (B,)."""
    low, high = low.copy(), high.copy()
    while (busy := low < high).any():
        middle = (low + high) // 2
        found = holds(np.where(busy, middle, 0))
        high = np.where(busy & found, middle, high)
        low = np.where(busy & ~found, middle + 1, low)
    return low


@functools.lru_cache(maxsize=2)
def _words(seed: int, epoch: int, num: int) -> np.ndarray:
    """(num,) uint64: a random number per frame; cached, since many batches ask for it."""
    return np.random.Philox(key=[seed, epoch]).jumped().random_raw(num)
