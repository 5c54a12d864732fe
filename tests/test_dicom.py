"""DICOM: exact luma in every transfer syntax, only the regions, nothing of the patient."""

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from sslus.engine import _luma, dicom
from sslus.engine.dicom_header import is_dicom, read_header
from sslus.engine.errors import InputError
from sslus.engine.prepare import prepare
from sslus.engine.region import Box, Region, moving
from sslus.engine.shard import Settings, shard
from sslus.engine.sources import OTHER_DICOM, UNKNOWN, find_videos
from sslus.engine.video import VideoError

UID = "1.2.840.10008.1.2"
IMPLICIT, LITTLE, BIG, RLE = UID, f"{UID}.1", f"{UID}.2", f"{UID}.5"
JPEG, JPEG_LOSSLESS, JPEG_LS, JPEG_2000 = (f"{UID}.4.{n}" for n in (50, 70, 80, 90))
H264, HEVC, MPEG2 = (f"{UID}.4.{n}" for n in (102, 107, 100))
PATIENT = {"PatientName": "Doe^Jane", "PatientID": "MRN4711", "StudyDate": "20201231"}


def write(path: Path, pixels: np.ndarray | list, syntax=LITTLE, photometric=None, **more) -> Path:
    """An ultrasound file. pixels: (T, H, W) or (T, H, W, 3), or the fragments of an encapsulated
    syntax, where Rows, Columns and NumberOfFrames are in `more`."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

    meta = FileMetaDataset()
    ultrasound = more.get("Modality", "US") == "US"
    other = "1.2.840.10008.5.1.4.1.1.2"  # CT
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage if ultrasound else other
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    order = {"is_implicit_VR": syntax == IMPLICIT, "is_little_endian": syntax != BIG}
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128, **order)
    plain = isinstance(pixels, np.ndarray)
    ds.Modality, ds.SamplesPerPixel = "US", 1
    ds.BitsAllocated = ds.BitsStored = 8 * (pixels.dtype.itemsize if plain else 1)
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, 0
    if plain:
        ds.NumberOfFrames, ds.Rows, ds.Columns = pixels.shape[:3]
        ds.SamplesPerPixel = pixels.shape[3] if pixels.ndim == 4 else 1
    for name, value in (PATIENT | more).items():
        setattr(ds, name, value)
    ds.PhotometricInterpretation = photometric or ("MONOCHROME2", "RGB")[ds.SamplesPerPixel > 1]
    if ds.SamplesPerPixel > 1 and "PlanarConfiguration" not in ds:
        ds.PlanarConfiguration = 0
    if plain:
        order = pixels.dtype.newbyteorder(">" if syntax == BIG else "<")
        ds.PixelData = pixels.astype(order).tobytes()
        ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
        if syntax == RLE:
            ds.compress(RLE)
    else:
        meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate(pixels)
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
    if syntax in (IMPLICIT, BIG):
        meta.TransferSyntaxUID = syntax
    ds.save_as(path)
    return path


def encoded(pixels: np.ndarray, codec: str, pixel_format: str, **options) -> list[bytes]:
    """Each frame by itself, by FFmpeg."""
    import av

    out = []
    for image in pixels:
        frame = av.VideoFrame.from_ndarray(image, pixel_format)
        context = av.CodecContext.create(codec, "w")
        context.height, context.width, context.pix_fmt = frame.height, frame.width, pixel_format
        context.time_base = Fraction(1, 25)
        context.options = options
        packets = [*context.encode(frame), *context.encode(None)]
        out.append(b"".join(bytes(p) for p in packets))
    return out


def shape_of(pixels: np.ndarray) -> dict:
    samples = pixels.shape[3] if pixels.ndim == 4 else 1
    names = ("NumberOfFrames", "Rows", "Columns")
    return dict(zip(names, pixels.shape[:3], strict=True)) | {"SamplesPerPixel": samples}


def box(left: int, top: int, right: int, bottom: int, form: int = 1, **more):
    """An ultrasound region; right and bottom are its last pixels."""
    from pydicom.dataset import Dataset

    region = Dataset()
    region.RegionSpatialFormat = form
    region.RegionLocationMinX0, region.RegionLocationMinY0 = left, top
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = right, bottom
    for name, value in more.items():
        setattr(region, name, value)
    return region


def frames(path: Path, size: int = 64) -> list:
    info = dicom.probe(path)
    found = list(dicom.DicomBackend().prepared(path, info, lambda *_: True, size, 95))
    assert [f.index for f in found] == list(range(len(found)))
    return found


def images(path: Path, size: int = 64) -> np.ndarray:
    found = frames(path, size)
    assert len(found) == dicom.probe(path).num_frames
    return np.stack([f.image for f in found])


@pytest.fixture(scope="module")
def grey(pattern) -> np.ndarray:
    return np.ascontiguousarray(pattern(5, 48, 64))


@pytest.fixture(scope="module")
def colour(pattern) -> np.ndarray:
    return np.stack([pattern(5, 48, 64, seed) for seed in range(3)], -1)


def bt601(rgb: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    return np.floor(rgb.astype(np.float64) @ [0.299, 0.587, 0.114] + 0.5).astype(np.uint8)


def stored(luma, size: int = 64) -> np.ndarray:
    return np.stack([prepare(np.ascontiguousarray(y), size) for y in luma])


def assert_luma(path: Path, luma: np.ndarray) -> None:
    np.testing.assert_array_equal(images(path), stored(luma))


@pytest.mark.parametrize("syntax", [IMPLICIT, LITTLE, BIG, RLE])
def test_luma_is_exact_where_pixels_are_not_compressed(syntax, grey, colour, tmp_path):
    assert_luma(write(tmp_path / "a.dcm", grey, syntax), grey)
    assert_luma(write(tmp_path / "b.dcm", grey, syntax, "MONOCHROME1"), 255 - grey)
    assert_luma(write(tmp_path / "c.dcm", colour, syntax), bt601(colour))
    assert_luma(write(tmp_path / "d.dcm", colour, syntax, "YBR_FULL"), colour[..., 0])
    if syntax != RLE:  # which keeps the values of each colour together anyway
        planes = np.ascontiguousarray(np.moveaxis(colour, -1, 1))
        more = shape_of(colour) | {"PlanarConfiguration": 1}
        assert_luma(write(tmp_path / "e.dcm", planes, syntax, "RGB", **more), bt601(colour))
        # Y1 Y2 Cb Cr: PS3.3, C.7.6.3.1.2
        pairs = grey.reshape(5, 48, 32, 2)
        halved = np.concatenate([pairs, np.full_like(pairs, 77)], -1)
        more = shape_of(grey) | {"SamplesPerPixel": 3}
        assert_luma(write(tmp_path / "f.dcm", halved, syntax, "YBR_FULL_422", **more), grey)


REVERSIBLE = {"pred": "dwt53"}
CODECS = [
    (JPEG_LOSSLESS, "ljpeg", {}), (JPEG_LS, "jpegls", {}),
    (JPEG_2000, "jpeg2000", REVERSIBLE | {"format": "j2k"}),
    (JPEG_2000, "jpeg2000", REVERSIBLE | {"format": "jp2"}),  # not allowed, but met
]  # fmt: skip


@pytest.mark.parametrize("syntax, codec, options", CODECS)
def test_luma_is_exact_in_lossless_syntaxes(syntax, codec, options, grey, colour, tmp_path):
    if codec == "ljpeg":  # FFmpeg writes no grey ones: take the three planes as they are stored
        planes = np.ascontiguousarray(np.moveaxis(colour, -1, 1))
        data = encoded(planes, codec, "yuvj444p")
    else:
        data = encoded(grey, codec, "gray", **options)
        assert_luma(write(tmp_path / "a.dcm", data, syntax, **shape_of(grey)), grey)
        path = write(tmp_path / "b.dcm", data, syntax, "MONOCHROME1", **shape_of(grey))
        assert_luma(path, 255 - grey)
        data = encoded(colour, codec, "rgb24", **options)
    # Three values a pixel; the header says what they mean.
    assert_luma(write(tmp_path / "c.dcm", data, syntax, "RGB", **shape_of(colour)), bt601(colour))
    path = write(tmp_path / "d.dcm", data, syntax, "YBR_FULL", **shape_of(colour))
    assert_luma(path, colour[..., 0])


@pytest.mark.parametrize("has_bot", [True, False])
@pytest.mark.parametrize("pieces", [1, 3])
def test_baseline_jpeg_in_any_number_of_fragments(has_bot, pieces, grey, tmp_path, monkeypatch):
    import simplejpeg

    data = [simplejpeg.encode_jpeg(y[..., None], 95, "GRAY", "Gray") for y in grey]
    want = [simplejpeg.decode_jpeg(d, "GRAY")[..., 0] for d in data]
    path = write(tmp_path / "a.dcm", data, JPEG, **shape_of(grey))
    fragment(path, data, pieces, has_bot)
    got = images(path)
    # FFmpeg's inverse DCT and libjpeg-turbo's differ by rounding
    assert np.abs(got.astype(int) - stored(want)).max() <= 1
    monkeypatch.setattr(dicom, "SAME_PIXELS", {"idct": "xvid"})  # is the name of one heard?
    assert (images(path) != got).any()


def test_a_jpeg_said_to_be_rgb(colour, tmp_path):
    """It is, unless it carries a mark that says YCbCr, or halves its colours."""
    planes = np.ascontiguousarray(np.moveaxis(colour, -1, 1))
    plain = encoded(planes, "mjpeg", "yuvj444p", qmin="1", qmax="1")
    more = shape_of(colour)
    got = images(write(tmp_path / "a.dcm", plain, JPEG, "RGB", **more))
    assert np.abs(got.astype(int) - stored(bt601(colour))).max() <= 3
    jfif = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    marked = [image[:2] + jfif + image[2:] for image in plain]
    got = images(write(tmp_path / "b.dcm", marked, JPEG, "RGB", **more))
    assert np.abs(got.astype(int) - stored(colour[..., 0])).max() <= 3
    sizes = [48 * 64, 24 * 32, 24 * 32]
    halved = [
        np.concatenate([p.ravel()[:n] for p, n in zip(x, sizes, strict=True)]) for x in planes
    ]
    halved = encoded(np.stack(halved).reshape(5, 72, 64), "mjpeg", "yuvj420p", qmin="1", qmax="1")
    got = images(write(tmp_path / "c.dcm", halved, JPEG, "RGB", **more))
    assert np.abs(got.astype(int) - stored(colour[..., 0])).max() <= 3


def fragment(path: Path, data: list[bytes], pieces: int, has_bot: bool) -> None:
    """Write Pixel Data anew, each image cut into `pieces`; pydicom cannot leave out the table."""

    def item(value: bytes) -> bytes:
        return b"\xfe\xff\x00\xe0" + len(value).to_bytes(4, "little") + value

    items, starts, at = [], [], 0
    for image in data:
        image += b"\0" * (-len(image) % (2 * pieces))
        step = len(image) // pieces
        starts.append(at)
        for k in range(pieces):
            items.append(item(image[k * step : (k + 1) * step]))
            at += len(items[-1])
    table = b"".join(s.to_bytes(4, "little") for s in starts) if has_bot else b""
    head = path.read_bytes()[: read_header(path).at]
    path.write_bytes(head + item(table) + b"".join(items) + b"\xfe\xff\xdd\xe0\0\0\0\0")


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize(
    "syntax, codec, kind, options",
    [(H264, "libx264", "mp4", {"qp": "0", "bf": "3"}), (H264, "libx264", "ts", {"qp": "0"}),
     (H264, "libx264", "h264", {"qp": "0", "bf": "3"}),
     (f"{H264}.1", "libx264", "mp4", {"qp": "0"}),
     (HEVC, "libx265", "mp4", {"x265-params": "lossless=1:log-level=none"}),
     (MPEG2, "mpeg2video", "mpg", {"q:v": "2"})],
)  # fmt: skip
def test_videos_inside(syntax, codec, kind, options, pieces, clip, pattern, tmp_path):
    luma = pattern(10, 48, 64)  # all differ
    video = clip(
        tmp_path / f"x.{kind}", luma, codec=codec, options=options,
        pixel_format="yuv420p" if codec == "mpeg2video" else "yuvj420p",
        full_range=codec != "mpeg2video",
    )  # fmt: skip
    more = shape_of(luma) | {"SamplesPerPixel": 3, "FrameTime": "50"}
    path = write(tmp_path / "a.dcm", [b"?"], syntax, "YBR_PARTIAL_420", **more)
    fragment(path, [video.read_bytes()], pieces, has_bot=False)
    found = frames(path)
    assert dicom.probe(path).num_frames == len(found) == 10
    np.testing.assert_allclose([f.time_seconds for f in found], np.arange(10) / 20, atol=1e-9)
    want = stored(luma)
    if codec == "mpeg2video":  # lossy, but in order
        near = [np.abs(f.image.astype(int) - want).mean((1, 2)).argmin() for f in found]
        assert near == list(range(10))
    else:
        np.testing.assert_array_equal([f.image for f in found], want)


def test_run_lengths_of_any_bytes():
    """Against the definition, PS3.5 G.3.1, with streams that end early or give too much."""

    def definition(packed: bytes, size: int) -> bytes:
        out, at = bytearray(), 0
        while at < len(packed) and len(out) < size:
            n, at = packed[at], at + 1
            if n < 128:
                out += packed[at : at + n + 1]
                at += n + 1
            elif n > 128:
                out += packed[at : at + 1] * (257 - n)
                at += 1
        return bytes(out[:size])

    rng = np.random.default_rng(0)
    for _ in range(300):
        packed = rng.choice([0, 2, 127, 128, 129, 250, 255, 7], rng.integers(0, 40))
        packed = packed.astype(np.uint8)
        out = np.full(rng.integers(0, 300) + 8, 99, np.uint8)
        done = _luma.unpack(packed, out[:-8])
        want = definition(packed.tobytes(), len(out) - 8)
        assert out[:done].tobytes() == want and (out[max(done, len(out) - 8) :] == 99).all()


def test_palettes(grey, tmp_path):
    """Of 8 and 16 bits, in both orders of bytes, shorter than the range of pixels."""
    rng = np.random.default_rng(0)
    for syntax in (LITTLE, BIG, RLE):
        for dtype in (np.uint8, np.uint16):
            table = rng.integers(0, 65536, (3, 200)).astype(np.uint16)
            first = 30
            tags = {}
            for name, entries in zip(("Red", "Green", "Blue"), table, strict=True):
                order = ">u2" if syntax == BIG else "<u2"
                tags[f"{name}PaletteColorLookupTableDescriptor"] = [200, first, 16]
                tags[f"{name}PaletteColorLookupTableData"] = entries.astype(order).tobytes()
            path = write(tmp_path / "a.dcm", grey.astype(dtype), syntax, "PALETTE COLOR", **tags)
            at = np.clip(grey.astype(int) - first, 0, 199)
            want = np.rint(np.array([0.299, 0.587, 0.114]) @ table / 257).astype(np.uint8)[at]
            assert_luma(path, want)
    # 16 bits in the header, 8 in the table, in bytes or words; and lines instead of entries.
    for data, prefix in (
        (bytes(range(256)), ""),
        (np.arange(256, dtype="<u2").tobytes(), ""),
        (np.array([0, 2, 0, 1, 1, 254, 255], "<u2").tobytes(), "Segmented"),
    ):
        tags = {}
        for name in ("Red", "Green", "Blue"):
            tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            tags[f"{prefix}{name}PaletteColorLookupTableData"] = data
        assert_luma(write(tmp_path / "a.dcm", grey, LITTLE, "PALETTE COLOR", **tags), grey)
    for name in ("Red", "Green", "Blue"):  # 65,535 entries, over and over
        data = np.tile(np.array([0, 1, 5, 1, 65535, 9], "<u2"), 1000).tobytes()
        tags[f"Segmented{name}PaletteColorLookupTableData"] = data
    path = write(tmp_path / "a.dcm", grey, LITTLE, "PALETTE COLOR", **tags)
    with pytest.raises(VideoError, match="damaged"):
        dicom.probe(path)


def test_only_the_regions_are_kept(grey, tmp_path):
    """What lies outside, such as the name of the patient, does not matter to a single pixel."""
    other = np.random.default_rng(1).integers(0, 256, grey.shape).astype(np.uint8)
    boxes = [(8, 4, 31, 39), (32, 10, 59, 45)]  # two images side by side, at different heights
    inside = np.zeros(grey.shape[1:], bool)
    for left, top, right, bottom in boxes:
        inside[top : bottom + 1, left : right + 1] = True
    named = np.where(inside, grey, other)
    ignored = [box(0, 0, 63, 3, 3), box(60, 0, 63, 47, 0)]  # a spectrum, a colour bar
    tags = {"SequenceOfUltrasoundRegions": [box(*b) for b in boxes] + ignored}
    path = write(tmp_path / "a.dcm", named, **tags)
    assert_luma(path, np.where(inside, grey, 0)[:, 4:46, 8:60])
    # Only a spectrum: that is what there is.
    path = write(tmp_path / "b.dcm", grey, SequenceOfUltrasoundRegions=[box(0, 9, 63, 40, 3)])
    assert_luma(path, grey[:, 9:41])
    # Many count the last pixel as the first one outside; others have scaled the image.
    path = write(tmp_path / "c.dcm", grey, SequenceOfUltrasoundRegions=[box(1, 2, 64, 48)])
    assert_luma(path, grey[:, 2:, 1:])
    assert not dicom.probe(path).uncropped
    # What cannot be does not undo what can.
    useless = [box(1, 2, 126, 90), box(0, 0, 0, 0), box(0, 0, 2**32 - 1, 9), box(0, 0, 63, 5, 5)]
    path = write(tmp_path / "d.dcm", grey, SequenceOfUltrasoundRegions=useless)
    assert dicom.probe(path).uncropped
    assert_luma(path, grey)
    useless.append(box(40, 40, 9, 5))
    path = write(tmp_path / "e.dcm", grey, SequenceOfUltrasoundRegions=useless)
    assert_luma(path, grey[:, 5:41, 9:41])


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def test_a_region_may_be_found_or_given(pattern, tmp_path):
    """What a file declares limits both; it suffices where nothing moves, but for whole screens."""
    screens = np.zeros((6, 96, 128), np.uint8)
    screens[:, 4:12, 4:120] = 220
    screens[:, 30:90, 20:110] = pattern(6, 60, 90)
    videos = tmp_path / "videos"
    videos.mkdir()
    write(videos / "a.dcm", screens)
    declared = [box(30, 20, 119, 95)]
    write(videos / "b.dcm", screens, SequenceOfUltrasoundRegions=declared)
    write(videos / "c.dcm", screens[:1])
    write(videos / "d.dcm", screens[:1], SequenceOfUltrasoundRegions=declared)
    write(videos / "e.dcm", screens[:1], SequenceOfUltrasoundRegions=[box(0, 0, 127, 95)])

    def lines(region: str) -> list[dict]:
        settings = Settings(size=64, stride=1, region=region)
        made = shard([videos], tmp_path / region, settings, device="cpu", jobs=1)
        assert not any(line["uncropped"] and line["kept_frames"] for line in made.ledger)
        return made.ledger

    found = lines("auto")
    assert [line["status"] for line in found] == ["ok", "ok", "refused", "ok", "refused"]
    free, both, still, alone, screen = found
    assert numbers(free["region"]) == pytest.approx([20, 30, 90, 60], abs=3)
    assert numbers(both["region"]) == pytest.approx([30, 30, 80, 60], abs=3)
    assert alone["region"] == "30,20,90,76"
    for line in (still, screen):
        assert "nothing in it moves" in line["why"] and line["expected_frames"] == 1
    given = [line["region"] for line in lines("20,30,90,60")]
    assert given == ["20,30,90,60", "30,30,80,60", "20,30,90,60", "30,30,80,60", "20,30,90,60"]
    assert "are not where --region 0,0,9,9 is" in lines("0,0,9,9")[1]["why"]
    whole = dicom.DicomBackend(Region.of_boxes((96, 128), (Box(30, 90, 20, 110),)))
    info = dicom.probe(videos / "b.dcm")
    cut = [f.image for f in whole.prepared(videos / "b.dcm", info, lambda *_: True, 64, 95)]
    np.testing.assert_array_equal(cut, [prepare(f[30:90, 20:110], 64) for f in screens])


def test_a_page_that_is_shown_between_stays_out(pattern, tmp_path):
    """Where the region was found by what moves: on another screen it may be text."""
    screens = np.zeros((6, 96, 128), np.uint8)
    screens[:, 4:12, 4:120] = 220
    screens[:, 30:90, 20:110] = pattern(6, 60, 90)
    region = moving((screen, False) for screen in screens)
    path = write(tmp_path / "a.dcm", np.concatenate([screens, 255 - screens[:1]]))
    backend, info = dicom.DicomBackend(region), dicom.probe(path)
    found = list(backend.prepared(path, info, lambda *_: True, 64, 95))
    assert [f.elsewhere for f in found] == [f.image is None for f in found] == [0] * 6 + [1]


def test_a_narrow_banner_outside_of_what_is_declared_stays_out(pattern, tmp_path):
    """A name that flickers, as in analog video, or that lies in the region that is given."""
    screens = pattern(6, 96, 128)
    path = write(tmp_path / "a.dcm", screens, SequenceOfUltrasoundRegions=[box(0, 4, 127, 95)])
    assert dicom.probe(path).uncropped  # not to be relied on: little is left out
    for region in ("auto", "0,0,128,96"):
        settings = Settings(size=64, stride=1, region=region)
        (line,) = shard([path], tmp_path / region, settings, device="cpu", jobs=1).ledger
        assert (line["status"], line["region"]) == ("ok", "0,4,128,92")


def test_pixel_aspect(grey, tmp_path):
    def aspect(**tags) -> float:
        return dicom.probe(write(tmp_path / "a.dcm", grey, **tags)).pixel_aspect

    def calibrated(x: float, y: float, units: int = 3) -> dict:
        region = box(0, 0, 63, 47, PhysicalDeltaX=x, PhysicalDeltaY=y)
        region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection = 3, units
        return {"SequenceOfUltrasoundRegions": [region]}

    assert aspect() == 1
    assert aspect(PixelAspectRatio=["4", "3"]) == 0.75  # height before width
    assert aspect(**calibrated(0.02, -0.04)) == 0.5
    assert aspect(**calibrated(0.02, 4.0)) == 1  # cannot be
    assert aspect(**calibrated(0.02, 0.0)) == aspect(**calibrated(0.02, 0.04, 4)) == 1  # seconds


def test_times(grey, tmp_path):
    def times(**tags) -> list[float]:
        return [f.time_seconds for f in frames(write(tmp_path / "a.dcm", grey, **tags))]

    assert times(FrameTime="20") == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert times(CineRate="10") == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert times(RecommendedDisplayFrameRate="10") == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    both = times(CineRate="20", RecommendedDisplayFrameRate="10")  # how it was taken, how shown
    assert both == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert times(CineRate="20000") == times(FrameTime="0") == pytest.approx(np.arange(5) / 25)
    vector = ["0", "10", "30", "10", "50"]
    given = times(FrameTimeVector=vector, FrameTime="20")
    assert given == pytest.approx([0, 0.01, 0.04, 0.05, 0.1])
    assert dicom.probe(tmp_path / "a.dcm").rate_hz == pytest.approx(40)
    assert times(FrameTimeVector=vector[:3]) == times() == pytest.approx(np.arange(5) / 25)
    assert dicom.probe(tmp_path / "a.dcm").rate_hz == 0


def test_files_are_found_by_what_they_are(grey, clip, pattern, tmp_path):
    folder = tmp_path / "study"
    (folder / "series").mkdir(parents=True)
    for name in ("a.dcm", "IM0001", "1.2.840.113619.2.55", "series/b.IMA"):
        write(folder / name, grey)
    clip(folder / "c.mp4", pattern(3, 48, 64))
    write(folder / "ct.dcm", grey, Modality="CT")
    write(folder / "DICOMDIR", grey, Modality=None)
    (folder / "notes").write_text("DICM")
    (folder / "scan.DoeJane").touch()  # which is not shown as an extension
    (folder / "d.dcm").write_bytes(b"\0" * 200)  # named like one: will be refused, by name
    sources, ignored = find_videos([folder])
    names = ["1.2.840.113619.2.55", "IM0001", "a.dcm", "c.mp4", "d.dcm", "series/b.IMA"]
    assert [s.name for s in sources] == names
    assert ignored == {OTHER_DICOM: 2, UNKNOWN: 2}


def spoil(path: Path, new: bytes, at: int) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        f.write(new)


def test_bad_files(grey, colour, tmp_path):
    """Each is refused with one line that says why and tells nothing of the patient."""

    def why(path: Path) -> str:
        with pytest.raises(VideoError) as e:
            frames(path)
        assert "\n" not in e.value.why and not any(v in e.value.why for v in PATIENT.values())
        return e.value.why

    path = tmp_path / "a.dcm"
    assert "modality CT" in why(write(path, grey, Modality="CT"))
    assert "modality none" in why(write(path, grey, Modality=None))
    assert "modality unknown" in why(write(path, grey, Modality="DOE^JANE"))
    assert "12 bits" in why(write(path, grey.astype(np.uint16), BitsStored=12))
    assert "signed" in why(write(path, grey, PixelRepresentation=1))
    why_not = why(write(path, [b"?"], f"{UID}.4.201", **shape_of(grey)))
    assert "High-Throughput JPEG 2000" in why_not and "not supported" in why_not
    assert "3 samples" in why(write(path, grey, photometric="MONOCHROME2", SamplesPerPixel=3))
    assert "no pixels" in why(write(path, grey, Rows=0))
    huge = write(path, grey, NumberOfFrames=2**31 - 1, FrameTime="20")
    assert len(frames(huge)) == 5 and dicom.probe(huge).num_frames == 2**31 - 1
    write(path, grey)
    data = path.read_bytes()
    path.write_bytes(data[: read_header(path).at - 12])
    assert "without an image" in why(path)
    for end in range(140, read_header(write(path, grey)).at - 12, 23):
        path.write_bytes(data[:end])
        assert why(path)
    path.write_bytes(b"")
    assert "not a DICOM file" in why(path)
    assert "photometric" in why(write(path, colour, photometric="HSV"))
    assert "contradicts" in why(write(path, grey[..., :63], photometric="YBR_FULL_422",
                                      SamplesPerPixel=3))  # fmt: skip
    write(path, grey)
    spoil(path, b"\xff" * 4, read_header(path).at - 4)  # a length as of compressed pixels
    assert "contradicts" in why(path)
    write(path, grey, BIG)
    spoil(path, b"OW", read_header(path).at - 8)
    assert "swapped" in why(path)
    data = write(path, grey).read_bytes()
    uid = b"1.2.840.10008.1.2.1"
    path.write_bytes(data.replace(uid + b"\0", b"1.2\n\x1b[2JDoe^Jane   "))
    assert why(path).endswith("private; convert the file")
    path.write_bytes(data.replace(uid + b"\0", uid[:-2] + b"\nDo"))
    assert why(path).endswith("unknown; convert the file")
    rows = b"\x28\0\x10\0US\2\0\x30\0"  # 48
    assert data.count(rows) == 1
    path.write_bytes(data.replace(rows, rows[:4] + b"LO\x08\0Doe^Jane"))
    assert why(path) == "a damaged DICOM file (ValueError)"
    assert "No such file" in why(path.with_name("no.dcm"))
    os.mkfifo(path.with_name("pipe.dcm"))
    assert "not a regular file" in why(path.with_name("pipe.dcm"))
    assert find_videos([tmp_path])[1][".dcm"] == 1  # nor is it opened when it is looked for
    lies = shape_of(grey) | {"Rows": 40}
    assert "64 x 40" in why(write(path, encoded(grey, "jpegls", "gray"), JPEG_LS, **lies))


def test_a_deflated_file_is_not_inflated(grey, tmp_path, monkeypatch):
    """A few MB may hold many GB."""
    import pydicom.filereader

    class Bomb:
        def __getattr__(self, name):
            pytest.fail("inflated")

    monkeypatch.setattr(pydicom.filereader, "zlib", Bomb())
    path = write(tmp_path / "a.dcm", grey)
    old = b"\2\0\x10\0UI\x14\0" + LITTLE.encode() + b"\0"
    new = b"\2\0\x10\0UI\x16\0" + LITTLE.encode() + b".99"
    path.write_bytes(path.read_bytes().replace(old, new))
    assert [s.path for s in find_videos([tmp_path])[0]] == [path]
    with pytest.raises(VideoError, match="not supported: Deflated Explicit VR Little Endian"):
        dicom.probe(path)


def test_what_a_truncated_or_damaged_file_still_gives(grey, colour, tmp_path):
    import simplejpeg

    path = write(tmp_path / "a.dcm", grey)
    path.write_bytes(path.read_bytes()[: read_header(path).at + 3 * 48 * 64 + 100])
    assert len(frames(path)) == 3 and dicom.probe(path).num_frames == 5
    path = write(tmp_path / "a.dcm", grey, NumberOfFrames=2)  # more than the header says
    assert len(frames(path)) == 5

    data = [simplejpeg.encode_jpeg(y[..., None], 95, "GRAY", "Gray") for y in grey]
    path = write(tmp_path / "b.dcm", data, JPEG, **shape_of(grey))
    fragment(path, data[:3], 1, has_bot=False)  # fewer than announced
    assert len(frames(path)) == 3
    data[1] = data[1][:20] + bytes(len(data[1]) - 20)
    fragment(path, data, 1, has_bot=True)
    assert [f.corrupt for f in frames(path)] == [False, True, False, False, False]

    path = write(tmp_path / "c.dcm", colour, RLE)
    with path.open("rb") as f:
        second = list(dicom._fragments(f, read_header(path).at))[2]  # after the table
    spoil(path, b"\2", second[0])  # the number of its segments
    assert [f.corrupt for f in frames(path)] == [False, True, False, False, False]
    spoil(path, b"\3" + bytes(3) + b"\xff" * 60, second[0])  # their starts
    assert [f.corrupt for f in frames(path)] == [False, True, False, False, False]


CUT = [("mjpeg", JPEG), ("ljpeg", JPEG_LOSSLESS), ("jpegls", JPEG_LS), ("jpeg2000", JPEG_2000)]


@pytest.mark.parametrize("codec, syntax", CUT)
def test_an_image_that_is_cut_off_is_damaged(codec, syntax, colour, tmp_path):
    planes = np.ascontiguousarray(np.moveaxis(colour, -1, 1))
    yuv = codec in ("mjpeg", "ljpeg")
    data = encoded(planes if yuv else colour, codec, "yuvj444p" if yuv else "rgb24")
    path = write(tmp_path / "a.dcm", data, syntax, "RGB", **shape_of(colour))
    whole = path.read_bytes()
    with path.open("rb") as f:
        start, length = list(dicom._fragments(f, read_header(path).at))[-1]
    for share in (0.98, 0.9, 0.5, 0.2):
        path.write_bytes(whole[: start + int(length * share)])
        assert [f.corrupt for f in frames(path)] == [False] * 4 + [True]


@pytest.mark.parametrize("codec, syntax", CUT)
def test_half_an_image_in_a_whole_fragment_is_damaged(codec, syntax, colour, tmp_path):
    """FFmpeg would make up the rest."""
    planes = np.ascontiguousarray(np.moveaxis(colour, -1, 1))
    yuv = codec in ("mjpeg", "ljpeg")
    data = list(encoded(planes if yuv else colour, codec, "yuvj444p" if yuv else "rgb24"))
    data[2] = data[2][: len(data[2]) // 2]
    path = write(tmp_path / "a.dcm", data, syntax, "RGB", **shape_of(colour))
    assert [f.corrupt for f in frames(path)] == [False, False, True, False, False]


def test_one_damaged_image_moves_no_other(grey, tmp_path):
    data = encoded(grey, "jpegls", "gray")
    want = stored(grey)
    for bad in (bytes(len(data[1])), b"", encoded(grey[:1, :40], "jpegls", "gray")[0]):
        broken = [data[0], bad, *data[2:]]
        path = write(tmp_path / "a.dcm", data, JPEG_LS, FrameTime="20", **shape_of(grey))
        fragment(path, broken, 1, has_bot=True)
        found = frames(path)
        assert [f.corrupt for f in found] == [False, True, False, False, False]
        for i in (0, 2, 3, 4):
            np.testing.assert_array_equal(found[i].image, want[i])
            assert found[i].time_seconds == pytest.approx(i / 50)


def test_headers_that_contradict_the_pixels(grey, colour, tmp_path, recwarn):
    """Seen in the data, or bounded by it, without a warning by pydicom."""
    path = tmp_path / "a.dcm"
    for syntax, other in ((LITTLE, IMPLICIT), (IMPLICIT, LITTLE)):
        data = write(path, grey, syntax).read_bytes()
        old, new = (
            b"\2\0\x10\0UI" + len(uid).to_bytes(2, "little") + uid
            for uid in (f"{u}\0".encode() for u in (syntax, other))
        )
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        assert_luma(path, grey)
    assert not [w for w in recwarn if "pydicom" in w.filename]
    # Another element follows the third of five frames.
    write(path, grey[:3], NumberOfFrames=5)
    with path.open("ab") as f:
        f.write(b"\xe1\x7f\x10\0UN\0\0" + (9000).to_bytes(4, "little") + b"Doe^Jane " * 1000)
    assert len(frames(path)) == 3 and dicom.probe(path).num_frames == 5
    assert_luma(write(path, colour, photometric="YBR_FULL_422"), colour[..., 0])
    assert_luma(write(path, colour, photometric="YBR_RCT"), bt601(colour))
    assert_luma(write(path, colour, photometric=" rgb"), bt601(colour))
    for pixel_format in ("yuv422p", "yuv444p"):  # full range, although FFmpeg thinks otherwise
        rows = {"yuv422p": 96, "yuv444p": 144}[pixel_format]
        shape = (5, 3, 48, 64) if pixel_format == "yuv444p" else (5, rows, 64)
        planes = np.concatenate([grey, np.full((5, rows - 48, 64), 128, np.uint8)], 1).reshape(
            shape
        )
        data = encoded(planes, "jpeg2000", pixel_format, **REVERSIBLE, format="jp2")
        photometric = "YBR_FULL_422" if pixel_format == "yuv422p" else "YBR_FULL"
        more = shape_of(grey) | {"SamplesPerPixel": 3}
        assert_luma(write(path, data, JPEG_2000, photometric, **more), grey)


def test_run_lengths_in_several_fragments_and_without_a_table(colour, tmp_path):
    path = write(tmp_path / "a.dcm", colour, RLE)
    with path.open("rb") as f:
        items = []
        for start, length in list(dicom._fragments(f, read_header(path).at))[1:]:
            f.seek(start)
            items.append(f.read(length))
    fragment(path, items, 2, has_bot=False)
    assert_luma(path, bt601(colour))
    fragment(path, items, 1, has_bot=False)
    data = path.read_bytes()
    at = read_header(path).at
    path.write_bytes(data[:at] + data[at + 8 :])
    assert_luma(path, bt601(colour))


def test_what_is_not_needed_does_not_matter(grey, tmp_path):
    """Optional attributes that cannot be used cost what they would have told, not the file."""
    calibrated = box(1, 1, 9, 9, PhysicalDeltaX=float("inf"), PhysicalDeltaY=1.0)
    bad = {
        "FrameTime": "33\\33", "CineRate": "30\\25", "RecommendedDisplayFrameRate": "2000000000",
        "FrameTimeVector": ["0", "1", "1e9", "1", "1"], "PixelAspectRatio": "1",
        "PlanarConfiguration": None, "BitsStored": None,
        "SequenceOfUltrasoundRegions": [calibrated],
    }  # fmt: skip
    for name, value in bad.items():
        path = write(tmp_path / "a.dcm", grey, **{name: value})
        assert dicom.probe(path).rate_hz == 0 and dicom.probe(path).pixel_aspect == 1
        assert [f.time_seconds for f in frames(path)] == pytest.approx(np.arange(5) / 25)


def test_no_damage_raises_anything_else(grey, colour, tmp_path, caplog):
    """Random damage to header and data: frames, or a VideoError, and never a patient's name."""
    from sslus.engine import spool

    tags = {"SequenceOfUltrasoundRegions": [box(1, 2, 60, 40)], "FrameTimeVector": ["0", *"9999"]}
    data = encoded(grey, "jpegls", "gray")
    files = [
        write(tmp_path / "a.dcm", grey, **tags),
        write(tmp_path / "b.dcm", colour, RLE, **tags),
        write(tmp_path / "c.dcm", data, JPEG_LS, **shape_of(grey), **tags),
    ]
    rng = np.random.default_rng(0)
    spool._worker_backends[:] = [spool.PyavBackend()]
    refused = 0
    for path in files:
        data = path.read_bytes()
        for _ in range(60):
            broken = bytearray(data)
            end = rng.choice([1500, len(data)])  # the header, mostly
            for at in rng.integers(132, end, rng.integers(1, 12)):
                broken[at] = rng.integers(256)
            path.write_bytes(broken[: rng.integers(200, end)] if rng.random() < 0.2 else broken)
            record = spool.spool_video(path, "id", Settings(size=32, stride=1), tmp_path)
            refused += record["status"] == "refused"
            assert record["status"] != "ok" or record["decoded_frames"] == record["expected_frames"]
            assert not any(v in json.dumps(record) for v in PATIENT.values())
    spool._worker_backends.clear()
    assert 10 < refused < 170
    assert not caplog.records  # by pydicom, which quotes what it finds odd


def test_a_folder_of_both_kinds(grey, clip, pattern, tmp_path):
    """Shards from the command line: all frames are accounted for, labels join by file, two runs
    with other numbers of jobs give the same bytes, and nothing of the header is in them."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write(videos / "Doe_Jane", grey, FrameTime="20", AccessionNumber="ACC0815")
    write(videos / "b.dcm", encoded(grey, "jpegls", "gray"), JPEG_LS, **shape_of(grey))
    clip(videos / "c.mp4", pattern(5, 48, 64))
    (videos / "labels.csv").write_text("path,label,patient\nDoe_Jane,x,1\nb.dcm,y,2\nc.mp4,x,3\n")
    digests = []
    for jobs, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        (tmp_path / "key").write_text("ab" * 32)
        done = subprocess.run(
            [sys.executable, "-m", "sslus.tools", "shard", videos, "-o", out, "--all", "--size",
             "64", "--jobs", str(jobs), "--device", "cpu", "--key", tmp_path / "key",
             "--labels", videos / "labels.csv"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "3 of 3 (2 with dicom, 1 with pyav)" in done.stdout
        assert "15 decoded of 15 expected, 15 kept" in done.stdout
        assert "3 files kept whole, with any text in the image" in " ".join(done.stdout.split())
        manifest = json.loads((out / "manifest.json").read_text())
        digests.append(manifest["digest"])
        shutil.rmtree(out / "local")
        secrets = [*PATIENT.values(), "ACC0815", "Doe_Jane"]
        for file in (f for f in out.rglob("*") if f.is_file()):
            assert not any(s.encode() in file.read_bytes() for s in secrets)
        assert not any(s in done.stdout + done.stderr for s in secrets)
    assert digests[0] == digests[1]


def test_a_named_decoder_refuses_dicom(grey, tmp_path):
    pytest.importorskip("nvidia.dali")
    write(tmp_path / "a.dcm", grey)
    with pytest.raises(InputError, match="DALI decodes .* only, not dicom native"):
        shard([tmp_path], tmp_path / "out", Settings(), decoder="dali", device="cpu", jobs=1)


def test_real_files(real_data):
    """The same image in three encodings, two orders of planes, two orders of bytes; a cine."""
    import simplejpeg
    from pydicom.encaps import generate_frames

    folder = real_data / "dicom-us"
    plain = images(folder / "US1_RLE", 256)
    for name in ("US1_J2KR.dcm", "examples_jpeg2k.dcm"):
        np.testing.assert_array_equal(images(folder / name, 256), plain)
    lossy = images(folder / "US1_J2KI.dcm", 256)
    assert np.abs(lossy.astype(int) - plain).mean() < 1
    pixels, planes = (images(folder / f"color-{kind}.dcm", 256) for kind in ("px", "pl"))
    np.testing.assert_array_equal(pixels, planes)
    little, big = (images(folder / f"gdcm-US-ALOKA-16{end}.dcm", 256) for end in ("", "_big"))
    np.testing.assert_array_equal(little, big)
    assert read_header(folder / "gdcm-US-ALOKA-16.dcm").region.box == (24, 416, 32, 640)
    cine = images(folder / "examples_ybr_color.dcm", 256)
    with (folder / "examples_ybr_color.dcm").open("rb") as f:
        f.seek(read_header(Path(f.name)).at)
        jpegs = list(generate_frames(f, number_of_frames=30))
    want = stored([simplejpeg.decode_jpeg(j, "GRAY")[..., 0] for j in jpegs], 256)
    assert len(cine) == 30 and np.abs(cine.astype(int) - want).max() <= 1
    assert dicom.probe(folder / "examples_ybr_color.dcm").rate_hz == pytest.approx(30, abs=1e-3)
    everything, _ = find_videos([folder, real_data / "itkpocus"])
    assert sum(is_dicom(s.path) for s in everything) == 15
