"""NT-Xent on a GPU: tiles of the logits are consumed as they are computed.

With P_ik = exp(s_ik - lse_i) the gradient is

    dL/du_i = (sum_k (P_ik + P_ki) u_k - 2 u_p) / (2 N T)

As s is symmetric, one tile of logits gives both P_ik and P_ki. The weight of the positive,
P_ip + P_pi - 2, is computed from lse - s_p of both rows, as stored by `combine`: a recomputed tile
may differ in its last digits, and the weight must vanish where the positive is all there is.

Launches, forward and backward together:

    1 stack       both views as one matrix of padded rows, and the scale of each row
    2 statistics  tiles of s -> maximum, sum and positive of each row in each part of the columns
    3 combine     reduce the parts -> lse, lse - s_p, loss
    4 gradient    tiles of s again, weights times rows -> each part's share of the gradient
    5 finish      sum the shares; keep the component orthogonal to u
    6 backward    scale by the upstream gradient, cast to the inputs' type

Up to D = 256 (float32: 128) there are three products of 4 N^2 D multiplications, as in autograd of
the definition; beyond, tiles are recomputed for every 256 (float32: 128) columns of the gradient.
Extra memory: 2 N D elements in the inputs' type, and the float32 shares: about 264 blocks of BM
rows or, for large N, 2 N D. Across ranks, each computes the logits of its own rows against all.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslus.kernels.aot import Build
from sslus.kernels.logits_gpu import (
    _NONE,
    COLUMNS,
    KINDS,
    LOG2_E,
    ROWS,
    TABLES,
    across,
    length,
    load,
    logits,
    multiply,
    over,
    plan,
    split,
    weigh,
)
from sslus.kernels.ntxent.reference import check
from sslus.kernels.ranks import Ranks
from sslus.kernels.tiles import cdiv

_LN_2 = tl.constexpr(1 / LOG2_E)


@triton.jit(do_not_specialize=["n", "d"])
def stack_kernel(za, zb, z, scale, n, d, width, root, ROWS: tl.constexpr, BD: tl.constexpr):
    """za, zb (n, d) -> z (2 n, width), zero from column d on; scale (2 n,) = root / |z|."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.minimum(row, n - 1)
    second = tl.program_id(1)
    squares = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, width, BD):
        c = c0 + tl.arange(0, BD)
        # Converted one by one: both branches must have the same type, but the views may not.
        x = load(za, i, c, d).to(tl.float32) if second == 0 else load(zb, i, c, d).to(tl.float32)
        squares += tl.sum(x * x, 1)
        place = z + (second * n + i)[:, None].to(tl.int64) * width + c[None, :]
        inside = (row < n)[:, None] & (c < width)[None, :]
        tl.store(place, x.to(z.dtype.element_ty), mask=inside)
    tl.store(scale + second * n + row, root / length(squares), mask=row < n)


@triton.jit
def _place(row, n, num, first):
    """Index among the 2 num rows of all ranks of a row (of 2 n) of this rank."""
    return first + tl.where(row < n, row, row - n + num)


@triton.jit(do_not_specialize=["n", "num", "first", "span"])
def statistics_kernel(
    z, scale, stats, n, num, first, span, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """stats (3, parts, 2 n): maximum, sum of exp2(s - maximum) and positive of each row.

    z (2 num, width), scale (2 num,): the rows of all ranks. This rank's are the n rows of each
    view that start at `first`.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    i = _place(tl.minimum(row, 2 * n - 1), n, num, first)
    partner = tl.where(i < num, i + num, i - num)
    scale_i = tl.load(scale + i)
    top = tl.full((BM,), _NONE, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    positive = tl.zeros((BM,), tl.float32)
    whole = tl.arange(0, BD)
    if BK == BD:
        x = load(z, i, whole, width)
    start = tl.program_id(1) * span
    for k0 in range(start, tl.minimum(start + span, 2 * num), BN):
        k = k0 + tl.arange(0, BN)
        there = tl.minimum(k, 2 * num - 1)
        if BK == BD:
            y = load(z, there, whole, width)
            s = multiply(x, tl.trans(y), tl.zeros((BM, BN), tl.float32))
        else:
            s = logits(z, z, i, there, width, BM, BN, BK)
        s = s * (scale_i[:, None] * tl.load(scale + there)[None, :])
        positive += tl.sum(tl.where(k[None, :] == partner[:, None], s, 0.0), 1)
        s = tl.where((k[None, :] != i[:, None]) & (k < 2 * num)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    part = tl.num_programs(1) * 2 * n
    place = stats + tl.program_id(1) * 2 * n + row
    tl.store(place, top, mask=row < 2 * n)
    tl.store(place + part, total, mask=row < 2 * n)
    tl.store(place + 2 * part, positive, mask=row < 2 * n)


@triton.jit(do_not_specialize=["rows", "parts"])
def combine_kernel(stats, lse, gap, loss, rows, parts, factor, BLOCK: tl.constexpr):
    """lse, gap = lse - positive (rows,); loss = factor x the sum of gap. One program."""
    losses = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        top = tl.full((BLOCK,), _NONE, tl.float32)
        positive = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            place = stats + part * rows + row
            top = tl.maximum(top, tl.load(place, mask=inside, other=_NONE))
            positive += tl.load(place + 2 * parts * rows, mask=inside, other=0.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            place = stats + part * rows + row
            share = tl.load(place + parts * rows, mask=inside, other=1.0)
            total += share * tl.exp2(tl.load(place, mask=inside, other=_NONE) - top)
        found = top + tl.log2(total)
        tl.store(lse + row, found, mask=inside)
        tl.store(gap + row, found - positive, mask=inside)
        losses += tl.where(inside, found - positive, 0.0).to(tl.float64)
    tl.store(loss, (tl.sum(losses, 0) * (factor * _LN_2)).to(tl.float32))


@triton.jit(do_not_specialize=["n", "num", "first", "span"])
def gradient_kernel(
    z, scale, lse, gap, share, n, num, first, span, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """share (parts, 2 n, width) = sum over a part's k of (P_ik + P_ki - 2 [k = p]) scale_k z_k.

    lse, gap: (2 num,), like scale.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    i = _place(tl.minimum(row, 2 * n - 1), n, num, first)
    partner = tl.where(i < num, i + num, i - num)
    scale_i, lse_i = tl.load(scale + i), tl.load(lse + i)
    drawn = tl.exp2(-tl.load(gap + i)) + tl.exp2(-tl.load(gap + partner)) - 2.0
    acc = tl.zeros((BM, BD), tl.float32)
    c = tl.program_id(2) * BD + tl.arange(0, BD)
    if tl.program_id(1) == 0:  # the positive in float32: the negatives may nearly cancel it
        u = load(z, partner, c, width).to(tl.float32)
        acc += u * (drawn * tl.load(scale + partner))[:, None]
    if BK == BD:
        x = load(z, i, c, width)
    start = tl.program_id(1) * span
    for k0 in range(start, tl.minimum(start + span, 2 * num), BN):
        k = k0 + tl.arange(0, BN)
        there = tl.minimum(k, 2 * num - 1)
        if BK == BD:
            y = load(z, there, c, width)
            s = multiply(x, tl.trans(y), tl.zeros((BM, BN), tl.float32))
        else:
            s = logits(z, z, i, there, width, BM, BN, BK)
            y = load(z, there, c, width)
        scale_k, lse_k = tl.load(scale + there), tl.load(lse + there)
        s = s * (scale_i[:, None] * scale_k[None, :])
        w = tl.exp2(s - lse_i[:, None]) + tl.exp2(s - lse_k[None, :])
        negative = (k[None, :] != i[:, None]) & (k[None, :] != partner[:, None])
        w = tl.where(negative & (k < 2 * num)[None, :], w, 0.0)
        acc = weigh(w * scale_k[None, :], y, acc, z.dtype.element_ty)
    place = (tl.program_id(1) * 2 * n + row)[:, None].to(tl.int64) * width + c[None, :]
    tl.store(share + place, acc, mask=(row < 2 * n)[:, None] & (c < width)[None, :])


@triton.jit
def _sum(share, row, c, rows, parts, width, ROWS: tl.constexpr, BD: tl.constexpr):
    g = tl.zeros((ROWS, BD), tl.float32)
    for part in range(parts):
        g += load(share, part * rows + row, c, width)
    return g


@triton.jit(do_not_specialize=["n", "num", "first", "parts", "d"])
def finish_kernel(
    share, z, ga, gb, n, num, first, parts, d, width, factor,
    ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """ga, gb (n, d) = factor (g - u (g . u)) / |z| with g the sum of the shares."""
    second = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.minimum(row, n - 1)
    i = first + second * num + r
    squares = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, width, BD):
        x = load(z, i, c0 + tl.arange(0, BD), width).to(tl.float32)
        squares += tl.sum(x * x, 1)
    size = length(squares)
    along = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, width, BD):
        c = c0 + tl.arange(0, BD)
        u = over(load(z, i, c, width).to(tl.float32), size)
        along += tl.sum(u * _sum(share, second * n + r, c, 2 * n, parts, width, ROWS, BD), 1)
    along = across(along, size)
    for c0 in range(0, width, BD):
        c = c0 + tl.arange(0, BD)
        u = over(load(z, i, c, width).to(tl.float32), size)
        g = _sum(share, second * n + r, c, 2 * n, parts, width, ROWS, BD)
        g = (g - u * along[:, None]) * (factor / size)[:, None]
        place = r[:, None].to(tl.int64) * d + c[None, :]
        inside = (row < n)[:, None] & (c < d)[None, :]
        tl.store((ga if second == 0 else gb) + place, g, mask=inside)


def ntxent(
    za: Tensor, zb: Tensor, *, temperature: float, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = check(za, zb, temperature)
    num, first = n * ranks.world, n * ranks.rank
    width = cdiv(d, 16) * 16  # so that every row is aligned to 16 bytes
    every_a, every_b = ranks.join(za), ranks.join(zb)
    dtype = torch.promote_types(za.dtype, zb.dtype)
    z = za.new_empty((2 * num, width), dtype=dtype)
    single = {"dtype": torch.float32}
    scale = za.new_empty(2 * num, **single)
    root = (LOG2_E / temperature) ** 0.5  # on both factors of a logit, so that s is symmetric
    rows = {"ROWS": ROWS, "BD": COLUMNS, "num_warps": 4}
    stack_kernel[(cdiv(num, ROWS), 2)](every_a, every_b, z, scale, num, d, width, root, **rows)

    blocks = plan(width, dtype)
    parts, span = split(2 * n, 2 * num, blocks)
    grid = (cdiv(2 * n, blocks["BM"]), parts)
    stats = za.new_empty((3, parts, 2 * n), **single)
    statistics_kernel[grid](z, scale, stats, n, num, first, span, width, **blocks)
    lse, gap = za.new_empty(2 * n, **single), za.new_empty(2 * n, **single)
    loss = za.new_empty((), **single)
    combine_kernel[(1,)](
        stats, lse, gap, loss, 2 * n, parts, 1 / (2 * num), BLOCK=1024, num_warps=4
    )
    ranks.sum_(loss)
    if ranks.world > 1:
        lse, gap = (torch.cat([ranks.join(half) for half in x.split(n)]) for x in (lse, gap))

    share = za.new_empty((parts, 2 * n, width), **single)
    chunks = cdiv(width, blocks["BD"])
    gradient_kernel[(*grid, chunks)](
        z, scale, lse, gap, share, n, num, first, span, width, **blocks
    )
    ga, gb = (torch.empty_like(x, **single) for x in (za, zb))
    finish_kernel[(cdiv(n, ROWS), 2)](
        share, z, ga, gb, n, num, first, parts, d, width, 1 / (2 * num * temperature * root), **rows
    )
    return loss, ga, gb


def builds() -> Iterator[Build]:
    numbers = {"n": "i32", "num": "i32", "first": "i32", "span": "i32", "width": "i32:16"}
    for dtype, table in TABLES.items():
        kind = KINDS[dtype]
        z = {"z": f"*{kind}:16"}
        for most, blocks in table.items():
            blocks = dict(blocks)
            options = blocks.pop("num_warps"), blocks.pop("num_stages")
            for name, kernel, floats in (
                ("statistics", statistics_kernel, ("scale", "stats")),
                ("gradient", gradient_kernel, ("scale", "lse", "gap", "share")),
            ):
                if name == "statistics" and kind == "fp16":
                    continue  # same as bf16
                signature = z | dict.fromkeys(floats, "*fp32:16") | numbers
                yield Build(f"{name} {kind} {most}", kernel, signature, blocks, *options)
        if kind == "fp16":
            continue  # same as bf16: the other kernels have no products
        pair = {"za": f"*{kind}:16", "zb": f"*{kind}:16"}
        rows = {"ROWS": ROWS, "BD": COLUMNS}
        yield Build(
            f"stack {kind}", stack_kernel,
            pair | z | {"scale": "*fp32:16", "n": "i32", "d": "i32", "width": "i32:16",
                        "root": "fp32"},
            rows,
        )  # fmt: skip
        yield Build(
            f"finish {kind}", finish_kernel,
            z | {"share": "*fp32:16", "ga": "*fp32:16", "gb": "*fp32:16", "n": "i32",
                 "num": "i32", "first": "i32", "parts": "i32", "d": "i32", "width": "i32:16",
                 "factor": "fp32"},
            rows,
        )  # fmt: skip
    yield Build(
        "combine", combine_kernel,
        {"stats": "*fp32:16", "lse": "*fp32:16", "gap": "*fp32:16", "loss": "*fp32:16",
         "rows": "i32", "parts": "i32", "factor": "fp32"},
        {"BLOCK": 1024},
    )  # fmt: skip
