"""Still pictures: exact luma, upright, whole or refused, and sharded like videos of one frame."""

import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslus.engine import picture
from sslus.engine.errors import InputError
from sslus.engine.shard import Settings, shard
from sslus.engine.sources import find_videos, probe
from sslus.engine.video import VideoError
from sslus.tools.cli import main

SMALL = Settings(size=32, frames_per_shard=7)


@pytest.fixture(scope="module")
def grey(pattern) -> np.ndarray:
    return pattern(1, 48, 64)[0]


@pytest.fixture(scope="module")
def colour(pattern) -> np.ndarray:
    return np.stack([pattern(1, 48, 64, seed=s)[0] for s in range(3)], -1)


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


@pytest.fixture
def luma(tmp_path):
    """What is read of these bytes, under a name with this extension."""

    def read(data: bytes, kind: str = "png") -> np.ndarray:
        path = tmp_path / f"x.{kind}"
        path.write_bytes(data)
        y, info = picture.luma(path), probe(path)
        assert (info.height, info.width, info.num_frames) == (*y.shape, 1)
        return y

    return read


def test_luma_is_exact(grey, colour, luma):
    for kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(luma(encoded(grey, kind), kind), grey)
        want = (colour @ np.array([299, 587, 114]) + 500) // 1000
        np.testing.assert_array_equal(luma(encoded(colour, kind), kind), want)
    np.testing.assert_array_equal(luma(encoded(colour, "WEBP", lossless=True), "webp"), want)
    for pixels in (grey, colour):
        jpeg = encoded(pixels, "JPEG", quality=60)
        with Image.open(io.BytesIO(jpeg)) as theirs:
            theirs.draft("YCbCr", theirs.size)
            y = np.asarray(theirs if theirs.mode == "L" else theirs.getchannel("Y"))
        np.testing.assert_array_equal(luma(jpeg, "jpg"), y)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bits_are_rounded(kind, luma):
    deep = (np.arange(64 * 64).reshape(64, 64) * 16 + 8).astype(np.uint16)
    want = np.floor(deep / 257 + 0.5)
    np.testing.assert_array_equal(luma(encoded(deep, {"tif": "TIFF"}.get(kind, kind)), kind), want)
    with pytest.raises(VideoError, match="32 bits"):
        luma(encoded(deep.astype(np.float32), "TIFF"), "tif")


def test_tiffs_of_12_bits_and_of_which_0_is_white(luma):
    def tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
        height, width = values.shape
        data = values.astype("<u2").tobytes()
        if bits == 12:  # two pixels in three bytes, the highest bit first
            each = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)
            data = np.packbits(each[..., 4:]).tobytes()
        tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1,
                278: height, 279: len(data)}  # fmt: skip
        rows = b"".join(struct.pack("<HHIHH", tag, 3, 1, x, 0) for tag, x in tags.items())
        head = b"II*\0" + struct.pack("<I", 8 + len(data))
        return head + data + struct.pack("<H", len(tags)) + rows + bytes(4)

    for bits, photometric in ((16, 1), (16, 0), (12, 1)):
        deep = np.linspace(0, (1 << bits) - 1, 64 * 64).round().reshape(64, 64)
        want = np.floor(deep * 255 / ((1 << bits) - 1) + 0.5)
        found = luma(tiff(deep, bits, photometric), "tif")
        np.testing.assert_array_equal(found, want if photometric else 255 - want)


def test_palettes_and_transparency(grey, luma):
    """In all their kinds: of a palette, of grey, of one colour, of pixels."""
    image = Image.fromarray(255 - grey, "P")
    image.putpalette([255 - v // 3 for v in range(768)])
    for transparent in (None, 0, int(255 - grey[9, 9])):
        data, options = io.BytesIO(), {} if transparent is None else {"transparency": transparent}
        image.save(data, "PNG", **options)
        want = np.where(255 - grey == transparent, 0, grey)
        np.testing.assert_array_equal(luma(data.getvalue()), want)
    value = int(grey[9, 9])
    got = luma(encoded(grey, "PNG", transparency=value))
    np.testing.assert_array_equal(got, np.where(grey == value, 0, grey))
    alpha = np.roll(grey, 5)
    want = (grey.astype(int) * alpha + 127) // 255
    for colours in (1, 3):
        pixels = np.dstack([grey] * colours + [alpha])
        np.testing.assert_array_equal(luma(encoded(pixels, "PNG")), want)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_pictures_come_upright(kind, grey, luma):
    upright = {
        1: grey, 2: np.fliplr(grey), 3: np.rot90(grey, 2), 4: np.flipud(grey), 5: grey.T,
        6: np.rot90(grey, -1), 7: np.rot90(grey.T, 2), 8: np.rot90(grey), 99: grey,
    }  # fmt: skip
    name = {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind)
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(kind, {})
    for orientation, want in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        got = luma(encoded(grey, name, exif=exif, **options), kind)
        np.testing.assert_allclose(got, want, atol=2 * (kind == "jpg"))
        if kind == "png":  # the chunk may also come behind the pixels
            data = encoded(grey, name, exif=exif)
            at = data.index(b"eXIf") - 4
            end = at + 12 + int.from_bytes(data[at : at + 4])
            last = data.index(b"IEND") - 4
            behind = data[:at] + data[end:last] + data[at:end] + data[last:]
            np.testing.assert_array_equal(luma(behind, kind), want)
    if kind != "tif":  # damaged EXIF does no harm
        assert luma(encoded(grey, name, exif=b"Exif\0\0MM\0\1?", **options), kind).shape == (48, 64)


def test_what_ffmpeg_takes_for_a_picture_of_a_series(grey, luma, tmp_path):
    """It recognises JPEGs by their names alone where they begin with much else."""
    data = encoded(grey, "JPEG", quality=100, comment=bytes(60_000))
    np.testing.assert_allclose(luma(data, "jpg"), grey, atol=2)
    for name in ("x.tga", "text.png"):
        (tmp_path / name).write_bytes(b"no picture at all" * 99)
        with pytest.raises(VideoError, match="not a picture of a kind that is read"):
            probe(tmp_path / name)


ENCODINGS = {
    "jpg": ("JPEG", {}), "progressive.jpg": ("JPEG", {"progressive": True, "quality": 95}),
    "thumbnail.jpg": ("JPEG", {}), "png": ("PNG", {}), "bmp": ("BMP", {}), "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}), "webp": ("WEBP", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_is_cut_off_is_refused(name, colour, tmp_path):
    kind, options = ENCODINGS[name]
    if name == "thumbnail.jpg":  # which has an end of its own
        options = {"exif": b"Exif\0\0" + encoded(colour[::4, ::4], "JPEG")}
    data, path = encoded(colour, kind, **options), tmp_path / name
    path.write_bytes(data + b"behind its end")
    assert picture.luma(path).shape == (48, 64)
    num_bytes = len(data)
    places = [*np.linspace(1, num_bytes - 9, 40).astype(int), *range(num_bytes - 8, num_bytes)]
    for place in places:
        for rest in (b"", bytes(num_bytes - place)):  # as a download leaves it that was prepared
            if rest and not data[place:].strip(b"\0"):
                continue  # those zeros were there
            path.write_bytes(data[:place] + rest)
            try:
                probe(path)
                y = picture.luma(path)
            except VideoError as e:
                assert "\n" not in str(e) and str(path) in str(e)
            else:  # no format but PNG and JPEG tells what its bytes should be
                assert rest and kind in ("BMP", "TIFF", "WEBP"), (place, y.shape)


def test_animations_are_videos_or_refused(colour, tmp_path):
    more = {"save_all": True, "append_images": [Image.fromarray(colour[::-1].copy())]}
    for name, kind in (("x.png", "PNG"), ("x.webp", "WEBP"), ("x.tif", "TIFF"), ("x.jpg", "MPO")):
        (tmp_path / name).write_bytes(encoded(colour, kind, **more))
    assert (probe(tmp_path / "x.png").codec, probe(tmp_path / "x.png").num_frames) == ("apng", 2)
    for name in ("x.webp", "x.tif"):
        with pytest.raises(VideoError, match="holds 2 pictures; save each"):
            probe(tmp_path / name)
    assert probe(tmp_path / "x.jpg").num_frames == 1  # of two eyes, or with a preview


# ---------------------------------------------------------------- sharding


@pytest.fixture
def folder(clips, grey, colour, tmp_path) -> Path:
    """Two videos among pictures of every kind, with labels; some files are no pictures."""
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    for name in "uv":
        shutil.copy(clips / f"{name}.mp4", folder)
    for i in range(12):
        pixels = np.roll(colour if i % 2 else grey, 5 * i, axis=1)
        ending, kind = (("PNG", "PNG"), ("jpeg", "JPEG"), ("tiff", "TIFF"), ("BMP", "BMP"))[i % 4]
        (folder / "a" / f"{i}.{ending}").write_bytes(encoded(pixels, kind))
    (folder / "a" / "._0.png").write_bytes(b"what a Mac leaves")
    rows = [f"{p.relative_to(folder)},{'ab'[k % 2]},p{k}" for k, p in enumerate(pictures(folder))]
    (folder / "labels.csv").write_text("\n".join(["path,label,patient", *rows, "u.mp4,a,p0"]))
    return folder


def pictures(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "a").iterdir() if not p.name.startswith("."))


def make(paths, out, settings=SMALL, **kwargs):
    kwargs = {"images": True, "jobs": 1, "device": "cpu"} | kwargs
    (out.parent / "key").write_text("01" * 32)
    return shard(paths, out, settings, key=out.parent / "key", **kwargs)


def public_bytes(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def test_each_picture_is_a_video_of_one_frame(folder, tmp_path):
    report = make([folder], tmp_path / "out", labels=folder / "labels.csv")
    assert not report.problems and report.ignored == {"unknown": 1, ".csv": 1}
    found = {r["source"]: r for r in report.ledger}
    assert len(found) == 14 and report.manifest.decoders == {"pillow": 12, "pyav": 2}
    assert list(report.manifest.labels) == ["a", "b"] and report.unlabelled == 1
    counts = ("expected_frames", "decoded_frames", "kept_frames", "status")
    for path in pictures(folder):
        assert [found[str(path)][c] for c in counts] == [1, 1, 1, "ok"]
    videos = make([folder], tmp_path / "videos", images=False)
    of_videos = {r["source"]: r | {"seconds": 0} for r in videos.ledger}
    assert of_videos == {s: found[s] | {"seconds": 0} for s in of_videos} and len(of_videos) == 2


@pytest.mark.parametrize("stride, rate_hz", [(1, None), (100, None), (None, 0.01), (None, 1000.0)])
def test_the_one_frame_is_always_kept(stride, rate_hz, folder, tmp_path):
    settings = Settings(size=32, stride=stride, rate_hz=rate_hz)
    report = make([folder / "a"], tmp_path / "out", settings)
    assert report.manifest.num_frames == report.manifest.num_videos == 12


def test_bytes_depend_on_neither_jobs_nor_an_interruption(folder, tmp_path):
    make([folder], tmp_path / "straight", labels=folder / "labels.csv", jobs=2)
    want = public_bytes(tmp_path / "straight")

    def stop(done, total, note):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make([folder], tmp_path / "out", labels=folder / "labels.csv", report=stop)
    again = make([folder], tmp_path / "out", labels=folder / "labels.csv")
    assert again.resumed == 5 and public_bytes(tmp_path / "out") == want
    assert make([folder], tmp_path / "out", labels=folder / "labels.csv").already
    with pytest.raises(InputError, match="of other videos, .*12 of the videos gone"):
        make([folder], tmp_path / "out", images=False)


def test_one_bad_picture_costs_that_picture_only(folder, tmp_path, capsys):
    bad = pictures(folder)[:3]
    for path in bad[:2]:
        path.write_bytes(path.read_bytes()[:-9])
    bad[2].write_text("no picture")
    out = tmp_path / "out"
    code = main(["shard", str(folder), "--images", "-o", str(out), "--size", "32", "--jobs", "1"])
    ledger = [json.loads(x) for x in (out / "local" / "ledger.jsonl").read_text().splitlines()]
    refused = {r["source"]: r["why"] for r in ledger if r["status"] != "ok"}
    said = capsys.readouterr()
    assert code == 3 and set(refused) == set(map(str, bad)), refused
    assert sum(r["expected_frames"] for r in ledger) - sum(r["decoded_frames"] for r in ledger) == 2
    assert all(f"{source}: {why}" in said.err for source, why in refused.items())
    assert "11 of 14" in said.out


def test_skipped_pictures_are_counted_and_the_way_to_take_them_is_said(folder, tmp_path, capsys):
    line = ["shard", str(folder), "-o", str(tmp_path / "out"), "--size", "32", "--jobs", "1"]
    assert main(line) == 0
    assert "14 files skipped" in (out := capsys.readouterr().out)
    assert "--images takes the 12 pictures among them" in " ".join(out.split())
    with pytest.raises(InputError, match="no video found .*; add --images to take the 12 pictures"):
        find_videos([folder / "a"])
    with pytest.raises(InputError, match="12 of its videos .* or add --images"):
        make([folder], tmp_path / "out", images=False, labels=folder / "labels.csv")
    assert main([*line, "--images", "--force"]) == 0
    assert "--images" not in capsys.readouterr().out


def test_in_a_picture_nothing_moves(folder, tmp_path):
    with pytest.raises(InputError, match="none of the 12 files .* nothing in it moves"):
        make([folder / "a"], tmp_path / "out", Settings(size=32, region="auto"))
    report = make([folder / "a"], tmp_path / "out", Settings(size=32, region="4,8,20,16"))
    assert {r["region"] for r in report.ledger} == {"4,8,20,16"} and not report.problems


def test_no_pair_of_frames_is_nearby(folder, tmp_path):
    from sslus.ssl.loader import open_store

    make([folder / "a"], tmp_path / "out")
    with pytest.raises(InputError, match="no video has two frames; use --pairs same"):
        open_store(tmp_path / "out", pairs="nearby")
    make([folder], tmp_path / "out", force=True)
    assert len(open_store(tmp_path / "out", pairs="nearby")) > 14


def test_every_real_picture_is_accounted_for(real_data, tmp_path):
    report = make([real_data / "pocus-ccby" / "pocus_images"], tmp_path / "out", jobs=2)
    assert not report.problems and not report.ignored
    assert len(report.ledger) == report.manifest.num_frames == 8
    for line in report.ledger:
        with Image.open(line["source"]) as theirs:
            black = Image.new("RGBA", theirs.size, "black")
            want = Image.alpha_composite(black, theirs.convert("RGBA")).convert("L")
        got = picture.luma(Path(line["source"])).astype(int)
        assert np.abs(got - np.asarray(want)).mean() < 0.6
