"""Contrastive losses in Triton: what the cases of test_kernels.py, being small, do not reach."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("parity", Path(__file__).with_name("test_kernels.py"))
spec.loader.exec_module(parity := importlib.util.module_from_spec(spec))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no CUDA device and TRITON_INTERPRET is not 1",
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(name, shapes, dtypes, temperature, kind="plain"):
    tensors = parity.inputs({"tensors": shapes}, F32, DEVICE, kind)
    tensors = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    parity.assert_parity(parity.OPS[name], "gpu", tensors, scalars={"temperature": temperature})


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sums_run_on_from_tile_to_tile(dtype, monkeypatch):
    from sslus.kernels import logits_gpu

    monkeypatch.setattr(logits_gpu, "PROGRAMS", 1)  # else every tile is a part of its own
    check("ntxent", [(70, 48)] * 2, [dtype] * 2, 0.05)
    check("infonce_queue", [(9, 48), (9, 48), (150, 48)], [dtype] * 3, 0.05)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_positive_that_is_all_there_is_gives_no_gradient(dtype):
    """The last digit of a logit of 100 / ln 2 would be a gradient of 1e-5."""
    check("ntxent", [(40, 100)] * 2, [dtype] * 2, 0.01, "near")


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_one_feature_that_dominates(temperature):
    """All vectors are nearly parallel: positives and negatives all but cancel in the gradient."""
    check("ntxent", [(40, 100)] * 2, [BF16] * 2, temperature, "dominant")


@pytest.mark.parametrize("name", ["ntxent", "byol"])
def test_gradients_too_small_for_float16_are_scaled_first(name):
    op = parity.OPS[name]
    case = {"tensors": [(9, 48)] * len(op.cases[0]["tensors"])}
    tensors = [(5000 * t).to(F16) for t in parity.inputs(case, F32, DEVICE)]
    got, want = (
        parity.value_and_grads(op, which, given, op.cases[0]["scalars"], factor=2**18)
        for which, given in (("gpu", tensors), ("reference", [t.double() for t in tensors]))
    )
    for g, w in zip(got[1:], want[1:], strict=True):
        assert g.dtype == F16
        assert (g - w).abs().max() <= torch.finfo(F16).eps * w.abs().max()


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="plays a GPU in Triton's interpreter"
)
@pytest.mark.parametrize("name", ["byol", "ntxent", "infonce_queue"])
def test_one_column_has_no_gradient_with_the_division_of_a_gpu(name, monkeypatch):
    """There `/` is a product with the reciprocal, and 41 x (1 / 41) is not 1."""
    from triton.runtime import interpreter

    def divide(builder, a, b):
        return interpreter.TensorHandle(a.data * (1 / b.data), a.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", divide)
    op = parity.OPS[name]
    tensors = [torch.arange(1.0, 98.0).view(-1, 1) for _ in op.cases[0]["tensors"]]
    _, *grads = parity.value_and_grads(op, "gpu", tensors, op.cases[0]["scalars"])
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32), (F32, F32, BF16), (BF16, F32, F16)], ids=str)
def test_a_queue_of_another_type(dtypes):
    check("infonce_queue", [(9, 48), (9, 48), (70, 48)], dtypes, 0.05)
    check("ntxent", [(9, 48)] * 2, dtypes[1:], 0.05)
