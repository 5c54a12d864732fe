"""Video files: find them, look into them, decode their luma on the CPU (PyAV).

Luma is taken from the decoder's own plane; no frame is ever converted to RGB and back.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sslus.engine.errors import InputError
from sslus.engine.prepare import expand_limited, prepare

# Names by which a file in a folder is taken for a video. A file named by the user is tried
# whatever its name.
EXTENSIONS = frozenset(
    ".264 .265 .3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2p .m2ts"
    " .m2v .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpe .mpeg .mpg .mts .mxf .nut .obu .ogm .ogv .qt .ts"
    " .vob .webm .wmv .y4m".split()
)
# Formats that make the demuxer open other files or addresses than the one it was given.
REFERRING_FORMATS = frozenset({"hls", "concat", "dash", "imf", "sdp", "rtsp", "lavfi", "image2"})

FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class VideoError(InputError):
    """A file that cannot be decoded: `path` and `why`, one line."""

    def __init__(self, path: Path | str, why: str):
        super().__init__(f"{path}: {why}")
        self.path, self.why = Path(path), why


@dataclass(frozen=True)
class VideoInfo:
    """What the file says of itself.

    `num_frames` is what a complete decode should give: the container's own count or the number
    of its packets, whichever is larger, so that a truncated file shows.
    """

    codec: str
    pixel_format: str
    height: int
    width: int
    rate_hz: float
    num_frames: int
    pixel_aspect: float = 1.0  # width of a pixel over its height
    full_range: bool = False  # luma in 0..255, else 16..235
    rotation_degrees: int = 0  # how far a player turns the picture, counterclockwise


@dataclass(frozen=True)
class Frame:
    index: int  # count of the frames decoded before it
    time_seconds: float  # after the first frame
    luma: np.ndarray  # (H, W) uint8, full range, owned by the receiver
    corrupt: bool  # the decoder had to invent parts of it


@dataclass(frozen=True)
class Prepared:
    """One decoded frame on its way into a shard. `image` is None where it was not kept."""

    index: int
    time_seconds: float
    corrupt: bool = False
    image: np.ndarray | None = None  # (S, S) uint8
    jpeg: bytes | None = None  # where the backend encodes it itself


# keep(index, time_seconds): whether a frame goes into the shards; asked once a frame, in order.
Keep = Callable[[int, float], bool]


class Backend(Protocol):
    """A way of decoding. One instance lives in one worker; it is not shared by threads."""

    name: str

    def refuses(self, info: VideoInfo) -> str | None:
        """Why this backend cannot decode such a file, or None if it can."""

    def prepared(
        self,
        path: Path,
        info: VideoInfo,
        keep: Keep,
        size: int,
        quality: int,
    ) -> Iterator[Prepared]:
        """Every decoded frame of the file in order; those that keep(index, time_seconds) accepts
        scaled into (size, size). Raises VideoError; what was yielded before stays good."""


@dataclass(frozen=True)
class Source:
    path: Path  # absolute
    name: str  # relative to the folder that was searched: what the video's id is made of


def find_videos(paths: Iterable[Path], skip: Path | None = None) -> tuple[list[Source], Counter]:
    """The videos under `paths` (files and folders, searched recursively), sorted by name.

    Returns the sources and a count, by extension, of the files that were passed over because
    their name is not a video's. `skip` is a folder not to look into. Raises InputError where a
    path does not exist, where no video is found, and where two paths lead to different files
    of the same name, which would get the same id.
    """
    sources: dict[str, Source] = {}
    ignored: Counter = Counter()
    seen: set[Path] = set()

    def refuse(e: OSError) -> None:  # os.walk would pass over the folder in silence
        raise InputError(
            f"{e.filename}: the folder cannot be read ({e.strerror}); make it readable or move it"
        )

    def add(path: Path, name: str) -> None:
        real = path.resolve()
        if real in seen:
            return
        seen.add(real)
        if name in sources:
            raise InputError(
                f"{path}: {sources[name].path} has the same name {name!r} in its folder;"
                " shard the folder that holds both instead"
            )
        sources[name] = Source(path.absolute(), name)

    paths = [Path(p) for p in paths]
    for root in paths:
        if root.is_file():
            add(root, root.name)
        elif not root.is_dir():
            raise InputError(f"{root}: no such file or folder")
        for folder, folders, files in os.walk(root, onerror=refuse) if root.is_dir() else ():
            here = Path(folder)
            folders[:] = sorted(f for f in folders if (here / f).resolve() != skip)
            for file in sorted(files):
                path = here / file
                if file.startswith(".") or path.suffix.lower() not in EXTENSIONS:
                    ignored[path.suffix.lower() or file] += 1
                else:
                    add(path, path.relative_to(root).as_posix())
    if not sources:
        where = ", ".join(str(p) for p in paths)
        other = f" ({sum(ignored.values())} files of other kinds)" if ignored else ""
        raise InputError(f"{where}: no video found{other}; name a folder with videos")
    return [sources[name] for name in sorted(sources)], ignored


def _open(path: Path):
    """Open a container without letting it reach for anything but the file itself."""
    import av

    # Absolute, so that no name is read as a protocol; no nested address is followed.
    try:
        if not path.is_file():  # reading from a pipe could wait forever
            path.stat()
            raise VideoError(path, "not a regular file")
        if path.stat().st_size == 0:
            raise VideoError(path, "the file is empty")
        container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
    except av.FFmpegError as e:
        raise VideoError(path, f"not a readable video ({_reason(e)})") from e
    except OSError as e:
        raise VideoError(path, f"cannot be read ({e.strerror})") from e
    if REFERRING_FORMATS & set(container.format.name.split(",")):
        container.close()
        raise VideoError(path, "a playlist that points to other files; give the files themselves")
    if not container.streams.video:
        container.close()
        raise VideoError(path, "no video stream in it")
    return container


def _reason(e: Exception) -> str:
    return (getattr(e, "strerror", None) or type(e).__name__).rstrip(".")


def probe(path: Path) -> VideoInfo:
    """Read what the file says of itself: its packets are counted, one frame is decoded.

    Raises VideoError for what is no video, is empty, or does not give a single frame.
    """
    import av

    path = Path(path)
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        shown = hidden = end = 0
        frame = None
        try:
            for packet in container.demux(stream):
                if packet.size:  # "discard" marks what lies outside the clip's edit list
                    hidden += packet.is_discard
                    shown += not packet.is_discard
                    if packet.pts is not None:
                        end = max(end, packet.pts + (packet.duration or 0))
                if frame is None:
                    try:
                        frame = next(iter(packet.decode()), None)
                    except av.FFmpegError:
                        continue  # a damaged packet; the next may do, and decode() counts them
        except av.FFmpegError as e:
            if frame is None:
                raise VideoError(path, f"cannot be read ({_reason(e)})") from e
        if frame is None:
            raise VideoError(path, "not a single frame can be decoded")
        aspect = stream.sample_aspect_ratio
        rate = stream.average_rate or stream.guessed_rate
        return VideoInfo(
            codec=stream.codec_context.name,
            pixel_format=frame.format.name,
            height=frame.height,
            width=frame.width,
            rate_hz=float(rate or 0),
            num_frames=max(shown, stream.frames - hidden)
            + (0 if stream.frames else _missing(container, stream, end)),
            pixel_aspect=float(aspect) if aspect else 1.0,
            full_range=_is_full_range(frame),
            rotation_degrees=int(frame.rotation) % 360,
        )


def _missing(container, stream, end: int) -> int:
    """How many frames a file without a frame count is short of the duration it announces.

    Matroska and WebM say how long they are but not how many frames they hold: when such a file
    is cut off, only its duration tells. `end` is the end of the last packet in time base units.
    """
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        announced = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:  # not said of this stream; the file's own is its only stream's
        if len(container.streams) > 1 or container.duration is None:
            return 0
        announced = container.duration / 1e6 + (container.start_time or 0) / 1e6
    short = announced - float(end * stream.time_base)
    # Half a frame of grace: a last frame without a duration of its own is no loss.
    return round(short * rate) if rate and short * rate > 1.5 else 0


def _is_full_range(frame) -> bool:
    """Unmarked grey and RGB are full range, unmarked YUV is limited: FFmpeg's own convention."""
    name = frame.format.name
    if name.startswith("yuvj") or frame.format.is_rgb or frame.format.has_palette:
        return True
    if int(frame.color_range) == 0:
        return name.startswith(("gray", "ya", "mono"))
    return int(frame.color_range) == FULL_RANGE


def luma(frame) -> np.ndarray:
    """The luma of a PyAV frame as (H, W) uint8 in full range, a new array, turned upright.

    Limited range is expanded exactly, deeper than 8 bits is rounded; RGB and palettes give
    BT.601 luma, round(.299 R + .587 G + .114 B), which leaves grey pictures as they are.
    """
    kind = frame.format
    if kind.is_rgb or kind.has_palette or kind.name.startswith("mono"):
        rgb = frame.to_ndarray(format="rgb24").astype(np.uint32)
        out = ((rgb @ np.array([299, 587, 114], np.uint32) + 500) // 1000).astype(np.uint8)
    else:
        first = kind.components[0]
        alone = all(c.plane != first.plane for c in kind.components[1:])
        if not alone:  # packed 4:2:2 and the like: the same luma in planes of its own
            target = "gray" if kind.name.startswith("ya") else "yuv422p"
            frame = frame.reformat(format=target if first.bits == 8 else f"{target}16le")
            first = frame.format.components[0]
        full = _is_full_range(frame)
        plane = frame.planes[0]
        if first.bits == 8:
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            y = rows[: frame.height, : frame.width]
            out = y.copy() if full else expand_limited(y)
        else:
            order = ">u2" if frame.format.is_big_endian else "<u2"
            rows = np.frombuffer(plane, order).reshape(-1, plane.line_size // 2)
            y = rows[: frame.height, : frame.width].astype(np.float64)
            scale = 1 << (first.bits - 8)
            low, span = (0, (1 << first.bits) - 1) if full else (16 * scale, 219 * scale)
            out = np.floor(np.clip((y - low) / span, 0, 1) * 255 + 0.5).astype(np.uint8)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(out, turns)) if turns else out


def decode(path: Path) -> Iterator[Frame]:
    """Every frame of a video that the decoder gives, in order, on one thread.

    A damaged packet costs its own frames only: the count of what comes is to be compared with
    VideoInfo.num_frames. Times are the file's own time stamps, 0 at the first frame; where the
    file has none, index / rate; where its clock starts anew, as in recordings that were joined,
    they go on from the frame before. Raises VideoError if the file cannot be opened.
    """
    for index, time_seconds, frame in _decoded(Path(path)):
        yield Frame(index, time_seconds, luma(frame), bool(frame.is_corrupt))


def _decoded(path: Path) -> Iterator[tuple[int, float, object]]:
    with _open(path) as container:
        stream = container.streams.video[0]
        # The workers are the parallelism; a second thread here would only take their core.
        stream.codec_context.thread_count = 1
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        index, zero, last = 0, None, 0.0
        for frames in _batches(container, stream):
            for frame in frames:
                at = index / rate if frame.time is None else frame.time
                if zero is None:
                    zero = at
                elif at - zero < last:
                    zero = at - (last + 1 / rate)
                last = at - zero
                yield index, last, frame
                index += 1


def _batches(container, stream) -> Iterator[list]:
    """The frames of one packet after the other; a damaged packet gives none."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:  # the file breaks off: what the decoder still holds is good
            with contextlib.suppress(av.FFmpegError):
                yield stream.codec_context.decode(None)
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        yield frames


class PyavBackend:
    """FFmpeg's decoders on the CPU, one thread: every format that PyAV opens."""

    name = "pyav"

    def refuses(self, info: VideoInfo) -> str | None:
        return None

    def prepared(
        self,
        path: Path,
        info: VideoInfo,
        keep: Keep,
        size: int,
        quality: int,
    ) -> Iterator[Prepared]:
        aspect = info.pixel_aspect if info.rotation_degrees % 180 == 0 else 1 / info.pixel_aspect
        for index, time_seconds, frame in _decoded(path):
            corrupt = bool(frame.is_corrupt)
            image = None
            if not corrupt and keep(index, time_seconds):
                image = prepare(luma(frame), size, aspect)
            yield Prepared(index, time_seconds, corrupt, image)
