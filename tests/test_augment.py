"""Views: the reference against torchvision, every implementation against the reference in float64.

A pixel of a compiled kernel may be 1.2 grey levels from the float64 reference, and 0.05 on
average. Two steps are not continuous enough for that everywhere: solarize at its threshold,
where such pixels are left out, and gamma below 0.6 at black, which is not asked for.
"""

import os
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sslus.kernels import _cpu
from sslus.kernels.augment import COLUMNS, PARAMS, identity, reference, views
from sslus.kernels.op import MAPS

COMPILED = [
    pytest.param(
        which,
        marks=pytest.mark.skipif(
            which == "gpu" and not torch.cuda.is_available(),
            # In Triton's interpreter these sizes take minutes: test_augment_gpu.py has smaller.
            reason="no CUDA device",
        ),
    )
    for which in ("cpu", "gpu")
    if getattr(MAPS["views"], which)
]
GREY = {"mean": 0.0, "std": 1 / 255}  # views in grey levels
FULL = settings(max_examples=25, deadline=None)
if torch.cuda.is_available():  # every size is a kernel of its own, compiled in seconds
    FULL = settings(FULL, max_examples=8, phases=[Phase.explicit, Phase.generate])


@pytest.fixture(params=COMPILED)
def make(request, monkeypatch):
    """views() by one compiled implementation, the result on the CPU."""
    monkeypatch.setenv("SSLUS_KERNELS", request.param)
    return by(request.param)


def by(which):
    device = "cuda" if which == "gpu" and torch.cuda.is_available() else "cpu"

    def make(frames, index, params, **options):
        return views(frames.to(device), index.to(device), params.to(device), **options).cpu()

    return make


def frames_of(store, num=4, seed=0):
    """White noise, and blobs on black with white spots: what clips, and what does not."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (num, store, store))
    blobs = np.kron(
        rng.uniform(-150, 300, (num, store // 16 + 1, store // 16 + 1)), np.ones((16, 16))
    )
    frames[1::2] = np.clip(
        blobs[1::2, :store, :store] + rng.normal(0, 6, (num, store, store))[1::2], 0, 255
    )
    return torch.from_numpy(frames.astype(np.uint8))


def table(store, rows):
    """A row for each dict, all else as in identity."""
    params = identity(len(rows), store)
    for v, row in enumerate(rows):
        for name, value in row.items():
            params[v, COLUMNS.index(name)] = value
    return params


def truth(frames, index, params, size, **scale):
    return reference.views(
        frames, index, params.double(), size=size, dtype=torch.float64, **(scale or GREY)
    )


def draw(rng, store, **fixed):
    """A row with every step at work."""
    height, width = rng.uniform(1, store, 2)
    row = {
        "height": height, "width": width,
        "top": rng.uniform(0, 1) * (store - height) * 0.999,
        "left": rng.uniform(0, 1) * (store - width) * 0.999,
        "flip": rng.integers(2), "brightness": rng.uniform(0.4, 2), "contrast": rng.uniform(0.4, 2),
        "gamma": np.exp(rng.uniform(-0.5, 0.5)), "sigma": rng.choice([0, rng.uniform(0.1, 6)]),
        "solarize": rng.choice([2, rng.uniform(0, 1)]), "gain_near": rng.uniform(0.5, 1.5),
        "gain_far": rng.uniform(0.5, 1.5), "speckle": rng.choice([0, rng.uniform(0, 0.5)]),
        "seed": rng.integers(2**24),
    }  # fmt: skip
    return row | fixed


def assert_near(got, frames, index, params, size, worst=1.2, mean=0.05):
    """Within `worst` grey levels of the truth where solarize is not at its threshold."""
    want = truth(frames, index, params, size)
    before = params.clone()
    for name in ("solarize", "gain_near", "gain_far", "speckle"):
        before[:, COLUMNS.index(name)] = identity(1, frames.shape[-1])[0, COLUMNS.index(name)]
    before = truth(frames, index, before, size)
    threshold = 255 * params[:, COLUMNS.index("solarize")].view(-1, 1, 1, 1)
    sure = (before - threshold).abs() > worst
    error = (got.double() - want).abs()[sure]
    assert len(error) == 0 or (error.max() <= worst and error.mean() <= mean), (
        f"off by {error.max():.3f}, {error.mean():.4f} on average"
    )


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("size", [(224, 224), (50, 97), (300, 20)])
def test_reference_is_torchvision(size):
    rng = np.random.default_rng(0)
    frames = frames_of(160, 6)
    rows = []
    for _ in range(6):
        height, width = rng.integers(1, 161, 2)
        top, left = rng.integers(0, 161 - height), rng.integers(0, 161 - width)
        box = {"top": top, "left": left, "height": height, "width": width, "flip": rng.integers(2)}
        rows.append(draw(rng, 160, **box, gain_near=1, gain_far=1, speckle=0))
    params = table(160, rows)
    got = truth(frames, torch.arange(6), params, size, mean=0.4, std=0.2)
    for frame, row, view in zip(frames, params.double().tolist(), got, strict=True):
        p = dict(zip(COLUMNS, row, strict=True))
        x = frame[None].double() / 255
        box = [int(p[name]) for name in ("top", "left", "height", "width")]
        x = F.resized_crop(x, *box, list(size), antialias=True)
        x = F.horizontal_flip(x) if p["flip"] else x
        x = F.adjust_brightness(x, p["brightness"])
        x = F.adjust_gamma(F.adjust_contrast(x, p["contrast"]), p["gamma"])
        if p["sigma"]:
            k = [2 * min(int(np.ceil(3 * p["sigma"])), n - 1) + 1 for n in size]
            x = F.gaussian_blur(x, k[::-1], [p["sigma"]] * 2)
        unsure = (x - p["solarize"]).abs() < 1e-6
        x = F.solarize(x, p["solarize"]) if p["solarize"] <= 1 else x
        x = F.normalize(x, [0.4], [0.2])
        # torchvision makes resize weights and Gaussians in float32 at best: 0.005 grey levels.
        assert ((view - x).abs() * ~unsure).max() <= 0.005 / 255 / 0.2


def test_cut_gaussian_is_within_its_stated_error():
    for sigma in (0.3, 1, 2.1, 7):
        cut = reference.gaussian(sigma, 1000)
        k = torch.arange(-100, 101, dtype=torch.float64)
        whole = torch.exp(-0.5 * (k / sigma) ** 2)
        whole /= whole.sum()
        radius = len(cut) // 2
        whole[100 - radius : 101 + radius] -= cut
        # The worst image is white where the difference is positive and black where negative.
        assert 255 * whole.clamp(min=0).sum() < 0.69


def test_noise_is_philox_and_near_normal():
    # The known answer of Random123 for counter 0 and key 0.
    zero = torch.zeros(1, 1, 1, dtype=torch.int64)
    words = [int(w) for w in reference.philox(zero, zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    noise = reference.noise(torch.tensor([5.0, 6.0], dtype=torch.float64), (200, 203))
    assert noise.shape == (2, 1, 200, 203)
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.02
    assert abs((noise[0] * noise[1]).mean()) < 0.02


# ---------------------------------------------------------------- every implementation


@pytest.mark.parametrize(
    "store, size",
    [(256, (224, 224)), (32, (32, 32)), (33, (96, 17)), (100, (7, 130)), (512, (64, 224)),
     (1024, (160, 100)), (64, (1, 1)), (1000, (3, 2)), (48, (40, 1)), (48, (1, 40))],
)  # fmt: skip
def test_parity(make, store, size):
    rng = np.random.default_rng(store)
    frames, index = frames_of(store), torch.tensor([0, 1, 2, 3, 1, 0])
    params = table(store, [draw(rng, store) for _ in index])
    got = make(frames, index, params, size=size, **GREY)
    assert_near(got, frames, index, params, size)


@pytest.mark.parametrize("name", [n for n in COLUMNS[5:] if n not in ("solarize", "seed")])
def test_parity_at_the_extremes(make, name):
    lowest, highest = next((low, high) for n, _, low, high, _ in PARAMS if n == name)
    frames, index = frames_of(96), torch.tensor([0, 1, 0, 1])
    middle = (max(lowest, 0.6) if name == "gamma" else lowest) * 0.5 + 0.5 * highest
    first = 0.6 if name == "gamma" else lowest
    params = table(96, [{name: first}, {name: highest}, {name: middle}, {name: highest}])
    got = make(frames, index, params, size=(80, 70), **GREY)
    assert_near(got, frames, index, params, (80, 70))


def test_pixel_crops_and_borders(make):
    frames, index = frames_of(64), torch.zeros(6, dtype=torch.int64)
    one = {"height": 1, "width": 1}
    params = table(64, [
        one, one | {"top": 63, "left": 63}, one | {"top": 30.5, "left": 0.25},
        {"height": 1, "top": 62.75, "width": 64}, {"width": 1.5, "left": 62.5, "flip": 1},
        # Of two pixels, the second has all of the weight but 1e-5: in 15 bits, more than fits.
        {"height": 20, "top": 0.99999, "width": 24, "left": 20.99999},
    ])  # fmt: skip
    got = make(frames, index, params, size=(20, 24), **GREY)
    assert (got[0] == frames[0, 0, 0]).all() and (got[1] == frames[0, 63, 63]).all()
    assert_near(got, frames, index, params, (20, 24))


@pytest.mark.parametrize("width, step", [(24, 0.25), (96, 1.0)])
def test_crops_of_every_width(make, width, step):
    """Eight or 32 neighbours share a window of 16 to 128 pixels, unless they need more."""
    rows = [
        {"height": 4, "width": w, "left": 512 - w if i % 2 else 17.3, "flip": i % 3 == 0}
        for i, w in enumerate(np.arange(width, 5 * width, step))
    ]
    frames, index = frames_of(512, num=1) // 128 * 255, torch.zeros(len(rows), dtype=torch.int64)
    params = table(512, rows)
    got = make(frames, index, params, size=(4, width), **GREY)
    assert_near(got, frames, index, params, (4, width), worst=0.5)


@pytest.mark.parametrize("store", [15, 32, 100])
def test_black_beside_a_pixel_without_weight_is_black(make, store):
    """Rounding makes some of these sums negative, which as an unsigned number would be white."""
    frames = torch.zeros(-(-255 // store), store, store, dtype=torch.uint8)
    frames.view(-1, store)[:255, 5] = torch.arange(1, 256)
    rows = [  # in the third result, pixel 5 has a weight of 1e-5
        {"width": 4 * scale, "left": 5.5 - 1.5 * scale - 1e-5}
        for scale in np.linspace(2.5, 3.5, 61)
    ]
    params = table(store, rows).repeat(len(frames), 1)
    index = torch.arange(len(frames)).repeat_interleave(len(rows))
    got = make(frames, index, params, size=(store, 4), **GREY)
    assert_near(got, frames, index, params, (store, 4), worst=0.5)


def test_solarize_inverts_from_its_threshold_on(make):
    greys = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    thresholds = [0, 100.01 / 255, 1]
    params = table(16, [{"solarize": threshold} for threshold in thresholds])
    got = make(greys, torch.zeros(3, dtype=torch.int64), params, size=16, **GREY)
    for first, view in zip((0, 101, 255), got, strict=True):
        assert torch.equal(view, torch.where(greys >= first, 255 - greys, greys).float())


def test_gamma_and_speckle_are_nearly_exact(make):
    """Within 0.03 grey levels, and rounded, not cut off: no darker on average."""
    greys = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    rows = [{"gamma": gamma} for gamma in (0.2, 0.7, 1.3, 2.5, 5)] + [{"speckle": 0.3, "seed": 5}]
    index, params = torch.zeros(len(rows), dtype=torch.int64), table(16, rows)
    got = make(greys, index, params, size=16, **GREY)
    error = got - truth(greys, index, params, (16, 16))
    assert error.abs().max() <= 0.03 and error.mean((1, 2, 3)).abs().max() <= 0.002


def test_the_mean_of_a_very_wide_view(make):
    """Contrast leaves white as it is, but for a sum that overflowed."""
    white, index = torch.full((1, 8, 8), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    got = make(white, index, table(8, [{"contrast": 0.5}]), size=(1, 140_000), **GREY)
    assert (got == 255).all()


def test_bfloat16_is_the_rounded_float32(make):
    frames, index = frames_of(80), torch.tensor([0, 1])
    params = table(80, [draw(np.random.default_rng(1), 80) for _ in index])
    kwargs = {"size": (50, 61), "mean": 0.3, "std": 0.2}
    full = make(frames, index, params, **kwargs)
    half = make(frames, index, params, dtype=torch.bfloat16, **kwargs)
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())
    # 128.5, 129.5, ... lie half-way between two bfloat16 numbers: to the even one.
    kwargs = {"size": 80, "mean": -0.5 / 255, "std": 1 / 255}
    full = make(frames, index, identity(2, 80), **kwargs)
    assert (full == 200.5).any()
    assert torch.equal(
        make(frames, index, identity(2, 80), dtype=torch.bfloat16, **kwargs), full.bfloat16()
    )


@FULL
@given(store=st.integers(1, 300), seed=st.integers(0, 99), flip=st.booleans())
@pytest.mark.parametrize("which", COMPILED)
def test_identity_and_flip_are_exact(which, store, seed, flip):
    frame = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (1, store, store), np.uint8)
    )
    params = table(store, [{"flip": flip}])
    got = run(which, frame, torch.zeros(1, dtype=torch.int64), params, (store, store))
    assert torch.equal(got[0, 0], (frame[0].flip(-1) if flip else frame[0]).float())


@FULL
@given(data=st.data(), store=st.integers(32, 400), value=st.integers(0, 255))
@pytest.mark.parametrize("which", COMPILED)
def test_a_crop_of_a_flat_frame_is_flat(which, data, store, value):
    frame = torch.full((1, store, store), value, dtype=torch.uint8)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size = data.draw(st.tuples(st.integers(1, 150), st.integers(1, 150)))
    neutral = {name: neutral for name, neutral, *_ in PARAMS[5:] if name != "sigma"}
    params = table(store, [draw(rng, store, **neutral)])
    got = run(which, frame, torch.zeros(1, dtype=torch.int64), params, size)
    assert (got == value).all()


@FULL
@given(seed=st.integers(0, 2**32), size=st.tuples(st.integers(1, 120), st.integers(1, 120)))
@pytest.mark.parametrize("which", COMPILED)
def test_flip_twice_is_nothing_and_a_view_is_on_its_own(which, seed, size):
    rng = np.random.default_rng(seed)
    store = int(rng.integers(32, 200))
    frames, index = frames_of(store), torch.tensor([3, 1, 2])
    rows = [draw(rng, store, speckle=0, solarize=2) for _ in index]
    params, flipped = (
        table(store, [row | {"flip": int(row["flip"]) ^ other} for row in rows]) for other in (0, 1)
    )
    got = run(which, frames, index, params, size)
    torch.testing.assert_close(
        run(which, frames, index, flipped, size).flip(-1), got, atol=0.3, rtol=0
    )
    assert torch.equal(run(which, frames, index[1:2], params[1:2], size), got[1:2])
    assert_near(got, frames, index, params, size, mean=1.2)


@FULL
@given(seed=st.integers(0, 2**32), sigma=st.floats(0.1, 5))
@pytest.mark.parametrize("which", COMPILED)
def test_blur_keeps_the_mean(which, seed, sigma):
    # Black around, as wide as the kernel: nothing is mirrored into the view.
    frame = torch.zeros(1, 96, 96, dtype=torch.uint8)
    rng = np.random.default_rng(seed)
    frame[0, 16:-16, 16:-16] = torch.from_numpy(rng.integers(0, 256, (64, 64), np.uint8))
    params = table(96, [{}, {"sigma": sigma}])
    got = run(which, frame, torch.zeros(2, dtype=torch.int64), params, (96, 96))
    assert abs(got[1].mean() - got[0].mean()) < 0.02
    assert (got[1] - got[0]).abs().max() > 0 or sigma < 0.3


def run(which, frames, index, params, size):
    """views() in grey levels by one implementation, under hypothesis, which wants no fixture."""
    device = "cuda" if which == "gpu" and torch.cuda.is_available() else "cpu"
    tensors = [t.to(device) for t in (frames, index, params)]
    out = torch.full((len(index), 1, *size), torch.nan, device=device)
    MAPS["views"].run(which, *tensors, out, **GREY, threads=1)
    return out.cpu()


# ---------------------------------------------------------------- threads, memory, borders


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    frames, index = frames_of(128), torch.arange(24) % 4
    return frames, index, table(128, [draw(rng, 128) for _ in index])


def test_threads_and_earlier_calls_change_nothing(batch, monkeypatch):
    monkeypatch.setenv("SSLUS_KERNELS", "cpu")
    want = views(*batch, size=112, threads=1)
    for threads in (2, 3, 40):
        assert torch.equal(views(*batch, size=112, threads=threads), want)
        views(*batch, size=(threads, 230), threads=threads)  # leaves its numbers in the buffers
        assert torch.equal(views(*batch, size=112, threads=threads), want)

    results = {}

    def call(i):
        for _ in range(5):
            results[i] = views(*batch, size=112, threads=1 + i % 3)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 6 and all(torch.equal(r, want) for r in results.values())


def test_others_run_while_views_are_made(others_run):
    """A loader's threads, and whoever waits for its batch, go on."""
    frames, index = frames_of(256, num=1), torch.zeros(64, dtype=torch.int64)
    params = table(256, [{"sigma": 16}] * len(index))
    out = torch.empty(len(index), 1, 512, 512)
    make = partial(MAPS["views"].cpu, mean=0.0, std=1.0, threads=1)
    assert others_run(partial(make, frames, index, params, out), out.numpy()[:, 0, -1, -1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(batch, monkeypatch):
    monkeypatch.setenv("SSLUS_KERNELS", "cpu")
    out = torch.empty(24, 1, 112, 112)
    views(*batch, size=112, threads=3, out=out)
    child = os.fork()
    if child == 0:
        try:
            again = torch.empty(24, 1, 112, 112)
            MAPS["views"].cpu(*batch, again, mean=0.0, std=1.0, threads=3)
            tasks = Path("/proc/self/task")
            alone = tasks.exists() and len(list(tasks.iterdir())) < 3
            os._exit(0 if (again.numpy() == out.numpy()).all() and not alone else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_writes_where_it_is_told(batch):
    room = torch.full((26, 1, 50, 60), -7.0)
    assert views(*batch, size=(50, 60), out=room[1:25]).data_ptr() == room[1].data_ptr()
    assert (room[0] == -7).all() and (room[25] == -7).all() and (room[1:25] != -7).all()
    weight = torch.ones((), requires_grad=True)
    product = (weight * room[1:25]).sum()
    views(*batch, size=(50, 60), out=room[1:25])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()  # else with the new views, without a word
    empty = views(batch[0], batch[1][:0], batch[2][:0], size=224)
    assert empty.shape == (0, 1, 224, 224)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_large_batches_anywhere_in_memory(batch, dtype, monkeypatch):
    """Stores past the caches want aligned addresses, which a part of a tensor need not have."""
    monkeypatch.setenv("SSLUS_KERNELS", "cpu")
    (frames, *rows), shape = batch, (24, 1, 320, 320)
    few = zip(*(x.split(4) for x in rows), strict=True)
    want = torch.cat([views(frames, *x, size=320, dtype=dtype) for x in few])
    for first in (0, 1, 8, 16):
        out = torch.empty(want.numel() + first, dtype=dtype)[first:].view(shape)
        assert torch.equal(views(*batch, size=320, dtype=dtype, out=out), want)


def column(name, value):
    def change(frames, index, params):
        params[2, COLUMNS.index(name)] = value
        return frames, index, params

    return change


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda f, i, p: (f.float(), i, p), {}, r"want frames .* torch.uint8.*got .*float32"),
        (lambda f, i, p: (f[:, :, :100], i, p), {}, r"want frames .*got \(4, 128, 100\)"),
        (lambda f, i, p: (f.mT, i, p), {}, "want frames .*not contiguous"),
        (lambda f, i, p: (f, i.int(), p), {}, "want index .*int64, got .*int32"),
        (lambda f, i, p: (f, i, p.double()), {}, "want params .*float32, got .*float64"),
        (lambda f, i, p: (f, i, p[:, :9]), {}, r"want params \(24, 14\).*got \(24, 9\)"),
        (lambda f, i, p: (f, i, p[:5]), {}, r"want params \(24, 14\).*got \(5, 14\)"),
        (lambda f, i, p: (f, i - 1, p), {}, r"want frame indices in 0\.\.3, got -1 at view 0"),
        (lambda f, i, p: (f, i + 1, p), {}, r"want frame indices in 0\.\.3, got 4 at view 3"),
        (column("gamma", torch.nan), {}, "want gamma .*got nan at view 2"),
        (column("top", torch.nan), {}, "want top .*got nan"),
        (column("sigma", 17), {}, r"want sigma .* in 0\.\.16, got 17"),
        (column("brightness", -0.1), {}, "want brightness"),
        (column("flip", 0.5), {}, "want flip"),
        (column("seed", 0.5), {}, "want seed"),
        (column("height", 0.5), {}, "want height"),
        (column("top", 127), {}, "want boxes inside the 128 x 128 frame, got rows 127 to"),
        (column("left", torch.inf), {}, "want"),
        (None, {"size": (0, 5)}, "want a size of at least 1 x 1, got 0 x 5"),
        (None, {"size": -3}, "want a size of at least 1 x 1, got -3 x -3"),
        (None, {"std": 0.0}, "want a finite mean and std >= 1e-06, got 0.0, 0.0"),
        (None, {"std": 1e-40}, "want .* std >= 1e-06"),
        (None, {"std": float("nan")}, "want .* std >= 1e-06"),
        (None, {"mean": float("inf")}, "want a finite mean"),
        (None, {"dtype": torch.float16}, "want dtype .*got torch.float16"),
        (None, {"out": torch.empty(24, 1, 112, 224)[..., ::2]}, "want out .*not contiguous"),
        (None, {"out": torch.empty(24, 1, 112, 112).double()}, "want out .*float64"),
        (
            None,
            {"out": torch.empty(24, 1, 112, 112, device="meta")},
            "want frames, index, params and out on one device",
        ),
        (None, {"out": torch.empty(23, 1, 112, 112)}, r"want out \(24, .*got \(23,"),
    ],
)
def test_refusals(batch, change, options, message):
    inputs = change(*batch) if change else batch
    with pytest.raises(ValueError, match="views: " + message) as error:
        views(*inputs, **({"size": 112} | options))
    assert "\n" not in str(error.value)


def test_the_compiled_border_is_safe_by_itself(batch):
    """Behind the checks in Python: memory is not touched for a wrong index or box."""
    frames, index, params = batch
    out = torch.empty(24, 1, 8, 8)
    border = MAPS["views"].cpu
    for name, value in (("top", 120), ("height", -3), ("left", torch.nan), ("sigma", 1e9)):
        wrong = params.clone()
        wrong[2, COLUMNS.index(name)] = value
        with pytest.raises(ValueError, match="view 2"):
            border(frames, index, wrong, out, mean=0.0, std=1.0, threads=1)
    with pytest.raises(ValueError, match="view 0"):
        border(frames, index + 4, params, out, mean=0.0, std=1.0, threads=1)
    fits = [frames, index, params, out]
    for i, wrong, message in [
        (0, frames[:, :100].contiguous(), "square"), (2, params[:23], "params must"),
        (2, params[:, :13].contiguous(), "params must"), (3, out.double(), "float32 or bfloat16"),
        (3, out[:23], "out must be"), (3, torch.empty(24, 2, 8, 8), "out must be"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            _cpu.views(*fits[:i], wrong, *fits[i + 1 :], 0.0, 1.0, 1)
    for height, width in ((0, 8), (8, 0)):  # there is nothing to do
        _cpu.views(*fits[:3], torch.empty(24, 1, height, width), 0.0, 1.0, 1)
    with pytest.raises(TypeError):  # noconvert: a converted copy of out would lose the result
        border(frames, index, params, out.mT, mean=0.0, std=1.0, threads=1)
