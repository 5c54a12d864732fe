"""Views: what the presets draw, batches that depend on nothing but the seed, nearby pairs."""

import dataclasses
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from sslus.engine.errors import InputError
from sslus.engine.plan import Plan, have_nearby, nearby
from sslus.engine.store import FrameStore
from sslus.kernels import _cpu
from sslus.kernels.augment import COLUMNS, PARAMS, check_params, identity, views
from sslus.ssl import loader as loaders
from sslus.ssl.loader import Batch, Loader
from sslus.ssl.views import PRESETS, ViewConfig, draw, parse, whole
from sslus.ssl.views import picture as picture_of
from sslus.tools.cli import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(many_shards) -> FrameStore:
    return FrameStore.open(many_shards)


def test_philox_known_answers():
    """From the Random123 distribution's kat_vectors."""
    for counter, key, want in [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        words = np.array([counter], np.uint32)
        _cpu.philox(words, key)
        assert words[0].tolist() == want


EVERYTHING = ViewConfig(
    min_area=0.2, p_jitter=0.7, contrast=0.2, gamma=0.3, p_blur=0.4, p_solarize=0.3, solarize=0.6,
    p_gain=0.6, gain=0.3, p_speckle=0.5, speckle=0.2,
)  # fmt: skip


def test_draws_have_their_ranges_and_probabilities():
    c, frames = EVERYTHING, np.arange(20_000)
    table = draw(c, frames, 0, 0, 7, store=256, size=448)
    column = dict(zip(COLUMNS, table.T, strict=True))
    for start, length in (("top", "height"), ("left", "width")):
        # Every place is as likely, the first and the last among them.
        assert (column[start] + column[length] / 2).mean() == pytest.approx(128, abs=1)
        cut = column[length] < 256
        start, length = column[start][cut], column[length][cut]
        share = (1 / (257 - length)).mean()
        for at_edge in (start == 0, start + length == 256):
            assert at_edge.mean() == pytest.approx(share, rel=0.1)
    area = column["height"] * column["width"] / 256**2  # uniform, but for the sides' rounding
    assert np.quantile(area, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1], abs=0.01
    )
    aspect = column["width"] / column["height"]
    assert aspect.max() == pytest.approx(4 / 3, rel=0.02) == 1 / aspect.min()
    assert (aspect > 1.01).mean() == pytest.approx((aspect < 0.99).mean(), abs=0.02)
    for name, neutral, probability in [
        ("flip", 0, c.p_flip), ("sigma", 0, c.p_blur), ("gamma", 1, c.p_jitter),
        ("brightness", 1, c.p_jitter), ("solarize", 2, c.p_solarize), ("gain_far", 1, c.p_gain),
        ("speckle", 0, c.p_speckle),
    ]:  # fmt: skip
        changed = column[name] != neutral
        assert changed.mean() == pytest.approx(probability, abs=0.02), name
    for name, low, high in [
        ("brightness", 0.6, 1.4), ("contrast", 0.8, 1.2), ("gain_near", 0.7, 1.3),
        ("gain_far", 0.7, 1.3), ("gamma", np.exp(-0.3), np.exp(0.3)), ("speckle", 0, 0.2),
    ]:  # fmt: skip
        assert low <= column[name].min() < low + 0.01, name
        assert high - 0.01 < column[name].max() <= high + 1e-6, name
    blurred = column["sigma"][column["sigma"] > 0]
    assert 0.2 <= blurred.min() < 0.21 and 3.98 < blurred.max() <= 4
    assert set(column["solarize"]) == {np.float32(0.6), 2}
    assert len(np.unique(column["seed"])) > 0.99 * len(frames)
    # Independent columns, the box aside: else two of them would share a random number.
    correlation = np.corrcoef(table.T) - np.eye(len(COLUMNS))
    assert COLUMNS[:4] == ("top", "left", "height", "width")
    assert np.abs(correlation[4:]).max() < 0.05
    for other in ((1, 0, 7), (0, 1, 7), (0, 0, 8), (0, 0, 7 + 2**32)):  # view, epoch, seed
        again = draw(c, frames, *other, store=256, size=448)
        assert (again[:, 0] != table[:, 0]).mean() > 0.9


def test_sides_are_rounded_to_whole_pixels():
    for store, area, want in [
        (256, (100.4 / 256) ** 2, 100), (256, (100.6 / 256) ** 2, 101), (32, 1e-4, 1),
    ]:  # fmt: skip
        config = ViewConfig(min_area=area, max_area=area, max_aspect=1)
        table = draw(config, np.arange(9), 0, 0, 0, store=store, size=32)
        assert (table[:, [COLUMNS.index("height"), COLUMNS.index("width")]] == want).all()


def test_the_border_refuses_tables_that_do_not_fit():
    """The compiled function trusts nobody: it would read or write beyond them."""
    nine = np.arange(9)
    fits = [np.ones(16), nine, nine, 0, 0, 64.0, 32.0, np.empty((9, len(COLUMNS)), np.float32)]
    _cpu.draw_views(*fits)
    narrow = fits[7][:, :13].copy()
    for i, wrong in [(0, np.ones(15)), (1, nine[:8]), (2, nine[:8]), (7, fits[7][:8]), (7, narrow)]:
        with pytest.raises(ValueError, match="^views: "):
            _cpu.draw_views(*fits[:i], wrong, *fits[i + 1 :])
    with pytest.raises(TypeError):  # the table would be written to a copy
        _cpu.draw_views(*fits[:7], fits[7].astype(np.float64))


def test_others_run_while_views_are_drawn(others_run):
    frames, ranges = np.arange(100_000), np.array(list(vars(EVERYTHING).values()), np.float64)
    out = np.empty((100_000, len(COLUMNS)), np.float32)
    draw_all = partial(_cpu.draw_views, ranges, frames, frames, 0, 7, 256.0, 224.0, out)
    assert others_run(draw_all, out[::1000, COLUMNS.index("flip")])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [32, 224, 512])
def test_every_preset_draws_what_the_op_takes(name, size):
    for view, config in enumerate(PRESETS[name]):
        table = draw(config, np.arange(3000), view, 3, 1, store=256, size=size)
        check_params(
            torch.zeros(3000, dtype=torch.int64), torch.from_numpy(table), num_frames=1, store=256
        )


PLAIN = {"p_jitter": 0, "p_blur": 0, "p_solarize": 0, "p_gain": 0, "p_speckle": 0}
MACHINE = {
    "min_area": 0.4, "max_aspect": 1.2, "p_flip": 0.5, "p_jitter": 0.8, "brightness": 0.25,
    "contrast": 0.25, "gamma": 0.2, "p_blur": 0.3, "max_sigma": 1 / 224, "p_solarize": 0,
    "p_gain": 0.5, "gain": 0.3, "p_speckle": 0.5, "speckle": 0.15,
}  # fmt: skip
PHOTO = {
    "min_area": 0.08, "max_area": 1, "max_aspect": 4 / 3, "p_flip": 0.5, "p_jitter": 0.8,
    "gamma": 0, "max_sigma": 2 / 224, "p_gain": 0, "p_speckle": 0,
}  # fmt: skip
SIMCLR = PHOTO | {"brightness": 0.8, "contrast": 0.8, "p_blur": 0.5, "p_solarize": 0}
TWINS = PHOTO | {"brightness": 0.4, "contrast": 0.4, "solarize": 0.5}
FRAME = {"min_area": 1, "max_area": 1, "max_aspect": 1, "p_flip": 0}


@pytest.mark.parametrize(
    "name, first, second",
    [
        # Crops that keep most of the image, changes that are a machine's.
        ("ultrasound", MACHINE, MACHINE),
        # arXiv:2002.05709, appendix A, but for colour.
        ("simclr", SIMCLR, SIMCLR),
        # arXiv:2006.07733, table 6: the views differ.
        (
            "barlowtwins", TWINS | {"p_blur": 1, "p_solarize": 0},
            TWINS | {"p_blur": 0.1, "p_solarize": 0.2},
        ),
        # The target is the frame, and so is its place in the input.
        (
            "autoencoder", FRAME | PLAIN,
            FRAME | PLAIN | {
                "p_jitter": 0.8, "brightness": 0.2, "contrast": 0.2, "p_blur": 0.5,
                "p_speckle": 0.8, "speckle": 0.3,
            },
        ),
        ("inpainting", PLAIN | {"min_area": 0.5}, PLAIN | {"min_area": 0.5}),
    ],
)  # fmt: skip
def test_presets_have_the_values_of_their_source(name, first, second):
    assert set(PRESETS) == {"ultrasound", "simclr", "barlowtwins", "autoencoder", "inpainting"}
    for config, want in zip(PRESETS[name], (first, second), strict=True):
        for field, value in want.items():
            assert getattr(config, field) == pytest.approx(value), field


def test_the_compiled_border_knows_the_bounds_of_the_table(monkeypatch):
    """It decides whether check_params, which names what is wrong, is asked at all."""
    monkeypatch.setattr("sslus.kernels.augment.check_params", lambda *_, **__: None)
    frames, index = torch.zeros(1, 64, 64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    for column, (name, _, low, high, _) in enumerate(PARAMS):
        side = name in ("top", "left", "height", "width")
        for value, right in [
            (low, True), (64 if side and low else 0 if side else high, True),
            (np.nextafter(np.float32(low), np.float32(-1)), False),
            (64.1 if side else np.nextafter(np.float32(high), np.float32(np.inf)), False),
            (np.nan, False), (0.5, name not in ("flip", "seed", "height", "width")),
            *[(63 + low + over, over < 1e-3) for over in (5e-4, 2e-3) if side],  # rounding errors
        ]:  # fmt: skip
            params = identity(1, 64)
            if side:
                params[0, :4] = torch.tensor([0.0, 0, 1, 1])
            params[0, column] = float(value)
            try:
                views(frames, index, params, size=8)
                taken = True
            except ValueError:
                taken = False
            assert taken == right, (name, value)


def test_presets_are_changed_by_name():
    first, second = parse("barlowtwins, p_blur=0.25 ,min_area=0.5")
    assert first.p_blur == second.p_blur == 0.25 and first.min_area == 0.5
    assert (first.p_solarize, second.p_solarize) == (0.0, 0.2)
    for text, words in [
        ("nothing", "ultrasound, simclr"),
        ("simclr,p_hue=1", "no field 'p_hue'"),
        ("simclr,p_blur=often", "wants a number"),
        ("simclr,p_blur=1.5", "p_blur in 0..1"),
        ("simclr,p_blur=nan", "p_blur in 0..1"),
        ("simclr,min_area=0.9,max_area=0.5", "min_area <= max_area"),
    ]:
        with pytest.raises(InputError, match=words):
            parse(text)


def test_a_blur_that_the_op_refuses_is_refused_before_it_is_drawn():
    text = "ultrasound,max_sigma=0.072,p_blur=0.001"
    parse(text, 222)
    with pytest.raises(InputError, match="at most 0.0714 for views of 224 px, got 0.072"):
        parse(text, 224)
    parse("ultrasound,max_sigma=1,p_blur=0", 224)


def batches_of(store, order, size, epoch=2):
    return [Batch(epoch, o, o) for o in np.array_split(order, len(order) // size)]


def make(store, batches, threads=1, tier=None, monkeypatch=None):
    if tier:
        monkeypatch.setattr(loaders, "tier", lambda *_: (tier, "for the test"))
    with Loader(
        store, iter(batches), parse("ultrasound"), size=24, seed=5, device=CPU, threads=threads
    ) as loader:
        return [torch.stack(pair[:2]) for pair in loader]


def test_a_view_does_not_depend_on_batch_threads_or_tier(store, monkeypatch):
    order = np.random.default_rng(0).permutation(len(store))[:48]
    together = torch.cat(make(store, batches_of(store, order, 48)), dim=1)
    apart = torch.cat(make(store, batches_of(store, order, 6), 3, "disk", monkeypatch), dim=1)
    assert torch.equal(together, apart)
    reverse = torch.cat(make(store, batches_of(store, order[::-1], 8), 2), dim=1)
    assert torch.equal(together, reverse.flip(1))
    assert not torch.equal(together[0], together[1])
    assert together.mean().abs() < 0.5 and 0.5 < together.std() < 1.5  # normalised


def test_whole_is_the_frame_resized(store):
    import torchvision.transforms.v2.functional as F

    frames = store.frames[:4]
    same = whole(frames, 64, 0.0, 1 / 255)
    assert torch.equal(same[:, 0], torch.from_numpy(np.array(frames)).float())
    half = whole(frames, 32, 0.0, 1.0)
    want = F.resize(torch.from_numpy(np.array(frames))[:, None] / 255, [32, 32], antialias=True)
    torch.testing.assert_close(half, want, atol=1 / 255, rtol=0)


def test_partners_and_the_order_are_drawn_from_different_numbers():
    """Else those of the frames that come first in an epoch would not be any."""
    num = 1000
    order = Plan(num, 4, 3).order(5)
    partners, _ = nearby(np.zeros(num, int), np.zeros(num), np.arange(num), 1.0, 3, 5)
    # Sorted by the numbers that the partners were drawn from, these would be the order.
    own = np.random.Philox(key=[3, 5]).random_raw(num)
    same = (own % np.uint64(num - 1)).astype(int)
    assert np.array_equal(np.argsort(own, kind="stable"), order)
    assert (partners == same + (same >= np.arange(num))).mean() < 0.02


def test_nearby_frames_are_of_the_same_video_and_in_reach():
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 7, 40, 200]  # clips of one frame work
    video = np.repeat(np.arange(len(lengths)), lengths)
    time = np.concatenate([np.sort(rng.uniform(0, n / 10, n)) for n in lengths]).astype(np.float32)
    every = np.arange(len(video))
    seen = [set() for _ in every]
    for epoch in range(60):
        partners, weights = nearby(video, time, every, 0.5, 3, epoch)
        assert (video[partners] == video).all()
        alone = partners == every
        assert (np.abs(time[partners] - time)[~alone] <= 0.5 + 1.1e-4).all()
        assert ((weights > 0) & (weights <= 1)).all() and (weights[alone] == 1).all()
        for i, j in enumerate(partners):
            seen[i].add(int(j))
        few = rng.permutation(len(every))[:50]
        assert np.array_equal(nearby(video, time, few, 0.5, 3, epoch)[0], partners[few])
    reach = [
        {int(j) for j in every if video[j] == video[i] and j != i and abs(time[j] - time[i]) <= 0.5}
        for i in every
    ]
    assert not reach[0]
    others = [i not in mine for i, mine in enumerate(seen)]
    assert have_nearby(video, time, 0.5).tolist() == others and not all(others)
    for i, (mine, want) in enumerate(zip(seen, reach, strict=True)):
        assert mine <= (want or {i}) and (len(want) > 4 or mine == (want or {i}))


@pytest.mark.parametrize("start_seconds", [0, 7600, 20000])
def test_the_frame_exactly_at_the_limit_is_nearby(start_seconds):
    """Also hours after the start, where float32 has steps of 0.5 and 2 ms."""
    times = start_seconds + np.round(np.arange(200) / 25, 6)  # 0.2 s are five of them
    times = times.astype(np.float32)
    video, every = np.zeros(200, np.int32), np.arange(200)
    far = np.max([np.abs(nearby(video, times, every, 0.2, 0, e)[0] - every) for e in range(80)], 0)
    assert (far == 5).all()
    few = video[::5], times[::5]
    assert have_nearby(*few, 0.2).all() and not have_nearby(*few, 0.19).any()


def test_weights_of_nearby_pairs_by_hand():
    video, time = np.zeros(5, np.int32), np.arange(5, dtype=np.float32)
    for epoch in range(20):
        partners, weights = nearby(video, time, np.array([0]), 4.0, 0, epoch)
        assert weights[0] == pytest.approx((4 - partners[0] + 1) / 5)


def test_a_picture_of_views(store, tmp_path):
    from PIL import Image

    command = [
        sys.executable,
        "-m",
        "sslus.tools",
        "views",
        str(store.frames.filename.parent.parent),
    ]
    options = ["--frames", "3", "--image-size", "48", "--pairs", "nearby"]
    result = subprocess.run(
        [*command, *options, "-o", str(tmp_path / "v.png")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "sslus train" in result.stdout
    picture = np.asarray(Image.open(tmp_path / "v.png"))
    margin = picture.shape[1] - (3 * 50 - 2)  # with the names of the rows
    assert len(picture) == 3 * 50 - 2 and 10 < margin < 60
    assert picture[:, margin:].std() > 20 and (picture[48:50] == 255).all()
    assert all(picture[y : y + 48, :margin].min() < 128 for y in (0, 50, 100))
    pictures, size = [], store.size
    for preset, seconds in (("ultrasound", None), ("ultrasound", 9.0), ("autoencoder", None)):
        picture_of(store, preset, tmp_path / "p.png", num=1, size=size, seed=0, max_seconds=seconds)
        column = np.asarray(Image.open(tmp_path / "p.png"))[:, -size:]
        pictures.append((column[:size], column[size + 2 : 2 * size + 2], column[-size:]))
    same, near, plain = pictures
    assert (same[1] == near[1]).all() and (same[2] != near[2]).any()  # another frame
    assert all((x == plain[0]).all() for x in (same[0], near[0], plain[1]))  # the frame as it is
    assert any((x == plain[0]).all() for x in store.frames)
    one = dataclasses.replace(store, frames=store.frames[:1])
    picture_of(one, "ultrasound", tmp_path / "new" / "one.png", num=6, size=48, seed=0)
    width, height = Image.open(tmp_path / "new" / "one.png").size
    assert height == 3 * 50 - 2 and 48 < width < 48 + 60


def test_wrong_views_are_told_before_the_store_is_built(store, tmp_path, capsys):
    shards = tmp_path / "shards"
    shutil.copytree(store.frames.filename.parent.parent, shards, ignore=lambda *_: ["store"])
    for line in (
        ["views", "--preset", "x"],
        ["train", "--run", str(tmp_path / "run"), "--views", "x"],
    ):
        assert main([*line, str(shards)]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("Error: views 'x': want one of ultrasound")
    assert not (shards / "store").exists()


def test_a_picture_for_which_the_disk_has_no_room(store, small_disk):
    (small_disk / "filler").write_bytes(bytes(4 << 20))
    with pytest.raises(OSError, match="No space left on device: .*/disk/v.png"):
        picture_of(store, "ultrasound", small_disk / "v.png", num=3, size=48, seed=0)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
