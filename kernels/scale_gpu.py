"""Backward on a GPU in one launch: a loss's gradients times the upstream gradient.

The kernel reads the factor, so the host does not wait for it. The gradients are float32 and are
rounded only here: before a gradient scaler's factor is applied, they may be too small for float16.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslus.kernels.aot import Build
from sslus.kernels.tiles import cdiv

BLOCK = 4096  # elements per program: 16 per thread, in 16-byte loads
NUM_WARPS = 8


@triton.jit
def scale_kernel(ga, gb, factor, out_a, out_b, num, BLOCK: tl.constexpr):
    """out_a, out_b (num,) = factor x ga, gb, in the dtypes of the outputs."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(factor).to(tl.float32)
    if tl.program_id(1) == 0:
        g = tl.load(ga + i, mask=i < num, other=0).to(tl.float32)
        tl.store(out_a + i, (g * by).to(out_a.dtype.element_ty), mask=i < num)
    else:
        g = tl.load(gb + i, mask=i < num, other=0).to(tl.float32)
        tl.store(out_b + i, (g * by).to(out_b.dtype.element_ty), mask=i < num)


def scaled(
    grads: list[Tensor], factor: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> list[Tensor]:
    """One or two contiguous gradients of the same shape times factor (), in the given dtypes."""
    out = [torch.empty_like(g, dtype=dtype) for g, dtype in zip(grads, dtypes, strict=False)]
    num = grads[0].numel()
    scale_kernel[(cdiv(num, BLOCK), len(grads))](
        grads[0], grads[-1], factor, out[0], out[-1], num, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return out


def builds() -> Iterator[Build]:
    for kind, num in (("fp32", "i32:16"), ("bf16", "i32:16"), ("bf16", "i64")):
        gradients = dict.fromkeys(("ga", "gb", "factor"), "*fp32:16")
        outs = dict.fromkeys(("out_a", "out_b"), f"*{kind}:16")
        yield Build(
            f"scale {kind} {num}", scale_kernel, gradients | outs | {"num": num},
            {"BLOCK": BLOCK}, NUM_WARPS,
        )  # fmt: skip
