"""BYOL's loss on a GPU: dL/dp = (u cos - v) 2 / (N |p|), with u, v the unit vectors.

Three launches, forward and backward together: both directions, 16 rows per program; the sum of
the partial losses; scaling by the upstream gradient. Every element is read from memory once, and
twice more from a cache. Extra floats: one for every 16 rows. Across ranks, each keeps its own rows.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslus.kernels.aot import Build
from sslus.kernels.byol.reference import check
from sslus.kernels.logits_gpu import (
    COLUMNS,
    ROWS,
    across,
    length,
    load,
    over,
    total,
    total_build,
)
from sslus.kernels.ranks import Ranks
from sslus.kernels.tiles import cdiv


@triton.jit
def _direction(p, t, grad, losses, n, d, factor, ROWS: tl.constexpr, BD: tl.constexpr):
    """losses[program] = sum |u - v|^2; grad (n, d) = factor / |p| times the component of u - v
    orthogonal to u."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.minimum(row, n - 1)
    squares_p = tl.zeros((ROWS,), tl.float32)
    squares_t = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, d, BD):
        c = c0 + tl.arange(0, BD)
        x, y = load(p, i, c, d).to(tl.float32), load(t, i, c, d).to(tl.float32)
        squares_p += tl.sum(x * x, 1)
        squares_t += tl.sum(y * y, 1)
    size_p, size_t = length(squares_p), length(squares_t)
    distance = tl.zeros((ROWS,), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, d, BD):
        c = c0 + tl.arange(0, BD)
        u = over(load(p, i, c, d).to(tl.float32), size_p)
        pull = u - over(load(t, i, c, d).to(tl.float32), size_t)
        distance += tl.sum(pull * pull, 1)
        along += tl.sum(pull * u, 1)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(row < n, distance, 0.0), 0))
    along = across(along, size_p)
    for c0 in range(0, d, BD):
        c = c0 + tl.arange(0, BD)
        u = over(load(p, i, c, d).to(tl.float32), size_p)
        pull = u - over(load(t, i, c, d).to(tl.float32), size_t)
        g = (pull - u * along[:, None]) * (factor / size_p)[:, None]
        place = grad + i[:, None].to(tl.int64) * d + c[None, :]
        inside = (row < n)[:, None] & (c < d)[None, :]
        tl.store(place, g, mask=inside)


@triton.jit(do_not_specialize=["n"])
def byol_kernel(pa, pb, ta, tb, ga, gb, losses, n, d, factor, ROWS: tl.constexpr, BD: tl.constexpr):
    """Grid (row blocks, 2 directions); losses (2, row blocks)."""
    if tl.program_id(1) == 0:
        _direction(pa, tb, ga, losses, n, d, factor, ROWS, BD)
    else:
        _direction(pb, ta, gb, losses + tl.num_programs(0), n, d, factor, ROWS, BD)


def byol(
    pa: Tensor, pb: Tensor, ta: Tensor, tb: Tensor, *, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    check(pa, pb, ta, tb)
    n, d = pa.shape
    num = n * ranks.world
    ga, gb = (torch.empty_like(p, dtype=torch.float32) for p in (pa, pb))
    programs = cdiv(n, ROWS)
    losses = pa.new_empty((2, programs), dtype=torch.float32)
    byol_kernel[(programs, 2)](
        pa, pb, ta, tb, ga, gb, losses, n, d, 2 / num, ROWS=ROWS, BD=COLUMNS, num_warps=4
    )
    return ranks.sum_(total(losses, 1 / num)), ga, gb


def builds() -> Iterator[Build]:
    names = ("pa", "pb", "ta", "tb")
    # The last has rows that are not all aligned to 16 bytes.
    for kind, d in (("bf16", "i32:16"), ("fp32", "i32:16"), ("bf16", "i32")):
        yield Build(
            f"byol {kind} {d}", byol_kernel,
            dict.fromkeys(names, f"*{kind}:16")
            | dict.fromkeys(("ga", "gb", "losses"), "*fp32:16")
            | {"n": "i32", "d": d, "factor": "fp32"},
            {"ROWS": ROWS, "BD": COLUMNS},
        )  # fmt: skip
    yield total_build()
