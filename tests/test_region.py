"""Regions: the part of the image that moves reaches the shards, the text beside it does not."""

import json
import subprocess
import sys

import numpy as np
import pytest

from sslus.engine import region
from sslus.engine.errors import InputError
from sslus.engine.prepare import prepare
from sslus.engine.region import Box, Region
from sslus.engine.shard import Settings, shard
from sslus.engine.video import decode, images, probe

HEIGHT, WIDTH = 360, 480


def sector() -> np.ndarray:
    """Where the ultrasound of `screens` is: a fan below (60, 200), 70 to 270 pixels deep."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    depth, angle = np.hypot(y - 60, x - 200), np.arctan2(x - 200, y - 60)
    return (depth > 70) & (depth < 270) & (np.abs(angle) < 0.6)


def written() -> np.ndarray:
    """Where the text of `screens` is."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), "DOE^JANE  1970-01-01  ST. ELSEWHERE", fill=255, font_size=20)
    draw.text((400, 120), "12.5 cm\nMI 1.1", fill=255, font_size=16)
    draw.text((10, 320), "GA 24w5d", fill=255, font_size=20)
    return np.asarray(image)


def screens(pattern, num=40) -> np.ndarray:
    """What a machine shows: ultrasound that moves, text that does not, and a clock that ticks."""
    from PIL import Image, ImageDraw

    frames = np.where(sector(), pattern(num, HEIGHT, WIDTH) // 2 + 40, 0).astype(np.uint8)
    frames = np.maximum(frames, written())
    for i, frame in enumerate(frames):
        image = Image.new("L", (60, 20))
        ImageDraw.Draw(image).text((0, 0), f"{i:05d}", fill=255, font_size=16)
        frame[40:60, 410:470] = np.asarray(image)
    return np.clip(frames, 16, 235)


def full_range(clip) -> np.ndarray:
    return np.stack([f.luma for f in decode(clip)])


@pytest.fixture
def stored(by_hand):
    """stored(shards): the frames by video and frame number."""

    def read(shards) -> dict[tuple[str, int], np.ndarray]:
        return {(facts["video"], facts["frame"]): image for image, facts in by_hand(shards)}

    return read


@pytest.mark.parametrize(
    ("codec", "pixel_format", "options"),
    [("libx264", "yuv420p", {"crf": "30", "g": "10"}), ("mpeg4", "yuv420p", {"qmax": "12"}),
     ("mjpeg", "yuvj420p", {})],
)  # fmt: skip
def test_what_moves_is_kept_and_text_is_not(
    tmp_path, clip, stored, pattern, codec, pixel_format, options
):
    frames = screens(pattern)
    path = clip(tmp_path / "a.avi", frames, codec=codec, pixel_format=pixel_format, options=options)
    decoded = full_range(path)
    found = moving(decoded)
    assert (found.inside & sector()).sum() > 0.97 * sector().sum()
    assert found.inside.sum() < 1.2 * sector().sum()  # its near edge is an arc
    assert not (found.inside & (written() > 0)).any() and not found.inside[40:60, 410:470].any()
    top, bottom, left, right = found.box
    assert found.inside[top:bottom, left:right].any(1).all()
    out = tmp_path / "shards"
    shard([path], out, Settings(size=256, stride=7, region="auto"), device="cpu", jobs=1)
    read = stored(out)
    assert len(read) == 6
    for (_, number), image in read.items():
        luma = np.where(found.inside, decoded[number], 0)[top:bottom, left:right]
        assert np.abs(prepare(luma, 256).astype(int) - image).max() < 24  # JPEG
    manifest, ledger = (
        json.loads((out / name).read_text()) for name in ("manifest.json", "local/ledger.jsonl")
    )
    assert manifest["settings"]["region"] == "auto" and ledger["region"] == str(found.box)


def test_two_images_side_by_side_are_both_kept(pattern):
    frames = np.zeros((20, 150, 300), np.uint8)
    frames[:, 20:110, 10:130] = pattern(20, 90, 120, seed=1)
    frames[:, 20:100, 170:290] = pattern(20, 80, 120, seed=2)
    frames[:, 5:15, 10:290] = 200
    frames[:, 135:139, 20:270] = pattern(20, 4, 250, seed=3)  # a heartbeat's trace
    inside = moving(frames).inside
    assert inside[25:95, 15:125].all() and inside[25:95, 175:285].all()
    assert not inside[:15].any() and not inside[:, 140:160].any() and not inside[130:].any()


def moving(frames) -> Region | None:
    return region.moving((f, False) for f in frames)


def test_the_whole_image_may_move(pattern):
    found = moving(np.ascontiguousarray(pattern(20, 90, 120)))
    assert found.box == (0, 90, 0, 120) and found.inside.mean() > 0.995


def test_flicker_does_not_join_text_to_the_ultrasound(pattern):
    """Two grey levels everywhere; dots up to the text, of a tenth of what the ultrasound does."""
    frames = np.full((20, 512, 512), 20, np.uint8)
    frames[:, 200:480, 100:400] = pattern(20, 280, 300)
    odd = np.arange(20) % 2 == 1
    frames[odd, :196] += 2
    for y in range(20, 196, 12):
        for x in range(100, 400, 12):
            frames[odd, y : y + 4, x : x + 4] += 14
    frames[:, 10:30, 100:400] = 220
    inside = moving(frames).inside
    assert inside[210:470, 110:390].all() and not inside[:180].any()


def test_a_clock_is_no_ultrasound(pattern):
    frames = screens(pattern, 20)
    frames[:, sector()] = frames[0, sector()]
    assert moving(frames) is None


def test_frames_that_cannot_be_used_do_not_matter(pattern):
    frames = screens(pattern, 20)
    want = moving(frames)
    images = [(lambda f=f: (f, False), 0.0) for f in frames]
    other = (lambda: (pattern(1, 100, 300, seed=5)[0], False), 0.0)
    images = [(None, 0.0), images[0], (None, 0.0), *images[1:5], other, *images[5:]]
    found = region.find("auto", iter(images), len(images))
    np.testing.assert_array_equal(found.inside, want.inside)
    assert region.find("1,2,3,4", iter(images), 20).box == (2, 6, 1, 4)
    assert region.find(f"0,0,{WIDTH},{HEIGHT}", iter(images), 20).inside.all()
    assert region.find("1,2,3,4", iter(images[:1]), 1) == "not a single frame can be decoded"


def test_frozen_and_repeated_frames_tell_nothing(pattern):
    frames = screens(pattern, 12)
    still = np.repeat(frames[:1], 200, 0)
    assert moving(still) is None and moving(frames[:1]) is None
    flicker = still.astype(int) + (np.arange(200) % 2)[:, None, None]  # of one grey level
    assert moving(flicker.astype(np.uint8)) is None
    late = np.concatenate([still, np.repeat(frames, 3, 0)])
    inside = moving(late).inside
    assert (inside & sector()).sum() > 0.97 * sector().sum()
    assert not (inside & (written() > 0)).any()


def test_short_clips_have_a_region(tmp_path, clip, stored, pattern):
    path = clip(tmp_path / "a.avi", screens(pattern, 2), codec="mjpeg", pixel_format="yuvj420p")
    out = tmp_path / "shards"
    shard([path], out, Settings(size=64, stride=1, region="auto"), device="cpu", jobs=1)
    assert len(stored(out)) == 2


def test_a_box_is_a_crop_of_the_upright_image(tmp_path, clip, stored, pattern):
    path = clip(tmp_path / "a.mp4", pattern(6, 96, 128))
    turned = tmp_path / "turned.mp4"
    turn(path, turned)
    assert full_range(turned).shape == (6, 128, 96)
    settings = Settings(size=64, stride=1, region="10,20,70,60")
    shard([turned], tmp_path / "shards", settings, device="cpu", jobs=1)
    for (_, number), image in stored(tmp_path / "shards").items():
        want = prepare(full_range(turned)[number][20:80, 10:80], 64)
        assert np.abs(want.astype(int) - image).max() < 24


def turn(path, out):
    """Copy a video and say that it is to be shown a quarter turn further."""
    import av

    with av.open(str(path)) as source, av.open(str(out), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    data = bytearray(out.read_bytes())
    identity = b"".join(x.to_bytes(4) for x in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    quarter = b"".join(
        (x % (1 << 32)).to_bytes(4) for x in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    )
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + 36] = quarter
    out.write_bytes(data)


def test_files_without_a_region_are_refused_by_name(tmp_path, clip, pattern):
    still = np.repeat(screens(pattern, 1), 10, 0)
    videos = tmp_path / "videos"
    videos.mkdir()
    clip(videos / "still.avi", still, codec="mjpeg", pixel_format="yuvj420p")
    clip(videos / "moving.avi", screens(pattern, 10), codec="mjpeg", pixel_format="yuvj420p")
    made = command("shard", videos, "-o", tmp_path / "a", "--region", "auto", "--device", "cpu")
    assert made.returncode == 3
    assert "still.avi: nothing in it moves" in made.stderr and "moving.avi:" not in made.stderr
    assert "10 decoded of 20 expected" in made.stdout
    assert "auto: 1 file cropped to it\n" in made.stdout
    clip(videos / "still.avi", pattern(10, 90, 160), codec="mjpeg", pixel_format="yuvj420p")
    again = ("--region", "auto", "--device", "cpu", "--force")
    made = command("shard", videos, "-o", tmp_path / "a", *again)
    told = " ".join(made.stdout.split())
    assert "auto: 2 files cropped to it; in 1 of them (nearly) the whole image moves" in told
    boxed = command("shard", videos, "-o", tmp_path / "a", "--region", "0,0,50,50", "--force")
    assert "--region 0,0,50,50 was used for images of 2 sizes" in boxed.stderr
    boxed = command("shard", videos, "-o", tmp_path / "b", "--region", "300, 0, 300, 100")
    assert boxed.returncode == 1 and boxed.stderr.count("Error") == 1
    assert "is 480 x 360 pixels, so it has no region 300,0,300,100" in boxed.stderr
    assert not list((tmp_path / "b").glob("*.tar"))
    boxed = command("shard", videos, "-o", tmp_path / "b", "--region", "0,300,100,61")
    assert boxed.returncode == 1 and "has no region 0,300,100,61" in boxed.stderr
    for text in ("1,2,3", "a,b,c,d", "-1,0,5,5", "0,0,0,5", "some"):
        with pytest.raises(InputError, match="--region: want all, auto, or LEFT,TOP,WIDTH,HEIGHT"):
            Settings(region=text)
    assert region.parse("3,4,10,20") == Box(4, 24, 3, 13) and str(Box(4, 24, 3, 13)) == "3,4,10,20"
    with pytest.raises(InputError, match="on the CPU only"):
        shard([videos], tmp_path / "c", Settings(region="auto"), decoder="dali")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sslus.tools", *map(str, arguments)], capture_output=True, text=True
    )


def test_a_frame_of_another_size_is_left_out(tmp_path, clip, stored, pattern):
    """Its ultrasound is elsewhere. The two videos are joined, as MPEG allows."""
    options = {"codec": "mpeg1video", "rate": 25}
    first = clip(tmp_path / "a.mpg", screens(pattern, 12), **options)
    second = clip(tmp_path / "b.mpg", pattern(12, 240, 320), **options)
    both = tmp_path / "both.mpg"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert {f.luma.shape for f in decode(both)} == {(360, 480), (240, 320)}
    out = tmp_path / "shards"
    result = shard([both], out, Settings(size=64, stride=1, region="auto"), device="cpu", jobs=1)
    (line,) = result.ledger
    frames = stored(out)
    assert line["status"] == "incomplete" and "frames show another screen" in line["why"]
    assert len(frames) == line["kept_frames"] == line["decoded_frames"] - line["other_screens"]
    assert 11 <= line["other_screens"] <= 13 and max(number for _, number in frames) < 13


def test_what_counts_as_another_screen(pattern):
    frames = screens(pattern, 20)
    found = moving(frames)

    def shown(frame) -> bool:
        return found.shown(np.clip(frame, 0, 255).astype(np.uint8), False)

    last = frames[-1].astype(float)
    assert shown(last) and shown(0.4 * last) and shown(np.full_like(last, 90))  # dimmed; faded out
    assert shown(0.5 * last + 100)  # and brighter
    assert found.shown(np.clip(16 + last * 219 / 255, 16, 235).astype(np.uint8), True)
    assert not shown(last[::-1]) and not shown(last[:, ::-1]) and not shown(255 - last)
    assert not found.shown(frames[-1][:-1], False)
    bare = np.where(sector(), frames, 0)
    found = moving(bare)  # nothing stands beside the ultrasound
    assert shown(bare[0]) and shown(bare[0] + np.random.default_rng(0).normal(0, 3, bare[0].shape))
    assert not shown(last)
    box = Region.of_boxes(last.shape, (Box(0, 9, 0, 9),))
    assert box.shown(frames[0], False) and not box.shown(frames[0][:-1], False)
    limited = region.find("auto", ((lambda f=f: (f, False), 0.0) for f in frames), 20, box)
    assert isinstance(limited, str) and "are not where" in limited
    declared = Region.of_boxes(last.shape, (Box(150, 300, 0, 300),))
    images = (((lambda f=f: (f, False)), 0.0) for f in frames)
    limited = region.find("auto", images, 20, declared)
    assert limited.box.top == 150 and not limited.shown(frames[-1][::-1].copy(), False)


@pytest.mark.parametrize("deviation", [1, 2, 5])
def test_flicker_of_the_brightness_is_no_motion(pattern, deviation):
    """As frame grabbers have it: each frame is brighter or darker than the last."""
    offset = np.random.default_rng(1).normal(0, deviation, (40, 1, 1))
    frames = np.clip(screens(pattern, 40) * 0.9 + 20 + offset, 0, 255).astype(np.uint8)
    inside = moving(frames).inside
    assert not (inside & (written() > 0)).any()
    assert (inside & sector()).sum() > 0.95 * sector().sum()
    still = np.clip(screens(pattern, 1) * 0.9 + 20 + offset, 0, 255).astype(np.uint8)
    assert moving(still) is None


def test_specks_are_no_motion(pattern):
    frames = np.repeat(screens(pattern, 1), 40, 0)
    for i, frame in enumerate(frames):
        frame[8 * i : 8 * i + 8, 100:108] += 4
    assert moving(frames) is None


def test_another_screen_is_left_out(tmp_path, clip, stored, pattern):
    """A page with the patient's data, then the examination, then another layout, whose text is
    where ultrasound was."""
    from PIL import Image, ImageDraw

    page = Image.new("L", (WIDTH, HEIGHT), 30)
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(["DOE^JANE", "BORN 1970-01-01", "12 MAIN STREET", "ID 00451-332"]):
        draw.text((100, 40 + 70 * i), text, fill=220, font_size=36)
    exam = screens(pattern, 90)
    exam[40:50] = (exam[40:50] * 0.4).astype(np.uint8)  # somebody turns the brightness down
    other = np.full((30, HEIGHT, WIDTH), 20, np.uint8)
    other[:, 200:340, 300:460] = pattern(30, 140, 160, seed=4)
    for frame in other:
        text = Image.new("L", (WIDTH, 40))
        ImageDraw.Draw(text).text((100, 0), "DOE^JANE  ID 00451-332", fill=255, font_size=28)
        frame[120:160] = np.asarray(text)
    frames = np.concatenate([np.repeat(np.asarray(page)[None], 30, 0), exam, other])
    path = clip(tmp_path / "a.avi", frames, codec="libx264")
    out = tmp_path / "shards"
    result = shard([path], out, Settings(size=64, stride=5, region="auto"), device="cpu", jobs=1)
    (line,) = result.ledger
    assert {number for _, number in stored(out)} == set(range(30, 120, 5))
    assert line["other_screens"] == 12 and line["status"] == "incomplete"
    assert "12 frames show another screen than most and were left out" in line["why"]


@pytest.mark.parametrize(
    ("name", "left", "top", "width", "height"),
    [
        # A patient's number, the date, a scale and the maker's mark surround a small image.
        ("cit-lus/image_93029618565613.mp4", 560, 110, 161, 261),
        ("itkpocus/butterfly-ocular-phantom.mp4", 92, 202, 600, 693),
        ("itkpocus/clarius-ocular-short.mp4", 260, 80, 761, 801),
    ],
)
def test_regions_of_real_machines(real_data, name, left, top, width, height):
    path = real_data / name
    found = region.find("auto", images(path), probe(path).num_frames)
    want = Region.of_boxes(found.inside.shape, (Box(top, top + height, left, left + width),))
    both = (found.inside & want.inside).sum()
    assert both > 0.7 * want.inside.sum() and both > 0.97 * found.inside.sum()


def test_every_real_lung_has_a_region(real_data):
    """Public videos that were cropped by hand: most of the image is ultrasound, or black."""
    videos = sorted((real_data / "pocus-ccby" / "pocus_videos").rglob("*.m*"))
    for path in videos[::6]:
        found = region.find("auto", images(path), probe(path).num_frames)
        lit = np.mean([f.luma for f in decode(path)][:30], axis=0) > 32
        assert (found.inside & lit).sum() > 0.9 * lit.sum(), path.name
        assert all(found.shown(*luma()) for luma, _ in list(images(path))[::5]), path.name


def test_a_still_does_not_pass_for_ultrasound(tmp_path, clip, pattern):
    """Compression makes the still text flicker, by different amounts from frame to frame."""
    still = np.repeat(screens(pattern, 1), 60, 0)
    for codec, pixel_format, options in (
        ("mjpeg", "yuvj420p", {}), ("mjpeg", "yuvj420p", {"qmin": "20"}),
        ("mjpeg", "yuvj420p", {"b": "300k"}), ("mpeg4", "yuv420p", {}), ("libx264", "yuv420p", {}),
        ("libx264", "yuv420p", {"crf": "40", "g": "3"}), ("mpeg2video", "yuv420p", {}),
    ):  # fmt: skip
        path = tmp_path / "a.avi"
        clip(path, still, codec=codec, pixel_format=pixel_format, options=options)
        why = region.find("auto", images(path), 60)
        assert isinstance(why, str) and "nothing in it moves" in why, (codec, options)
