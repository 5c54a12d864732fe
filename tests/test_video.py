"""Decoding: every frame, exact luma, true times, one clear line for what cannot be decoded."""

import csv
import errno
import gc
import hashlib
import io
import itertools
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg

from sslus.engine import truncated, video
from sslus.engine.errors import InputError
from sslus.engine.prepare import _taps, expand_limited, fit, moments, prepare
from sslus.engine.sources import FILE_LINKS, FOLDER_LINKS, HIDDEN_FOLDERS, find_videos
from sslus.engine.truncated import ASF_PROPERTIES
from sslus.engine.video import VideoError, _empty_chunks, decode, probe


def expanded(y: np.ndarray) -> np.ndarray:
    """The definition, in float64: BT.601/709 limited range to full range."""
    return np.clip(np.floor((y.astype(np.float64) - 16) * 255 / 219 + 0.5), 0, 255)


def test_limited_range_is_expanded_exactly():
    every = np.arange(256, dtype=np.uint8)
    for width in (1, 31, 32, 33, 256):  # shorter than a vector, whole vectors, an odd tail
        padded = np.tile(every, (3, 2))[:, : width + 5]
        rows = padded[:, :width]  # strided, as a decoder's plane is
        np.testing.assert_array_equal(expand_limited(rows), expanded(rows))


# lossless codecs: what comes out must be what went in
LOSSLESS = [
    ("ffv1", "yuv420p", "mkv"),
    ("ffv1", "yuv444p", "mkv"),
    ("ffv1", "gray", "mkv"),
    ("libx264", "yuv420p", "mp4"),
    ("libx264", "yuv444p", "mp4"),
    ("libvpx-vp9", "yuv420p", "webm"),
    ("huffyuv", "yuv422p", "avi"),
]


@pytest.mark.parametrize("codec, pixel_format, container", LOSSLESS)
@pytest.mark.parametrize("height, width", [(64, 96), (51, 77)])
def test_luma_is_bit_exact(codec, pixel_format, container, height, width, clip, pattern, tmp_path):
    if (codec, width % 2) in {("libx264", 1), ("huffyuv", 1)} and pixel_format != "yuv444p":
        width, height = width + 1, height + 1  # these encoders refuse odd sizes in 4:2:x
    luma = pattern(12, height, width)
    options = {"libx264": {"qp": "0"}, "libvpx-vp9": {"lossless": "1"}}.get(codec, {})
    path = clip(
        tmp_path / f"x.{container}", luma, codec=codec, pixel_format=pixel_format, options=options
    )
    info = probe(path)
    frames = list(decode(path))
    assert (info.num_frames, info.height, info.width) == (12, height, width)
    assert [f.index for f in frames] == list(range(12))
    want = luma if pixel_format == "gray" else expanded(luma)
    np.testing.assert_array_equal(np.stack([f.luma for f in frames]), want)
    assert not any(f.corrupt for f in frames)


def test_full_range_stays_as_it_is(clip, pattern, tmp_path):
    luma = pattern(5, 48, 64)
    path = clip(tmp_path / "x.mkv", luma, codec="ffv1", full_range=True)
    assert probe(path).full_range
    np.testing.assert_array_equal(np.stack([f.luma for f in decode(path)]), luma)


def test_a_lossy_video_has_the_same_pixels_on_every_processor(tmp_path, monkeypatch):
    """FFmpeg's usual inverse DCT is not the same on x86-64 and ARM; libjpeg-turbo's files are.
    On x86-64 the usual one is the one that is named: another shows that the name is heard."""
    noise = np.random.Generator(np.random.PCG64(5)).integers(0, 256, (6, 48, 64, 1), np.uint8)
    path = tmp_path / "x.mjpeg"
    path.write_bytes(b"".join(simplejpeg.encode_jpeg(x, 60, "GRAY") for x in noise))
    frames = np.stack([f.luma for f in decode(path)])
    assert frames.shape == (6, 48, 64)
    assert hashlib.sha256(frames).hexdigest()[:16] == "fba425cbd7c21284"
    monkeypatch.setattr(video, "SAME_PIXELS", {"idct": "xvid"})
    assert 0 < np.abs(frames - np.stack([f.luma.astype(int) for f in decode(path)])).max() < 4


@pytest.mark.parametrize(
    "codec, tag, says, own",
    [("mpeg2video", "[2][0][0][0]", None, False), ("mpeg4", "mp4v", None, False),
     ("mpeg4", "FMP4", b"\0\0\1\xb2Lavc62.28.102", False), ("mpeg4", "DIVX", b"XviD0050", True),
     ("mpeg4", "xvid", None, True), ("mpeg4", "XVID", b"Lavc62.28.102", False)],
)  # fmt: skip
def test_what_xvid_has_encoded_is_decoded_by_its_own_inverse_dct(codec, tag, says, own):
    context = SimpleNamespace(name=codec, codec_tag=tag, extradata=says)
    assert video._options(context) == ({} if own else video.SAME_PIXELS)


@pytest.mark.parametrize("name", ["gray", "ya8", "gray10le"])
def test_grey_that_came_from_limited_range_is_not_expanded_twice(name):
    import av

    frame = av.VideoFrame(256, 4, "yuv420p")
    for plane in frame.planes:
        np.frombuffer(plane, np.uint8)[:] = 128
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(4, -1)
    rows[:, :256] = every = np.arange(256, dtype=np.uint8)
    frame.color_range = 1  # limited
    grey = frame.reformat(format=name)
    grey.color_range = 1
    want = np.broadcast_to(expanded(every), (4, 256))
    np.testing.assert_allclose(video.luma(frame), want)
    np.testing.assert_allclose(video.luma(grey), want, atol=1)


def test_ten_bits_are_rounded(tmp_path):
    import av

    deep = (np.arange(64 * 64).reshape(64, 64) % 1024).astype(np.uint16)
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p10le"
        frame = av.VideoFrame(64, 64, "yuv420p10le")
        for plane in frame.planes:
            rows = np.frombuffer(plane, "<u2").reshape(-1, plane.line_size // 2)
            rows[:] = 512
        rows = np.frombuffer(frame.planes[0], "<u2").reshape(64, -1)
        rows[:, :64] = deep
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (frame,) = decode(tmp_path / "x.mkv")
    want = np.clip(np.floor((deep.astype(float) - 64) * 255 / 876 + 0.5), 0, 255)
    np.testing.assert_array_equal(frame.luma, want)


@pytest.mark.parametrize("pixel_format", ["p010le", "p012be", "yuv444p10msble", "grayf32le"])
def test_bits_at_the_upper_end_of_a_word_and_floats(pixel_format):
    import av

    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, 2), format="rgb24")
    if pixel_format not in av.video.format.names:
        pytest.skip(f"this FFmpeg has no {pixel_format}")
    frame = frame.reformat(format=pixel_format)
    for _ in range(10):  # with several threads swscale is wrong in two of three
        np.testing.assert_allclose(video.luma(frame), grey, atol=1)


@pytest.mark.parametrize("name", ["rgb555be", "rgb565be", "bgr555be", "bgr565be", "rgb565le"])
def test_rgb_of_16_bits_in_either_order_of_bytes(name):
    """QuickTime's own is rgb555be."""
    import av

    bits = [int(digit) for digit in name[3:6]]
    rgb = [np.random.default_rng(b).integers(0, 1 << n, (6, 20)) for b, n in enumerate(bits)]
    high, middle, low = rgb if name[:3] == "rgb" else rgb[::-1]
    words = (high << (bits[1] + bits[2])) | (middle << bits[2]) | low
    frame = av.VideoFrame(20, 6, name)
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(6, -1)
    rows[:, :40] = words.astype(">u2" if name.endswith("be") else "<u2").view(np.uint8)
    red, green, blue = (x * 255 / ((1 << n) - 1) for x, n in zip(rgb, bits, strict=True))
    want = 0.299 * red + 0.587 * green + 0.114 * blue
    np.testing.assert_allclose(video.luma(frame), want, atol=1.2)


def test_grey_gif_is_exact(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 30, 41), dtype=np.uint8)
    images = [Image.fromarray(f) for f in frames]
    images[0].save(tmp_path / "x.gif", save_all=True, append_images=images[1:], duration=40)
    got = list(decode(tmp_path / "x.gif"))
    np.testing.assert_array_equal(np.stack([f.luma for f in got]), frames)


def test_what_is_transparent_is_black(tmp_path):
    from PIL import Image

    grey = np.full((30, 40), 120, np.uint8)
    grey[:10] = 0
    image = Image.fromarray(grey, "P")
    image.putpalette([v for k in range(256) for v in (k, k, k)])
    image.save(tmp_path / "x.gif", transparency=0)
    (frame,) = decode(tmp_path / "x.gif")
    np.testing.assert_array_equal(frame.luma, grey)


@pytest.mark.parametrize("name", ["rgba", "bgra", "argb", "gbrap"])
def test_transparency_mixes_with_black_unless_it_is_nowhere_set(name):
    import av

    rgba = np.full((4, 256, 4), 200, np.uint8)
    rgba[..., 3] = np.arange(256)
    for alpha, want in ((rgba[..., 3], rgba[..., 3] * (200 / 255)), (0, 200), (255, 200)):
        rgba[..., 3] = alpha
        frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=name)
        np.testing.assert_allclose(video.luma(frame), np.broadcast_to(want, (4, 256)), atol=0.51)


@pytest.mark.parametrize(
    "codec, container, options",
    [
        ("mpeg2video", "mpg", {"bf": "2"}),
        ("mpeg4", "avi", {}),
        ("mjpeg", "mov", {}),
        ("amv", "avi", {"strict": "unofficial"}),  # whose rows lie in memory from the bottom up
        ("libx264", "mkv", {"bf": "3"}),
        # without times of presentation, with those of the first frame only, not starting at 0
        ("libx264", "avi", {"bf": "3"}),
        ("libx264", "wmv", {"bf": "3"}),
        ("mpeg2video", "wmv", {"bf": "2"}),  # nor durations
        ("libx264", "mpg", {"bf": "3"}),
        ("libx264", "flv", {"bf": "3"}),
        ("libx265", "mp4", {"x265-params": "log-level=none"}),
        ("libvpx", "webm", {}),
    ],
)
def test_no_frame_is_lost_by_any_codec(codec, container, options, clip, pattern, tmp_path):
    luma = pattern(31, 64, 80)
    full = codec in ("mjpeg", "amv")
    path = clip(
        tmp_path / f"x.{container}", luma, codec=codec, options=options, audio=container == "mkv",
        pixel_format="yuvj420p" if full else "yuv420p",
    )  # fmt: skip
    frames = list(decode(path))
    assert len(frames) == probe(path).num_frames == 31
    times = [f.time_seconds for f in frames]
    assert times[0] == 0 and np.allclose(np.diff(times), 1 / 25, atol=1e-3)
    want = luma.astype(float) if full else expanded(luma)
    assert np.abs(np.stack([f.luma for f in frames]) - want).mean() < 8  # lossy, but in order


@pytest.mark.parametrize("container", ["webm", "ivf"])  # ivf: the header counts the packets
def test_images_of_vp8_that_are_never_shown_are_not_expected(container, clip, pattern, tmp_path):
    import av

    path = clip(tmp_path / f"x.{container}", pattern(31, 64, 80), codec="libvpx")
    with av.open(str(path)) as a, av.open(str(tmp_path / f"y.{container}"), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for number, packet in enumerate(p for p in a.demux() if p.size):
            data = bytes(packet)
            copy = av.Packet(data if number % 10 != 5 else bytes([data[0] & ~0x10]) + data[1:])
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.stream = stream
            b.mux(copy)
    assert probe(path).num_frames == 31
    path = tmp_path / f"y.{container}"
    assert len(list(decode(path))) == probe(path).num_frames == 28


def test_true_times_of_a_variable_rate(clip, pattern, tmp_path):
    times = [0, 40, 50, 210, 250, 900]
    path = clip(tmp_path / "x.mkv", pattern(6, 48, 64), codec="ffv1", times=times)
    got = [f.time_seconds for f in decode(path)]
    np.testing.assert_allclose(got, np.array(times) / 1000, atol=1e-3)


@pytest.mark.parametrize(
    "codec, container, later",
    [
        ("mpeg4", "mp4", True),  # an MP4 would leave out what is earlier
        ("libx264", "mp4", True),
        ("ffv1", "mkv", True),
        ("ffv1", "mkv", False),
        ("mpeg2video", "ts", True),
        ("mpeg2video", "ts", False),
    ],
)
def test_an_absurd_time_stamp_moves_no_other(codec, container, later, clip, pattern, tmp_path):
    """One far later than the others, or all the others far later than one."""
    import av

    path = clip(tmp_path / f"x.{container}", pattern(60, 48, 64), codec=codec, options={"bf": "0"})
    changed = tmp_path / f"changed.{container}"
    with av.open(str(path)) as a, av.open(str(changed), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for i, packet in enumerate(p for p in a.demux(video=0) if p.size):
            if (i == 40) == later:
                packet.pts += round(1000 / packet.time_base)
            packet.stream = stream
            b.mux(packet)
    times = [f.time_seconds for f in decode(changed)]
    assert times == pytest.approx([i / 25 for i in range(60)], abs=2e-3)


def test_times_that_were_guessed_are_noticed_in_any_format(clip, pattern, tmp_path, monkeypatch):
    """As if nobody knew that an AVI has none: a few frames at the start may come out wrong."""
    monkeypatch.setattr("sslus.engine.video.UNTIMED_FORMATS", frozenset())
    path = clip(tmp_path / "x.avi", pattern(50, 64, 80), codec="libx264", options={"bf": "3"})
    times = np.array([f.time_seconds for f in decode(path)])
    assert len(times) == 50 and (np.diff(times) > 0).all()
    assert np.allclose(np.diff(times)[5:], 1 / 25) and times[-1] < 50 / 25 + 0.2


def test_an_avi_that_repeats_frames_is_whole(clip, pattern, tmp_path):
    """It says so by empty chunks, which are counted as frames."""
    times = [0, 40, 80, 240, 280, 800]
    path = clip(
        tmp_path / "x.avi", pattern(6, 48, 64), codec="mjpeg", pixel_format="yuvj420p", times=times
    )
    assert probe(path).num_frames == 6
    np.testing.assert_allclose([f.time_seconds for f in decode(path)], np.array(times) / 1000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert probe(path).num_frames > sum(1 for _ in decode(path)) > 0


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mjpeg"])
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_samples_that_show_nothing_are_not_expected(codec, container, clip, pattern, tmp_path):
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = tmp_path / f"x.{container}"
    clip(path, pattern(12, 48, 64), codec=codec, pixel_format=pixel_format)
    data = bytearray(path.read_bytes())
    last = data.index(b"stsz") + 16 + 4 * 11
    assert data[last - 4 * 12 : last - 4 * 11] == (12).to_bytes(4)
    empty = bytearray(data)
    empty[last : last + 4] = bytes(4)
    path.write_bytes(empty)  # its last image is shown for two periods
    assert probe(path).num_frames == len(list(decode(path))) == 11
    at = data.index(b"elst") + 12  # trimmed, as QuickTime Player does, to its second half
    data[at : at + 4] = (int.from_bytes(data[at : at + 4]) // 2).to_bytes(4)
    start = int.from_bytes(data[at + 4 : at + 8])
    data[at + 4 : at + 8] = (start + 6 * 512).to_bytes(4)
    path.write_bytes(data)
    assert probe(path).num_frames == len(list(decode(path))) == 6


@pytest.mark.parametrize("padding", [b"", b"\0"])
def test_empty_chunks_are_found_behind_odd_ones(padding, tmp_path):
    """Not all writers pad them, as they should."""
    chunks = b"".join(
        name + struct.pack("<I", length) + b"x" * length + padding * (length % 2)
        for name, length in [(b"00dc", 3), (b"00dc", 0), (b"01wb", 0), (b"00dc", 5), (b"00dc", 0)]
    )
    movi = b"LIST" + struct.pack("<I", 4 + len(chunks)) + b"movi" + chunks
    path = tmp_path / "x.avi"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(movi)) + b"AVI " + movi)
    assert _empty_chunks(path, 0) == 2


def test_an_avi_of_several_parts_that_repeats_frames_is_whole(clip, pattern, tmp_path):
    """OpenDML: what does not fit in a first RIFF goes on in another, of which its index is silent.
    The index of other writers is in the RIFFs; FFmpeg reads on without."""
    luma, times = pattern(6, 48, 64), [0, 40, 200, 240, 280, 800]
    path = clip(tmp_path / "x.avi", luma, codec="mjpeg", pixel_format="yuvj420p", times=times)
    data = path.read_bytes()
    start = data.index(b"movi") + 4
    end = start - 4 + struct.unpack("<I", data[start - 8 : start - 4])[0]
    place, heads = start, []
    while place < end:
        heads.append(place)
        length = struct.unpack("<I", data[place + 4 : place + 8])[0]
        place += 8 + length + length % 2
    num = len(heads) // 2  # empty ones before and behind it

    def part(kind: bytes, name: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", 4 + len(content)) + name + content

    index = b"idx1" + struct.pack("<I", 16 * num) + data[end + 8 : end + 8 + 16 * num]
    first = part(b"LIST", b"movi", data[start : heads[num]]) + index
    second = part(b"LIST", b"movi", data[heads[num] : end])
    head = data[12 : start - 12]
    path.write_bytes(part(b"RIFF", b"AVI ", head + first) + part(b"RIFF", b"AVIX", second))
    assert probe(path).num_frames == 6
    np.testing.assert_allclose([f.time_seconds for f in decode(path)], np.array(times) / 1000)


@pytest.mark.parametrize("container", ["ts", "mpg"])
def test_times_go_on_where_recordings_were_joined(container, clip, pattern, tmp_path):
    parts = [
        clip(tmp_path / f"{i}.{container}", pattern(num, 64, 80), codec="mpeg2video").read_bytes()
        for i, num in enumerate((12, 5))
    ]
    joined = tmp_path / f"joined.{container}"
    joined.write_bytes(b"".join(parts))
    times = [f.time_seconds for f in decode(joined)]
    assert len(times) == 17
    assert np.allclose(np.diff(times), np.diff(times)[0], atol=1e-4) and times[1] > 0


# FFmpeg's display matrix (a, b, c, d), and what a player makes of a picture
ORIENTATIONS = {
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),  # clockwise: what a phone held upright writes
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): np.transpose,
    (0, -1, -1, 0): lambda p: np.rot90(np.transpose(p), 2),
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_pictures_come_upright_and_unmirrored(matrix, clip, pattern, tmp_path):
    luma = pattern(2, 48, 64)
    path = clip(tmp_path / "x.mp4", luma, codec="libx264", options={"qp": "0"})
    a, b, c, d = (65536 * x for x in matrix)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: the matrix of a version 0 box
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    want = np.stack([ORIENTATIONS[matrix](expanded(p)) for p in luma])
    np.testing.assert_array_equal(np.stack([f.luma for f in decode(path)]), want)
    info = probe(path)
    assert (info.rotation_degrees % 180 == 0) == (want.shape[1:] == luma.shape[1:])
    assert info.mirrored == (a * d - b * c < 0)


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_a_picture_with_exif_comes_upright(orientation, turns, pattern, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    luma = pattern(1, 48, 64)[0]
    Image.fromarray(luma).save(tmp_path / "x.jpg", exif=exif, quality=100)
    (frame,) = decode(tmp_path / "x.jpg")
    np.testing.assert_allclose(frame.luma, np.rot90(luma, turns), atol=2)


def test_a_colour_profile_does_no_harm(tmp_path):
    """In a process of its own, which PyAV would crash when it frees the profile's name."""
    from PIL import Image, ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("L", (64, 48), 7).save(tmp_path / "x.png", icc_profile=profile)
    script = "import sys; from sslus.engine.video import probe; print(probe(sys.argv[1]).codec)"
    line = [sys.executable, "-c", script, str(tmp_path / "x.png")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "png\n"), done.stderr


def write_streams(path, counts):
    """A file with several videos, of so many frames and 16, 32, ... pixels high."""
    import av

    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in counts]
        for i, stream in enumerate(streams):
            stream.width, stream.height, stream.pix_fmt = 64, 16 * (i + 1), "yuv420p"
        container.start_encoding()
        for stream, count in zip(streams, counts, strict=True):
            for t in range(count):
                frame = av.VideoFrame(64, stream.height, "yuv420p")
                frame.pts, frame.time_base = t, Fraction(1, 25)
                container.mux(stream.encode(frame))
            if count:
                container.mux(stream.encode(None))
    return path


def test_files_that_were_joined_byte_by_byte_are_counted(clip, pattern, tmp_path):
    one = clip(tmp_path / "one.mp4", pattern(4, 32, 32))
    assert probe(one).other_streams == 0
    (tmp_path / "three.mp4").write_bytes(3 * one.read_bytes())
    assert probe(tmp_path / "three.mp4").other_streams == 2
    raw = b"\0\0\0\1\x67d\0\x1f" + 8 * b"\xff"  # of raw H.264, as a box: of 2^64 bytes
    one.write_bytes(one.read_bytes() + raw)
    assert (probe(one).other_streams, probe(one).num_frames) == (0, 4)


@pytest.mark.parametrize("counts, best", [((10, 10), 0), ((0, 10), 1)])
def test_of_several_videos_in_a_file_the_best_is_taken(counts, best, tmp_path):
    path = write_streams(tmp_path / "x.mkv", counts)
    info = probe(path)
    assert (info.other_streams, info.num_frames, info.height) == (1, 10, 16 * (best + 1))
    assert [f.luma.shape[0] for f in decode(path)] == [info.height] * 10


def test_a_title_in_latin_1_does_no_harm(tmp_path):
    import av

    path = tmp_path / "x.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Dr. Mxller"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert b"Mxller" in data
    path.write_bytes(data.replace(b"Mxller", "Müller".encode("latin-1")))
    assert probe(path).num_frames == len(list(decode(path))) == 1


def test_every_real_video_gives_every_frame(real_data):
    """Against the decoded counts that came with the files."""
    checked = 0
    for table in sorted(real_data.glob("*/metadata.csv")):
        for row in csv.DictReader(table.open()):
            path = table.parent / row["file"]
            # A few of each kind here; `sslus shard` over all of them is in test_shard.py.
            if path.suffix not in (".mp4", ".mov", ".mpeg") or int(row["frames"]) > 210:
                continue
            assert probe(path).num_frames == int(row["frames"]) == sum(1 for _ in decode(path))
            checked += 1
    assert checked >= 12


def test_what_is_no_video(clip, pattern, tmp_path):
    whole = clip(tmp_path / "whole.mp4", pattern(30, 64, 64)).read_bytes()
    bad = {
        "empty.mp4": b"",
        "text.mp4": b"this is not a video\n" * 500,
        "noise.mkv": np.random.default_rng(0).bytes(20000),
        "headless.mp4": whole[: len(whole) // 2],  # an MP4's index is at its end
        "codec.avi": clip(tmp_path / "x.avi", pattern(5, 64, 64))
        .read_bytes()
        .replace(b"FMP4", b"ZZQ7"),
        "list.m3u8": b"#EXTM3U\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n",
        "list.mp4": b"#EXTM3U\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n",
    }
    for name, content in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(VideoError) as e:
            probe(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(VideoError, match="No such file"):
        probe(tmp_path / "missing.mp4")


def test_a_damaged_packet_costs_only_itself(clip, pattern, tmp_path):
    """A hole in the middle: one frame less than expected, but those after it come."""
    import av

    luma = pattern(40, 64, 64)
    path = clip(tmp_path / "x.avi", luma, codec="mjpeg", pixel_format="yuvj420p")
    whole = [f.luma for f in decode(path)]
    with av.open(str(path)) as container:
        place, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][20]
    data = bytearray(path.read_bytes())
    data[place + 8 : place + size] = bytes(size - 8)
    path.write_bytes(data)
    assert probe(path).num_frames == 40
    got = [f.luma for f in decode(path) if not f.corrupt]
    assert len(got) == 39
    np.testing.assert_array_equal(got[-1], whole[-1])


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_lost_parts_of_an_mpeg_ts_are_told(codec, clip, pattern, tmp_path):
    """It counts its parts of 188 bytes. The decoders say nothing where one is missing in front of a
    picture or at its end."""
    path = clip(tmp_path / "x.ts", pattern(40, 96, 128), codec=codec, options={"bf": "2"})
    assert not any(f.corrupt for f in decode(path))
    data = path.read_bytes()
    parts = [data[at : at + 188] for at in range(0, len(data), 188)]
    video = [n for n, part in enumerate(parts) if part[1] & 31 == 1 and part[2] == 0]  # its PID
    for n in video[20 : -20 : len(video) // 10]:
        path.write_bytes(b"".join(parts[:n] + parts[n + 1 :]))
        assert sum(not f.corrupt for f in decode(path)) < probe(path).num_frames


def test_where_files_of_mpeg_ts_were_joined_only_frames_at_the_joints_are_left_out(
    clip, pattern, tmp_path
):
    """Their parts are counted anew there, as if some were missing."""
    path = clip(tmp_path / "x.ts", pattern(40, 96, 128), codec="libx264", options={"bf": "0"})
    path.write_bytes(4 * path.read_bytes())
    corrupt = [f.index for f in decode(path) if f.corrupt]
    assert probe(path).num_frames == sum(1 for _ in decode(path)) == 160
    assert len(corrupt) == 3 and all(i // 40 == k for k, i in enumerate(corrupt))


def h264_of_fields(num: int) -> list[bytes]:
    """Grey frames of 16 x 32 pixels at 25 Hz in H.264, each as two fields, which x264 does not make
    (ITU-T H.264, 7.3)."""

    def ue(value: int) -> str:
        code = f"{value + 1:b}"
        return "0" * (len(code) - 1) + code

    def nal(kind: int, bits: str) -> bytes:
        bits += "1"
        bits += "0" * (-len(bits) % 8)
        return b"\0\0\0\1" + bytes([96 | kind, *int(bits, 2).to_bytes(len(bits) // 8)])

    ticks = f"{0x01010101:032b}{50 * 0x01010101:032b}"  # without zero bytes, which need escapes
    # Main profile, level 3.0; one macroblock, fields; square pixels, the rate, and nothing more.
    head = f"{77:08b}{0:08b}{30:08b}" + 4 * ue(0) + ue(1) + "0" + 2 * ue(0) + "00101" + "00001"
    sets = nal(7, head + ticks + "10000") + nal(8, "1100111000111100")

    def field(second: int, value: int) -> bytes:
        head = ue(0) + ue(7) + ue(0) + "00001" + str(second)  # slice I, frame number, field
        head += "00010" if second else f"{ue(value % 2)}000000"  # order, marking
        head += ue(0) + ue(1) + ue(25)  # quantiser, no deblocking, macroblock as it is
        pixels = "".join(f"{x:08b}" for x in [value] * 256 + [128] * 128)
        return nal(1 if second else 5, head + "0" * (-len(head) % 8) + pixels)

    return [sets + field(0, 40 + k) + field(1, 40 + k) for k in range(num)]


def test_two_fields_in_packets_of_their_own_are_one_frame(tmp_path):
    """As camcorders and capture cards write them."""
    import av

    frames = h264_of_fields(20)
    raw = tmp_path / "x.h264"
    raw.write_bytes(b"".join(frames))
    with (
        av.open(str(raw)) as source,
        av.open(str(tmp_path / "x.ts"), "w") as whole,
        av.open(str(tmp_path / "x.mp4"), "w") as halves,
    ):
        (stream,) = source.streams.video
        for container, packets, num in (
            (whole, map(av.Packet, frames), 20), (halves, source.demux(stream), 40)
        ):  # fmt: skip
            to = container.add_stream_from_template(stream)
            for number, packet in zip(range(num), packets, strict=False):
                packet.stream, packet.duration = to, 1
                packet.pts = packet.dts = number
                packet.time_base = Fraction(20, 25 * num)
                container.mux(packet)
    for path in tmp_path.iterdir():
        info = probe(path)
        lumas = [int(f.luma[0, 0]) for f in decode(path)]
        assert info.interlaced and info.num_frames == len(lumas) == 20, path
        assert lumas == [round((40 + k - 16) * 255 / 219) for k in range(20)]


class _BadSector:
    """A container on a disk that gives only its first `num` packets."""

    def __init__(self, container, num: int):
        self.container, self.num = container, num

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()

    def __getattr__(self, name):
        return getattr(self.container, name)

    def demux(self, stream):
        import av

        yield from itertools.islice(self.container.demux(stream), self.num)
        raise av.error.OSError(errno.EIO, "Input/output error", self.container.name)


def test_a_disk_that_fails_is_no_end_of_the_file(pattern, tmp_path, monkeypatch):
    """What counts no frames would be complete where the disk cannot be read."""
    from PIL import Image

    pages = [Image.fromarray(x) for x in pattern(30, 48, 64)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    whole = list(decode(tmp_path / "a.gif"))
    opened = video.open_video

    def failing(path, file=None):
        container, stream = opened(path, file)
        return _BadSector(container, 12), stream

    monkeypatch.setattr(video, "open_video", failing)
    frames = []
    with pytest.raises(VideoError, match=r"cannot be read to its end \(Input/output error\)"):
        frames.extend(decode(tmp_path / "a.gif"))
    assert len(frames) == 11 < len(whole) == 30  # the last one's successor was not seen
    for frame, want in zip(frames, whole, strict=False):
        assert np.array_equal(frame.luma, want.luma) and frame.time_seconds == want.time_seconds


@pytest.mark.parametrize("codec", ["mpeg2video", "wmv2", "mpeg4"])
@pytest.mark.parametrize("num", [1, 2])
def test_a_duration_says_nothing_where_no_rate_can_be_told(codec, num, clip, pattern, tmp_path):
    path = clip(tmp_path / "x.wmv", pattern(num, 48, 64), codec=codec)
    assert probe(path).num_frames == len(list(decode(path))) == num


@pytest.mark.parametrize(
    "codec, container, audio, kept",
    [
        ("libvpx-vp9", "mkv", False, 0.5),
        ("libvpx-vp9", "mkv", True, 0.5),
        # With more gone FFmpeg believes the header no longer.
        ("mpeg2video", "wmv", False, 0.96),
        ("mpeg4", "wmv", False, 0.96),
    ],
)
def test_a_truncated_file_shows_though_it_holds_no_count(
    codec, container, audio, kept, clip, pattern, tmp_path
):
    path = clip(
        tmp_path / f"x.{container}", pattern(200, 128, 128), codec=codec, audio=audio,
        options={"b": "4000000"},
    )  # fmt: skip
    assert probe(path).num_frames == 200
    path.write_bytes(path.read_bytes()[: round(kept * path.stat().st_size)])
    decoded = sum(1 for _ in decode(path))
    assert 5 < decoded < 198 and abs(probe(path).num_frames - 200) <= 1


@pytest.mark.parametrize("container", ["wmv", "flv"])
def test_a_file_whose_last_image_is_shown_for_long_is_whole(container, clip, pattern, tmp_path):
    """As recorders of a screen make them, where nothing changed at the end."""
    codec = {"wmv": "wmv2", "flv": "flv"}[container]
    path = clip(tmp_path / f"x.{container}", pattern(30, 48, 64), codec=codec)
    data = bytearray(path.read_bytes())
    if container == "wmv":
        at = data.index(ASF_PROPERTIES)
        for place in (at + 64, at + 72):  # the time to play and to send, in units of 100 ns
            longer = int.from_bytes(data[place : place + 8], "little") + 30_000_000
            data[place : place + 8] = longer.to_bytes(8, "little")
    else:
        at = data.index(b"duration\0") + 9
        data[at : at + 8] = struct.pack(">d", 3 + struct.unpack_from(">d", data, at)[0])
    path.write_bytes(data)
    assert probe(path).num_frames == len(list(decode(path))) == 30
    path.write_bytes(data[:-50])  # cut off
    assert probe(path).num_frames > 30


def test_sound_that_goes_on_behind_the_last_image_is_no_loss(clip, pattern, tmp_path):
    """Where only the file's duration is stated, that of its longest stream."""
    path = clip(tmp_path / "x.mkv", pattern(10, 48, 64), audio=True)  # 0.4 s, and 1 s of sound
    data = path.read_bytes()
    assert data.count(b"DURATION") == 2  # of each stream
    path.write_bytes(data.replace(b"DURATION", b"ANYTHING"))
    assert probe(path).num_frames == len(list(decode(path))) == 10


@pytest.mark.parametrize("size_is_told", [True, False])
@pytest.mark.parametrize("codec, bf", [("flv", "0"), ("libx264", "2")])
def test_an_flv_with_sound_that_is_cut_between_two_tags(
    codec, bf, size_is_told, clip, pattern, tmp_path
):
    """As a recorder leaves it whose disk was full: nothing there is damaged, and only the duration
    of the whole file tells. The sound ends long before the video, or after it."""
    path = clip(
        tmp_path / "x.flv", pattern(50, 48, 64), codec=codec, options={"bf": bf}, audio=True
    )
    data = path.read_bytes()
    if not size_is_told:
        data = data.replace(b"filesize\0", b"filesizX\0")
    path.write_bytes(data)
    assert probe(path).num_frames == len(list(decode(path))) == 50
    at, tags = 13, []
    while at < len(data):
        tags += [at] * (data[at] == 9)  # a video's
        at += 15 + int.from_bytes(data[at + 1 : at + 4])
    for end in tags[10:40:9]:
        path.write_bytes(data[:end])
        assert len(list(decode(path))) < 45 and 45 < probe(path).num_frames <= 51


def remux(path, out, **options):
    import av

    with av.open(str(path)) as a, av.open(str(out), "w", options=options) as b:
        streams = {s.index: b.add_stream_from_template(s) for s in a.streams}
        for packet in a.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                b.mux(packet)
    return out


TRUNCATED = [
    ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}, True),
    ("libx264", "mp4", {"movflags": "faststart"}, False),
    ("libx264", "mkv", {}, True),
    ("libx264", "mkv", {"live": "1"}, True),  # without a duration, as browsers record
    ("libvpx", "webm", {"live": "1"}, False),
    ("libx264", "flv", {}, True),
    ("libx264", "ts", {}, True),
    ("mpeg2video", "ts", {}, False),
    ("libx264", "m2ts", {}, False),
    ("mpeg2video", "mxf", {}, False),
    ("libx264", "mxf", {}, False),
    ("wmv2", "wmv", {}, False),
    ("libx264", "asf", {}, False),
    ("mjpeg", "avi", {}, False),
    ("mjpeg", "mjpeg", {}, False),
    ("libvpx", "ivf", {}, False),
    ("libvpx", "ogv", {}, False),
    ("gif", "gif", {}, False),
    ("dvvideo", "dv", {}, False),
    ("wrapped_avframe", "y4m", {}, False),
]


@pytest.mark.parametrize("codec, container, options, audio", TRUNCATED)
def test_a_truncated_file_is_noticed_and_its_last_frame_left_out(
    codec, container, options, audio, clip, pattern, tmp_path
):
    size = (576, 720) if codec == "dvvideo" else (96, 128)
    path = clip(
        tmp_path / f"x.{container}", pattern(50, *size), codec=codec, audio=audio,
        pixel_format={"gif": "gray", "mjpeg": "yuvj420p"}.get(codec, "yuv420p"),
        options={"g": "10"},
    )  # fmt: skip
    if options:
        path = remux(path, tmp_path / f"remuxed.{container}", **options)
    data, whole = path.read_bytes(), np.stack([f.luma for f in decode(path)]).astype(np.int16)
    assert probe(path).num_frames == len(whole) == 50
    padded = tmp_path / f"padded.{container}"
    for padding in (b"\0", bytes(3000), b"\r\n", b"TAG".ljust(128, b"x")):
        padded.write_bytes(data + padding)
        if container not in ("dv", "ivf"):  # FFmpeg takes anything for a frame of theirs
            assert probe(padded).num_frames == sum(not f.corrupt for f in decode(padded)) == 50
    cut = tmp_path / f"cut.{container}"
    block = {"ts": 188, "m2ts": 192, "dv": 144_000}.get(container, 2)  # a cut between two is none
    places = [round(share * len(data)) for share in np.linspace(0.431, 0.857, 7)]
    if b"moof" in data:  # in a fragment's sound, which is behind its frames; in a frame
        places = [data.index(b"moof", data.index(b"mdat")) - 24, data.rindex(b"mdat") + 100]
    for place in places:
        cut.write_bytes(data[: place // block * block + block // 2])
        try:
            expected = probe(cut).num_frames
        except VideoError:
            continue
        kept = [f.luma for f in decode(cut) if not f.corrupt]
        assert 0 < len(kept) < expected <= 51
        for luma in kept[-3:]:
            assert np.abs(whole - luma).mean((1, 2)).min() < 2


def test_how_a_file_tells_that_it_is_cut_short():
    """By hand, what muxers here do not write."""

    def cut(name, data):
        return truncated.CUT_SHORT[name](io.BytesIO(data), len(data), None)

    said = truncated.ASF_PROPERTIES + bytes(24) + (500).to_bytes(8, "little") + bytes(40)
    for live in (0, 1):  # a stream that was recorded: its size was not yet known
        whole = (said + bytes([live])).ljust(500, b"\0")
        assert not cut("asf", whole) and cut("asf", whole[:-1]) == (not live)
    flv = b"FLV\1\5\0\0\0\x09" + bytes(60)
    assert truncated.cut_flv(io.BytesIO(flv), len(flv))  # it does not say; so it may be
    for length in (188, 192, 204):
        for phase in (0, 4):
            whole = bytes(phase) + 7 * (b"\x47" + 187 * b"\1" + (length - 188) * b"\2")
            end = len(whole) - (length - 188) * (phase == 0)  # what is behind a packet is no loss
            assert not cut("mpegts", whole[:end]) and cut("mpegts", whole[: end - (length - 187)])
    element = bytes.fromhex
    unknown = "01ffffffffffffff"  # the length of a segment or a cluster that was sent live
    whole = element(f"1a45dfa380 18538067{unknown} 1f43b675{unknown} e78100 a384") + b"data"
    assert not cut("matroska", whole) and cut("matroska", whole[:-1])
    assert not cut("matroska", whole + element("a300") + bytes(20))  # no element has such a length
    good, bad = SimpleNamespace(is_corrupt=False), SimpleNamespace(is_corrupt=True)
    for last in ([bad, good], [good, bad], [bad]):
        assert truncated.breaks_off(None, None, last)


def test_a_truncated_video_shows_in_the_count(clip, pattern, tmp_path):
    path = clip(tmp_path / "x.mp4", pattern(60, 64, 64), codec="mpeg4")
    # The index at the front, so that the header survives.
    fast = remux(path, tmp_path / "fast.mp4", movflags="faststart")
    data = fast.read_bytes()
    fast.write_bytes(data[: len(data) * 2 // 3])
    assert probe(fast).num_frames == 60
    decoded = sum(1 for f in decode(fast) if not f.corrupt)
    assert 20 < decoded < 60


def test_decoding_does_not_gather_memory(clip, pattern, tmp_path):
    """Frames own their pixels: none keeps the decoder's buffers, or an earlier frame, alive."""
    path = clip(tmp_path / "x.mkv", pattern(30, 64, 64), codec="ffv1")
    frames = [f.luma for f in decode(path)]
    assert all(f.base is None and f.flags.c_contiguous for f in frames)
    first = frames[0].copy()
    gc.collect()
    list(decode(path))
    np.testing.assert_array_equal(frames[0], first)


def test_a_decoded_frame_is_let_go_at_once(clip, pattern, tmp_path):
    """Without the garbage collector, which may come late: 60 frames are 60 MB."""
    path = clip(tmp_path / "x.mkv", pattern(60, 1000, 1000), codec="mpeg4")

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    gc.disable()
    try:
        seen = [resident_mb() for _ in decode(path)]
    finally:
        gc.enable()
    assert seen[-1] - seen[20] < 20


# ---------------------------------------------------------------- prepare


@pytest.mark.parametrize(
    "height, width, size",
    [(370, 370, 256), (480, 640, 256), (100, 61, 256), (1, 700, 64), (1080, 776, 224), (3, 5, 64),
     (60, 5, 500)],
)  # fmt: skip
def test_prepare_is_the_antialiased_triangle(height, width, size):
    from PIL import Image

    image = np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8)
    top, left, h, w = fit(height, width, size)
    assert max(h, w) == size and abs(h / w - height / width) <= 0.5 / min(h, w) * max(1, h / w)
    exact = np.zeros((size, size), np.float32)
    floating = Image.fromarray(image.astype(np.float32))
    exact[top : top + h, left : left + w] = floating.resize((w, h), Image.Resampling.BILINEAR)
    got = prepare(image, size)
    assert np.abs(got - exact).max() < 0.6
    # On every machine the same bytes: 8 bits of fraction between the passes, both rounded.
    (starts, weights), (column_starts, column_weights) = _taps(height, h), _taps(width, w)
    rows = image[starts[:, None] + np.arange(weights.shape[1])].astype(np.int64)
    middle = ((weights[:, :, None] * rows).sum(1) + (1 << 5)) >> 6
    columns = middle[:, column_starts[:, None] + np.arange(column_weights.shape[1])]
    want = ((columns * column_weights).sum(2) + (1 << 21)) >> 22
    np.testing.assert_array_equal(got[top : top + h, left : left + w], want)
    assert got[:top].max(initial=0) == got[top + h :].max(initial=0) == 0
    np.testing.assert_array_equal(
        prepare(image, size, limited=True), prepare(expand_limited(image), size)
    )
    assert moments(got) == (got.sum(dtype=np.int64), (got.astype(np.int64) ** 2).sum())


def test_prepare_keeps_what_needs_no_change():
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (96, 96), dtype=np.uint8)
    np.testing.assert_array_equal(prepare(image, 96), image)
    np.testing.assert_array_equal(prepare(image, 96, limited=True), expand_limited(image))
    for value in (0, 1, 128, 254, 255):
        assert (prepare(np.full((77, 77), value, np.uint8), 64) == value).all()


def test_prepare_undoes_anamorphic_pixels():
    assert fit(576, 720, 256, pixel_aspect=16 / 15)[2:] == (192, 256)


def test_moments_are_exact_for_rows_of_any_length_and_with_gaps():
    wide = np.full((2, 140_000), 255, np.uint8)  # more than 2^32 / 255^2 in a row
    wide[1] = 3
    for image in (wide, wide[:, :70], wide[::2], wide[:, :0]):
        exact = image.astype(np.int64)
        assert moments(image) == (exact.sum(), (exact**2).sum())


def test_native_code_refuses_what_would_be_lost():
    from sslus.engine import _luma

    good, gaps = np.zeros((4, 5), np.uint8), np.zeros((4, 10), np.uint8)[:, ::2]
    out, colours = np.zeros((8, 8), np.uint8), np.zeros((4, 5, 3), np.uint8)
    rows, columns = (np.arange(n, dtype=np.int32) for n in (3, 4))
    taps = np.full((4, 2), 1 << 13, np.int32)
    resize = [good, False, out, 5, 4, rows, taps[:3], columns, taps]
    down, below, above = columns[::-1].copy(), rows - 1, rows + 1
    for function, fits, wrongs in [
        (_luma.expand, [good, good.copy()], [
            (0, gaps), (0, good[:3]), (0, good[:, :4]), (1, gaps), (1, good.astype(np.float32)),
        ]),
        (_luma.resize, resize, [
            (0, gaps), (0, good[:3]), (0, good[:, :4]), (2, out[:7]), (2, out[:, :7].copy()),
            (2, out.T[::2]), (2, out.astype(np.float32)), (3, -1), (4, -1), (5, rows[:2]),
            (5, below), (5, above), (7, down), (7, columns - 1), (7, columns + 1), (8, taps[:3]),
            (6, taps[:3].astype(float)), (5, rows.astype(np.int64)),
            (8, taps.astype(float)), (7, columns.astype(np.int64)),
        ]),
        (_luma.moments, [good], [(0, gaps)]),
        (_luma.rgb, [colours, good.copy()], [
            (0, colours[:3]), (0, colours[:, :4]), (1, gaps), (1, good.astype(np.float32)),
        ]),
        (_luma.unpack, [good[0], good[1].copy()], [(0, gaps[0]), (1, gaps[0]), (1, np.zeros(5))]),
    ]:  # fmt: skip
        function(*fits)
        for i, wrong in wrongs:
            with pytest.raises((ValueError, TypeError)):
                function(*fits[:i], wrong, *fits[i + 1 :])


# ---------------------------------------------------------------- find


def test_find_videos_is_recursive_sorted_and_counts_the_rest(clips):
    sources, ignored = find_videos([clips])
    assert [s.name for s in sources] == sorted(
        ["a/x.mp4", "a/y.mp4", "b/x.mp4", "b/z.mp4", "u.mp4", "v.mp4"]
    )
    assert ignored == {".csv": 1}
    again, ignored = find_videos([clips, clips / "a"])  # the same files by another way
    assert len(again) == 6 and ignored == {".csv": 1}


@pytest.mark.parametrize("link, kept", [("a.mp4", "a.mp4"), ("z.mp4", "file.mp4")])
def test_a_file_under_several_names_is_taken_once_and_the_others_counted(
    link, kept, clips, tmp_path
):
    (tmp_path / "file.mp4").write_bytes((clips / "u.mp4").read_bytes())
    (tmp_path / link).symlink_to("file.mp4")
    sources, ignored = find_videos([tmp_path, tmp_path])
    assert [s.name for s in sources] == [kept] and ignored == {FILE_LINKS: 1}


def test_typescript_is_no_video(clip, pattern, tmp_path):
    data = clip(tmp_path / "x.ts", pattern(6, 32, 32), codec="mpeg2video").read_bytes()
    (tmp_path / "late.ts").write_bytes(data[100:])  # begins in the midst of a packet
    (tmp_path / "empty.ts").write_bytes(b"")  # for probe to refuse
    (tmp_path / "gone.ts").symlink_to("nowhere")
    (tmp_path / "app.ts").write_text("Game.start();  // größer\n" * 40)
    sources, ignored = find_videos([tmp_path])
    assert [s.name for s in sources] == ["empty.ts", "gone.ts", "late.ts", "x.ts"]
    assert ignored == {".ts": 1} and probe(tmp_path / "late.ts").num_frames
    assert len(find_videos([tmp_path / "app.ts"])[0]) == 1  # a file that is named is always tried


def test_links_to_folders_and_hidden_ones_are_counted_and_not_searched(clips, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "x.mp4").symlink_to(clips / "u.mp4")  # a link to a file is as good as the file
    (folder / "circle").symlink_to(folder)
    (folder / "elsewhere").symlink_to(clips / "a")
    sources, ignored = find_videos([folder])
    assert [s.name for s in sources] == ["x.mp4"] and ignored == {FOLDER_LINKS: 2}
    assert len(find_videos([folder / "elsewhere"])[0]) == 2
    (folder / ".trash").mkdir()
    (folder / ".trash" / "y.mp4").symlink_to(clips / "v.mp4")
    sources, ignored = find_videos([folder])
    assert len(sources) == 1 and ignored == {FOLDER_LINKS: 2, HIDDEN_FOLDERS: 1}
    assert len(find_videos([folder / ".trash"])[0]) == 1
    (folder / "x.mp4").unlink()
    with pytest.raises(InputError, match="2 links to folders, not followed, 1 hidden"):
        find_videos([folder])


def test_find_videos_refuses(clips, tmp_path):
    with pytest.raises(InputError, match="same name 'x.mp4'"):
        find_videos([clips / "a", clips / "b"])
    with pytest.raises(InputError, match="no such file"):
        find_videos([tmp_path / "nowhere"])
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path(os.devnull)):
        with pytest.raises(InputError, match="not a regular file"):
            find_videos([path])
    (tmp_path / "pipe.mp4").unlink()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no video found"):
        find_videos([tmp_path])
    (tmp_path / "itself.mp4").symlink_to("itself.mp4")  # for probe to refuse, this file alone
    assert [source.name for source in find_videos([tmp_path])[0]] == ["itself.mp4"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, clip, pattern, monkeypatch):
    clip(tmp_path / "a.mp4", pattern(4, 32, 32))
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"closed: the folder cannot be read \(Permission denied"):
        find_videos([tmp_path])
