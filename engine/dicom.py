"""Ultrasound DICOM files: find, probe, decode their luma on the CPU.

Of the header, only the attributes listed in HEADER are read, none of which is about the patient. A
file declares where its images lie (Ultrasound Region Calibration, PS3.3 C.8.5.5); frames are
cropped to those regions, so that the name and the date beside them do not reach the shards.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sslus.engine import _luma
from sslus.engine.prepare import prepare, rgb_luma
from sslus.engine.video import Keep, Prepared, VideoError, VideoInfo, decoded, plane
from sslus.engine.video import probe as probe_video

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
MODALITIES = frozenset({"US", "IVUS"})  # (0008,0060), PS3.3 C.7.3.1.1.1
HEADER = (
    0x00080060,  # Modality
    0x00082144,  # Recommended Display Frame Rate
    0x00180040,  # Cine Rate
    0x00181063,  # Frame Time
    0x00181065,  # Frame Time Vector
    0x00186011,  # Sequence of Ultrasound Regions
    0x00280002,  # Samples per Pixel
    0x00280004,  # Photometric Interpretation
    0x00280006,  # Planar Configuration
    0x00280008,  # Number of Frames
    0x00280010,  # Rows
    0x00280011,  # Columns
    0x00280034,  # Pixel Aspect Ratio
    0x00280100,  # Bits Allocated
    0x00280101,  # Bits Stored
    0x00280103,  # Pixel Representation
    *range(0x00281101, 0x00281104),  # Palette Color Lookup Table Descriptors
    *range(0x00281201, 0x00281204),  # and their data,
    *range(0x00281221, 0x00281224),  # or segmented data
)

# Transfer syntaxes, PS3.5 A. FFmpeg decodes images of these, each by itself:
IMAGE_CODECS = {
    "1.2.840.10008.1.2.4.50": "mjpeg",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "mjpeg",  # extended
    "1.2.840.10008.1.2.4.57": "mjpeg",  # lossless
    "1.2.840.10008.1.2.4.70": "mjpeg",  # lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "jpegls",
    "1.2.840.10008.1.2.4.81": "jpegls",
    "1.2.840.10008.1.2.4.90": "jpeg2000",
    "1.2.840.10008.1.2.4.91": "jpeg2000",
}
# With these, the fragments joined are a video: MPEG-2 .100 and .101, H.264 .102 to .106, HEVC .107
# and .108; a ".1" after that allows several fragments.
VIDEOS = tuple(f"1.2.840.10008.1.2.4.{n}" for n in range(100, 109))
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
BIG_ENDIAN = "1.2.840.10008.1.2.2"
RLE = "1.2.840.10008.1.2.5"

ITEM = b"\xfe\xff\x00\xe0"  # the tag before each fragment
# Of an image: SOI of JPEG and JPEG-LS, SOC of JPEG 2000, and the signature of JPEG 2000's file
# format, which does not belong there but is met.
STARTS = (b"\xff\xd8", b"\xff\x4f", b"\0\0\0\x0cjP  ")
TWO_DIMENSIONAL = 1  # Region Spatial Format: not M-mode, a spectrum or a colour bar
USUAL_HZ = 25.0  # if the file does not tell


def is_dicom(path: Path) -> bool:
    """Whether a file is named or begins like one of DICOM (PS3.10, 7.1)."""
    try:
        if path.suffix.lower() in SUFFIXES or not path.is_file():  # a pipe could block forever
            return path.suffix.lower() in SUFFIXES
        with path.open("rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_ultrasound(path: Path) -> bool | None:
    """Whether a DICOM file says that it is ultrasound; None if its header cannot be read."""
    from pydicom.filereader import read_partial

    _quiet()
    try:
        with path.open("rb") as f:
            header = read_partial(f, lambda tag, *_: tag > HEADER[0], specific_tags=[HEADER[0]])
        return header.get("Modality") in MODALITIES
    except Exception:
        return None


class Box(NamedTuple):
    """Part of an image, as in luma[top:bottom, left:right]."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Header:
    """What a DICOM file says about its pixels."""

    syntax: str  # Transfer Syntax UID
    codec: str
    num_frames: int
    height: int
    width: int
    samples: int  # 1 or 3 values per pixel
    planar: bool  # all red values come first, then all green ones
    photometric: str
    bytes_per_sample: int
    rate_hz: float  # 0 if unknown
    times_seconds: tuple[float, ...] | None  # of each frame, if they are not at equal intervals
    pixel_aspect: float  # width of a pixel over its height
    regions: tuple[Box, ...]  # parts with ultrasound; () if unknown
    palette: np.ndarray | None  # (2^bits,) uint8, the luma of each pixel value
    at: int  # where the value of Pixel Data begins in the file, in bytes
    num_bytes: int  # its length, which encapsulated data does not tell

    def time_seconds(self, index: int) -> float | None:
        """When a frame was taken, after the first; None if the file does not tell."""
        if self.times_seconds and index < len(self.times_seconds):
            return self.times_seconds[index]
        return index / self.rate_hz if self.rate_hz else None

    @property
    def is_video(self) -> bool:
        return self.syntax.startswith(VIDEOS)

    @cached_property
    def box(self) -> Box:
        """The smallest part of the image that holds all regions."""
        if not self.regions:
            return Box(0, self.height, 0, self.width)
        top, bottom, left, right = zip(*self.regions, strict=True)
        return Box(min(top), max(bottom), min(left), max(right))

    @cached_property
    def outside(self) -> np.ndarray | None:
        """(H, W) bool: what of the box no region covers; None if nothing."""
        outside = np.ones((self.height, self.width), bool)
        for top, bottom, left, right in self.regions:
            outside[top:bottom, left:right] = False
        outside = outside[_slices(self.box)]
        return outside if self.regions and outside.any() else None


def probe(path: Path) -> VideoInfo:
    """Read what a DICOM file says about its images. Raises VideoError if it has none of use."""
    header = read_header(path)
    if header.is_video:
        with path.open("rb") as f:
            info = probe_video(path, Fragments(f, header.at))
        return replace(
            info,
            codec=f"dicom {info.codec}",
            rate_hz=header.rate_hz or info.rate_hz,
            num_frames=max(info.num_frames, header.num_frames),
        )
    return VideoInfo(
        codec=f"dicom {header.codec}",
        pixel_format=header.photometric.lower(),
        height=header.height,
        width=header.width,
        rate_hz=header.rate_hz,
        num_frames=header.num_frames,
        pixel_aspect=header.pixel_aspect,
        full_range=not header.photometric.startswith("YBR_PARTIAL"),
    )


class DicomBackend:
    """Ultrasound DICOM files on one CPU thread: pydicom reads the header, FFmpeg decodes."""

    name = "dicom"

    def refuses(self, info: VideoInfo) -> str | None:
        return None if info.codec.startswith("dicom ") else "not a DICOM file"

    def prepared(
        self, path: Path, info: VideoInfo, keep: Keep, size: int, quality: int
    ) -> Iterator[Prepared]:
        header = read_header(path)
        for index, (luma, time_seconds) in enumerate(_images(path, header)):
            told = header.time_seconds(index)
            time_seconds = time_seconds if told is None else told
            image = None
            if luma is not None and keep(index, time_seconds):
                y, limited = luma()
                if y.shape != (header.height, header.width):
                    wants = f"{header.width} x {header.height}"
                    raise VideoError(
                        path, f"its header says {wants}, but a frame is {y.shape[1]} x {y.shape[0]}"
                    )
                y = y[_slices(header.box)]
                if header.outside is not None:
                    y = np.where(header.outside, np.uint8(16 if limited else 0), y)
                image = prepare(y, size, header.pixel_aspect, limited)
            yield Prepared(index, time_seconds, luma is None, image)


def read_header(path: Path) -> Header:
    """Raises VideoError if the file has no ultrasound images that can be decoded here."""
    import pydicom

    _quiet()
    try:
        with path.open("rb") as f:
            tags = pydicom.dcmread(f, stop_before_pixels=True, specific_tags=list(HEADER))
            found = _skip_element_header(f, tags)
        return _header(path, tags, found)
    except VideoError:
        raise
    except OSError as e:
        raise VideoError(path, f"cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, AttributeError, KeyError, pydicom.errors.InvalidDicomError) as e:
        # Not its message: it may quote the header.
        raise VideoError(path, f"its DICOM header is damaged ({type(e).__name__})") from e


def _header(path: Path, tags, found: tuple[int, int] | None) -> Header:
    syntax = str(tags.file_meta.TransferSyntaxUID)
    modality = str(tags.get("Modality") or "none")
    if modality not in MODALITIES:
        modality = modality if modality.isalnum() else "unreadable"
        raise VideoError(path, f"a DICOM file, but not of ultrasound (modality {modality})")
    if syntax in NATIVE:
        codec = "native"
    elif syntax == RLE:
        codec = "rle"
    elif syntax.startswith(VIDEOS):
        codec = "video"
    elif syntax in IMAGE_CODECS:
        codec = IMAGE_CODECS[syntax]
    else:
        name = tags.file_meta.TransferSyntaxUID.name
        raise VideoError(path, f"DICOM transfer syntax {name} is not supported; convert the file")
    if found is None:
        raise VideoError(path, "a DICOM file without an image")
    photometric = tags.PhotometricInterpretation
    header = Header(
        syntax=syntax,
        codec=codec,
        num_frames=int(tags.get("NumberOfFrames") or 1),
        height=tags.Rows,
        width=tags.Columns,
        samples=tags.SamplesPerPixel,
        planar=bool(tags.get("PlanarConfiguration")),
        photometric=photometric,
        bytes_per_sample=tags.BitsAllocated // 8,
        pixel_aspect=_pixel_aspect(tags),
        regions=_regions(tags),
        palette=_palette(tags, syntax) if photometric == "PALETTE COLOR" else None,
        at=found[0],
        num_bytes=found[1],
        **_timing(tags),
    )
    bits = tags.BitsAllocated, tags.BitsStored
    wants_8 = header.palette is None or codec in IMAGE_CODECS.values()
    signed = tags.get("PixelRepresentation") == 1
    if signed or bits[0] not in (8, 16) or (wants_8 and bits != (8, 8)):
        said = f"{bits[1]} bits{', signed' * signed}"
        raise VideoError(path, f"pixels of {said}; want 8 bits, as ultrasound has: convert it")
    if header.samples != (1 if photometric.startswith(("MONO", "PAL")) else 3):
        raise VideoError(path, f"{header.samples} samples per pixel, which its colours contradict")
    if min(header.height, header.width, header.num_frames) < 1:
        raise VideoError(path, "its header announces no pixels")
    return header


def _skip_element_header(f, tags) -> tuple[int, int] | None:
    """Where the value of Pixel Data begins and its length, if pydicom has stopped in front of it;
    else None."""
    implicit, little = tags.original_encoding
    head = f.read(8 if implicit else 12)  # PS3.5, 7.1: tag, type and length
    if head[:4] != (b"\xe0\x7f\x10\x00" if little else b"\x7f\xe0\0\x10"):
        return None
    return f.tell(), int.from_bytes(head[-4:], "little" if little else "big")


def _timing(tags) -> dict:
    """rate_hz and times_seconds of a Header, by the first attribute that tells: PS3.3, C.7.6.5."""
    num = int(tags.get("NumberOfFrames") or 1)
    steps_ms = [float(s) for s in np.atleast_1d(tags.get("FrameTimeVector") or [])]
    if len(steps_ms) == num > 1 and min(steps_ms[1:]) >= 0 < sum(steps_ms[1:]):
        times = np.cumsum([0.0, *steps_ms[1:]]) / 1000
        return {"rate_hz": float((num - 1) / times[-1]), "times_seconds": tuple(times.tolist())}
    period_ms = float(tags.get("FrameTime") or 0)
    rate_hz = float(tags.get("CineRate") or tags.get("RecommendedDisplayFrameRate") or 0)
    rate_hz = 1000 / period_ms if period_ms > 0 else max(0.0, rate_hz)
    return {"rate_hz": rate_hz, "times_seconds": None}


def _regions(tags) -> tuple[Box, ...]:
    """Where a file says that ultrasound is: its two-dimensional regions, or all it declares if
    none of them is. () if it says nothing or what cannot be: some programs scale an image and
    leave the old regions."""
    declared = tags.get("SequenceOfUltrasoundRegions") or []
    flat = [r for r in declared if r.get("RegionSpatialFormat") == TWO_DIMENSIONAL]
    boxes = []
    for r in flat or declared:
        left, top = r.RegionLocationMinX0, r.RegionLocationMinY0
        right, bottom = r.RegionLocationMaxX1, r.RegionLocationMaxY1  # the last pixel
        if right > tags.Columns or bottom > tags.Rows:  # equal: many count it as the first outside
            return ()
        box = Box(top, min(bottom + 1, tags.Rows), left, min(right + 1, tags.Columns))
        if box.top < box.bottom and box.left < box.right:
            boxes.append(box)
    return tuple(boxes)


def _pixel_aspect(tags) -> float:
    """Width of a pixel over its height."""
    if ratio := tags.get("PixelAspectRatio"):  # height, width: PS3.3, C.7.6.3.1.7
        height, width = map(float, ratio)
        return width / height if height > 0 < width else 1.0
    for r in tags.get("SequenceOfUltrasoundRegions") or []:
        if r.get("RegionSpatialFormat") == TWO_DIMENSIONAL:
            width, height = (abs(float(r.get(f"PhysicalDelta{a}") or 0)) for a in "XY")
            units = [r.get(f"PhysicalUnits{a}Direction") for a in "XY"]
            if units[0] == units[1] and height > 0 < width:
                return width / height
    return 1.0


def _palette(tags, syntax: str) -> np.ndarray:
    """(2^bits,) uint8: the luma of each pixel value, PS3.3 C.7.6.3.1.5 and .6."""
    from pydicom.pixels import apply_color_lut

    length, first, bits = tags.RedPaletteColorLookupTableDescriptor
    length = length or 1 << 16
    if "SegmentedRedPaletteColorLookupTableData" in tags:
        if bits == 8 and length > 256:
            raise ValueError("pydicom would wrap its numbers")
        rgb = apply_color_lut(np.arange(first, first + length), tags).T
    else:
        rgb = np.empty((3, length), np.uint16)
        for row, colour in zip(rgb, ("Red", "Green", "Blue"), strict=True):
            data = tags[f"{colour}PaletteColorLookupTableData"].value
            wide = len(data) // length  # bytes of an entry, of which `bits` count
            if wide == 1 and syntax == BIG_ENDIAN:
                raise ValueError("bytes in swapped words")
            row[:] = np.frombuffer(data, f"{'>' if syntax == BIG_ENDIAN else '<'}u{wide}", length)
    luma = np.array([0.299, 0.587, 0.114]) @ rgb * (255 / ((1 << bits) - 1))
    at = np.clip(np.arange(1 << tags.BitsAllocated) - first, 0, length - 1)
    return np.rint(np.clip(luma, 0, 255)).astype(np.uint8)[at]


def _slices(box: Box) -> tuple[slice, slice]:
    return slice(box.top, box.bottom), slice(box.left, box.right)


# Gives the luma (H, W) uint8 of a frame, and whether its range is limited; not called for frames
# that are not kept. None for a damaged frame.
Luma = Callable[[], tuple[np.ndarray, bool]] | None


def _images(path: Path, header: Header) -> Iterator[tuple[Luma, float]]:
    """The luma and the time in seconds of every frame."""
    if header.is_video:
        with path.open("rb") as f:
            for _, time_seconds, frame, turn in decoded(path, Fragments(f, header.at)):
                yield None if frame.is_corrupt else partial(plane, frame, turn), time_seconds
        return
    read = {"native": _native, "rle": _rle}.get(header.codec, _compressed)
    for index, luma in enumerate(read(path, header)):
        yield luma, index / USUAL_HZ


def _luma_of(pixels: np.ndarray, header: Header) -> tuple[np.ndarray, bool]:
    """Of (H, W) or (H, W, 3) pixels as the file stores them."""
    limited = header.photometric.startswith("YBR_PARTIAL")
    if header.palette is not None:
        return header.palette[pixels], limited
    if header.photometric == "MONOCHROME1":  # its lowest value is white
        return 255 - pixels, limited
    if header.samples == 1:
        return pixels, limited
    rgb = header.photometric == "RGB"
    return rgb_luma(pixels) if rgb else np.ascontiguousarray(pixels[..., 0]), limited


def _native(path: Path, header: Header) -> Iterator[Luma]:
    """Uncompressed pixels, PS3.5 8.1: as many frames as there are, whatever the header says."""
    shape = header.height, header.width
    num_pixels = header.height * header.width
    kind = np.dtype(f"{'>' if header.syntax == BIG_ENDIAN else '<'}u{header.bytes_per_sample}")
    halved = header.photometric.endswith("_422")  # two pixels share their colours: Y Y Cb Cr
    num_bytes = num_pixels * kind.itemsize * (2 if halved else header.samples)

    def luma(data: bytes) -> tuple[np.ndarray, bool]:
        pixels = np.frombuffer(data, kind)
        if halved:
            pixels = pixels.reshape(-1, 4)[:, :2].reshape(*shape, 1)
        elif header.samples == 1:
            pixels = pixels.reshape(shape)
        elif header.planar:
            pixels = np.moveaxis(pixels.reshape(3, *shape), 0, -1)
        else:
            pixels = pixels.reshape(*shape, 3)
        return _luma_of(pixels, header)

    with path.open("rb") as f:
        f.seek(header.at)
        for _ in range(header.num_bytes // num_bytes):
            data = f.read(num_bytes)
            if len(data) < num_bytes:  # truncated
                return
            yield partial(luma, data)


def _rle(path: Path, header: Header) -> Iterator[Luma]:
    """Run lengths, PS3.5 G: one fragment a frame, one segment for each byte of a pixel, the high
    byte first."""
    shape = header.samples, header.bytes_per_sample, header.height, header.width
    with path.open("rb") as f:
        for start, length in _fragments(f, header.at):
            f.seek(start)
            data = np.frombuffer(f.read(length), np.uint8)
            starts = data[:64].view("<u4") if len(data) >= 64 else [0]
            num = int(starts[0])
            if num != shape[0] * shape[1]:
                yield None
                continue
            planes = np.empty((num, header.height * header.width), np.uint8)
            ends = [*starts[2 : num + 1].tolist(), len(data)]
            segments = zip(starts[1 : num + 1].tolist(), ends, planes, strict=True)
            done = [_luma.unpack(data[a:b], out) for a, b, out in segments]
            if min(done) < planes.shape[1]:
                yield None
                continue
            pixels = planes.reshape(shape).astype(f"u{shape[1]}")
            pixels = pixels[:, 0] if shape[1] == 1 else pixels[:, 0] << 8 | pixels[:, 1]
            yield partial(
                _luma_of, np.moveaxis(pixels, 0, -1) if shape[0] > 1 else pixels[0], header
            )


def _compressed(path: Path, header: Header) -> Iterator[Luma]:
    """JPEG in its many kinds.

    An image may span several fragments. The Basic Offset Table, which says where each begins, is
    often missing or wrong, but every image begins with its own marker.
    """
    import av

    context = av.CodecContext.create(header.codec, "r")
    context.thread_count = 1
    with path.open("rb") as f:
        for data in _joined(f, header.at):
            try:
                frames = context.decode(av.Packet(data))
            except av.FFmpegError:
                frames = []
            whole = len(frames) == 1 and not frames[0].is_corrupt
            # Many files say RGB of a JPEG that is marked as YCbCr; it is, if it is lossy.
            tables = data[: data.find(b"\xff\xda")]
            marked = b"JFIF\0" in tables or b"Adobe\0" in tables
            as_said = header.syntax.endswith((".57", ".70")) or not marked
            yield partial(_frame_luma, frames[0], header, as_said) if whole else None


def _frame_luma(frame, header: Header, as_said: bool) -> tuple[np.ndarray, bool]:
    """FFmpeg takes the colours of a JPEG for YCbCr, and those of JPEG-LS and JPEG 2000 for RGB.
    as_said: whether they are what the header says."""
    if header.samples == 1:
        return _luma_of(frame.to_ndarray(format="gray"), header)
    if frame.format.is_rgb and header.photometric.startswith("YBR_FULL"):
        return _luma_of(frame.to_ndarray(format="rgb24"), header)
    full = frame.format.name in ("yuv444p", "yuvj444p")  # where colours are halved, it is YCbCr
    if as_said and header.photometric == "RGB" and full:
        return _luma_of(np.moveaxis(frame.to_ndarray(), 0, -1), header)
    return plane(frame)


def _joined(f, at: int) -> Iterator[bytes]:
    """The images in the fragments, each whole."""
    image = []
    for start, length in _fragments(f, at):
        f.seek(start)
        data = f.read(length)
        if image and data.startswith(STARTS):
            yield b"".join(image)
            image = []
        image.append(data)
    if image:
        yield b"".join(image)


def _fragments(f, at: int) -> Iterator[tuple[int, int]]:
    """(start, length) of each fragment's data, PS3.5 A.4; not of the first, the offset table."""
    first = True
    while True:
        f.seek(at)
        head = f.read(8)
        if len(head) < 8 or head[:4] != ITEM:
            return
        start, length = at + 8, int.from_bytes(head[4:], "little")
        if not first:
            yield start, length
        first, at = False, start + length


class Fragments(io.RawIOBase):
    """The fragments of a file, joined, for reading: a video as FFmpeg wants it.

    f: an open file, which stays the caller's; at: where Pixel Data begins in it.
    """

    def __init__(self, f, at: int):
        self.f, self.position = f, 0
        self.starts, self.lengths = np.array(list(_fragments(f, at)), np.int64).reshape(-1, 2).T
        self.ends = np.cumsum(self.lengths)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: sum(self.lengths)}[whence]
        self.position = max(0, int(base) + offset)
        return self.position

    def readinto(self, buffer) -> int:
        number = int(np.searchsorted(self.ends, self.position, "right"))
        if number == len(self.ends):
            return 0
        left = int(self.ends[number]) - self.position
        self.f.seek(int(self.starts[number] + self.lengths[number]) - left)
        num = self.f.readinto(memoryview(buffer)[: min(left, len(buffer))])
        self.position += num
        return num


def _quiet() -> None:
    """pydicom warns of odd values and quotes them."""
    import logging
    import warnings

    import pydicom.config

    warnings.filterwarnings("ignore", module="pydicom")

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
