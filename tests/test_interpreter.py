"""The checks that tests/interpreter.py adds to Triton's interpreter find what they are for."""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1"
)


@triton.jit
def shift(x, n, BY: tl.constexpr, EACH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Copies each program's numbers to BY places further on, and back."""
    i = tl.program_id(0) * EACH + tl.arange(0, 8)
    there = tl.load(x + i, mask=i < n)
    if FIRST:
        tl.debug_barrier()
    tl.store(x + i + BY, there, mask=i < n)
    if LAST:
        tl.debug_barrier()
    tl.store(x + i, tl.load(x + i + BY, mask=i < n), mask=i < n)


@pytest.mark.parametrize(
    "changed, error",
    [
        ({}, None),
        ({"BY": 0, "FIRST": False}, None),  # each thread replaces what it has read
        ({"EACH": 17}, "beside its tensors"),
        ({"FIRST": False, "BY": 1}, "writes what it read, without a barrier"),
        ({"LAST": False}, "reads what it wrote, without a barrier"),
        ({"EACH": 8}, "reads what another program writes"),
    ],
    ids=str,
)
def test_a_kernel_that_a_gpu_may_run_otherwise_fails(changed, error):
    settings = {"n": 64, "BY": 8, "EACH": 16, "FIRST": True, "LAST": True} | changed
    x = torch.arange(128.0)[32:96]
    if error is None:
        shift[(4,)](x, **settings)
        assert x[settings["BY"] :].tolist()[:8] == list(range(32, 40))
    else:
        with pytest.raises(InterpreterError, match=error):
            shift[(4,)](x, **settings)


@triton.jit
def collide(x, SAME: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(x + i // 2, 0 * i if SAME else i)


@pytest.mark.parametrize(
    "programs, same, error",
    [
        (1, False, "two values for an address"),
        (2, True, "writes what another program reads or writes"),
    ],
)
def test_stores_do_not_collide(programs, same, error):
    collide[(1,)](torch.zeros(4), SAME=True)
    with pytest.raises(InterpreterError, match=error):
        collide[(programs,)](torch.zeros(4), SAME=same)
