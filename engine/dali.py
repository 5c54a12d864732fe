"""Video files decoded by NVIDIA DALI: with NVDEC on a GPU, with DALI's own decoder without one.

On a GPU, frames stay there until they are S x S pixels and encoded as JPEG:

    file -> NVDEC -> luma plane -> full range -> antialiased resize -> black border -> nvJPEG

Without a GPU the same graph runs on the CPU, which exists for tests: DALI's CPU decoder supports
only MJPEG, VP8 and VP9, and PyAV (engine/video.py) is faster.
"""

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from sslus.engine.errors import InputError
from sslus.engine.prepare import expand_limited, fit
from sslus.engine.truncated import breaks_off
from sslus.engine.video import (
    Keep,
    Prepared,
    VideoError,
    VideoInfo,
    is_untimed,
    open_video,
    shows_nothing,
)

# Frames decoded at a time, which bounds the memory use: 100 MB for 1920 x 1080, and twice that
# because the next chunk is decoded meanwhile. After the last frame DALI starts the file again, so
# larger chunks waste more work.
CHUNK = 16

# FFmpeg's name -> (NVDEC's codec number, common name), for the codecs that DALI passes to NVDEC.
# The driver says which of them this GPU decodes, and in which sizes.
NVDEC_CODECS = {
    "mpeg4": (2, "MPEG-4"),
    "h264": (4, "H.264"),
    "hevc": (8, "HEVC"),
    "vp8": (9, "VP8"),
    "vp9": (10, "VP9"),
}
CPU_CODECS = ("mjpeg", "vp8", "vp9")
FORMATS_420 = ("yuv420p", "yuvj420p")
FORMATS_8_BIT = (*FORMATS_420, "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")


def why_not(device: str) -> str | None:
    """Why DALI cannot run on this device, and what to do; None if it can."""
    try:
        _encoder(device)
    except InputError as e:
        return str(e)
    return None


def _encoder(device: str):
    """nvImageCodec's JPEG encoder, which needs all that DALI needs: driver, packages and CUDA.

    Raises InputError, which says what is missing and what to do. CUDA may not start although it is
    there: an installed driver may be too old for the version that nvImageCodec is built with.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"the device must be cpu or cuda, got {device!r}")
    gpu = device == "cuda"
    if gpu:
        _nvdec()
    try:
        import nvidia.dali  # noqa: F401  only to know that it is there
        from nvidia import nvimgcodec as codec
    except ImportError as e:
        instead = "--device cpu" if gpu else "--decoder pyav"
        raise InputError(
            f"it cannot be imported ({e}); pip install nvidia-dali-cuda130, or use {instead}"
        ) from e
    kind = codec.BackendKind
    kinds = (kind.GPU_ONLY, kind.HYBRID_CPU_GPU) if gpu else (kind.CPU_ONLY,)
    try:
        return codec.Encoder(
            device_id=0 if gpu else codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(k) for k in kinds],
        )
    except RuntimeError as e:
        why = str(e).splitlines()[0]
        instead = "is the driver too old? use --device cpu" if gpu else "use --decoder pyav"
        raise InputError(f"nvImageCodec does not start ({why}); {instead}") from e


class DaliBackend:
    """DALI on one GPU (`device="cuda"`) or on the CPU (`device="cpu"`, one thread).

    NVDEC gives the decoder's own luma plane, as PyAV does, so their prepared frames differ only by
    rounding, at most one grey level. DALI's CPU decoder gives only RGB: just as close where the
    image is grey, but colours are rounded once more, and clipped where RGB cannot hold them.
    DALI does not report damaged frames, so `corrupt` is never set.

    Raises InputError if the device cannot be used; there is no fallback to another one.
    """

    name = "dali"

    def __init__(self, device: str):
        try:
            self._encoder = _encoder(device)
        except InputError as e:
            raise InputError(f"dali: {e}") from e
        import nvidia.dali

        self._dali = nvidia.dali
        self._gpu = device == "cuda"

    def refuses(self, info: VideoInfo) -> str | None:
        """Why this device cannot decode such a file, or None if it can."""
        kind = f"{info.codec} {info.pixel_format}"
        if info.rotation_degrees or info.mirrored:
            how = f"by {info.rotation_degrees} degrees{', mirrored' * info.mirrored}"
            return f"DALI does not rotate frames (these are rotated {how})"
        if info.other_streams:
            return "DALI cannot be told which of several videos in a file to use"
        if not self._gpu:
            if info.codec not in CPU_CODECS or info.pixel_format not in FORMATS_8_BIT:
                return f"without a GPU DALI decodes 8-bit {', '.join(CPU_CODECS)} only, not {kind}"
            return None
        if info.codec not in NVDEC_CODECS or info.pixel_format not in FORMATS_420:
            names = ", ".join(name for _, name in NVDEC_CODECS.values())
            return f"DALI decodes 8-bit 4:2:0 of {names} on a GPU, not {kind}"
        if info.width % 2 or info.height % 2:
            return f"NVDEC gives only even sizes, not {info.width} x {info.height}"
        if info.interlaced:
            return "DALI treats each field of an interlaced video as a frame"
        number, name = NVDEC_CODECS[info.codec]
        caps = _nvdec_limits(number)
        if not caps.supported:
            return f"this GPU does not decode {name}"
        if not (
            caps.min_width <= info.width <= caps.max_width
            and caps.min_height <= info.height <= caps.max_height
            and info.width * info.height // 256 <= caps.max_macroblocks
        ):
            return (
                f"this GPU decodes {name} from {caps.min_width} x {caps.min_height}"
                f" to {caps.max_width} x {caps.max_height}, not {info.width} x {info.height}"
            )
        return None

    def prepared(
        self,
        path: Path,
        info: VideoInfo,
        keep: Keep,
        size: int,
        quality: int,
    ) -> Iterator[Prepared]:
        """Every decoded frame in order; the kept ones as (size, size) image and as JPEG."""
        path = Path(path).absolute()
        _check_packets(path)
        with _blame(path):
            pipe = self._pipeline(path, info, size)
            pipe.build()
            num_chunks = pipe.reader_meta("video")["epoch_size"]
        index = 0
        for _ in range(num_chunks):
            with _blame(path):
                pipe.schedule_run()
                squares, times, shape = pipe.outputs()
                images, times, shape = (np.array(_host(x)) for x in (squares, times, shape))
            if tuple(shape[1:3]) != (info.height, info.width):
                raise VideoError(
                    path, f"DALI gives {shape[2]} x {shape[1]}, not {info.width} x {info.height}"
                )
            times = times[times >= 0]  # the last chunk is padded; its padding has time -1
            kept = [i for i, time in enumerate(times) if keep(index + i, float(time))]
            with _blame(path):
                jpegs = dict(zip(kept, self._encode(squares, images, kept, quality), strict=True))
            for i, time in enumerate(times):
                image = images[i, :, :, 0] if i in jpegs else None
                yield Prepared(index + i, float(time), False, image, jpegs.get(i))
            index += len(times)

    def _pipeline(self, path: Path, info: VideoInfo, size: int):
        """The graph: a chunk of frames in, (CHUNK, size, size, 1) uint8 and their times out."""
        fn, types = self._dali.fn, self._dali.types
        top, left, height, width = fit(info.height, info.width, size, info.pixel_aspect)
        device = "gpu" if self._gpu else "cpu"
        pipe = self._dali.Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=0 if self._gpu else None,
            prefetch_queue_depth=1,  # the reader decodes ahead itself; more would waste work
        )
        with pipe:
            frames, times = fn.experimental.readers.video(
                name="video",
                device=device,
                filenames=[str(path)],
                sequence_length=CHUNK,
                pad_mode="constant",  # "none" would drop the frames after the last full chunk
                enable_timestamps=True,
                image_type=types.YCbCr if self._gpu else types.RGB,
            )
            if self._gpu:
                # YCbCr is NVDEC's surface with upsampled chroma; Y is unchanged.
                luma = fn.slice(frames, start=0, shape=1, axis_names="C")
                if not info.full_range:
                    table = expand_limited(np.arange(256, dtype=np.uint8)[None])[0]
                    luma = fn.lookup_table(
                        luma, keys=list(range(256)), values=table.tolist(), dtype=types.UINT8
                    )
            else:
                # DALI's CPU decoder fails on YCbCr; its RGB has full range.
                luma = fn.color_space_conversion(
                    frames, image_type=types.RGB, output_type=types.GRAY
                )
            # Beyond the border DALI repeats the outermost pixels, while prepare() ignores them.
            # A black border and division by the filter weight inside give prepare()'s result.
            rows, row_share = _inside(info.height, height)
            columns, column_share = _inside(info.width, width)
            bordered = fn.slice(
                luma,
                start=(-rows, -columns),
                shape=(info.height + 2 * rows, info.width + 2 * columns),
                axis_names="HW",
                out_of_bounds_policy="pad",
            )
            scaled = fn.resize(
                bordered,
                size=(height, width),
                roi_start=(rows, columns),
                roi_end=(rows + info.height, columns + info.width),
                interp_type=types.INTERP_TRIANGULAR,
                antialias=True,
                dtype=types.FLOAT,
            )
            share = np.outer(row_share, column_share).astype(np.float32)[..., None]
            scaled = fn.cast(scaled / types.Constant(share, device=device), dtype=types.UINT8)
            squares = fn.slice(
                scaled,
                start=(-top, -left),
                shape=(size, size),
                axis_names="HW",
                out_of_bounds_policy="pad",
            )
            pipe.set_outputs(squares, times, frames.shape())
        return pipe

    def _encode(self, squares, images: np.ndarray, kept: list[int], quality: int) -> list[bytes]:
        """The kept frames as JPEG, encoded on the device that holds them."""
        from nvidia import nvimgcodec as codec

        if not kept:
            return []
        params = codec.EncodeParams(
            quality_type=codec.QualityType.QUALITY,
            quality_value=quality,
            chroma_subsampling=codec.ChromaSubsampling.CSS_GRAY,
        )
        if self._gpu:
            shape, start = images.shape[1:], squares[0].data_ptr()
            sources = [_OnGpu(start + i * images[0].nbytes, shape) for i in kept]
        else:
            sources = [images[i] for i in kept]
        streams = self._encoder.encode([codec.as_image(s) for s in sources], "jpeg", params=params)
        if None in streams:
            raise RuntimeError("nvImageCodec cannot encode a frame as JPEG")
        return [bytes(stream) for stream in streams]


class _OnGpu:
    """One (H, W, 1) uint8 image inside a larger block of GPU memory, for nvImageCodec."""

    def __init__(self, address: int, shape: tuple[int, ...]):
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": tuple(shape),
            "strides": None,
            "typestr": "|u1",
            "version": 3,
        }


def _inside(length: int, new_length: int) -> tuple[int, np.ndarray]:
    """How many pixels a triangle filter reaches beyond the border, and for each output pixel the
    share of the filter weight that lies inside, (new_length,)."""
    scale = length / new_length
    reach = max(1.0, scale)
    border = int(np.ceil(reach))
    centre = (np.arange(new_length) + 0.5) * scale
    at = np.arange(-border, length + border) + 0.5
    weight = np.maximum(0.0, 1.0 - np.abs(at - centre[:, None]) / reach)
    return border, weight[:, border : border + length].sum(1) / weight.sum(1)


def _host(batch):
    """The only tensor of a DALI batch, in memory that Python can read."""
    return batch.as_cpu()[0]


@contextmanager
def _blame(path: Path):
    """Turn what DALI throws into a VideoError of one line."""
    try:
        yield
    except Exception as e:  # DALI raises whatever its C++ exceptions were mapped to
        text = str(e).partition("encountered:")[2] or str(e)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        why = lines[0].partition("failed: ")[2] or lines[0] if lines else type(e).__name__
        if "number of input samples: 0" in why:
            why = "it cannot open the file"
        raise VideoError(path, f"DALI: {why}") from e


def _check_packets(path: Path) -> None:
    """Raise VideoError unless every packet is one frame, shown at its timestamp, as DALI assumes.

    DALI sorts frames by their timestamps, in 32 bits, and skips negative ones. Without usable
    timestamps, frames would come in the wrong order, or too many or too few of them. An AVI has
    none: FFmpeg infers them (sometimes wrongly, where frames are reordered), DALI's demuxer does
    not. On a GPU, timestamps wait in a queue and each decoded image takes the next one: if a packet
    gives no image, all later frames get wrong timestamps.
    """
    import av

    stamps, order, last, edited, whole = [], [], [], False, True
    try:
        container, stream = open_video(path)
        with container, path.open("rb") as f:
            codec = stream.codec_context.name
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if not stamps and not _begins(packet, stream):
                    raise VideoError(path, "pictures that refer to earlier ones, which are cut off")
                if not _shows_its_own(codec, packet):
                    raise VideoError(path, "packets that show no new picture, which DALI counts")
                stamps.append(packet.pts)
                order.append(packet.dts)
                edited |= packet.pts is not None and (packet.pts < 0) != packet.is_discard
                whole &= not packet.is_corrupt
                last = [*last[-1:], packet]
            whole &= not (last and breaks_off(f, container, last))
            guessed = is_untimed(container)
            first = stream.index == container.streams.video[0].index
            reordered = stream.codec_context.has_b_frames
    except av.FFmpegError as e:
        raise VideoError(path, f"cannot be read ({e.strerror or e})") from e
    if not first:  # a cover image comes before it
        raise VideoError(path, "an image before the video, which DALI would use")
    if None in stamps or (guessed and (reordered or stamps != sorted(stamps))):
        raise VideoError(path, "no timestamps to order the frames by, which DALI needs")
    order = [dts for dts in order if dts is not None]
    if order != sorted(order):
        raise VideoError(path, "timestamps that start again, which would mix DALI's frames")
    if len(set(stamps)) < len(stamps) or max(stamps, default=0) >= 1 << 31:
        raise VideoError(path, "timestamps repeated or over 32 bits, which mislead DALI")
    if edited:
        raise VideoError(path, "an edit list or negative times, which DALI does not follow")
    if not whole:
        raise VideoError(path, "damaged packets, which DALI would not report")


def _begins(packet, stream) -> bool:
    """Whether NVDEC gives images from this packet on, the first of a file.

    For H.264 it gives none before an IDR picture, for HEVC none that refer to earlier ones.
    """
    codec = stream.codec_context.name
    if codec not in ("h264", "hevc"):
        return packet.is_keyframe
    from av.bitstream import BitStreamFilterContext

    own = type(packet)(bytes(packet))  # a filter empties the packet it is given
    units = b"".join(map(bytes, BitStreamFilterContext(f"{codec}_mp4toannexb", stream).filter(own)))
    heads = [head[0] for head in re.findall(rb"\x00\x00\x01(.)", units, re.DOTALL)]
    if codec == "h264":
        return any(head & 31 == 5 for head in heads)  # ITU-T H.264, table 7-1
    return any(17 <= head >> 1 & 63 <= 20 for head in heads)  # H.265, table 7-1: IDR, BLA


def _shows_its_own(codec: str, packet) -> bool:
    """Whether a packet of VP8 or VP9 shows an image that it holds."""
    # show_existing_frame, VP9 bitstream, section 6.2: NVDEC has nothing to decode then.
    refers = codec == "vp9" and memoryview(packet)[0] & 0x08
    return not (refers or shows_nothing(codec, packet))


# --- what the driver supports, without a CUDA toolkit --------------------------------------------


class _Limits(ctypes.Structure):
    """CUVIDDECODECAPS of NVIDIA's Video Codec SDK (cuviddec.h); the first four are inputs."""

    _fields_ = [
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("_reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("num_engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("_histogram", ctypes.c_ubyte * 4),
        ("_reserved3", ctypes.c_uint * 10),
    ]


@cache
def _nvdec():
    """The driver (libcuda, libnvcuvid) and the GPU's context. Raises InputError without them."""
    otherwise = "; use --device cpu"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise InputError(f"no NVIDIA driver here (libcuda.so.1){otherwise}") from e
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise InputError(f"the NVIDIA driver finds no GPU{otherwise}")
    try:
        cuvid = ctypes.CDLL("libnvcuvid.so.1")
    except OSError as e:
        raise InputError(
            "the driver's video library is missing (libnvcuvid.so.1; in a container set"
            f" NVIDIA_DRIVER_CAPABILITIES=all){otherwise}"
        ) from e
    context = ctypes.c_void_p()
    status = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    if status:
        raise InputError(f"the GPU cannot be used (CUDA error {status}){otherwise}")
    return cuda, cuvid, context


@cache
def _nvdec_limits(codec: int) -> _Limits:
    """What this GPU decodes of a codec, in 8-bit 4:2:0."""
    cuda, cuvid, context = _nvdec()
    limits = _Limits(codec=codec, chroma=1, bit_depth_minus_8=0)
    cuda.cuCtxPushCurrent_v2(context)
    status = cuvid.cuvidGetDecoderCaps(ctypes.byref(limits))
    cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    if status:
        raise InputError(f"dali: NVDEC does not answer (CUDA error {status}); use --device cpu")
    return limits
