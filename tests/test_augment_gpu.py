"""The Triton views: against the float64 reference, and what they compile to on machines not here.

The kernel runs on a GPU or in Triton's interpreter, slowly; it compiles without a GPU, but not
where the interpreter is on, so in a process of its own (this file run as a script).
"""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton

from sslus.kernels import aot, augment
from sslus.kernels.augment import gpu
from sslus.kernels.augment.reference import COLUMNS, identity, noise, views

runs = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no CUDA device and TRITON_INTERPRET is not 1",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# log2(0) is on purpose, and the interpreter has numpy say so.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def frames_of(store, num=3):
    """White noise; a black frame with a bright noisy block; a ramp."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (num, store, store))
    frames[1, : store // 2] = 0
    frames[2] = np.arange(store)[:, None] * 255 // store
    return torch.from_numpy(frames.astype(np.uint8))


def table(store, rows):
    params = identity(len(rows), store)
    for v, row in enumerate(rows):
        for name, value in row.items():
            params[v, COLUMNS.index(name)] = value
    return params


def make(frames, index, params, size, *, mean=0.0, std=1 / 255, dtype=torch.float32):
    """Views in grey levels, unless told otherwise."""
    out = torch.empty((len(index), 1, *size), dtype=dtype, device=DEVICE)
    gpu.augment_gpu(*(t.to(DEVICE) for t in (frames, index, params)), out, mean=mean, std=std)
    return out.cpu()


BOX = {"top": 3.3, "left": 6.7, "height": 20.2, "width": 18.4}
ROWS = [
    {},
    {"flip": 1},
    BOX,
    BOX | {"flip": 1},
    {"height": 1, "width": 1, "top": 30, "left": 31},
    {"brightness": 1.8, "contrast": 1.6},  # the mean lies behind the clamp
    {"contrast": 0.2},
    {"gamma": 0.6},
    {"gamma": 3},
    {"top": 4 - 5e-4, "height": 20 + 1e-3, "left": 3 - 5e-4, "width": 9 + 1e-3},  # rounded sums
    {"sigma": 0.4},
    {"sigma": 1e-38},  # of whose reciprocal the square is not finite
    {"sigma": 2, "gamma": 0.8, "contrast": 1.5},
    {"sigma": 16},
    {"gain_near": 0.4, "gain_far": 1.9},
    {"speckle": 0.4, "seed": 2**24 - 1},
    {"sigma": 1, "solarize": 0.5, "brightness": 1.2},
]


@runs
@pytest.mark.parametrize(
    "store, size",
    # At 136 the last steps have tiles of another form; at 3 x 2 weights are summed in turns.
    [(32, (32, 32)), (96, (80, 70)), (50, (130, 17)), (32, (24, 136)), (200, (3, 2))],
)
def test_each_step_is_the_reference(store, size, monkeypatch):
    # What is left in memory by others, and by the view before, must not show.
    monkeypatch.setattr(torch, "empty", lambda shape, **kw: torch.full(shape, torch.nan, **kw))
    frames, params = frames_of(store), table(store, ROWS)
    index = torch.arange(len(ROWS)) % 3
    got = make(frames, index, params, size).double()
    want = views(frames, index, params.double(), size=size, std=1 / 255, dtype=torch.float64)
    sure = torch.ones_like(want, dtype=torch.bool)
    plain = table(store, [ROWS[-1] | {"solarize": 2}]).double()
    before = views(frames, index[-1:], plain, size=size, std=1 / 255, dtype=torch.float64)
    sure[-1:] = (before - 127.5).abs() > 0.3  # further from where solarize jumps
    error = torch.where(sure, got - want, 0).abs()
    for row, worst, mean in zip(ROWS, error.amax((1, 2, 3)), error.mean((1, 2, 3)), strict=True):
        assert worst < 0.3 and mean < 0.05, f"{row}: off by {worst:.3f}, {mean:.4f} on average"
    if store == size[0]:
        assert torch.equal(got[0, 0], frames[0].double())
        assert torch.equal(got[1, 0], frames[1].flip(-1).double())


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="plays a GPU in Triton's interpreter"
)
def test_what_is_not_resized_is_exact_with_the_division_of_a_gpu(monkeypatch):
    """There `/` is a product with the reciprocal, and 41 x (1 / 41) is not 1."""
    from triton.runtime import interpreter

    def divide(builder, a, b):
        return interpreter.TensorHandle(a.data * (1 / b.data), a.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", divide)
    frame = frames_of(41)[1:2]
    got = make(frame, torch.tensor([0]), identity(1, 41), (41, 41))
    assert torch.equal(got[0, 0], frame[0].float())


@runs
def test_noise_has_the_reference_bits():
    """At 4.2 grey levels a step of the noise, no other sum of bytes would pass."""
    frame = torch.full((1, 32, 32), 128, dtype=torch.uint8)
    seeds = [0, 1, 2**24 - 1]
    params = table(32, [{"speckle": 0.25, "seed": seed} for seed in seeds])
    got = make(frame, torch.zeros(3, dtype=torch.int64), params, (31, 53))
    found = (got.double() / 128 - 1) / 0.25
    want = noise(torch.tensor(seeds, dtype=torch.float64), (31, 53))
    assert (found - want).abs().max() < 1e-3 / 21845**0.5


@runs
def test_noise_and_values_of_a_view_of_several_tiles_in_a_row():
    frames, size = frames_of(32), (5, 300)  # a tile has 256 columns at most
    params = table(32, [{"speckle": 0.25, "seed": 3}, {"sigma": 2, "speckle": 0.25, "seed": 4}])
    got = make(frames, torch.tensor([0, 2]), params, size).double()
    index = torch.tensor([0, 2])
    want = views(frames, index, params.double(), size=size, std=1 / 255, dtype=torch.float64)
    assert (got - want).abs().max() < 0.5


@runs
def test_strided_tables_are_copied_first(monkeypatch):
    monkeypatch.setenv("SSLUS_KERNELS", "gpu")
    frames, params = frames_of(32), table(32, [BOX, {"flip": 1}])
    want = make(frames, torch.tensor([1, 2]), params, (9, 7), std=0.5)
    index = torch.tensor([1, 0, 2, 0])[::2].to(DEVICE)
    wide = params.to(DEVICE).repeat(1, 2)[:, : len(COLUMNS)]
    assert not index.is_contiguous() and not wide.is_contiguous()
    assert torch.equal(
        augment.views(frames.to(DEVICE), index, wide, size=(9, 7), std=0.5).cpu(), want
    )


@runs
def test_bfloat16_and_normalisation():
    frames, index, params = frames_of(40), torch.arange(3), table(40, [BOX, {}, {"sigma": 1.5}])
    full = make(frames, index, params, (33, 48), mean=0.3, std=0.2)
    grey = make(frames, index, params, (33, 48))
    torch.testing.assert_close(full, (grey / 255 - 0.3) / 0.2, atol=1e-5, rtol=0)
    half = make(frames, index, params, (33, 48), mean=0.3, std=0.2, dtype=torch.bfloat16)
    # Triton's interpreter cuts the last bits off, which hardware rounds.
    cut = (full.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    assert torch.equal(half, full.bfloat16()) or torch.equal(half, cut)


@runs
def test_what_is_not_there_becomes_nan_and_leaves_its_neighbours():
    frames, store, size = frames_of(32), 32, (20, 24)
    rows = [{"sigma": 1}, {"top": 20}, {"height": np.nan}, {}, {}, {"seed": np.inf}]
    rows += [{"sigma": np.inf}, {"flip": 1}]
    index = torch.tensor([0, 1, 2, 3, -1, 0, 0, 1])
    got = make(frames, index, table(store, rows), size)
    assert got[1:7].isnan().all()
    kept = [0, 7]
    alone = make(frames, index[kept], table(store, [rows[i] for i in kept]), size)
    assert torch.equal(got[kept], alone) and alone.isfinite().all()


LIMITS = {  # of a program: shared memory in bytes, and how a tensor-core product begins in PTX
    80: (163 << 10, "mma.sync"),
    90: (227 << 10, "wgmma.mma_async"),
    100: (227 << 10, "tcgen05.mma"),
}


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", LIMITS)
def test_compiles_without_spills(capability, kind):
    """256 -> 224: nothing spills, and every product is one of tensor cores."""
    if (capability, kind) != (90, "fp32") and os.environ.get("SSLUS_AOT_ALL") != "1":
        pytest.skip("compiled with SSLUS_AOT_ALL=1")
    found = compiled(capability, kind)
    shared, product = LIMITS[capability]
    # Triton 3.6 spills 64 bytes for sm_100, 3.8 and 3.9 nothing.
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    assert found["spills"] <= (64 if capability == 100 and old else 0), found
    assert found["shared_bytes"] * gpu.PROGRAMS <= shared, found
    assert found[product] >= 4, found  # one for each of the steps that are products
    # Or a multiprocessor would not hold PROGRAMS of them. Before 3.9 Triton gives the kernel 181 to
    # 196 registers, and one program is resident.
    if capability >= 90 and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        assert found["registers"] * 32 * gpu.NUM_WARPS * gpu.PROGRAMS <= 65536, found


def test_extreme_shrinking_compiles_like_any_other():
    """1000 -> 3 x 2, of 668 pixels and more each: no tile of weights is as long as that."""
    found = compiled(90, "bf16", 1000, 3, 2)
    assert found["spills"] == 0, found
    meta = gpu.plan(1000, (3, 2))
    # With a tile of BO x 1024 the compiler took half a minute.
    assert found["largest"] == meta["BO"] * meta["BM"], found


def compiled(capability, kind, store=256, height=224, width=224):
    """Resources of the kernel on a device of this compute capability, for views of this kind."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [str(x) for x in (capability, kind, store, height, width)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(capability, kind, store, height, width):
    build = aot.Build(
        "views", gpu.augment_kernel,
        {"frames": "*u8:16", "index": "*i64:16", "table": "*fp32:16", "out": f"*{kind}:16",
         "scratch": "*fp16:16", "num_frames": "i32", "num_views": "i32", "white": "fp32",
         "black": "fp32"},
        gpu.plan(int(store), (int(height), int(width))) | {"DEVICE": True}, gpu.NUM_WARPS,
    )  # fmt: skip
    x = aot.compiled(build, int(capability))
    tiles = re.findall(r"tensor<([\dx]+)x[a-z]", x.ttir)
    found = {product: x.ptx.count(product) for _, product in LIMITS.values()}
    found |= {"largest": max(math.prod(map(int, tile.split("x"))) for tile in tiles)}
    found |= {"registers": x.registers, "spills": x.spills, "shared_bytes": x.shared_bytes}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
