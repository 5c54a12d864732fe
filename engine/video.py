"""Video files: probe them, decode their luma on the CPU (PyAV).

Luma is taken directly from the decoder's plane, without conversion to RGB and back.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from sslus.engine.errors import InputError, out_of_memory
from sslus.engine.prepare import expand_limited, prepare, rgb_luma, rgba_luma
from sslus.engine.region import Luma, Region
from sslus.engine.truncated import breaks_off, cut_asf, cut_flv

# Formats that make the demuxer open files or addresses other than the given one.
REFERRING_FORMATS = frozenset({"hls", "concat", "dash", "imf", "sdp", "rtsp", "lavfi", "image2"})

# Formats whose packets have no presentation time, only an order: FFmpeg guesses one, wrongly where
# H.264 has B-frames.
UNTIMED_FORMATS = frozenset({"avi", "asf", "mxf", "mxf_opatom"})
# Formats whose header states the duration, counted from time 0. For others FFmpeg measures it, so
# that the duration of a truncated file does not reveal what is missing.
ANNOUNCING_FORMATS = frozenset({"matroska", "webm", "flv", "asf"})

REORDERED = 16  # most frames that a decoder may hold back, and so the largest error of a guess
FULL_RANGE = 2  # AVCOL_RANGE_JPEG
XVID_TAGS = frozenset({"XVID", "XVIX", "RMP4", "ZMP4", "SIPP"})
# The inverse DCT of FFmpeg that gives the same pixels on every processor, for `options`.
SAME_PIXELS = {"idct": "simple"}


# Counterclockwise quarter turns, and whether the image is mirrored left to right before that.
Turn = tuple[int, bool]


class VideoError(InputError):
    """A file that cannot be decoded, and `why`, in one line."""

    def __init__(self, path: Path, why: str):
        super().__init__(f"{path}: {why}")
        self.why = why


@dataclass(frozen=True)
class VideoInfo:
    """What the file says about itself.

    `num_frames` is what a complete decode should give: the container's frame count or the number
    of its packets, whichever is larger, so that truncated files are detected.
    """

    codec: str
    pixel_format: str
    height: int
    width: int
    rate_hz: float
    num_frames: int
    tick_seconds: float = 1e-3  # what its times are rounded to, if not more finely
    pixel_aspect: float = 1.0  # width of a pixel over its height
    full_range: bool = False  # luma in 0..255, else 16..235
    rotation_degrees: int = 0  # how far players rotate the image, counterclockwise
    mirrored: bool = False  # left to right, before rotation
    other_streams: int = 0  # further videos in the file, which are not decoded
    interlaced: bool = False  # its first frame holds two fields
    uncropped: bool = True  # it does not say where in the image ultrasound is, as DICOM files do


@dataclass(frozen=True)
class Frame:
    index: int  # number of frames decoded before it
    time_seconds: float  # since the first frame
    luma: np.ndarray  # (H, W) uint8, full range, owned by the receiver
    corrupt: bool  # the decoder had to make up parts of it


class Prepared(NamedTuple):
    """One decoded frame on its way into a shard. `image` is None if it was not kept."""

    index: int
    time_seconds: float
    corrupt: bool = False
    image: np.ndarray | None = None  # (S, S) uint8
    jpeg: bytes | None = None  # if the backend encodes it itself
    elsewhere: bool = False  # left out: on its screen, the region may be text


# keep(index, time_seconds): whether a frame goes into the shards; called once per frame, in order.
Keep = Callable[[int, float], bool]


class Backend(Protocol):
    """A decoder. Each worker has its own instance; threads must not share one."""

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
        are scaled into (size, size). Raises VideoError; frames yielded before it remain valid."""


def open_video(path: Path, file=None):
    """Open a container without letting it access anything but the file itself.

    file: if the video is only a part of the file, that part, open for reading and seeking.
    Returns the container and the stream to decode, the one that FFmpeg considers best. Raises
    VideoError.
    """
    import av

    # Absolute, so that no name is taken for a protocol; nested addresses are not followed.
    try:
        if not path.is_file():  # reading from a pipe could block forever
            path.stat()
            raise VideoError(path, "not a regular file")
        if path.stat().st_size == 0:
            raise VideoError(path, "the file is empty")
        container = av.open(
            file or str(path.absolute()),
            container_options={"protocol_whitelist": "file"},
            # A title in Latin-1 must not make a video unreadable. PyAV 19 has no such option.
            **({"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}),
        )
    except av.FFmpegError as e:
        if out_of_memory(e):
            raise
        raise VideoError(path, f"not a readable video ({_reason(e)})") from e
    except OSError as e:
        raise VideoError(path, f"cannot be read ({e.strerror})") from e
    try:
        if found := REFERRING_FORMATS & _formats(container):
            raise VideoError(
                path,
                "not a picture of a kind that is read; convert it to PNG"
                if "image2" in found
                else "a playlist that refers to other files; give those instead",
            )
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError(path, "no video stream in it")
        if stream.codec_context is None:
            raise VideoError(path, "FFmpeg has no decoder for its codec; convert the file")
    except BaseException:
        container.close()
        raise
    return container, stream


def is_untimed(container) -> bool:
    """Whether the presentation times that FFmpeg gives for its packets are guesses."""
    return bool(UNTIMED_FORMATS & _formats(container))


def _formats(container) -> set[str]:
    """The names of its format, which FFmpeg gives like "matroska,webm"."""
    return set(container.format.name.split(","))


def _reason(e: Exception) -> str:
    return (getattr(e, "strerror", None) or type(e).__name__).rstrip(".")


def probe(path: Path, file=None) -> VideoInfo:
    """Read what the file says about itself; this counts its packets and decodes one frame.

    file: see open_video. Raises VideoError for a file that is not a video, is empty or gives no
    frame.
    """
    from av.stream import Disposition

    path = Path(path)
    container, stream = open_video(path, file)
    with container:
        stream.codec_context.thread_count = 1
        packets = _read_packets(path, container, stream)
        frame = packets.first_frame
        # Two fields are one frame.
        halves = packets.num_fields(stream) // 2 if frame.interlaced_frame else 0
        num_frames = _num_samples(container, stream) - packets.hidden - halves
        if "avi" in _formats(container):
            num_frames -= _empty_chunks(path, stream.index)
        if "mxf" in _formats(container):  # counted in frames, and in the header
            num_frames = max(num_frames, stream.duration or 0)
        missing = 0 if stream.frames else _missing(path, container, stream, packets)
        aspect = stream.sample_aspect_ratio
        rate = stream.average_rate or stream.guessed_rate
        turns, mirrored = _turn(frame, stream)
        others = [
            s for s in container.streams.video
            if s is not stream and not s.disposition & Disposition.attached_pic
        ]  # fmt: skip
        return VideoInfo(
            codec=stream.codec_context.name,
            pixel_format=frame.format.name,
            height=frame.height,
            width=frame.width,
            rate_hz=float(rate or 0),
            tick_seconds=_tick_seconds(stream),
            num_frames=max(packets.shown - halves, num_frames) + missing,
            pixel_aspect=float(aspect) if aspect else 1.0,
            full_range=_is_full_range(frame),
            rotation_degrees=90 * turns,
            mirrored=mirrored,
            other_streams=len(others) + _joined(path, container),
            interlaced=bool(frame.interlaced_frame),
        )


@dataclass
class _Packets:
    """What the packets of a video tell. Times are in time base units: as fractions of a second,
    those of every packet would take a third of the time of `probe`."""

    first_frame: object = None
    shown: int = 0
    hidden: int = 0  # images that are not to be shown
    durations: Counter[int] = field(default_factory=Counter)  # how many packets last so long
    duration: int = 0  # of one packet; 0 where they tell none
    # By stream: when the first packet begins, and when the last one ends (or begins, if it does
    # not tell how long it is).
    begins: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)

    def num_fields(self, stream) -> int:
        """How many packets of the stream hold half a frame."""
        return sum(num for d, num in self.durations.items() if _is_field(stream, d))

    def end(self, stream) -> int:
        return self.ends.get(stream.index, 0)

    def seconds(self, container) -> float:
        """How long the longest stream lasts. Sound may begin before 0, by the lead that its encoder
        needs."""
        lengths = {i: end - min(0, self.begins[i]) for i, end in self.ends.items()}
        bases = container.streams
        return max((float(n * bases[i].time_base) for i, n in lengths.items()), default=0.0)


def _read_packets(path: Path, container, stream) -> _Packets:
    """Raises VideoError if they give no frame."""
    import av

    found, codec = _Packets(), stream.codec_context.name
    try:
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                number, until = packet.stream_index, packet.pts + (packet.duration or 0)
                found.begins.setdefault(number, packet.pts)
                found.ends[number] = max(found.ends.get(number, 0), until)
            if packet.stream is not stream:
                continue
            if packet.size:  # "discard" marks packets outside the clip's edit list
                hides = packet.is_discard or shows_nothing(codec, packet)
                found.hidden += hides
                found.shown += not hides
                found.durations[packet.duration] += 1
                if packet.pts is not None:
                    found.duration = packet.duration or found.duration
            if found.first_frame is None:
                try:
                    found.first_frame = next(iter(packet.decode()), None)
                except av.FFmpegError as e:  # a damaged packet, which `decode` will count
                    if out_of_memory(e):
                        raise
    except av.FFmpegError as e:
        if out_of_memory(e):
            raise
        if found.first_frame is None:
            raise VideoError(path, f"cannot be read ({_reason(e)})") from e
    if found.first_frame is None:
        raise VideoError(path, "not a single frame can be decoded")
    return found


def shows_nothing(codec: str, packet) -> bool:
    """Whether the image in a packet is only there for others to refer to: one of VP8 whose
    show_frame is 0 (RFC 6386, section 9.1), as encoders of two passes make."""
    return codec == "vp8" and not memoryview(packet)[0] & 0x10


def _is_field(stream, duration: int | None) -> bool:
    """Whether a packet that lasts so long is half a frame: interlaced H.264 may have a packet for
    each field."""
    codec = stream.codec_context
    if codec.name != "h264" or not codec.framerate or not duration:
        return False
    return 0.4 < duration * stream.time_base * codec.framerate < 0.6


def _tick_seconds(stream) -> float:
    """Matroska, FLV and ASF round times to 1 ms, QuickTime perhaps to 1/600 s, GIF to 10 ms. A
    coarser tick, or one as long as a frame, counts frames and rounds nothing."""
    tick, rate = float(stream.time_base), float(stream.average_rate or 0)
    rounded = tick * rate < 0.99 or stream.codec_context.name == "gif"  # whose rate is a guess
    return tick if 1e-3 < tick <= 1e-2 and rounded else 1e-3


def _num_samples(container, stream) -> int:
    """How many frames the header counts; without the samples of an MP4 or MOV that are empty, which
    go on showing the previous image, and those that FFmpeg leaves out for the edit list."""
    index = stream.index_entries
    if "mp4" not in _formats(container) or not stream.frames or not len(index):
        return stream.frames
    return sum(entry.size > 0 for entry in index)


def _empty_chunks(path: Path, stream: int) -> int:
    """How many chunks of a stream are empty in an AVI.

    An empty chunk repeats the previous image. The header counts it as a frame, but FFmpeg makes no
    packet of it. This walks from chunk header to chunk header, since the index at the end of an
    AVI covers only its first GB and is missing in truncated files.
    """
    name, num_empty = b"%02dd" % stream, 0  # d, then b or c: an image, not a palette change
    with path.open("rb") as f:
        while len(head := f.read(8)) == 8 and any(head[:4]):
            length = int.from_bytes(head[4:], "little")
            if head[:4] in (b"RIFF", b"LIST"):
                f.seek(4, os.SEEK_CUR)  # its type; its items follow
            else:
                num_empty += head[:3] == name and not length
                f.seek(length, os.SEEK_CUR)
                if length % 2 and f.read(1) not in (b"\0", b""):  # the padding byte is missing
                    f.seek(-1, os.SEEK_CUR)
    return num_empty


def _joined(path: Path, container) -> int:
    """How many more files follow in an MP4 or MOV: joined byte by byte, FFmpeg reads the first."""
    if "mp4" not in _formats(container):
        return 0
    num_movies = at = 0
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        while at < size:
            f.seek(at)
            head = f.read(16)
            length = int.from_bytes(head[:4])
            if length == 1:  # 64 bits follow
                length = int.from_bytes(head[8:])
            num_movies += head[4:8] == b"moov"
            if length < 8:  # 0: up to the end of the file
                break
            at += length
    return max(0, num_movies - 1)


def _missing(path: Path, container, stream, packets: _Packets) -> int:
    """How many frames a file without a frame count lacks of the duration it announces.

    Matroska and WebM state their duration but not their number of frames, so only the duration
    reveals that such a file was truncated.
    """
    if not ANNOUNCING_FORMATS & _formats(container):
        return 0
    for name, cut in (("asf", cut_asf), ("flv", cut_flv)):
        if name in _formats(container):
            with path.open("rb") as f:
                if not cut(f, path.stat().st_size):  # its last image is shown for long
                    return 0
    period = float(packets.duration * stream.time_base)
    if stream.average_rate:
        period = 1 / float(stream.average_rate)
    if not period:
        return 0
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        announced = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:  # not stated for this stream; the file's is that of its longest one
        announced = (container.duration or 0) / 1e6
        if announced - packets.seconds(container) <= 1.5 * period:
            return 0
    short = announced - float(packets.end(stream) * stream.time_base)
    short = short / period - (not packets.duration)
    # With reordered frames ASF announces one frame too many. And half a frame for rounding.
    return round(short) if short > 1.5 else 0


def _is_full_range(frame) -> bool:
    """FFmpeg's convention: grey and RGB are full range, and unmarked YUV is limited.

    Grey is even if it is marked as limited: FFmpeg expands what it converts to grey, and may keep
    the mark of what it came from.
    """
    if frame.format.is_rgb or frame.format.has_palette:
        return True
    full = frame.format.name.startswith(("yuvj", "gray", "ya", "mono"))
    return full or int(frame.color_range) == FULL_RANGE


def luma(frame, turn: Turn = (0, False)) -> np.ndarray:
    """The luma of a PyAV frame as a new array, (H, W) uint8 in full range, turned upright.

    Limited range is expanded exactly, more than 8 bits are rounded to 8. RGB and palettes give
    BT.601 luma, round(.299 R + .587 G + .114 B), which leaves grey images unchanged.
    """
    y, limited = plane(frame, turn)
    return expand_limited(y) if limited else y.copy()


def plane(frame, turn: Turn = (0, False)) -> tuple[np.ndarray, bool]:
    """The luma (H, W) uint8, upright, perhaps in the frame's own memory; if its range is limited.

    What has to be computed comes in full range. Behind transparent RGB is black.
    """
    kind, limited = frame.format, False
    if kind.is_rgb or kind.has_palette or kind.name.startswith("mono"):
        if kind.name.endswith(("555be", "565be")):  # FFmpeg 8's swscale takes them for "le"
            frame = _converted(frame, kind.name.replace("be", "le"))
        has_alpha = any(c.is_alpha for c in kind.components)
        pixels = _converted(frame, "rgba" if has_alpha else "rgb24").to_ndarray()
        out = (rgba_luma if has_alpha else rgb_luma)(pixels)
    else:
        first = kind.components[0]
        alone = all(c.plane != first.plane for c in kind.components[1:])
        # P010 and similar keep their bits at the upper end of a word, which PyAV does not tell.
        odd = kind.name.startswith(("p0", "p2", "p4", "grayf")) or "msb" in kind.name
        if odd or not alone:  # packed 4:2:2 and similar: move the same luma to a plane of its own
            target = "gray" if kind.name.startswith(("ya", "gray")) else "yuv422p"
            frame = _converted(frame, target if first.bits == 8 else f"{target}16le")
            first = frame.format.components[0]
        full = _is_full_range(frame)
        if frame.planes[0].line_size < 0:  # from the bottom up, as AMV is, which PyAV cannot read
            frame = _converted(frame, "yuvj444p" if full else "yuv444p")
        stored = frame.planes[0]
        if first.bits == 8:
            rows = np.frombuffer(stored, np.uint8).reshape(-1, stored.line_size)
            out, limited = rows[: frame.height, : frame.width], not full
        else:
            order = ">u2" if frame.format.is_big_endian else "<u2"
            rows = np.frombuffer(stored, order).reshape(-1, stored.line_size // 2)
            y = rows[: frame.height, : frame.width].astype(np.float64)
            scale = 1 << (first.bits - 8)
            low, span = (0, (1 << first.bits) - 1) if full else (16 * scale, 219 * scale)
            out = np.floor(np.clip((y - low) / span, 0, 1) * 255 + 0.5).astype(np.uint8)
    turns, mirrored = turn
    if mirrored:
        out = out[:, ::-1]
    if turns:
        out = np.rot90(out, turns)
    return np.ascontiguousarray(out) if mirrored or turns else out, limited


def _converted(frame, pixel_format: str):
    """A PyAV frame in another pixel format, by one thread: several write some pixels of odd widths
    wrongly (FFmpeg 8's swscale)."""
    return frame.reformat(format=pixel_format, threads=1)


def _turn(frame, stream) -> Turn:
    """How players turn a video, by its first frame. FFmpeg's display matrix moves (x, y) to
    (a x + c y, b x + d y).

    Not asked of every frame: a frame and its side data refer to each other, so that a frame whose
    side data was read stays in memory for long.
    """
    unmirrored = round(frame.rotation / 90) % 4, False
    if stream.codec_context.name == "png":  # a colour profile has a name, which PyAV frees twice
        return unmirrored
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside it is a kind that PyAV does not know: EXIF, a second eye's view
        return unmirrored
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    return round(-math.atan2(b, a) / (math.pi / 2)) % 4, mirrored


def decode(path: Path) -> Iterator[Frame]:
    """Every frame of a video that the decoder gives, in order, on one thread.

    A damaged packet loses only its own frames: compare the number of frames with
    VideoInfo.num_frames. Times are the file's timestamps, shifted to 0 at the first frame, and
    never decrease: a frame without a timestamp comes one period after the previous frame, as does
    a frame at which the clock restarts because recordings were joined. A single absurd timestamp,
    more than REORDERED frames away from both its neighbours, is replaced by their midpoint. Raises
    VideoError if the file cannot be opened or, after the frames, cannot be read to its end.
    """
    for index, time_seconds, frame, turn, corrupt in decoded(Path(path)):
        yield Frame(index, time_seconds, luma(frame, turn), corrupt)


def decoded(path: Path, file=None) -> Iterator[tuple[int, float, object, Turn, bool]]:
    """Index, time in seconds, PyAV frame and turn of every frame, and whether it is damaged; see
    `decode`. file: see open_video."""
    container, stream = open_video(path, file)
    with container, contextlib.nullcontext() if file else path.open("rb") as whole:
        # Workers already run in parallel: a second thread here would only take their cores.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _options(stream.codec_context)
        clock = _Clock(stream, in_order=is_untimed(container))
        lost: set[int] = set()
        batches = _batches(path, container, stream, whole, lost)
        frames, turn = chain.from_iterable(batches), None
        for index, (frame, following) in enumerate(pairwise(chain(frames, (None,)))):
            turn = _turn(frame, stream) if turn is None else turn
            corrupt = bool(frame.is_corrupt) or frame.pts in lost
            lost.discard(frame.pts)  # in recordings that were joined, another frame has this time
            yield index, clock(frame, following), frame, turn, corrupt


def _options(codec) -> dict[str, str]:
    """SAME_PIXELS: by itself FFmpeg takes another inverse DCT on ARM, which changes MPEG-1, 2, 4,
    H.263 and motion JPEG by a few grey levels. {} for what Xvid has encoded, for which it takes
    Xvid's own on every processor."""
    if codec.name != "mpeg4":
        return SAME_PIXELS
    says = codec.extradata or b""  # the encoder's name among it
    by_xvid = b"XviD" in says or (codec.codec_tag.upper() in XVID_TAGS and b"Lavc" not in says)
    return {} if by_xvid else SAME_PIXELS


class _Clock:
    """clock(frame, following): the frame's time in seconds since the first frame, for frames in
    display order; following: the next frame, or None.

    The time is that of presentation (pts) or, with `in_order`, that of the packet which made the
    decoder output the frame (dts). If pts falls back where dts does not, pts was guessed, and dts
    is used from there on.
    """

    def __init__(self, stream, in_order: bool):
        self.tick_seconds = float(stream.time_base)
        self.period_seconds = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        self.far = REORDERED * self.period_seconds / self.tick_seconds
        self.in_order = in_order
        self.zero_seconds = None  # the timestamp at time 0
        self.last_seconds = None
        self.last_stamps = None, None

    def __call__(self, frame, following) -> float:
        last_pts, last_dts = self.last_stamps
        next_pts, next_dts = (None, None) if following is None else (following.pts, following.dts)
        pts = self.settled(last_pts, frame.pts, next_pts)
        dts = self.settled(last_dts, frame.dts, next_dts)
        self.last_stamps = pts, dts
        if _falls(last_pts, pts) and _falls(last_dts, dts) is False and not self.in_order:
            self.in_order, self.zero_seconds = True, None
        first = self.last_seconds is None
        due = 0.0 if first else self.last_seconds + self.period_seconds
        stamp = dts if self.in_order else pts
        if stamp is None:
            self.last_seconds = due
            return due
        at = stamp * self.tick_seconds
        if self.zero_seconds is None or at - self.zero_seconds < self.last_seconds:
            self.zero_seconds = at - due
        self.last_seconds = at - self.zero_seconds
        return self.last_seconds

    def settled(self, last: int | None, stamp: int | None, after: int | None) -> int | None:
        """The timestamp; if it is absurd, the midpoint of those before and after it."""
        if last is None or stamp is None or after is None or last > after:
            return stamp
        return stamp if last - self.far <= stamp <= after + self.far else (last + after) // 2


def _falls(stamp: int | None, next_stamp: int | None) -> bool | None:
    return None if stamp is None or next_stamp is None else next_stamp < stamp


def _batches(
    path: Path, container, stream, whole: BinaryIO | None, lost: set[int]
) -> Iterator[list]:
    """The frames of each packet in turn; a damaged packet gives none. whole: see breaks_off. The
    times of packets in which the container finds that bytes are missing, as an MPEG-TS counts its
    parts, are added to `lost`: many decoders make up the rest and do not say so."""
    import av

    for packet in _packets(path, container, stream, whole):
        if packet and packet.is_corrupt and packet.pts is not None:
            lost.add(packet.pts)
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as e:
            if out_of_memory(e):
                raise
            continue
        yield frames


def _packets(path: Path, container, stream, whole: BinaryIO | None) -> Iterator:
    """The packets, without the last one of a file that breaks off, and None.

    Raises VideoError behind them if a disk or a network does not give the rest of the file.
    """
    import av

    held, last = [], []  # a packet and empty ones behind it; it and the one before
    unread = None
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield from held
                held, last = [], [*last[-1:], packet]
            held.append(packet)
    except av.FFmpegError as e:
        if out_of_memory(e):
            raise
        unread = e if isinstance(e, OSError) else None  # others: the file breaks off
    if last and breaks_off(whole, container, last):
        del held[0]
    yield from held
    yield None  # for the frames that are still in the decoder, which are good
    if unread:
        raise VideoError(path, f"cannot be read to its end ({_reason(unread)})")


def images(path: Path, file=None) -> Iterator[tuple[Luma, float]]:
    """The luma of every frame, None if it is damaged, and its time in seconds. file: see
    open_video."""
    for _, time_seconds, frame, turn, corrupt in decoded(path, file):
        yield None if corrupt else partial(plane, frame, turn), time_seconds


@dataclass(frozen=True)
class PyavBackend:
    """FFmpeg's decoders on one CPU thread, for every format that PyAV opens.

    region: the part of the upright image that is used; by default, all of it.
    """

    region: Region | None = None
    name = "pyav"

    def refuses(self, info: VideoInfo) -> str | None:
        return None

    def images(self, path: Path) -> Iterator[tuple[Luma, float]]:
        return images(path)

    def prepared(
        self,
        path: Path,
        info: VideoInfo,
        keep: Keep,
        size: int,
        quality: int,
    ) -> Iterator[Prepared]:
        aspect = info.pixel_aspect if info.rotation_degrees % 180 == 0 else 1 / info.pixel_aspect
        for index, (luma, time_seconds) in enumerate(self.images(path)):
            image, elsewhere = None, False
            if luma is not None and keep(index, time_seconds):
                y, limited = luma()
                if self.region is None:
                    image = prepare(y, size, aspect, limited)
                elif self.region.shown(y, limited):
                    image = prepare(self.region.cut(y), size, aspect, limited)
                else:
                    elsewhere = True
            yield Prepared(index, time_seconds, luma is None, image, elsewhere=elsewhere)
