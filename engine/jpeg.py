"""Greyscale JPEGs to pixels: the frames of the shards."""

import numpy as np

from sslus.engine import _jpeg

is_fast = _jpeg.is_fast  # whether this processor decodes faster than libjpeg-turbo


def decode(jpeg, out: np.ndarray) -> None:
    """Decode a JPEG (anything with the buffer protocol) into `out`, (H, W) uint8, contiguous.

    The pixels are those of libjpeg-turbo with its default, accurate inverse DCT. Raises ValueError
    for a damaged file and for one of another size; `out` may then hold anything.
    """
    if _jpeg.decode(np.frombuffer(jpeg, np.uint8), out):
        return
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]  # before memory is allocated for it
    if (height, width) != out.shape:
        raise ValueError(f"its size is {height} x {width}")
    out[:] = simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0]
