"""The frames' own JPEG decoder against libjpeg-turbo, to the last bit."""

import threading

import numpy as np
import pytest
import simplejpeg

from sslus.engine import _jpeg
from sslus.engine.jpeg import DamagedJpeg, decode, is_fast

needs_avx2 = pytest.mark.skipif(not is_fast(), reason="this processor has no AVX2")


def picture(rng, height, width) -> np.ndarray:
    """Noise, waves, black with a bright spot, or one grey."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(0, 256, (height, width)).astype(np.uint8)
    if kind == 1:
        y, x = np.mgrid[:height, :width] / rng.uniform(1, 30)
        return (127.5 + 127.5 * np.sin(y) * np.cos(3 * x)).astype(np.uint8)
    out = np.full((height, width), 0 if kind == 2 else rng.integers(256), np.uint8)
    if kind == 2:
        out[rng.integers(height), rng.integers(width)] = 255
    return out


def encoded(image: np.ndarray, quality: int = 95) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image[..., None]), quality, "GRAY", "Gray")


def fast(jpeg: bytes, out: np.ndarray) -> bool:
    return not _jpeg.decode([jpeg], out[None])


@needs_avx2
def test_the_same_pixels_as_libjpeg_turbo():
    rng = np.random.default_rng(0)
    for i in range(600):
        size = rng.integers(1, 70, 2) if i % 10 else rng.integers(1, 600, 2)
        jpeg = encoded(picture(rng, *size), int(rng.integers(1, 101)))
        out = np.empty(size, np.uint8)
        assert fast(jpeg, out)
        np.testing.assert_array_equal(out, simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0])


def pillow(image: np.ndarray, **options) -> bytes:
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize(
    "make, plain",
    [
        (lambda x: pillow(x, optimize=True), True),  # a Huffman table of its own
        (lambda x: pillow(x, comment=b"\xff\xd9"), True),
        (lambda x: pillow(x, progressive=True), False),
        (lambda x: pillow(x, restart_marker_blocks=3), False),
        (lambda x: pillow(np.stack([x, x // 2, 255 - x], -1)), False),  # in colour
        (lambda x: pillow(x, qtables=[[1000 + i for i in range(64)]]), False),  # steps of 16 bits
    ],
)
def test_every_kind_of_jpeg_is_decoded(make, plain):
    jpeg = make(picture(np.random.default_rng(1), 50, 83))
    out = np.empty((50, 83), np.uint8)
    assert fast(jpeg, out) == (plain and is_fast())
    decode([jpeg], out[None])
    np.testing.assert_array_equal(out, simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0])


@needs_avx2
def test_a_table_with_a_code_of_ones_is_left_to_libjpeg_turbo():
    """It takes such a table for damage."""
    jpeg, out = encoded(np.full((16, 16), 100, np.uint8)), np.empty((16, 16), np.uint8)
    table = jpeg.index(b"\xff\xc4") + 5  # the number of its codes of each length
    assert fast(jpeg, out)
    codes = np.frombuffer(jpeg, np.uint8)[table : table + 16]
    assert codes.tolist() == [0, 1, 5, 1, 1, 1, 1, 1, 1] + [0] * 7  # of DC
    ones = bytearray(jpeg)
    ones[table + 8] = 2
    ones[table + 16 + 12 : table + 16 + 12] = b"\x00"
    ones[table - 2] += 1
    assert not fast(bytes(ones), out)
    with pytest.raises(ValueError, match="Huffman"):
        decode([bytes(ones)], out[None])


@needs_avx2
def test_what_it_takes_for_whole_libjpeg_turbo_does_too():
    """Bytes changed, cut out, or cut off. Not every damage can be seen: the scan may still be
    valid. Then nearly all images are the same; the two differ where values overflow."""
    rng = np.random.default_rng(2)
    taken = same = 0
    for _ in range(1500):
        jpeg = bytearray(encoded(picture(rng, 40, 40), int(rng.integers(50, 101))))
        for _ in range(rng.integers(1, 3)):
            jpeg[rng.integers(20, len(jpeg))] = rng.integers(256)  # after the version of JFIF
        if rng.random() < 0.2:
            del jpeg[rng.integers(len(jpeg)) :]
        if rng.random() < 0.2:
            del jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 1]
        out = np.empty((40, 40), np.uint8)
        if fast(bytes(jpeg), out):
            taken += 1  # the next line raises ValueError if libjpeg-turbo finds damage
            same += np.array_equal(out, simplejpeg.decode_jpeg(bytes(jpeg), "GRAY")[..., 0])
    assert taken > 20 and same > 0.9 * taken


def test_damaged_files_and_other_sizes_are_refused():
    jpeg, out = encoded(np.zeros((40, 40), np.uint8)), np.empty((40, 40), np.uint8)
    for broken in (b"", b"\xff", jpeg[:10], jpeg[:-2], jpeg[:-40] + jpeg[-2:], b"x" * 1000):
        with pytest.raises(ValueError):
            decode([broken], out[None])
    with pytest.raises(ValueError, match="its size is 40 x 40"):
        decode([jpeg], np.empty((1, 40, 41), np.uint8))
    for wrong in (out[None, :, ::2], out[None].astype(np.int8), out):
        with pytest.raises(TypeError):
            decode([jpeg], wrong)
    data = np.frombuffer(jpeg, np.uint8)
    assert not fast(data[:-1], out)  # what comes after it in memory is not part of it
    for wrong, error in ((data.repeat(2)[::2], ValueError), (jpeg.hex(), TypeError)):
        with pytest.raises(error):
            decode([jpeg, wrong], np.empty((2, 40, 40), np.uint8))
    for num in (0, 2):
        with pytest.raises(ValueError, match="as many files as images"):
            decode([jpeg], np.empty((num, 40, 40), np.uint8))


def test_every_file_gets_its_image_and_the_damaged_one_is_named():
    rng = np.random.default_rng(5)
    images = [picture(rng, 24, 40) for _ in range(5)]
    jpegs = [encoded(x) if i % 2 else pillow(x, progressive=True) for i, x in enumerate(images)]
    out = np.empty((5, 24, 40), np.uint8)
    decode([memoryview(b"__" + x)[2:] for x in jpegs], out)
    for jpeg, got in zip(jpegs, out, strict=True):
        np.testing.assert_array_equal(got, simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0])
    jpegs[3] = jpegs[3][:-9]
    with pytest.raises(DamagedJpeg) as e:
        decode(tuple(jpegs), out)
    assert e.value.number == 3
    decode([], np.empty((0, 24, 40), np.uint8))


def test_threads_with_other_tables_do_not_disturb_each_other():
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (64, 64)).astype(np.uint8) for _ in range(8)]
    jpegs = [encoded(x, 90) if i % 2 else pillow(x, optimize=True) for i, x in enumerate(images)]
    wanted = [simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0] for jpeg in jpegs]
    wrong = []

    def work(start: int) -> None:
        out = np.empty((64, 64), np.uint8)
        for i in range(start, start + 200):
            decode([jpegs[i % 8]], out[None])
            if (out != wanted[i % 8]).any():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_avx2
def test_others_run_while_it_decodes(others_run):
    """The threads of a store and of a stream decode at the same time."""
    image = np.random.default_rng(4).integers(0, 256, (2000, 2000)).astype(np.uint8)
    image[:, -8:] = 0
    jpeg, out = encoded(image), np.empty_like(image)
    assert others_run(lambda: fast(jpeg, out), out[:, -1])
