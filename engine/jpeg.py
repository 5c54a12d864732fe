"""Greyscale JPEGs to pixels: the frames of the shards."""

from collections.abc import Sequence

import numpy as np

from sslus.engine import _jpeg

is_fast = _jpeg.is_fast  # whether this processor decodes faster than libjpeg-turbo


class DamagedJpeg(ValueError):
    """number: which of the files."""

    def __init__(self, number: int, why: object):
        super().__init__(str(why))
        self.number = number


def decode(jpegs: Sequence, out: np.ndarray) -> None:
    """Decode JPEGs (bytes-like objects) into `out`, (B, H, W) uint8, contiguous.

    The pixels are those of libjpeg-turbo with its default, accurate inverse DCT. Raises DamagedJpeg
    for a damaged file and for one of another size; `out` may then hold anything. Other threads can
    run until the last one is decoded. Give many at once: the few lines of Python between two calls
    are in no cache, and take several times as long as usual.
    """
    for number in _jpeg.decode(jpegs, out):
        try:
            _decode_any(jpegs[number], out[number])
        except ValueError as e:
            raise DamagedJpeg(number, e) from e


def _decode_any(jpeg, out: np.ndarray) -> None:
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]  # before memory is allocated for it
    if (height, width) != out.shape:
        raise ValueError(f"its size is {height} x {width}")
    out[:] = simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0]
