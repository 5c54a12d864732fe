"""From a decoded luma plane to the square frame that is stored."""

from functools import lru_cache

import numpy as np

from sslus.engine import _luma

WEIGHT_SCALE = 1 << 14  # luma.cpp's kWeightBits

moments = _luma.moments


def expand_limited(luma: np.ndarray) -> np.ndarray:
    """Limited-range luma 16..235 to full range 0..255: round((y - 16) * 255 / 219), clipped.

    luma: (H, W) uint8, rows may be strided. Returns a new (H, W) uint8 array.
    """
    out = np.empty(luma.shape, np.uint8)
    _luma.expand(luma, out)
    return out


def rgb_luma(rgb: np.ndarray) -> np.ndarray:
    """BT.601 luma of RGB: round(.299 R + .587 G + .114 B), which leaves grey pixels unchanged.

    rgb: (H, W, 3) uint8, with any strides. Returns a new (H, W) uint8 array.
    """
    out = np.empty(rgb.shape[:2], np.uint8)
    _luma.rgb(rgb, out)
    return out


def rgba_luma(rgba: np.ndarray) -> np.ndarray:
    """As rgb_luma, of (H, W, 4) uint8; behind what is transparent is black."""
    out, alpha = rgb_luma(rgba[..., :3]), rgba[..., 3]
    if not alpha.any():  # AVIs of 32 bits may leave it 0, and are opaque
        return out
    return ((out.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def fit(height: int, width: int, size: int, pixel_aspect: float = 1.0) -> tuple[int, int, int, int]:
    """Where an image lies in the size x size frame: (top, left, new height, new width).

    The longer side becomes `size`, and the other follows from the aspect ratio; the image is
    centred. `pixel_aspect` is the width of a pixel over its height (not 1 in anamorphic video).
    """
    shown = width * pixel_aspect
    longer = max(height, shown)
    new_height = min(size, max(1, round(height * size / longer)))
    new_width = min(size, max(1, round(shown * size / longer)))
    return (size - new_height) // 2, (size - new_width) // 2, new_height, new_width


def prepare(
    luma: np.ndarray, size: int, pixel_aspect: float = 1.0, limited: bool = False
) -> np.ndarray:
    """Scale a frame into a black square, preserving its aspect ratio.

    luma: (H, W) uint8, rows may be strided; limited: of limited range, expand_limited comes first.
    Returns (size, size) uint8, owned by the caller. Antialiased with a triangle filter (what Pillow
    calls BILINEAR and torchvision antialias=True) in integer arithmetic: the same bytes on every
    machine, within 0.6 grey levels of the exact filter.
    """
    height, width = luma.shape
    top, left, new_height, new_width = fit(height, width, size, pixel_aspect)
    out = np.empty((size, size), np.uint8)
    taps = *_taps(height, new_height), *_taps(width, new_width)
    _luma.resize(luma, limited, out, top, left, *taps)
    return out


@lru_cache(maxsize=256)
def _taps(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First input pixel (new_length,) and integer weights (new_length, taps) of each output pixel.

    Triangle of half-width max(1, length / new_length) around (i + 0.5) * length / new_length.
    """
    scale = length / new_length
    reach = max(1.0, scale)
    centre = (np.arange(new_length) + 0.5) * scale
    first = np.maximum(np.ceil(centre - reach - 0.5), 0).astype(np.int32)
    last = np.minimum(np.floor(centre + reach - 0.5), length - 1).astype(np.int32)
    num_taps = int((last - first).max()) + 1
    start = np.minimum(first, length - num_taps)
    at = start[:, None] + np.arange(num_taps) + 0.5
    weight = np.maximum(0.0, 1.0 - np.abs(at - centre[:, None]) / reach)
    weight *= WEIGHT_SCALE / weight.sum(1, keepdims=True)
    whole = np.rint(weight).astype(np.int32)
    # Rounded weights must still sum to 1, or a constant image would change: adjust the largest.
    whole[np.arange(new_length), whole.argmax(1)] += WEIGHT_SCALE - whole.sum(1)
    return start.astype(np.int32), whole
