"""Still pictures: each is a video of one frame. Pillow decodes them, not FFmpeg, which recognises
some JPEGs by their names alone and takes what is cut off for whole.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslus.engine import video
from sslus.engine.errors import out_of_memory
from sslus.engine.prepare import rgb_luma, rgba_luma
from sslus.engine.region import Luma
from sslus.engine.video import PyavBackend, VideoError, VideoInfo

EXTENSIONS = frozenset(".bmp .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # of Pillow's many
# How such files begin. What else has one of the extensions is left to FFmpeg.
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"RIFF")
END_OF_PNG, END_OF_JPEG, START_OF_SCAN = b"IEND\xaeB`\x82", b"\xff\xd9", 0xDA
CODEC = "picture"  # how VideoInfo.codec begins
ORIENTATION = 0x0112  # a tag of EXIF and TIFF
BITS, WHITE = 0x0102, 0x0106  # tags of TIFF: bits of a pixel; 0 if its lowest value is white
IN_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # what may tell it there
# Its values: quarter turns counterclockwise, and whether the image is mirrored before that.
TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True),
         8: (1, False)}  # fmt: skip


def is_picture(path: Path) -> bool:
    """By its extension, as videos are found in folders, and by its first bytes."""
    if path.suffix.lower() not in EXTENSIONS or not path.is_file():
        return False
    try:
        with path.open("rb") as f:
            head = f.read(12)
    except OSError:  # `video` says why
        return False
    return head.startswith(STARTS) and (head[:4] != b"RIFF" or head[8:] == b"WEBP")


def probe(path: Path) -> VideoInfo:
    """Read what a picture says about itself. Raises VideoError if it cannot be read."""
    with _opened(path) as picture:
        kind, num = picture.format, getattr(picture, "n_frames", 1)
        turned = _turn(picture, path)[0] % 2 and kind != "TIFF"  # whose size Pillow has turned
        width, height = picture.size[:: -1 if turned else 1]
        mode = picture.mode
    if num > 1 and kind == "PNG":  # an animation, which FFmpeg reads
        return video.probe(path)
    if num > 1 and kind != "MPO":  # a JPEG, followed by previews or the view of another eye
        raise VideoError(path, f"holds {num} pictures; save each in a file, or make a video of it")
    return VideoInfo(
        codec=f"{CODEC} {kind.lower()}",
        pixel_format=mode.lower(),
        height=height,
        width=width,
        rate_hz=0.0,
        num_frames=1,
        full_range=True,
    )


def luma(path: Path) -> np.ndarray:
    """The luma of a picture, (H, W) uint8, upright. Raises VideoError if the picture is not whole.

    Grey and the Y of a JPEG stay as they are stored, 12 and 16 bits are rounded to 8, colours give
    BT.601 luma. Behind what is transparent is black.
    """
    with _opened(path) as picture:
        picture.draft("L", picture.size)  # of a JPEG the Y, at full size; other formats ignore it
        picture.load()
        if not _ends(path.read_bytes(), picture.format):
            raise OSError("its end is missing")
        turns, mirrored = _turn(picture, path)
        y = _luma(picture)
    return np.ascontiguousarray(np.rot90(y[:, ::-1] if mirrored else y, turns))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of odd tags, for each file
            path.open("rb") as f,
            Image.open(f, formats=FORMATS) as picture,
        ):
            yield picture
    except UnidentifiedImageError as e:  # names an address in memory
        raise VideoError(path, "not a readable picture, or cut off at its start") from e
    except Exception as e:  # of a dozen kinds, SyntaxError among them
        if out_of_memory(e):
            raise
        said = f"{e}".partition("\n")[0] or type(e).__name__
        raise VideoError(path, f"the picture cannot be decoded ({said})") from e


def _ends(data: bytes, kind: str) -> bool:
    """Pillow stops at the last pixel; what is there of a file that was cut off may be zeros."""
    if kind == "PNG":
        return END_OF_PNG in data
    if kind in ("JPEG", "MPO"):  # a thumbnail in one of the first segments has an end, too
        at = 2
        while (mark := data[at + 1]) != START_OF_SCAN:
            at += 1 if mark == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
        return END_OF_JPEG in data[at:]
    return True


def _turn(picture, path: Path) -> tuple[int, bool]:
    if picture.format == "PNG":  # of which Pillow decodes all to look for it behind the pixels
        data = path.read_bytes()
        if not any(mark in data for mark in IN_PNG):
            return 0, False
    try:
        orientation = picture.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF turns nothing; where it is the picture, decoding it says so
        orientation = None
    return TURNS.get(orientation, (0, False))


def _luma(picture) -> np.ndarray:
    mode = picture.mode
    if mode.startswith("I;16"):
        tags = picture.tag_v2 if picture.format == "TIFF" else {}
        (bits,) = tags.get(BITS, (16,))
        most = (1 << bits) - 1
        y = np.asarray(picture).astype(np.uint32)
        y = ((y * 255 + most // 2) // most).astype(np.uint8)
        return 255 - y if tags.get(WHITE) == 0 else y  # Pillow inverts at most 8 bits
    if mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; convert it to 8 or 16")
    if picture.has_transparency_data:
        return rgba_luma(np.asarray(picture.convert("RGBA")))
    if mode in ("1", "L"):
        return np.asarray(picture.convert("L"))
    return rgb_luma(np.asarray(picture.convert("RGB")))


@dataclass(frozen=True)
class PictureBackend(PyavBackend):
    """Pictures: as PyavBackend, but Pillow decodes."""

    name = "pillow"

    def images(self, path: Path) -> Iterator[tuple[Luma, float]]:
        y = luma(path)
        yield lambda: (y, False), 0.0
