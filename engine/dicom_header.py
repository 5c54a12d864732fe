"""What the header of an ultrasound DICOM file says about its pixels.

Only the attributes listed in HEADER are used, none of which is about the patient.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sslus.engine.errors import out_of_memory
from sslus.engine.region import Box, Region
from sslus.engine.video import VideoError

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
# SOP classes of ultrasound (PS3.4 B.5), single and multi-frame, then the retired ones.
SOP_CLASSES = frozenset(f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("6.1", "3.1", "6", "3"))
# Transfer syntaxes, PS3.5 A. FFmpeg decodes images of these, each by itself:
SYNTAX = "1.2.840.10008.1.2"
IMAGE_CODECS = {
    f"{SYNTAX}.4.50": "mjpeg",  # JPEG baseline
    f"{SYNTAX}.4.51": "mjpeg",  # extended
    f"{SYNTAX}.4.53": "mjpeg",  # spectral selection
    f"{SYNTAX}.4.55": "mjpeg",  # progressive
    f"{SYNTAX}.4.57": "mjpeg",  # lossless
    f"{SYNTAX}.4.70": "mjpeg",  # lossless, first-order prediction
    f"{SYNTAX}.4.80": "jpegls",
    f"{SYNTAX}.4.81": "jpegls",
    f"{SYNTAX}.4.90": "jpeg2000",
    f"{SYNTAX}.4.91": "jpeg2000",
}
LOSSLESS_JPEG = (f"{SYNTAX}.4.57", f"{SYNTAX}.4.70")
# With these, the fragments joined are a video: MPEG-2 .100 and .101, H.264 .102 to .106, HEVC .107
# and .108; with a ".1" after that there may be several fragments.
VIDEOS = frozenset(f"{SYNTAX}.4.{n}{end}" for n in range(100, 109) for end in ("", ".1"))
BIG_ENDIAN = f"{SYNTAX}.2"
NATIVE = frozenset({SYNTAX, f"{SYNTAX}.1", BIG_ENDIAN})
DEFLATED = f"{SYNTAX}.1.99"
RLE = f"{SYNTAX}.5"
MONOCHROME = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT",
           "YBR_RCT")  # fmt: skip
UNDEFINED = 0xFFFFFFFF  # a length
TWO_DIMENSIONAL, CURVES = 1, (2, 3, 4)  # Region Spatial Format; CURVES: M-mode, spectrum, waveform
LONGEST_MS = 1e6  # between two frames; more is damage
# What a value raises that is missing or not a number.
UNREADABLE = (TypeError, ValueError, OverflowError)


def is_dicom(path: Path) -> bool:
    """Whether a file is named or begins like one of DICOM (PS3.10, 7.1). One that cannot be read
    may be one: `read_header` says why it cannot."""
    try:
        if not path.is_file():  # a pipe could block forever
            return False
        with path.open("rb") as f:
            return path.suffix.lower() in SUFFIXES or f.read(132)[128:] == b"DICM"
    except OSError:
        return True


def is_ultrasound(path: Path) -> bool | None:
    """Whether a DICOM file says that it is ultrasound; None if its header cannot be read."""
    from pydicom.filereader import read_file_meta_info, read_partial

    _quiet()
    try:
        meta = read_file_meta_info(path)
        if meta.TransferSyntaxUID == DEFLATED:  # pydicom would inflate it, to any size
            return None
        with path.open("rb") as f:
            tags = read_partial(f, lambda tag, *_: tag > HEADER[0], specific_tags=[HEADER[0]])
        return _of_ultrasound(meta, tags)
    except Exception:  # whatever it is, `probe` meets it again and says so
        return None


def _of_ultrasound(meta, tags) -> bool:
    modality = str(tags.get("Modality") or "").strip().upper()
    return modality in MODALITIES or meta.get("MediaStorageSOPClassUID") in SOP_CLASSES


@dataclass(frozen=True)
class Header:
    """What a DICOM file says about its pixels."""

    syntax: str  # Transfer Syntax UID
    photometric: str
    num_frames: int
    height: int
    width: int
    samples: int  # 1 or 3 values per pixel
    bytes_per_sample: int
    planar: bool  # all red values come first, then all green ones
    palette: np.ndarray | None  # (2^bits,) uint8, the luma of each pixel value
    rate_hz: float  # 0 if unknown
    times_seconds: tuple[float, ...] | None  # of each frame, if they are not at equal intervals
    pixel_aspect: float  # width of a pixel over its height
    regions: tuple[Box, ...]  # parts with ultrasound; () if unknown
    at: int  # where the value of Pixel Data begins in the file, in bytes
    num_bytes: int  # its length; UNDEFINED if it is encapsulated

    @property
    def codec(self) -> str:
        if self.syntax in NATIVE:
            return "native"
        return "rle" if self.syntax == RLE else IMAGE_CODECS.get(self.syntax, "video")

    @property
    def frame_bytes(self) -> int:
        """Of an uncompressed frame."""
        return (
            self.height * self.width * self.bytes_per_sample * (2 if self.halved else self.samples)
        )

    @property
    def halved(self) -> bool:
        """Whether two uncompressed pixels share their colours, as Y Y Cb Cr. Programs that
        decompress leave "_422" in the header of files where they do not."""
        whole = self.height * self.width * 3 * self.num_frames
        return self.photometric.endswith("_422") and self.num_bytes < whole

    def time_seconds(self, index: int) -> float | None:
        """When a frame was taken, after the first; None if the file does not tell."""
        if self.times_seconds and index < len(self.times_seconds):
            return self.times_seconds[index]
        return index / self.rate_hz if self.rate_hz else None

    @cached_property
    def region(self) -> Region:
        """All regions, or the whole image if there are none."""
        whole = Box(0, self.height, 0, self.width)
        return Region.of_boxes((self.height, self.width), self.regions or (whole,))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is raised becomes a VideoError without its message, which may quote the header."""
    try:
        yield
    except VideoError:
        raise
    except OSError as e:
        raise VideoError(path, f"cannot be read ({e.strerror})") from e
    except Exception as e:
        if out_of_memory(e):
            raise
        raise VideoError(path, f"a damaged DICOM file ({type(e).__name__})") from e


def read_header(path: Path) -> Header:
    """Raises VideoError if the file has no ultrasound images that can be decoded here."""
    import pydicom
    from pydicom.filereader import read_file_meta_info

    _quiet()
    with reading(path):
        if not path.is_file():
            path.stat()
            raise VideoError(path, "not a regular file")
        try:
            meta = read_file_meta_info(path)
        except pydicom.errors.InvalidDicomError as e:
            raise VideoError(path, "not a DICOM file, or one without the prefix DICM") from e
        syntax = str(meta.TransferSyntaxUID)
        if syntax not in NATIVE | VIDEOS | IMAGE_CODECS.keys() | {RLE}:
            name = meta.TransferSyntaxUID.name if syntax.startswith(SYNTAX) else "private"
            name = name if name.isprintable() and len(name) < 100 else "unknown"
            raise VideoError(path, f"DICOM transfer syntax not supported: {name}; convert the file")
        with path.open("rb") as f:
            tags = pydicom.dcmread(f, stop_before_pixels=True, specific_tags=list(HEADER))
            found = _skip_element_header(f, syntax)
        if not _of_ultrasound(meta, tags):
            modality = str(tags.get("Modality") or "none")
            modality = modality if modality.isalnum() and len(modality) < 5 else "unknown"
            raise VideoError(path, f"a DICOM file, but not of ultrasound (modality {modality})")
        if found is None:
            raise VideoError(path, "a DICOM file without an image")
        return _header(path, tags, syntax, *found)


def _header(path: Path, tags, syntax: str, kind: bytes, at: int, num_bytes: int) -> Header:
    def required(name: str):
        with contextlib.suppress(KeyError, *UNREADABLE):
            return tags[name].value
        raise VideoError(path, f"its DICOM header has no {name} that can be read")

    photometric = str(required("PhotometricInterpretation")).strip().upper()
    if photometric not in MONOCHROME + COLOURS:
        raise VideoError(path, "its photometric interpretation is not supported; convert the file")
    allocated = int(required("BitsAllocated"))
    header = Header(
        syntax=syntax,
        photometric=photometric,
        num_frames=max(1, int(_number(tags, "NumberOfFrames", 1))),
        height=int(required("Rows")),
        width=int(required("Columns")),
        samples=int(required("SamplesPerPixel")),
        bytes_per_sample=allocated // 8,
        planar=bool(_number(tags, "PlanarConfiguration")),
        palette=_palette(tags, syntax) if photometric == "PALETTE COLOR" else None,
        pixel_aspect=_pixel_aspect(tags),
        regions=_regions(tags),
        at=at,
        num_bytes=num_bytes,
        **_timing(tags),
    )
    if header.samples != (1 if photometric in MONOCHROME else 3):
        raise VideoError(path, f"{header.samples} samples per pixel, which its colours contradict")
    if min(header.height, header.width) < 1:
        raise VideoError(path, "its header announces no pixels")
    if header.codec != "video":
        stored = int(_number(tags, "BitsStored", allocated))
        any_bits = header.palette is not None and header.codec in ("native", "rle")
        if _number(tags, "PixelRepresentation") == 1:
            raise VideoError(
                path, "signed pixels, which ultrasound does not have; convert the file"
            )
        if not (allocated in (8, 16) and any_bits) and (allocated, stored) != (8, 8):
            raise VideoError(
                path, f"pixels of {stored} bits in {allocated}; want 8 in 8; convert the file"
            )
    if header.codec == "native":
        if (num_bytes == UNDEFINED) or (header.halved and header.width % 2):
            raise VideoError(path, "its DICOM header contradicts its pixels")
        if syntax == BIG_ENDIAN and allocated == 8 and kind == b"OW":
            raise VideoError(path, "bytes in swapped words are not supported; convert the file")
    return header


def _skip_element_header(f, syntax: str) -> tuple[bytes, int, int] | None:
    """The type of Pixel Data, where its value begins and its length, if pydicom has stopped in
    front of it; else None. PS3.5, 7.1."""
    order = "big" if syntax == BIG_ENDIAN else "little"
    head = f.read(12)
    if head[:4] != (b"\x7f\xe0\0\x10" if order == "big" else b"\xe0\x7f\x10\x00"):
        return None
    # Seen in the data, since some programs write the one and say the other.
    if head[4:6] in (b"OB", b"OW", b"UN"):
        return head[4:6], f.tell(), int.from_bytes(head[8:], order)
    return b"OW", f.tell() - 4, int.from_bytes(head[4:8], order)


def _number(tags, name: str, default: float = 0.0) -> float:
    """An optional attribute; the default if it is missing or not a number."""
    try:
        value = float(tags.get(name))
    except UNREADABLE:
        return default
    return value if math.isfinite(value) else default


def _timing(tags) -> dict:
    """rate_hz and times_seconds of a Header, by the first attribute that tells: PS3.3, C.7.6.5."""
    num = int(_number(tags, "NumberOfFrames", 1))
    try:
        steps_ms = [float(s) for s in np.atleast_1d(tags.get("FrameTimeVector") or [])]
    except UNREADABLE:
        steps_ms = []
    steps_ms = steps_ms[1:] if len(steps_ms) == num else steps_ms  # the first should be 0
    if (
        len(steps_ms) == num - 1 > 0
        and all(0 <= s < LONGEST_MS for s in steps_ms)
        and any(steps_ms)
    ):
        times = np.cumsum([0.0, *steps_ms]) / 1000
        return {"rate_hz": float((num - 1) / times[-1]), "times_seconds": tuple(times.tolist())}
    period_ms = _number(tags, "FrameTime")
    rate_hz = _number(tags, "CineRate") or _number(tags, "RecommendedDisplayFrameRate")
    rate_hz = 1000 / period_ms if 0 < period_ms < LONGEST_MS else rate_hz
    return {"rate_hz": rate_hz if 1000 / LONGEST_MS < rate_hz < 1e4 else 0.0, "times_seconds": None}


def _regions(tags) -> tuple[Box, ...]:
    """Where a file says that ultrasound is: its two-dimensional regions, or else its curves. Left
    out is what cannot be: empty regions, and those beyond the image, which programs leave that
    scale it. () if nothing remains."""
    found: dict[bool, list[Box]] = {True: [], False: []}
    for r in tags.get("SequenceOfUltrasoundRegions") or []:
        form = _number(r, "RegionSpatialFormat")
        x, y = (
            sorted(int(_number(r, f"RegionLocation{end}", -1)) for end in ends)
            for ends in (("MinX0", "MaxX1"), ("MinY0", "MaxY1"))
        )
        # The second is the last pixel, but many programs count it as the first one outside.
        fits = 0 <= x[0] < x[1] <= tags.Columns and 0 <= y[0] < y[1] <= tags.Rows
        if fits and form in (TWO_DIMENSIONAL, *CURVES):
            box = Box(y[0], min(y[1] + 1, tags.Rows), x[0], min(x[1] + 1, tags.Columns))
            found[form == TWO_DIMENSIONAL].append(box)
    return tuple(found[True] or found[False])


def _pixel_aspect(tags) -> float:
    """Width of a pixel over its height."""
    sides = []
    with contextlib.suppress(*UNREADABLE):  # height, width: PS3.3, C.7.6.3.1.7
        sides.append([float(v) for v in tags.get("PixelAspectRatio")])
    for r in tags.get("SequenceOfUltrasoundRegions") or []:
        same_unit = r.get("PhysicalUnitsXDirection") == r.get("PhysicalUnitsYDirection")
        if _number(r, "RegionSpatialFormat") == TWO_DIMENSIONAL and same_unit:
            sides.append([abs(_number(r, f"PhysicalDelta{axis}")) for axis in "YX"])
    for side in sides:
        if len(side) == 2 and min(side) > 0 and 0.1 < side[1] / side[0] < 10:
            return side[1] / side[0]
    return 1.0


def _palette(tags, syntax: str) -> np.ndarray:
    """(2^bits,) uint8: the luma of each pixel value, PS3.3 C.7.6.3.1.5 and .6, C.7.9.2."""
    length, first, bits = tags.RedPaletteColorLookupTableDescriptor
    length = length or 1 << 16
    order = ">" if syntax == BIG_ENDIAN else "<"
    rgb = np.empty((3, length))
    for row, colour in zip(rgb, ("Red", "Green", "Blue"), strict=True):
        if (name := f"Segmented{colour}PaletteColorLookupTableData") in tags:
            wide = bits // 8
            row[:] = _expanded(np.frombuffer(tags[name].value, f"{order}u{wide}").tolist(), length)
        else:
            data = tags[f"{colour}PaletteColorLookupTableData"].value
            wide = len(data) // length
            row[:] = np.frombuffer(data, f"{order}u{wide}", length)
        if wide == 1 and syntax == BIG_ENDIAN:
            raise ValueError("bytes in swapped words")
    # Some files say 16 bits where 8 are meant, or the other way round.
    bits = 8 if rgb.max() < 256 else 16
    luma = np.array([0.299, 0.587, 0.114]) @ rgb * (255 / ((1 << bits) - 1))
    at = np.clip(np.arange(1 << tags.BitsAllocated) - first, 0, length - 1)
    return np.rint(luma).astype(np.uint8)[at]


def _expanded(values: list[int], length: int) -> list[int]:
    """A segmented palette: 0, n, then n entries; or 1, n, y: n entries on a line that ends at y."""
    out, at = [], 0
    while len(out) < length:
        kind, num = values[at : at + 2]
        if not 0 < num <= length - len(out) or kind > 1:  # 2 repeats segments: not in ultrasound
            raise ValueError("not a segmented palette")
        if kind == 0:
            out += values[at + 2 : at + 2 + num]
        else:
            start, end = out[-1], values[at + 2]
            out += [round(start + (end - start) * k / num) for k in range(1, num + 1)]
        at += 2 + (num if kind == 0 else 1)
    return out


def _quiet() -> None:
    """pydicom warns of odd values and quotes them."""
    import logging
    import warnings

    import pydicom.config

    warnings.filterwarnings("ignore", module="pydicom")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
