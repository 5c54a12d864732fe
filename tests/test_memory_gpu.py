"""Triton kernels read only what was written.

A partial sum that no program has written may be 0 for years. tests/interpreter.py sees that they
access nothing but their tensors.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sslus.kernels.mask import Mask
from sslus.kernels.op import MAPS
from sslus.kernels.ranks import Ranks

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1"
    ),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # log2(0), on purpose
]
spec = importlib.util.spec_from_file_location("parity", Path(__file__).with_name("test_kernels.py"))
spec.loader.exec_module(parity := importlib.util.module_from_spec(spec))

FRESH = 0xD7  # each byte of memory that was not written yet; no number here has only those


@pytest.fixture
def kernels(monkeypatch) -> set[str]:
    """The names of those that ran; they raise where they read what is FRESH."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, call = builder.create_masked_load, executor.__call__
    names = set()

    def run(self, *args, **kwargs):
        names.add(self.fn.__name__)
        return call(self, *args, **kwargs)

    def checked_load(self, addresses, mask, *rest):
        found = load(self, addresses, mask, *rest)
        values = np.ascontiguousarray(found.data[mask.data])
        if values.itemsize > 1:
            fresh = values.view(np.uint8).reshape(-1, values.itemsize) == FRESH
            assert not fresh.all(1).any(), "a value that nothing has written"
        return found

    def fresh(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            out.untyped_storage().fill_(FRESH)
            return out

        return made

    monkeypatch.setattr(executor, "__call__", run)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, fresh(getattr(owner, name)))
    return names


SHAPES = {
    # D and N on both sides of each other and of a tile, neither a multiple of 16.
    "vicreg": [[(17, 37)] * 2, [(37, 17)] * 2 + [(37,)], [(65, 70)] * 2, [(70, 65)] * 2],
    "barlow": [[(17, 37)] * 2, [(37, 17)] * 2, [(65, 70)] * 2, [(70, 65)] * 2],
    "ntxent": [[(19, 21)] * 2],
    "infonce_queue": [[(19, 21), (19, 21), (70, 21)]],
    "byol": [[(19, 21)] * 4],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, "plain") for name in SHAPES),
        ("vicreg", "dominant"), ("barlow", "identity"),  # sums that cancel take another way
    ],
)  # fmt: skip
def test_losses(name, kind, dtype, kernels):
    from sslus.kernels.scale_gpu import scaled

    op = parity.OPS[name]
    for shapes in SHAPES[name]:
        tensors = parity.inputs({"tensors": shapes[:2]}, dtype, kind=kind)
        tensors += parity.inputs({"tensors": shapes[2:]}, dtype)
        dense = [t.contiguous() for t in tensors]
        loss, *grads = op.gpu(*dense, ranks=Ranks(), **op.cases[0]["scalars"])
        for g in scaled(grads, loss, (dtype, dtype)):
            assert g.isfinite().all()
    assert "scale_kernel" in kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["patches", "rectangles"])
def test_masks(kind, dtype, kernels):
    from sslus.kernels.mask import gpu

    g = torch.Generator().manual_seed(0)
    x, target = (torch.randn(3, 1, 33, 19, generator=g).to(dtype) for _ in "ab")
    mask = vars(Mask(kind, patch=7, num=3, background=0.3))
    ids, out = torch.arange(3), torch.empty_like(x)
    MAPS["mask_fill"].run("gpu", x, target, ids, out, **mask, fill=-7.0)
    gpu.masked_mse(x, target, ids, **mask, hole=1.0, rest=0.5, ranks=Ranks())
    assert kernels == {"fill_kernel", "count_kernel", "loss_kernel"}


def test_views(kernels):
    from sslus.kernels.augment.gpu import augment_gpu
    from sslus.kernels.augment.reference import COLUMNS, identity

    frames = torch.randint(0, 255, (2, 41, 41), dtype=torch.uint8)
    params = identity(4, 41)
    for v, row in enumerate(
        [
            {},
            {"top": 20.5, "left": 11.5, "height": 20.5, "width": 29.5, "sigma": 2, "flip": 1},
            {"sigma": 16, "speckle": 0.3, "seed": 7},
            {"top": 40, "left": 40, "height": 1, "width": 1, "sigma": 0.3},
        ]
    ):
        for name, value in row.items():
            params[v, COLUMNS.index(name)] = value
    for size in ((37, 53), (70, 9)):
        out = torch.empty(4, 1, *size)
        augment_gpu(frames, torch.tensor([0, 1, 1, 0]), params, out, mean=0.2, std=0.1)
        assert out.isfinite().all()
    assert kernels == {"augment_kernel"}
