"""Which part of the images goes into the shards: beside the ultrasound, names and dates are shown.

Machines burn text, scales and logos into the image around the ultrasound. They stand still (or
change in small places, as a clock does), whereas speckle moves even between two heartbeats.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np

from sslus.engine.errors import InputError
from sslus.engine.prepare import fit, prepare

WHOLE, MOVING = "all", "auto"

SIDE = 128  # of the thumbnails that are compared, in pixels
NUM_CHANGES = 32  # differences between two thumbnails, averaged
EVERY = 3  # frames between two thumbnails, fewer in short clips: neighbours may hardly differ
# A pixel moves if it changes by more than this many grey levels, and by this share of what the
# liveliest pixels do: compression makes still parts flicker.
LEAST_CHANGE, LEAST_SHARE = 1.0, 0.1
# A part is ultrasound if the median of its pixels changes by this share of the contrast around it.
# Flickering text changes by a twentieth of its contrast, speckle by a quarter and more.
LEAST_RATIO, AROUND = 0.15, 5
GAP = 5  # dark tissue hardly changes: still parts that are narrower count as moving
LEAST_PIXELS = 64  # of a part, in the thumbnail
SECOND = 0.25  # other parts of at least this share of the largest: two images side by side

# Gives the luma (H, W) uint8 of a frame, and whether its range is limited; not called for frames
# that are not kept. None for a damaged frame.
Luma = Callable[[], tuple[np.ndarray, bool]] | None


class Box(NamedTuple):
    """Part of an image, as in luma[top:bottom, left:right]."""

    top: int
    bottom: int
    left: int
    right: int

    def __str__(self) -> str:
        """As `--region` takes it."""
        return f"{self.left},{self.top},{self.right - self.left},{self.bottom - self.top}"

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Region:
    """Where ultrasound is. inside: (H, W) bool, not all False."""

    inside: np.ndarray

    @classmethod
    def of_boxes(cls, shape: tuple[int, int], boxes: tuple[Box, ...]) -> "Region":
        inside = np.zeros(shape, bool)
        for box in boxes:
            inside[box.slices] = True
        return cls(inside)

    @cached_property
    def box(self) -> Box:
        """The smallest part of the image that holds all of it."""
        ends = (np.flatnonzero(self.inside.any(axis))[[0, -1]] + (0, 1) for axis in (1, 0))
        return Box(*np.concatenate(list(ends)).tolist())

    @cached_property
    def outside(self) -> np.ndarray | None:
        """Bool, as large as the box: what of the box does not belong to it; None if nothing."""
        outside = ~self.inside[self.box.slices]
        return outside if outside.any() else None

    def cut(self, luma: np.ndarray) -> np.ndarray:
        """The box of a frame of the same size, with black where ultrasound is not."""
        part = luma[self.box.slices]
        return part if self.outside is None else np.where(self.outside, np.uint8(0), part)


def parse(text: str) -> Box | None:
    """The box of `--region LEFT,TOP,WIDTH,HEIGHT`; None for `all` and `auto`."""
    if text in (WHOLE, MOVING):
        return None
    with contextlib.suppress(ValueError):
        left, top, width, height = map(int, text.split(","))
        if min(left, top) >= 0 and min(width, height) > 0:
            return Box(top, top + height, left, left + width)
    raise InputError(f"--region: want all, auto, or LEFT,TOP,WIDTH,HEIGHT in pixels, got {text!r}")


def find(text: str, images: Iterator[tuple[Luma, float]], num_frames: int) -> Region | str:
    """The region of one file for a `--region` other than `all`, or why it has none.

    images: the upright frames, with their times, of which no more are read than needed.
    """
    box = parse(text)
    lumas = (luma() for luma, _ in images if luma is not None)
    if box is None:
        every = min(EVERY, max(1, num_frames // NUM_CHANGES))
        return moving(islice(lumas, 0, None, every)) or (
            "nothing in it moves, so that ultrasound and text cannot be told apart; leave it out,"
            " or give --region LEFT,TOP,WIDTH,HEIGHT"
        )
    first = next(lumas, None)
    if first is None:
        return "not a single frame can be decoded"
    height, width = first[0].shape
    if box.bottom > height or box.right > width:
        return f"its image is {width} x {height} pixels, so it has no region {text}"
    return Region.of_boxes((height, width), (box,))


def moving(lumas: Iterator[tuple[np.ndarray, bool]]) -> Region | None:
    """The convex hull of what changes from frame to frame; None if nothing does.

    Of parts that do not touch, only the largest counts, and those of a similar size. Frames that
    only repeat the previous one are passed over.
    """
    shape, thumbnails = None, []
    for luma, limited in lumas:
        shape = shape or luma.shape
        if luma.shape != shape:
            continue
        now = prepare(luma, SIDE, limited=limited).astype(np.float32)
        if not thumbnails or np.abs(now - thumbnails[-1]).max() > LEAST_CHANGE:
            thumbnails.append(now)
        if len(thumbnails) > NUM_CHANGES:
            break
    parts = _parts(np.stack(thumbnails)) if len(thumbnails) > 1 else []
    return Region(_hulls(parts, shape)) if parts else None


def _parts(thumbnails: np.ndarray) -> list[np.ndarray]:
    """Masks (SIDE, SIDE) bool of the parts that move. thumbnails: (T, SIDE, SIDE) float32."""
    from scipy import ndimage

    change = np.abs(np.diff(thumbnails, axis=0)).mean(0)
    lively = np.percentile(change[change > LEAST_CHANGE / 4], 95)
    moves = change > max(LEAST_CHANGE, LEAST_SHARE * lively)
    image = thumbnails.mean(0)
    mean, mean_square = (ndimage.uniform_filter(x, AROUND) for x in (image, image * image))
    ratio = change / np.sqrt(np.maximum(mean_square - mean * mean, 1))
    whole = ndimage.binary_opening(moves, np.ones((2, 2)))  # not what is one pixel wide
    whole = ndimage.binary_closing(np.pad(whole, GAP), np.ones((GAP, GAP)))[GAP:-GAP, GAP:-GAP]
    label, num = ndimage.label(whole, np.ones((3, 3)))
    parts = [label == k + 1 for k in range(num)]
    parts = [part for part in parts if np.median(ratio[part & moves]) > LEAST_RATIO]
    least = max([LEAST_PIXELS, *(SECOND * part.sum() for part in parts)])
    return [part for part in parts if part.sum() >= least]


def _hulls(parts: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The convex hulls of parts of a thumbnail, in the image it was made from: bool of `shape`."""
    from PIL import Image, ImageDraw
    from scipy.spatial import ConvexHull

    top, left, height, width = fit(*shape, SIDE)
    scale = np.array([shape[1] / width, shape[0] / height])
    image = Image.new("1", shape[::-1])
    for part in parts:
        y, x = np.nonzero(part)
        corners = np.concatenate([np.c_[x + i, y + j] for i in (0, 1) for j in (0, 1)])
        points = (corners[ConvexHull(corners).vertices] - (left, top)) * scale
        ImageDraw.Draw(image).polygon([tuple(p) for p in points.tolist()], fill=1)
    return np.array(image)
