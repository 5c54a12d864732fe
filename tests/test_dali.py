"""The DALI backend against the PyAV backend: the same frames, times and pictures."""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import simplejpeg

from sslus.engine import dali
from sslus.engine.dali import CHUNK, DaliBackend
from sslus.engine.errors import InputError
from sslus.engine.video import PyavBackend, VideoError, VideoInfo, open_video, probe

LIMITED, FULL = 1, 2


def make_clip(path, codec, num_frames, *, size=(66, 48), pixels="yuv420p", range_=LIMITED,
              colour=0, times_ms=None, options=None):  # fmt: skip
    """A clip with moving fine texture: grey with black and white at the border, or, if
    `colour` is not 0, tinted, without the extremes at which RGB would clip the tint.

    Its codec may be lossy: both backends see the same losses. Returns the path.
    """
    width, height = size
    rng = np.random.default_rng(7)
    texture = rng.integers(16, 236, (height + num_frames % 64 + 64, width), dtype=np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.color_range = range_
        base = Fraction(1, 1000) if times_ms else Fraction(1, 25)
        stream.time_base = stream.codec_context.time_base = base
        for i in range(num_frames):
            frame = av.VideoFrame(width, height, pixels)
            frame.color_range = range_
            for k, plane in enumerate(frame.planes):
                rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
                rows[:] = 128 + (colour, -colour)[k % 2]
                if k == 0:
                    rows[:, :width] = texture[i % 64 : i % 64 + height] // 2 + 64
                    if not colour:
                        rows[: height // 3, : width // 2] = 235 if i % 2 else 16
                        rows[-1, :width] = 16 + 3 * (i % 64)
            frame.pts, frame.time_base = (times_ms[i] if times_ms else i), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def differences(path, backend, size, keep=lambda index, time: True):
    """Where the backend's frames are not those of PyAV: lines to read, none if they agree."""
    info = probe(path)
    assert backend.refuses(info) is None
    ours = list(backend.prepared(path, info, keep, size, 95))
    theirs = list(PyavBackend().prepared(path, info, keep, size, 95))
    found = []
    if len(ours) != len(theirs) or len(theirs) != info.num_frames:
        found.append(f"{len(ours)} frames, PyAV {len(theirs)}, expected {info.num_frames}")
    worst = 0
    for a, b in zip(ours, theirs, strict=False):
        if a.index != b.index or abs(a.time_seconds - b.time_seconds) > 1e-3:
            found.append(f"frame {a.index} at {a.time_seconds} s, PyAV {b.index}: {b.time_seconds}")
        if (a.image is None) != (b.image is None):
            found.append(f"frame {a.index}: one of the two has no picture")
            continue
        if a.image is None:
            continue
        assert a.image.dtype == np.uint8 and a.image.shape == (size, size)
        diff = a.image.astype(int) - b.image
        if abs(diff).max() > max(worst, 1):
            worst = abs(diff).max()
            y, x = np.unravel_index(abs(diff).argmax(), diff.shape)
            found.append(
                f"frame {a.index}: {a.image[y, x]} for {b.image[y, x]} at row {y} column {x};"
                f" {(abs(diff) > 1).mean():.1%} differ by more than 1, mean {diff.mean():+.2f}"
            )
        decoded = simplejpeg.decode_jpeg(a.jpeg, colorspace="GRAY")[..., 0]
        header = simplejpeg.decode_jpeg_header(a.jpeg)
        if header[:3] != (size, size, "Gray") or abs(decoded.astype(int) - a.image).mean() > 3:
            found.append(f"frame {a.index}: the JPEG {header} is another picture")
    return [f"{Path(path).name} {info.codec} {info.width}x{info.height}: {x}" for x in found[:6]]


VFR_MS = [0, 40, 50, 51, 300, 1000, 1001, 1700] + [2000 + 33 * i for i in range(CHUNK)]
FAST = {"deadline": "realtime", "cpu-used": "8", "b:v": "2M"}
EXACT = FAST | {"lossless": "1"}  # grey stays exactly grey, so that RGB rounds nothing
BEST = {"q:v": "2", "strict": "unofficial"}
# Even, but no multiple of 16: the decoder must crop.
LARGE = (370, 242)
CPU_CLIPS = {
    "mjpeg-full-odd": ("a.avi", "mjpeg", 2 * CHUNK + 5,
                       dict(pixels="yuvj420p", range_=FULL, size=(65, 47), options=BEST)),
    "mjpeg-full-444": ("a.avi", "mjpeg", 3, dict(pixels="yuvj444p", range_=FULL, colour=20,
                                                     options=BEST)),
    "mjpeg-limited": ("a.avi", "mjpeg", CHUNK, dict(options=BEST)),
    "vp8-odd": ("a.webm", "libvpx", CHUNK - 1, dict(size=(47, 65), options=FAST)),
    "vp9-limited-chunks": ("a.webm", "libvpx-vp9", 2 * CHUNK, dict(options=EXACT)),
    "vp9-colour": ("a.webm", "libvpx-vp9", 5, dict(colour=-20, options=EXACT)),
    "vp9-full-odd": ("a.webm", "libvpx-vp9", CHUNK + 1,
                     dict(range_=FULL, size=(131, 75), options=EXACT)),
    "vp9-one-frame": ("a.webm", "libvpx-vp9", 1, dict(options=EXACT)),
    "vp9-hidden-frames": ("a.mkv", "libvpx-vp9", 40, dict(options=EXACT)),
    "vp9-variable-rate": ("a.webm", "libvpx-vp9", len(VFR_MS),
                          dict(times_ms=VFR_MS, options=EXACT)),
}  # fmt: skip


@pytest.fixture(scope="module")
def cpu():
    pytest.importorskip("nvidia.dali")
    return DaliBackend("cpu")


@pytest.mark.parametrize("name", CPU_CLIPS)
def test_cpu_agrees_with_pyav(name, cpu, tmp_path):
    file, codec, num_frames, extra = CPU_CLIPS[name]
    path = make_clip(tmp_path / file, codec, num_frames, **extra)
    assert not differences(path, cpu, 32)  # smaller than the clip, and larger
    assert not differences(path, cpu, 150)
    times = [p.time_seconds for p in cpu.prepared(path, probe(path), lambda i, t: False, 32, 95)]
    wanted = [t / 1000 for t in extra.get("times_ms", range(0, 40 * num_frames, 40))]
    assert np.allclose(times, wanted, atol=1e-3)


def test_pixels_that_are_not_square_are_stretched_as_by_pyav(cpu, tmp_path):
    path = make_clip(tmp_path / "a.webm", "libvpx-vp9", 2, options=EXACT)
    info = replace(probe(path), pixel_aspect=0.4)
    ours, theirs = (
        list(backend.prepared(path, info, lambda i, t: True, 32, 95))
        for backend in (cpu, PyavBackend())
    )
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.image.astype(int) - b.image).max() <= 1


def test_what_dali_gives_must_be_what_was_probed(cpu, tmp_path, monkeypatch):
    path = make_clip(tmp_path / "a.webm", "libvpx-vp9", 2, options=FAST)
    info = probe(path)
    wider = replace(info, width=info.width + 2)
    with pytest.raises(VideoError, match=f"gives {info.width} x {info.height}, not {wider.width}"):
        list(cpu.prepared(path, wider, lambda i, t: True, 32, 95))
    fails = SimpleNamespace(encode=lambda images, *a, **k: [b"", None][: len(images)])
    monkeypatch.setattr(cpu, "_encoder", fails)
    with pytest.raises(VideoError, match="cannot encode a frame as JPEG"):
        list(cpu.prepared(path, info, lambda i, t: True, 32, 95))


def test_only_kept_frames_have_pictures(cpu, tmp_path):
    path = make_clip(tmp_path / "a.avi", "mjpeg", 2 * CHUNK + 3, options=BEST)
    asked = []

    def keep(index, time_seconds):
        asked.append((index, round(time_seconds, 3)))
        return index % 20 == 1

    got = list(cpu.prepared(path, probe(path), keep, 32, 95))
    assert asked == [(i, round(i / 25, 3)) for i in range(2 * CHUNK + 3)]
    assert [p.index for p in got if p.image is not None] == [1, 21]
    assert [p.index for p in got if p.jpeg is not None] == [1, 21]
    # Each picture is its own: the next chunk must not overwrite what was handed out.
    again = {p.index: p.image for p in cpu.prepared(path, probe(path), keep, 32, 95)}
    assert all(np.array_equal(p.image, again[p.index]) for p in got if p.image is not None)


def test_damage_is_never_silent(cpu, tmp_path):
    whole = make_clip(tmp_path / "a.webm", "libvpx-vp9", 60, options=FAST)
    data = whole.read_bytes()
    info = probe(whole)
    # DALI remembers the index of a file by its name, so every variant gets a name of its own.
    for name, damaged in {
        "cut": data[: len(data) // 2],
        "junk": b"this is no video" * 100,
    }.items():
        path = tmp_path / f"{name}.webm"
        path.write_bytes(damaged)
        try:
            decoded = sum(1 for _ in cpu.prepared(path, info, lambda i, t: True, 32, 95))
        except VideoError as e:
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
        else:
            assert name == "cut" and 0 < decoded < info.num_frames
    # A damaged packet inside: an AVI's packets can be hit one at a time.
    hit = make_clip(tmp_path / "hit.avi", "mjpeg", 40, options=BEST)
    data = bytearray(hit.read_bytes())
    with av.open(str(hit)) as container:
        packet = [p for p in container.demux(video=0) if p.size][20]
    data[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
    hit.write_bytes(data)
    with pytest.raises(VideoError) as e:
        list(cpu.prepared(hit, info, lambda i, t: True, 32, 95))
    assert str(e.value).startswith(f"{hit}: ") and "\n" not in str(e.value)
    # The same backend goes on working.
    assert not differences(whole, cpu, 32)


@pytest.mark.parametrize(
    "file, codec", [("a.avi", "mpeg4"), ("a.avi", "libx264"), ("a.h264", "libx264")]
)
def test_frames_that_dali_would_not_put_in_order_are_refused(file, codec, cpu, tmp_path):
    path = make_clip(tmp_path / file, codec, 12, options={"bf": "2"})
    with pytest.raises(VideoError, match="timestamps"):
        list(cpu.prepared(path, probe(path), lambda i, t: True, 32, 95))


def test_stamps_of_joined_and_of_long_recordings_are_refused(tmp_path):
    whole = make_clip(tmp_path / "a.ts", "libx264", 12)
    dali._check_packets(whole)
    twice = tmp_path / "b.ts"
    twice.write_bytes(2 * whole.read_bytes())
    with pytest.raises(VideoError, match="timestamps that start again"):
        dali._check_packets(twice)
    late = remux(whole, tmp_path / "c.ts", lambda n, p: bytes(p), later=1 << 31)
    with pytest.raises(VideoError, match="over 32 bits"):
        dali._check_packets(late)


def test_a_video_behind_another_is_refused(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for stream, num in zip(streams, (1, 12), strict=True):
            for i in range(num):
                frame = av.VideoFrame(64, 48, "yuv420p")
                frame.pts = i
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    assert open_video(path)[1].index == 1  # the one that is taken
    with pytest.raises(VideoError, match="an image before the video"):
        dali._check_packets(path)


OPEN = {
    "libx264": {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"},
    "libx265": {"x265-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"},
}


def remux(path, into, change, later=0):
    """The packets of a file in another; change(number, data) -> the data to write, or None.

    later: is added to their time stamps."""
    with av.open(str(path)) as source, av.open(str(into), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = change(number, packet)
            if data is not None:
                copy = av.Packet(data)
                copy.pts, copy.dts = packet.pts + later, packet.dts + later
                copy.time_base = packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                out.mux(copy)
    return into


@pytest.mark.parametrize("codec", OPEN)
def test_a_file_that_leans_on_what_was_cut_off_is_refused(codec, cpu, tmp_path):
    whole = make_clip(tmp_path / "a.mkv", codec, 40, options=OPEN[codec])
    dali._check_packets(whole)
    keys = []

    def from_second_key(number, packet):
        keys.extend([number] * packet.is_keyframe)
        return bytes(packet) if len(keys) > 1 else None

    cut = remux(whole, tmp_path / "cut.mkv", from_second_key)
    assert 0 < keys[1] < 40
    with pytest.raises(VideoError, match="refer to earlier ones"):
        list(cpu.prepared(cut, probe(cut), lambda i, t: True, 32, 95))


@pytest.mark.parametrize(
    "codec, change",
    [
        ("libvpx", lambda data: bytes([data[0] & 0xEF]) + data[1:]),  # hidden
        ("libvpx-vp9", lambda data: b"\x88"),  # shows again what was shown before
    ],
)
def test_packets_that_show_nothing_new_are_refused(codec, change, cpu, tmp_path):
    whole = make_clip(tmp_path / "a.webm", codec, 12, options=FAST)
    dali._check_packets(whole)
    hit = remux(whole, tmp_path / "b.webm", lambda n, p: change(bytes(p)) if n == 5 else bytes(p))
    with pytest.raises(VideoError, match="no new picture"):
        list(cpu.prepared(hit, probe(whole), lambda i, t: True, 32, 95))


def test_the_clips_with_hidden_frames_hold_some(tmp_path):
    for file, codec, size in (("a.mkv", "libvpx-vp9", (66, 48)), ("a.webm", "libvpx-vp9", LARGE)):
        with av.open(str(make_clip(tmp_path / file, codec, 37, size=size, options=EXACT))) as clip:
            assert any(not bytes(p)[0] & 2 for p in clip.demux(video=0) if p.size)


def test_damage_that_the_file_tells_of_is_refused(cpu, tmp_path):
    whole = make_clip(tmp_path / "a.ts", "libx264", 40)
    data = whole.read_bytes()
    blocks = [data[i : i + 188] for i in range(0, len(data), 188)]
    # Those of a stream are numbered. One in the midst of the video (0x100) is taken away.
    middle = range(len(blocks) // 2, len(blocks))
    del blocks[next(i for i in middle if blocks[i][1:3] == b"\x01\x00")]
    hit = tmp_path / "b.ts"
    hit.write_bytes(b"".join(blocks))
    cut = tmp_path / "c.ts"
    cut.write_bytes(data[: len(data) // 2 // 188 * 188 + 100])
    dali._check_packets(whole)
    for damaged in (hit, cut):
        with pytest.raises(VideoError, match="damaged packets"):
            list(cpu.prepared(damaged, probe(whole), lambda i, t: True, 32, 95))


def test_fields_are_seen(tmp_path):
    options = {"x264-params": "interlaced=1"}
    assert probe(make_clip(tmp_path / "a.mp4", "libx264", 4, options=options)).interlaced
    assert not probe(make_clip(tmp_path / "b.mp4", "libx264", 4)).interlaced


def info_of(codec, pixels="yuv420p", width=640, height=480, **more):
    return VideoInfo(codec, pixels, height, width, 25.0, 10, **more)


def test_cpu_refuses_what_it_cannot_decode(cpu):
    assert cpu.refuses(info_of("vp9", width=641)) is None
    assert "h264" in cpu.refuses(info_of("h264"))
    assert "yuv420p10le" in cpu.refuses(info_of("vp9", "yuv420p10le"))
    assert "90 degrees" in cpu.refuses(info_of("vp9", rotation_degrees=90))
    assert "0 degrees, mirrored" in cpu.refuses(info_of("vp9", mirrored=True))
    assert "several videos" in cpu.refuses(info_of("vp9", other_streams=1))


def test_gpu_refuses_what_nvdec_cannot_decode(monkeypatch, cpu):
    assert ctypes.sizeof(dali._Limits) == 88  # CUVIDDECODECAPS, as the driver writes it
    limits = dict(max_width=4096, max_height=4096, max_macroblocks=65536, min_width=48)
    monkeypatch.setattr(
        dali, "_nvdec_limits",
        lambda codec: dali._Limits(supported=codec != 9, min_height=16, **limits),
    )  # fmt: skip
    monkeypatch.setattr(cpu, "_gpu", True)
    assert cpu.refuses(info_of("h264")) is None
    for info, why in [
        (info_of("h264", "yuv444p"), "4:2:0"),
        (info_of("hevc", "yuv420p10le"), "8-bit"),
        (info_of("av1"), "av1"),
        (info_of("mpeg4", width=641), "even"),
        (info_of("h264", width=4098), "4096"),
        (info_of("h264", width=32), "48 x 16"),
        (info_of("vp8"), "does not decode VP8"),
        (info_of("h264", rotation_degrees=270), "270 degrees"),
        (info_of("h264", interlaced=True), "interlaced"),
    ]:
        assert why in cpu.refuses(info)
    largest = info_of("h264", width=4096, height=4096)
    assert cpu.refuses(largest) is None  # in as many blocks of 16 x 16 as there may be
    limits["max_macroblocks"] -= 1
    assert "4096" in cpu.refuses(largest)


def test_a_device_that_cannot_work_is_an_error(monkeypatch):
    with pytest.raises(InputError, match="cpu or cuda"):
        DaliBackend("tpu")
    dali._nvdec.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with pytest.raises(InputError, match="no NVIDIA driver") as e:
        DaliBackend("cuda")
    assert "\n" not in str(e.value)
    assert "no NVIDIA driver" in dali.why_not("cuda") and dali.why_not("cpu") is None
    monkeypatch.undo()
    monkeypatch.setattr(dali, "_nvdec", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if dali.why_not("cuda"):  # a driver is there, but CUDA does not start
        assert "\n" not in dali.why_not("cuda") and "driver" in dali.why_not("cuda")
        with pytest.raises(InputError, match="nvImageCodec does not start"):
            DaliBackend("cuda")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(InputError, match="pip install"):
        DaliBackend("cpu")


def test_a_backend_makes_one_encoder(monkeypatch):
    """On a GPU, each one takes memory and time."""
    codec = pytest.importorskip("nvidia.nvimgcodec")
    pytest.importorskip("nvidia.dali")
    made, encoder = [], codec.Encoder
    monkeypatch.setattr(codec, "Encoder", lambda **how: made.append(how) or encoder(**how))
    DaliBackend("cpu")
    assert [how["max_num_cpu_threads"] for how in made] == [1]


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    pytest.importorskip("nvidia.dali")  # is no part of a GPU: SSLUS_REQUIRE_GPU does not want it
    dali._nvdec.cache_clear()
    try:
        return DaliBackend("cuda")
    except InputError as e:
        if os.environ.get("SSLUS_REQUIRE_GPU") == "1":
            pytest.fail(f"SSLUS_REQUIRE_GPU=1, but {e}")
        pytest.skip(str(e))


B_FRAMES = {"preset": "fast", "bf": "3", "g": "24", "crf": "12"}
GPU_CLIPS = {
    "h264-b-frames": ("a.mp4", "libx264", {}, B_FRAMES),
    "h264-no-b-frames": ("a.mkv", "libx264", {}, {"preset": "ultrafast", "tune": "zerolatency"}),
    "h264-full-range": ("a.mov", "libx264", dict(pixels="yuvj420p", range_=FULL), B_FRAMES),
    "h264-variable-rate": ("a.mp4", "libx264", dict(times_ms=VFR_MS), B_FRAMES),
    "h264-transport-stream": ("a.ts", "libx264", {}, B_FRAMES),
    "h264-colour": ("a.mp4", "libx264", dict(colour=60), B_FRAMES),
    "h264-one-frame": ("a.mp4", "libx264", {}, B_FRAMES),
    "h264-chunks": ("a.mp4", "libx264", {}, B_FRAMES),
    "hevc-b-frames": ("a.mp4", "libx265", {}, {"preset": "ultrafast", "x265-params": "bframes=3"}),
    "hevc-full-range": ("a.mkv", "libx265", dict(range_=FULL), {"preset": "ultrafast"}),
    "mpeg4": ("a.mp4", "mpeg4", {}, {"q:v": "2"}),
    "mpeg4-b-frames": ("a.mp4", "mpeg4", {}, {"q:v": "2", "bf": "2"}),
    "vp8": ("a.webm", "libvpx", {}, FAST),
    "vp9": ("a.webm", "libvpx-vp9", {}, FAST),
    "vp9-hidden-frames": ("a.webm", "libvpx-vp9", {}, EXACT),
    "vp9-full-range": ("a.webm", "libvpx-vp9", dict(range_=FULL), FAST),
}  # fmt: skip
GPU_COUNTS = {"h264-one-frame": 1, "h264-chunks": 3 * CHUNK, "h264-variable-rate": len(VFR_MS)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CLIPS)
def test_gpu_agrees_with_pyav(name, cuda, tmp_path):
    file, codec, extra, options = GPU_CLIPS[name]
    path = tmp_path / file
    count = GPU_COUNTS.get(name, 2 * CHUNK + 5)
    make_clip(path, codec, count, size=LARGE, options=options, **extra)
    assert not differences(path, cuda, 128)
    assert not differences(path, cuda, 500, keep=lambda index, time: index % 3 == 0)


@pytest.mark.gpu
def test_gpu_damage_is_never_silent(cuda, tmp_path):
    whole = make_clip(tmp_path / "a.ts", "libx264", 100, size=LARGE, options=B_FRAMES)
    info = probe(whole)
    cut = tmp_path / "cut.ts"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    try:
        decoded = sum(1 for _ in cuda.prepared(cut, info, lambda i, t: True, 64, 95))
    except VideoError as e:
        assert "\n" not in str(e)
    else:
        assert 0 < decoded < info.num_frames
    assert not differences(whole, cuda, 64)


@pytest.mark.gpu
def test_gpu_decodes_the_real_videos(cuda, real_data):
    """Every real video that NVDEC takes, four at a time, each thread with a backend of its own."""
    suffixes = (".mp4", ".mov", ".mpeg", ".mpg")
    files = sorted(p for p in real_data.rglob("*") if p.suffix in suffixes)
    taken = [p for p in files if cuda.refuses(probe(p)) is None]
    print(f"{len(taken)} of {len(files)} videos go to NVDEC")
    assert taken, [cuda.refuses(probe(p)) for p in files]

    def check(path):
        try:
            return differences(path, DaliBackend("cuda"), 256, lambda index, time: index % 5 == 0)
        except Exception as e:
            return [f"{path.name}: {type(e).__name__}: {e}"]

    with ThreadPoolExecutor(4) as pool:
        found = [line for lines in pool.map(check, taken) for line in lines]
    assert not found, "\n".join(found)
