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
EVERY = 3  # frames between two thumbnails, fewer in short clips: neighbours may hardly differ
FEW, MANY = 33, 256  # thumbnails of a clip, if it has as many frames
CUT = 4.0  # a step between thumbnails, times the usual one: another page or a flash, no motion
# A pixel moves if it changes by more than this many grey levels, and by this share of what the
# liveliest pixels do: compression makes still parts flicker.
LEAST_CHANGE, LEAST_SHARE = 1.0, 0.1
# A part is ultrasound if the median of its pixels changes by this share of the contrast around it:
# text that flickers changes by a twentieth of its contrast, speckle by a tenth to all of it.
LEAST_RATIO, AROUND = 0.08, 5
GAP = 5  # dark tissue hardly changes: still parts that are narrower count as moving
LEAST_PIXELS = 64  # of a part, in the thumbnail
SECOND = 0.25  # other parts of at least this share of the largest: two images side by side
NEARLY_ALL = 0.95  # of the image: a region of more says nothing
MOST = 0.7  # of what moves lies in the parts that are kept, else it is flicker here and there
# A frame shows another screen if, outside of the region, its correlation with the usual screen is
# less than this, and more than this many grey levels (standard deviation) are not explained by it.
SAME, UNEXPLAINED = 0.65, 6.0

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
    """Where ultrasound is.

    inside: (H, W) bool, not all False. screen: if the region was found by what moves, a thumbnail
    (SIDE, SIDE) uint8 of the screen with which this was done.
    """

    inside: np.ndarray
    screen: np.ndarray | None = None

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

    @cached_property
    def _around(self) -> np.ndarray:
        """(SIDE, SIDE) bool: the thumbnail's pixels outside of the region, and not close to it."""
        from scipy import ndimage

        inside = prepare(self.inside.astype(np.uint8) * 255, SIDE) > 0
        near = ndimage.binary_dilation(inside, np.ones((2 * GAP + 1, 2 * GAP + 1)))
        return _image_of(self.inside.shape) & ~near

    def shown(self, luma: np.ndarray, limited: bool) -> bool:
        """Whether a frame shows the screen with which the region was found: another one may have
        text where this one has ultrasound. Its size must be that, too."""
        if luma.shape != self.inside.shape:
            return False
        if self.screen is None or not self._around.any():
            return True
        now = prepare(luma, SIDE, limited=limited)[self._around].astype(np.float64)
        usual = self.screen[self._around].astype(np.float64)
        now, usual = now - now.mean(), usual - usual.mean()
        own = np.sqrt((now * now).mean())
        scale = own * np.sqrt((usual * usual).mean())
        alike = max(0.0, (now * usual).mean() / scale) if scale > 0 else 0.0
        return alike >= SAME or own * np.sqrt(1 - alike * alike) <= UNEXPLAINED


def parse(text: str) -> Box | None:
    """The box of `--region LEFT,TOP,WIDTH,HEIGHT`; None for `all` and `auto`."""
    if text in (WHOLE, MOVING):
        return None
    with contextlib.suppress(ValueError):
        left, top, width, height = map(int, text.split(","))
        if min(left, top) >= 0 and min(width, height) > 0:
            return Box(top, top + height, left, left + width)
    raise InputError(f"--region: want all, auto, or LEFT,TOP,WIDTH,HEIGHT in pixels, got {text!r}")


def find(
    text: str,
    images: Iterator[tuple[Luma, float]],
    num_frames: int,
    declared: Region | None = None,
) -> Region | str:
    """The region of one file for a `--region` other than `all`, or why it has none.

    images: the upright frames, with their times; all are read for `auto`. declared: where the file
    says that its ultrasound is, so that nothing outside is used.
    """
    box, good = parse(text), (luma for luma, _ in images if luma is not None)
    if box is None:
        every = max(1, min(EVERY, num_frames // FEW), num_frames // MANY)
        found = moving(luma() for luma in islice(good, 0, None, every))
        if found is None:
            if declared is not None and declared.inside.mean() <= NEARLY_ALL:
                return declared
            return (
                "nothing in it moves, so that ultrasound and text cannot be told apart; leave it"
                " out, or give --region LEFT,TOP,WIDTH,HEIGHT"
            )
    else:
        first = next(good, None)
        if first is None:
            return "not a single frame can be decoded"
        height, width = first()[0].shape
        if box.bottom > height or box.right > width:
            return f"its image is {width} x {height} pixels, so it has no region {text}"
        found = Region.of_boxes((height, width), (box,))
    if declared is None or declared.inside.shape != found.inside.shape:
        return found
    inside = found.inside & declared.inside
    if not inside.any():
        return f"the regions that it declares are not where --region {text} is"
    return Region(inside, found.screen)


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
        now = prepare(luma, SIDE, limited=limited)
        step = np.subtract(now, thumbnails[-1], dtype=np.int16) if thumbnails else None
        if step is None or np.abs(step).max() > LEAST_CHANGE:
            thumbnails.append(now)
        if len(thumbnails) == 4 * MANY:  # more frames than the file announces
            break
    if len(thumbnails) < 2:
        return None
    parts = _parts(np.stack(thumbnails), _image_of(shape))
    screen = np.median(thumbnails, axis=0).astype(np.uint8)
    return Region(_hulls(parts, shape), screen) if parts else None


def _image_of(shape: tuple[int, int]) -> np.ndarray:
    """(SIDE, SIDE) bool: where the image lies in its thumbnail, whose rest is padding."""
    top, left, height, width = fit(*shape, SIDE)
    image = np.zeros((SIDE, SIDE), bool)
    image[top : top + height, left : left + width] = True
    return image


def _parts(thumbnails: np.ndarray, image: np.ndarray) -> list[np.ndarray]:
    """Masks (SIDE, SIDE) bool of the parts that move. thumbnails: (T, SIDE, SIDE) uint8; image:
    their part that is not padding."""
    from scipy import ndimage

    steps = np.diff(thumbnails.astype(np.float32), axis=0)
    # What the stillest quarter does is flicker of the brightness, no motion.
    rough = np.abs(steps).mean(0)
    still = image & (rough <= np.percentile(rough[image], 25))
    steps -= np.median(steps[:, still], axis=1)[:, None, None]
    changes = np.abs(steps)
    sizes = changes[:, image].mean(1)
    change = changes[sizes <= CUT * np.median(sizes)].mean(0)
    if not (change > LEAST_CHANGE).any():
        return []
    lively = np.percentile(change[change > LEAST_CHANGE / 4], 95)
    moves = image & (change > max(LEAST_CHANGE, LEAST_SHARE * lively))
    mean = thumbnails.mean(0)
    mean, mean_square = (ndimage.uniform_filter(x, AROUND) for x in (mean, mean * mean))
    ratio = change / np.sqrt(np.maximum(mean_square - mean * mean, 1))
    whole = ndimage.binary_opening(moves, np.ones((2, 2)))  # not what is one pixel wide
    whole = ndimage.binary_closing(np.pad(whole, GAP), np.ones((GAP, GAP)))[GAP:-GAP, GAP:-GAP]
    label, num = ndimage.label(whole, np.ones((3, 3)))
    parts = [label == k + 1 for k in range(num)]
    parts = [part for part in parts if np.median(ratio[part & moves]) > LEAST_RATIO]
    least = max([LEAST_PIXELS, *(SECOND * part.sum() for part in parts)])
    parts = [part for part in parts if part.sum() >= least]
    return parts if sum(part.sum() for part in parts) > MOST * whole.sum() else []


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
