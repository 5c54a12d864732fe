"""Masks: the same pixels from every implementation, in the sector alone, and the loss over them.

test_kernels.py holds the loss against an oracle that draws the mask a pixel at a time, and its
gradients against float64; here is what a mask looks like.
"""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sslus.kernels import _cpu
from sslus.kernels.mask import Mask, draw_mask, mask_fill, masked_mse, sample_ids
from sslus.kernels.mask.reference import plan
from sslus.kernels.op import MAPS, OPS

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() and not INTERPRET,
    reason="no CUDA device and TRITON_INTERPRET is not 1",
)
KERNELS = ["cpu", pytest.param("gpu", marks=needs_gpu)]
PATCHES, RECTANGLES = Mask("patches"), Mask("rectangles")


def device_of(which):
    return "cuda" if which == "gpu" and torch.cuda.is_available() else "cpu"


def choose(which, monkeypatch):
    """Runs the implementation `which`; on a GPU in small tiles, so that an image takes several."""
    monkeypatch.setenv("SSLUS_KERNELS", which)
    if which == "gpu":
        from sslus.kernels.mask import gpu

        monkeypatch.setattr(gpu, "TILE", 256)
        monkeypatch.setattr(gpu, "COUNT_TILE", 256)


def ids_of(num, seed=0):
    """Any 64 bits may be an id."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (num,), generator=g)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hidden_cells(hidden, patch):
    """(B, H, W) -> (B, rows, columns): the share of each cell that is hidden; H, W divisible."""
    b, h, w = hidden.shape
    return hidden.view(b, h // patch, patch, w // patch, patch).float().mean((2, 4))


SHAPES = [(1, 1), (33, 17), (96, 65)]
SAME = [("cpu", shape) for shape in [*SHAPES, (7, 130), (64, 64)]]
SAME += [pytest.param("gpu", shape, marks=needs_gpu) for shape in SHAPES[1:2]]  # it is slow


@pytest.mark.parametrize("which, shape", SAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_implementation_hides_the_same_pixels(which, shape, dtype, monkeypatch):
    choose(which, monkeypatch)
    device, ids = device_of(which), ids_of(2)
    x, target = noise(2, 1, *shape), noise(2, 1, *shape, seed=1)
    for mask in (
        PATCHES,
        Mask("patches", patch=5, ratio=0.3, background=0.3, share=0.5),
        Mask("patches", patch=4, ratio=1e-3, background=1.5, share=0),
        RECTANGLES,
        Mask("rectangles", patch=9, num=32, min_side=0.01, max_side=1, background=0.2, share=0.5),
        Mask("rectangles", patch=8, num=9, background=2.5, share=0.01),  # few cells
        Mask("rectangles", patch=8, background=99),  # no sector
    ):
        hidden = draw_mask(target, ids, mask).unsqueeze(1)
        tensors = [t.to(device) for t in (x.to(dtype), ids, target)]
        got = mask_fill(*tensors[:2], mask, fill=-77, target=tensors[2])
        want = torch.where(hidden, -77, x.to(dtype))
        assert torch.equal(got.cpu(), want), mask
        assert torch.equal(tensors[0].cpu(), x.to(dtype))  # a copy was filled
    # A grey value of exactly the threshold is background, in float32 as in the definition.
    grey = 0.1 if dtype == torch.float32 else 0.125  # in bfloat16 0.1 is more
    image = torch.full((1, 1, *shape), grey, dtype=dtype)
    image[..., shape[1] // 2 :] = 1
    mask = Mask("patches", patch=4, background=grey, share=0)
    hidden = draw_mask(image.float(), ids[:1], mask)
    assert not hidden[..., : shape[1] // 2 - 3].any()
    got = mask_fill(image.to(device), ids[:1].to(device), mask, fill=-77)
    assert torch.equal(got.cpu()[:, 0] == -77, hidden)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("strided", ["x", "target", "ids"])
def test_strided_tensors_are_copied_first(strided, which, monkeypatch):
    choose(which, monkeypatch)
    mask, ids = Mask(patch=5, background=0.3), ids_of(2)
    x, target = noise(2, 1, 17, 23), noise(2, 1, 17, 23, seed=1)
    want = torch.where(draw_mask(target, ids, mask).unsqueeze(1), -7, x)
    given = {"x": x, "target": target, "ids": ids}
    t = given[strided]
    given[strided] = t.repeat_interleave(2)[::2] if t.ndim == 1 else t.mT.contiguous().mT
    given = {name: t.to(device_of(which)) for name, t in given.items()}
    assert not given[strided].is_contiguous()
    filled = mask_fill(given["x"], given["ids"], mask, fill=-7, target=given["target"])
    assert filled.is_contiguous() and torch.equal(filled.cpu(), want)


def test_patches_hide_the_exact_share():
    ids = ids_of(50)
    hidden = hidden_cells(draw_mask(torch.zeros(50, 1, 224, 224), ids, PATCHES), 16)
    assert ((hidden == 0) | (hidden == 1)).all()
    assert (hidden.sum((1, 2)) == 147).all()  # 0.75 x 14 x 14
    for ratio, want in [(0.6, 118), (1, 196), (1e-4, 1)]:
        mask = Mask("patches", ratio=ratio)
        hidden = hidden_cells(draw_mask(torch.zeros(3, 1, 224, 224), ids[:3], mask), 16)
        assert (hidden.sum((1, 2)) == want).all()


def test_patches_are_even():
    """Each cell as often as any other, and two neighbours as often together as by chance."""
    num = 4000
    hidden = hidden_cells(
        draw_mask(torch.zeros(num, 1, 32, 32), torch.arange(num), Mask(patch=4)), 4
    )
    deviation = (hidden.mean(0) - 0.75) / (0.75 * 0.25 / num) ** 0.5
    assert deviation.abs().max() < 4 and 0.7 < deviation.std() < 1.3
    together = (hidden[:, :, 1:] * hidden[:, :, :-1]).mean()
    assert abs(together - 0.75 * 47 / 63) < 0.003


def test_rectangles_are_inside_and_of_the_sizes_asked_for():
    mask = Mask("rectangles", num=1, min_side=0.1, max_side=0.4)
    hidden = draw_mask(torch.zeros(600, 1, 100, 60), ids_of(600), mask)
    rows, columns = hidden.any(2).int(), hidden.any(1).int()
    heights, widths = rows.sum(1), columns.sum(1)
    assert (hidden.sum((1, 2)) == heights * widths).all()  # a full rectangle
    for x in (rows, columns):  # in one piece: it begins once
        assert (x.diff(prepend=torch.zeros(600, 1), dim=1).clamp(min=0).sum(1) == 1).all()
    assert set(heights.tolist()) == set(range(10, 41))  # whole and not cut at the border
    assert set(widths.tolist()) == set(range(6, 25))
    everywhere = hidden.float().mean(0)
    assert everywhere.min() > 0 and everywhere[30:70, 20:40].std() < 0.03
    several = draw_mask(torch.zeros(50, 1, 100, 60), ids_of(50), Mask("rectangles", num=5))
    assert (several.sum((1, 2)) > hidden[:50].sum((1, 2))).all()  # the first of them is the same


def fan(size=128):
    """A sector with the probe at the top and a black chamber, on black: (1, 1, S, S), grey 0..1;
    and where it is, the chamber with it."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    x -= (size - 1) / 2
    y += 0.1 * size
    r, angle = np.hypot(x, y), np.arctan2(x, y)
    inside = (r > 0.3 * size) & (r < 1.05 * size) & (np.abs(angle) < 0.6)
    chamber = np.hypot(x - 0.05 * size, y - 0.75 * size) < 0.15 * size
    speckle = np.random.default_rng(0).rayleigh(0.3, (size, size)).clip(0.1, 1)
    image = torch.from_numpy((inside & ~chamber) * speckle).float()
    return (
        image.view(1, 1, size, size),
        torch.from_numpy(inside),
        torch.from_numpy(inside & chamber),
    )


@pytest.mark.parametrize("kind", ["patches", "rectangles"])
def test_only_the_sector_is_hidden(kind):
    image, inside, chamber = fan()
    image = (image - 0.2) / 0.3  # black is no longer 0
    ids = ids_of(200)
    mask = Mask(kind, patch=8, background=(8.5 / 255 - 0.2) / 0.3, share=0.25)
    hidden = draw_mask(image.expand(200, -1, -1, -1), ids, mask)
    share = hidden_cells(inside.view(1, 128, 128), 8)[0]
    covered = hidden_cells(hidden, 8)
    assert (covered[:, share < 0.25] == 0).all()  # never one of the background
    full = share == 1
    assert full.sum() > 60 and (covered[:, full].mean(0) > 0).all()  # every one of the sector
    assert hidden[:, chamber].any(0).all()  # black, but inside
    if kind == "patches":
        assert (covered.sum((1, 2)) == torch.round(0.75 * (share >= 0.25).sum())).all()
    # Where nothing is lit, the whole image is the sector.
    black = torch.full_like(image, -0.2 / 0.3)
    assert torch.equal(
        draw_mask(black, ids[:1], mask),
        draw_mask(black, ids[:1], Mask(kind, patch=8)),
    )


def test_the_sector_of_a_phantom_frame():
    from sslus.engine.phantom.clips import Clip, Settings
    from sslus.engine.phantom.film import Film

    film = Film(Settings(seed=0, size=224), Clip(0, "x.mp4", "4CH", "p02"))
    frame = torch.from_numpy(np.array(next(iter(film)))).float()
    height, width = (n // 8 * 8 for n in frame.shape)
    frame = frame[None, None, :height, :width] / 255
    inside = torch.from_numpy(film.sector.inside)[:height, :width]
    ids = ids_of(100)
    for kind in ("patches", "rectangles"):
        mask = Mask(kind, patch=8, background=8.5 / 255)
        hidden = draw_mask(frame.expand(100, -1, -1, -1), ids, mask)
        blind = draw_mask(frame.expand(100, -1, -1, -1), ids, Mask(kind, patch=8))
        outside = [(h & ~inside).sum() / h.sum() for h in (hidden, blind)]
        # What is left is the part of the border's cells that is outside, and the overlay.
        assert outside[0] < 0.04 < 0.3 < outside[1]
        # All but the border's other cells and the fluid that reaches it: blood and shadows too.
        assert hidden[:, inside].any(0).float().mean() > 0.85


def test_the_seed_is_spread_as_by_splitmix64():
    """Its first two numbers for the seed 0, as Java's SplittableRandom gives them."""
    for seed, want in ((0, 0xE220A8397B1DCDAF), (0x9E3779B97F4A7C15, 0x6E789E6AA1B965F4)):
        assert sample_ids(torch.zeros(1), seed=seed, epoch=0).item() % 2**64 == want


def test_ids_differ_for_each_sample_and_epoch():
    samples, epochs = torch.tensor([7, 8, 7], dtype=torch.int32), torch.tensor([3, 3, 4])
    one, next_sample, next_epoch = sample_ids(samples, seed=0, epoch=epochs).tolist()
    assert one ^ next_sample == 7 ^ 8 and one ^ next_epoch == (3 ^ 4) << 40
    assert sample_ids(samples[:1], seed=0, epoch=3).item() == one
    assert sample_ids(samples[:1], seed=5, epoch=3).item() not in (one, next_sample, next_epoch)


@pytest.mark.parametrize("mask", [PATCHES, Mask("rectangles", background=0.1)], ids=["mae", "rect"])
def test_a_mask_is_of_the_sample_and_the_epoch_alone(mask):
    cells = noise(8, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    x, samples = cells + 0.01 * noise(8, 1, 64, 64), torch.arange(8)
    first = sample_ids(samples, seed=0, epoch=0)
    hidden = mask_fill(x, first, mask, fill=99)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    assert torch.equal(mask_fill(x[order], first[order], mask, fill=99), hidden[order])
    assert torch.equal(mask_fill(x[3:4], first[3:4], mask, fill=99), hidden[3:4])
    assert torch.equal(first, sample_ids(samples, seed=0, epoch=0))
    seen = [first, sample_ids(samples, seed=0, epoch=1), sample_ids(samples, seed=1, epoch=0)]
    same = x[:1].expand(24, -1, -1, -1)
    masks = draw_mask(same, torch.cat(seen), mask)
    assert len(torch.unique(masks.flatten(1), dim=0)) == 24


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@pytest.mark.parametrize("mask", [Mask(patch=8), Mask("rectangles", patch=8, background=0.1)])
def test_the_loss_is_where_it_belongs(mask, which, monkeypatch):
    choose(which, monkeypatch)
    device, ids = device_of(which), ids_of(3)
    prediction, target = noise(3, 1, 40, 33), noise(3, 1, 40, 33, seed=1)
    hidden = draw_mask(target, ids, mask).unsqueeze(1)
    error = prediction.double() - target.double()
    for hole, rest in [(1, 0), (1, 1), (3, 0.5)]:
        weight = torch.where(hidden, hole, rest).double()
        leaf = prediction.clone().to(device).requires_grad_()
        still = target.clone().to(device).requires_grad_()
        loss = masked_mse(leaf, still, ids.to(device), mask, hole=hole, rest=rest)
        loss.backward()
        want = (weight * error**2).sum() / weight.sum()
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)
        if hole == rest:
            assert want == pytest.approx(error.square().mean())
        gradient = leaf.grad.cpu()
        torch.testing.assert_close(
            gradient.double(), 2 * weight * error / weight.sum(), rtol=1e-6, atol=1e-12
        )
        assert still.grad is None
        if not rest:
            assert (gradient[~hidden] == 0).all() and (gradient[hidden] != 0).all()


@pytest.mark.parametrize("which", KERNELS)
def test_a_cell_of_many_pixels(which, monkeypatch):
    """Pixels times 2^16 would not fit into 32 bits: of the two cells, the one on the left alone
    is bright enough."""
    monkeypatch.setenv("SSLUS_KERNELS", which)
    x = torch.zeros(1, 1, 200, 400)
    x[..., :190, :190] = 1
    x[..., :100, 200:] = 1
    mask = Mask(patch=200, ratio=1, background=0.5, share=0.9)
    ids, device = ids_of(1), device_of(which)
    filled = mask_fill(x.to(device), ids.to(device), mask, fill=-7).cpu()
    assert (filled[..., :200] == -7).all() and torch.equal(filled[..., 200:], x[..., 200:])


@pytest.mark.parametrize("which", KERNELS)
def test_mixed_types_and_threads(which, monkeypatch):
    """Under autocast the prediction is bfloat16 and the target is not."""
    monkeypatch.setenv("SSLUS_KERNELS", which)
    device, ids = device_of(which), ids_of(4).to(device_of(which))
    target = noise(4, 1, 40, 33, seed=1).to(device)
    half = noise(4, 1, 40, 33).to(device).bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    losses = [masked_mse(p, target, ids, PATCHES) for p in (half, full)]
    for loss in losses:
        loss.backward()
    # A thread of a GPU adds up as many neighbours as it loads at once: more of those in bfloat16.
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert half.grad.dtype == torch.bfloat16
    # Half a step; the interpreter of Triton cuts off what hardware rounds.
    torch.testing.assert_close(
        half.grad.float(), full.grad, rtol=2 ** -(7 + (which == "cpu")), atol=0
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = full.detach().requires_grad_()
        loss = masked_mse(again, target, ids, PATCHES)
        loss.backward()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(loss, losses[1]) and torch.equal(again.grad, full.grad)


def test_no_thread_overwrites_what_another_has_counted():
    """Thousands of samples that are drawn in no time: all threads are at the sum at once."""
    x, ids, p = torch.zeros(4000, 1, 8, 8), ids_of(4000), plan(8, 8, **vars(Mask(patch=4)))
    table = torch.empty(4000, p.cells, dtype=torch.int32)
    hidden = {_cpu.mask_table(x, ids, table, p.numbers, -torch.inf, 4) for _ in range(500)}
    assert hidden == {4000 * 3 * 16}


def test_no_nan_is_rounded_to_a_number():
    """As a number, one whose bits are all ones would become -0, and the divergence not show."""
    target = torch.full((1, 1, 8, 20), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    prediction = torch.zeros(1, 1, 8, 20, dtype=torch.bfloat16, requires_grad=True)
    OPS["masked_mse"].run(
        "cpu", prediction, target, ids_of(1), **vars(Mask(patch=4)), hole=1.0, rest=1.0
    ).backward()
    assert prediction.grad.isnan().all()


def test_others_run_while_masks_are_made(others_run):
    x, ids, losses = torch.ones(64, 1, 512, 512), ids_of(64), torch.empty(64, dtype=torch.float64)
    p, out = plan(512, 512, **vars(Mask("rectangles", background=0.5))), torch.empty_like(x)
    table = torch.empty(64, 4 * p.num + p.cells, dtype=torch.int32)
    for work, places in [
        (lambda: _cpu.mask_table(x, ids, table, p.numbers, 0.5, 1), table[:, -1]),
        (lambda: _cpu.mask_fill(x, x, ids, out, p.numbers, 0.5, 0.0, 1), out[:, 0, -1, -1]),
        (lambda: _cpu.masked_mse(x, x, table, out, losses, p.numbers, 1.0, 0.0, 1), losses),
    ]:
        assert others_run(work, places.numpy())


MEMORY = """
import re, torch
from sslus.kernels.mask import Mask, mask_fill, masked_mse

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

x, p = torch.ones(64, 1, 512, 512), torch.ones(64, 1, 512, 512, requires_grad=True)
x[:, :, :100] = 0
ids = torch.arange(64)
for kind in ("patches", "rectangles"):
    mask = Mask(kind, background=0.5)
    for work in (lambda: mask_fill(x, ids, mask), lambda: masked_mse(p, x, ids, mask).backward()):
        mask_fill(x[:2], ids[:2], mask), masked_mse(p[:2], x[:2], ids[:2], mask).backward()
        p.grad = None
        open("/proc/self/clear_refs", "w").write("5")  # forget the peak
        before = kilobytes("VmRSS")
        work()
        print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_no_tensor_of_the_mask():
    """A byte a pixel would be 16 MB more than the 64 MB of what is asked for."""
    # On ARM, PyTorch allocates by mimalloc, which would keep what earlier work has freed.
    at_once = os.environ | {"MIMALLOC_PURGE_DELAY": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, env=at_once
    )
    assert done.returncode == 0, done.stderr
    for kilobytes in map(int, done.stdout.split()):
        assert 60 << 10 < kilobytes < 68 << 10


def test_a_patch_larger_than_the_image_is_the_image(largest):
    """Padded to whole cells, two small images would take gigabytes."""
    target, ids = noise(2, 1, 24, 40), ids_of(2)
    for kind in ("patches", "rectangles"):
        whole, larger = (Mask(kind, patch, 0.5, background=0.3) for patch in (40, 1 << 12))
        with largest:
            hidden = draw_mask(target, ids, larger)
        assert largest.numel <= 2 * 40 * 40 * 32  # pixels of a cell, for each rectangle
        assert torch.equal(hidden, draw_mask(target, ids, whole))
        assert kind == "rectangles" or hidden.all()  # of an oblong one, too


def test_compiled_without_a_break():
    x, ids = noise(3, 1, 32, 48), ids_of(3)
    layer = torch.nn.Conv2d(1, 1, 3, padding=1)
    for mask in (PATCHES, Mask("rectangles", background=0.2)):

        def step(x, ids, mask=mask):
            return masked_mse(layer(mask_fill(x, ids, mask)), x, ids, mask)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for batch in (ids, ids + 1):
            grads = []
            for run in (step, compiled):
                layer.zero_grad()
                run(x, batch).backward()
                grads.append(layer.weight.grad)
            assert torch.equal(*grads)


def test_what_cannot_be_masked_is_refused():
    x, ids = torch.zeros(2, 1, 64, 64), torch.arange(2)
    for change, why in [
        ({"kind": "rectangle"}, "patches or rectangles"),
        ({"ratio": 0}, "ratio above 0"),
        ({"patch": 0}, "patch of 1"),
        ({"patch": 32769}, "patch of 1 to 32768 px"),
        ({"num": 33}, "1 to 32 rectangles"),
        ({"min_side": 0.5}, "min_side <= max_side"),
        ({"share": 2}, "share in 0..1"),
        ({"background": float("nan")}, "background"),
    ]:
        with pytest.raises(ValueError, match=why):
            Mask(**change)
    for change, why in [
        ({"patch": "2"}, "want a whole number as patch, got '2'"),
        ({"num": 1.5}, "want a whole number as num, got 1.5"),
        ({"ratio": None}, "want a number as ratio, got None"),
    ]:
        with pytest.raises(TypeError, match=f"^mask: {why}$"):
            Mask(**change)
    with pytest.raises(TypeError, match="^mask: want a number as fill, got '0'$"):
        mask_fill(x, ids, PATCHES, fill="0")
    for tensors, mask, why in [
        ((x, ids), Mask(patch=1), "64 x 64 of 1 px in 64 x 64: take a larger patch"),
        ((x[:, 0], ids), PATCHES, r"want two tensors \(B, 1, H, W\)"),
        ((x, ids[:1]), PATCHES, "want 2 ids"),
        ((x[:0], ids[:0]), PATCHES, "the batch is empty"),
        ((x, ids.int()), PATCHES, "ids of torch.int64"),
        ((x, ids.to("meta")), PATCHES, "on one device, got cpu, cpu, meta"),
        ((x.half(), ids), PATCHES, "want images of torch.float32, torch.bfloat16"),
        ((x.clone().requires_grad_(), ids), PATCHES, r"no gradient; detach\(\) the images"),
    ]:
        with pytest.raises(ValueError, match=why):
            mask_fill(*tensors, mask)
    for arguments, why in [
        ((x, x[:, :, 1:], ids), "want two tensors"),
        ((x, x.double(), ids), "want images of torch.float64"),
    ]:
        with pytest.raises(ValueError, match=why):
            masked_mse(*arguments, PATCHES)
    for hole, rest in [(0, 1), (1, -1), (np.inf, 0), (1, np.inf), (np.nan, 0), (1, np.nan)]:
        with pytest.raises(ValueError, match="hole > 0 and rest >= 0"):
            masked_mse(x, x, ids, PATCHES, hole=hole, rest=rest)
    for wrong in ((x.numpy(), ids, PATCHES), (x, [0, 1], PATCHES), (x, None, PATCHES)):
        for masking in (mask_fill, draw_mask, lambda x, *rest: masked_mse(x, x, *rest)):
            with pytest.raises(TypeError, match="mask: want tensors of images, targets and ids"):
                masking(*wrong)
    with pytest.raises(TypeError, match="mask: want a Mask, got str"):
        mask_fill(x, ids, "patches")
    with pytest.raises(ValueError, match=r"want two tensors \(B, 1, H, W\)"):
        draw_mask(x[:, 0], ids, PATCHES)
    assert torch.equal(*(sample_ids(x, seed=1, epoch=2) for x in (ids, ids.numpy())))
    assert "mask_fill" in MAPS and "masked_mse" in OPS


def test_the_border_refuses_what_does_not_fit():
    """The compiled functions trust nobody: wrong numbers are an error, not a wild write."""
    p = plan(32, 32, **vars(RECTANGLES))
    x, ids, out = torch.zeros(2, 1, 32, 32), torch.arange(2), torch.zeros(2, 1, 32, 32)
    table = torch.zeros(2, 4 * p.num + p.cells, dtype=torch.int32)
    losses = torch.zeros(2, dtype=torch.float64)
    calls = [
        (_cpu.mask_fill, [x, x, ids, out, p.numbers, 0.0, 0.0, 1]),
        (_cpu.mask_table, [x, ids, table, p.numbers, 0.0, 1]),
        (_cpu.masked_mse, [x, x, table, out, losses, p.numbers, 1.0, 0.0, 1]),
    ]
    for function, fits in calls:
        function(*fits)
        for i, right in enumerate(fits):
            if not isinstance(right, torch.Tensor):
                continue
            gaps = torch.zeros(*right.shape, 2, dtype=right.dtype)[..., 0]
            wrong = [right[:1], gaps, right.float() if right.dtype != torch.float32 else x.double()]
            if right.ndim == 4:
                sizes = (2, 1, 31, 32), (2, 1, 32, 31), (2, 2, 32, 32)
                wrong += [torch.zeros(size) for size in sizes]
            wrong += [out.bfloat16()] if right is out else []
            wrong += [table[:, 1:].contiguous()] if right is table else []
            for other in wrong:
                with pytest.raises((ValueError, TypeError)):  # TypeError: else written to a copy
                    function(*fits[:i], other, *fits[i + 1 :])
    many = torch.zeros(2, 1, 33, 32)
    for images, change, why in [
        (x, {"height": 0}, "cells"), (x, {"width": 0}, "cells"), (x, {"patch": 0}, "cells"),
        (x, {"rows": 3}, "cells"), (x, {"columns": 1}, "cells"),
        (many, {"height": 33, "patch": 1, "rows": 33, "columns": 32}, "cells"),
        (x, {"num": -1}, "num or ratio"), (x, {"num": 33}, "num or ratio"),
        (x, {"ratio": -1}, "num or ratio"), (x, {"ratio": 65537}, "num or ratio"),
        *((x, {f"{end}_{side}": n}, "rectangles") for side in ("height", "width")
          for end, n in (("low", 0), ("low", 32), ("high", 33))),
    ]:  # fmt: skip
        numbers = dataclasses.replace(p, **change).numbers
        with pytest.raises(ValueError, match=f"^mask: .*{why}"):
            _cpu.mask_fill(images, images, ids, torch.empty_like(images), numbers, 0.0, 0.0, 1)
