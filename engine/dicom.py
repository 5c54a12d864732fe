"""Ultrasound DICOM files: probe them, decode their luma on the CPU.

A file declares where its images lie (Ultrasound Region Calibration, PS3.3 C.8.5.5); frames are
cropped to those regions, so that the name and the date beside them do not reach the shards.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from sslus.engine import _luma
from sslus.engine.dicom_header import BIG_ENDIAN, LOSSLESS_JPEG, Header, read_header, reading
from sslus.engine.errors import out_of_memory
from sslus.engine.prepare import prepare, rgb_luma
from sslus.engine.region import NEARLY_ALL, Luma, Region
from sslus.engine.video import SAME_PIXELS, Keep, Prepared, VideoError, VideoInfo, images, plane
from sslus.engine.video import probe as probe_video

ITEM = b"\xfe\xff\x00\xe0"  # the tag before each fragment
# Of an image: SOI of JPEG and JPEG-LS, SOC of JPEG 2000, and the signature of JPEG 2000's file
# format, which does not belong there but is met.
STARTS = (b"\xff\xd8", b"\xff\x4f", b"\0\0\0\x0cjP  ")
USUAL_HZ = 25.0  # if the file does not tell


def probe(path: Path) -> VideoInfo:
    """Read what a DICOM file says about its images. Raises VideoError if it has none of use."""
    header = read_header(path)
    whole = bool(header.region.inside.mean() > NEARLY_ALL)
    if header.codec == "video":
        with path.open("rb") as f:
            info = probe_video(path, Fragments(f, header.at))
        return replace(
            info,
            codec=f"dicom {info.codec}",
            rate_hz=header.rate_hz or info.rate_hz,
            num_frames=max(info.num_frames, header.num_frames),
            uncropped=whole,
        )
    num_frames = header.num_frames
    if header.codec == "native":
        num_frames = max(num_frames, header.num_bytes // header.frame_bytes)
    return VideoInfo(
        codec=f"dicom {header.codec}",
        pixel_format=header.photometric.lower(),
        height=header.height,
        width=header.width,
        rate_hz=header.rate_hz,
        num_frames=num_frames,
        pixel_aspect=header.pixel_aspect,
        full_range=not header.photometric.startswith("YBR_PARTIAL"),
        uncropped=whole,
    )


@dataclass(frozen=True)
class DicomBackend:
    """Ultrasound DICOM files on one CPU thread: pydicom reads the header, FFmpeg decodes.

    region: the part of the image that is used; by default, what the file declares.
    """

    region: Region | None = None
    name = "dicom"

    def refuses(self, info: VideoInfo) -> str | None:
        return None

    def declared(self, path: Path) -> Region:
        return read_header(path).region

    def images(self, path: Path) -> Iterator[tuple[Luma, float]]:
        """The luma of every frame, None if it is damaged, and its time in seconds."""
        header = read_header(path)

        def read(luma) -> tuple[np.ndarray, bool]:
            with reading(path):
                return luma()

        with reading(path):
            for index, (luma, time_seconds) in enumerate(_images(path, header)):
                told = header.time_seconds(index)
                at_seconds = time_seconds if told is None else told
                yield (None if luma is None else partial(read, luma)), at_seconds

    def prepared(
        self, path: Path, info: VideoInfo, keep: Keep, size: int, quality: int
    ) -> Iterator[Prepared]:
        header = read_header(path)
        region = self.region or header.region
        for index, (luma, time_seconds) in enumerate(self.images(path)):
            image, elsewhere = None, False
            if luma is not None and keep(index, time_seconds):
                y, limited = luma()
                if y.shape == (header.height, header.width):
                    elsewhere = not region.shown(y, limited)
                    if not elsewhere:
                        image = prepare(region.cut(y), size, header.pixel_aspect, limited)
                elif index == 0:
                    said = f"{header.width} x {header.height}"
                    is_ = f"{y.shape[1]} x {y.shape[0]}"
                    raise VideoError(path, f"its header says {said}, its first frame is {is_}")
                else:
                    luma = None
            yield Prepared(index, time_seconds, luma is None, image, elsewhere=elsewhere)


def _images(path: Path, header: Header) -> Iterator[tuple[Luma, float]]:
    """The luma and the time in seconds of every frame."""
    if header.codec == "video":
        with path.open("rb") as f:
            yield from images(path, Fragments(f, header.at))
        return
    read = {"native": _native, "rle": _rle}.get(header.codec, _compressed)
    for index, luma in enumerate(read(path, header)):
        yield luma, index / USUAL_HZ


def _luma_of(pixels: np.ndarray, header: Header) -> tuple[np.ndarray, bool]:
    """Of (H, W) or (H, W, 3) pixels as the file stores them."""
    if header.palette is not None:
        return header.palette[pixels], False
    if header.photometric == "MONOCHROME1":  # its lowest value is white
        return 255 - pixels, False
    if header.samples == 1:
        return pixels, False
    # ICT and RCT are steps of JPEG 2000, left in the header by a program that decompressed it.
    if header.photometric in ("RGB", "YBR_ICT", "YBR_RCT"):
        return rgb_luma(pixels), False
    limited = header.photometric.startswith("YBR_PARTIAL")
    return np.ascontiguousarray(pixels[..., 0]), limited


def _native(path: Path, header: Header) -> Iterator[Luma]:
    """Uncompressed pixels, PS3.5 8.1: as many frames as there are, whatever the header says."""
    shape = header.height, header.width
    kind = np.dtype(f"{'>' if header.syntax == BIG_ENDIAN else '<'}u{header.bytes_per_sample}")
    halved, num_bytes = header.halved, header.frame_bytes

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
    """Run lengths, PS3.5 G: a segment for each byte of a pixel, the high byte first."""
    shape = header.samples, header.bytes_per_sample, header.height, header.width
    num = header.samples * header.bytes_per_sample
    with path.open("rb") as f:
        for image in _joined(f, header, (num.to_bytes(4, "little") + b"\x40\0\0\0",)):
            data = np.frombuffer(image or b"", np.uint8)
            starts = data[:64].view("<u4").tolist() if len(data) >= 64 else [0]
            planes = np.empty((num, header.height * header.width), np.uint8)
            segments = zip(starts[1:], [*starts[2 : num + 1], len(data)], planes, strict=False)
            whole = starts[0] == num and all(
                _luma.unpack(data[a:b], out) == len(out) for a, b, out in segments
            )
            pixels = planes.reshape(shape).astype(f"u{shape[1]}")
            pixels = pixels[:, 0] if shape[1] == 1 else pixels[:, 0] << 8 | pixels[:, 1]
            pixels = np.moveaxis(pixels, 0, -1) if shape[0] > 1 else pixels[0]
            yield partial(_luma_of, pixels, header) if whole else None


def _compressed(path: Path, header: Header) -> Iterator[Luma]:
    """JPEG in its many kinds."""
    import av

    context = av.CodecContext.create(header.codec, "r")
    context.thread_count = 1
    # Without "explode", FFmpeg makes up what is missing.
    context.options = {"err_detect": "explode"} | SAME_PIXELS
    with path.open("rb") as f:
        for image in _joined(f, header, STARTS):
            frames = []
            if image:
                try:
                    frames = context.decode(av.Packet(image))
                except av.FFmpegError as e:
                    if out_of_memory(e):
                        raise
            if len(frames) != 1 or frames[0].is_corrupt or frames[0].format.components[0].bits != 8:
                yield None
                continue
            # Many headers say RGB of a JPEG that is marked as YCbCr; it is, unless it is lossless.
            tables = image[: image.find(b"\xff\xda")]
            marked = b"JFIF\0" in tables or b"Adobe\0" in tables
            as_said = not marked or header.syntax in LOSSLESS_JPEG or header.codec != "mjpeg"
            yield partial(_frame_luma, frames[0], header, as_said)


def _frame_luma(frame, header: Header, as_said: bool) -> tuple[np.ndarray, bool]:
    """FFmpeg takes the colours of a JPEG for YCbCr, and those of JPEG-LS and JPEG 2000 for RGB.
    as_said: whether they are what the header says."""
    limited = header.photometric.startswith("YBR_PARTIAL")
    if header.samples == 1:
        return _luma_of(frame.to_ndarray(format="gray"), header)
    if as_said and frame.format.is_rgb and header.photometric.startswith("YBR_FULL"):
        return np.ascontiguousarray(frame.to_ndarray(format="rgb24")[..., 0]), False
    full = frame.format.name in ("yuv444p", "yuvj444p")  # where colours are halved, it is YCbCr
    if as_said and header.photometric == "RGB" and full:
        return rgb_luma(np.moveaxis(frame.to_ndarray(), 0, -1)), False
    return plane(frame)[0], limited and not frame.format.is_rgb


def _joined(f, header: Header, starts: tuple[bytes, ...]) -> Iterator[bytes | None]:
    """The images in the fragments, each whole; None for one that is cut off.

    The Basic Offset Table, which says where each image begins, is often missing or wrong. Where
    there are as many fragments as images, each is one; else an image begins with one of `starts`.
    """
    fragments = list(_fragments(f, header.at))
    if fragments:  # one that begins an image is no table
        f.seek(fragments[0][0])
        fragments = fragments[not f.read(12).startswith(starts) :]
    each = len(fragments) == header.num_frames
    image, whole = [], True
    for start, length in fragments:
        f.seek(start)
        data = f.read(length)
        if image and (each or data.startswith(starts)):
            yield b"".join(image) if whole else None
            image, whole = [], True
        image.append(data)
        whole &= len(data) == length
    if image:
        yield b"".join(image) if whole else None


def _fragments(f, at: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the data of each item, PS3.5 A.4; the first is the offset table."""
    while True:
        f.seek(at)
        head = f.read(8)
        if len(head) < 8 or head[:4] != ITEM:
            return
        start, length = at + 8, int.from_bytes(head[4:], "little")
        yield start, length
        at = start + length


class Fragments(io.RawIOBase):
    """The fragments of a file, joined, for reading: a video as FFmpeg wants it.

    f: an open file, which stays the caller's; at: where Pixel Data begins in it.
    """

    def __init__(self, f, at: int):
        self.f, self.position = f, 0
        fragments = list(_fragments(f, at))[1:]
        self.starts, self.lengths = np.array(fragments, np.int64).reshape(-1, 2).T
        self.ends = np.cumsum(self.lengths)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = int(self.ends[-1]) if len(self.ends) else 0
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: end}[whence]
        self.position = max(0, base + offset)
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
