"""Tiles of logits on a GPU, and other code shared by the kernels of the contrastive losses.

A logit is the product of two rows times a scale. Tensor cores multiply the rows as given; scaling
to unit length follows in float32. Products of bfloat16 or float16 numbers are exact, whereas
rounded unit vectors would cause errors of 2^-9 / T. float32 is multiplied as three TF32 products,
which lose its last two bits.

Logits are in base 2 (the scale includes 1 / ln 2), because exp2 is a single instruction.
"""

import math

import torch
import triton
import triton.language as tl

from sslus.kernels.aot import Build
from sslus.kernels.tiles import cdiv

LOG2_E = math.log2(math.e)
PROGRAMS = 264  # per launch: two per multiprocessor of an H100. Not queried from the device, so
# that sums are split, and thus rounded, in the same way on all devices.
ROWS, COLUMNS = 16, 128  # the tile of kernels without matrix products

_NONE = tl.constexpr(-1e30)  # below every logit, but finite, so that _NONE - _NONE is 0, not NaN
_SHORTEST = tl.constexpr(1e-12)  # as in F.normalize

# Largest D -> rows BM and columns BN of a tile of logits; step BK along D; columns BD of a gradient
# tile. If BK = BD, a block holds all of D, and a row is loaded once for both products. Blocks are
# as large as the registers of sm_80, sm_90 and sm_100 allow; not timed yet.
_LONG = {"BM": 64, "BN": 64, "BK": 64, "BD": 256, "num_warps": 8, "num_stages": 3}
_128 = {"BM": 128, "BN": 64, "BK": 128, "BD": 128, "num_warps": 8, "num_stages": 3}
_256 = {"BM": 64, "BN": 64, "BK": 256, "BD": 256, "num_warps": 8, "num_stages": 2}
_FLOAT32 = {"BM": 64, "BN": 32, "BK": 32, "BD": 128, "num_warps": 8, "num_stages": 2}
TABLES = {
    torch.bfloat16: {128: _128, 256: _256, math.inf: _LONG},
    torch.float16: {128: _128, math.inf: _LONG},
    torch.float32: {math.inf: _FLOAT32},
}
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # Triton's names


def plan(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages for products of rows of length d."""
    table = TABLES[dtype]
    if d % 16:  # no vector loads: a tile with all of D would take too many registers
        return table[math.inf]
    return next(blocks for most, blocks in table.items() if d <= most)


def split(rows: int, columns: int, blocks: dict[str, int]) -> tuple[int, int]:
    """How many parts to split the columns into, and how many columns each part has."""
    tiles = cdiv(columns, blocks["BN"])
    wanted = cdiv(PROGRAMS, cdiv(rows, blocks["BM"]))
    span = cdiv(tiles, min(wanted, tiles)) * blocks["BN"]
    return cdiv(columns, span), span


@triton.jit
def load(p, r, c, d):
    """p[r, c] of a row-major matrix with d columns; 0 from column d on. Row r must exist."""
    return tl.load(p + r[:, None].to(tl.int64) * d + c[None, :], mask=c[None, :] < d, other=0.0)


@triton.jit
def multiply(a, b, acc):
    """acc + a b, without rounding half-precision inputs."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit
def logits(x, y, i, k, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """x_i . y_k, (BM, BN), for rows longer than a block."""
    s = tl.zeros((BM, BN), tl.float32)
    for c0 in range(0, d, BK):
        c = c0 + tl.arange(0, BK)
        s = multiply(load(x, i, c, d), tl.trans(load(y, k, c, d)), s)
    return s


@triton.jit
def weigh(w, y, acc, TYPE: tl.constexpr):
    """acc + w y; w may be rounded to the precision of the gradient's final dtype, TYPE."""
    if y.dtype == tl.float32 or tl.float32 == TYPE:
        return tl.dot(w, y.to(tl.float32), acc, input_precision="tf32x3")
    if y.dtype == tl.bfloat16:
        return tl.dot(w.to(tl.bfloat16), y, acc)
    # float16 lacks the range for the weights; tf32 has the same precision.
    return tl.dot(w, y.to(tl.float32), acc, input_precision="tf32")


@triton.jit
def length(squares):
    return tl.maximum(tl.sqrt_rn(squares), _SHORTEST)


@triton.jit
def across(along, size):
    """How much of u to take from a gradient for u = z / size, so that what is left is orthogonal to
    u. Nothing where `length` has limited the size: there, u grows with z."""
    return tl.where(size > _SHORTEST, along, 0.0)


@triton.jit
def over(x, length):
    """Rows x divided by their lengths, rounded once: at D = 1 exactly 1, with gradient 0."""
    return tl.div_rn(x, length[:, None] + tl.zeros_like(x))


@triton.jit(do_not_specialize=["num"])
def total_kernel(parts, out, num, factor, BLOCK: tl.constexpr):
    """out = factor times the sum of num parts, in float64 and in a fixed order; one program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts + i, mask=i < num, other=0.0).to(tl.float64)
    tl.store(out, (tl.sum(total, 0) * factor).to(tl.float32))


def total(parts: torch.Tensor, factor: float) -> torch.Tensor:
    out = parts.new_empty(())
    total_kernel[(1,)](parts, out, parts.numel(), factor, BLOCK=1024, num_warps=4)
    return out


def total_build() -> Build:
    signature = {"parts": "*fp32:16", "out": "*fp32:16", "num": "i32", "factor": "fp32"}
    return Build("total", total_kernel, signature, {"BLOCK": 1024})
