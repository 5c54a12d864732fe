"""InfoNCE with a queue on a GPU: the queue is read in tiles, neither copied nor concatenated.

One pass over the queue: each tile of logits s updates a running maximum top, the sum of
exp(s - top) and the sum of exp(s - top) queue; the sums are rescaled when top grows. With
x = lse over the queue - q.k / T, the loss is softplus(x), accurate where it is small too, and
dL/dq_i = sigmoid(x) (sum_m P_im queue_m - k_i) / (N T), with P the softmax over the queue alone.

Launches, forward and backward together:

    1 mix       tiles of the queue -> maximum and both sums of each row in each part of the queue
    2 finish    reduce the parts, add the positive -> partial loss; gradient orthogonal to q
    3 total     the loss
    4 backward  scale by the upstream gradient

Up to D = 256 (float32: 128) there are two products of N M D multiplications; beyond, logits are
recomputed for every 256 (128) columns of the gradient. Extra floats: N D for each part, about 264
blocks of BM rows in all or, for large N, N D. Across ranks, each keeps its own rows.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslus.kernels.aot import Build
from sslus.kernels.infonce_queue.reference import check
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
    total,
    total_build,
    weigh,
)
from sslus.kernels.ranks import Ranks
from sslus.kernels.tiles import cdiv

_LN_2 = tl.constexpr(1 / LOG2_E)


@triton.jit(do_not_specialize=["n", "m", "span"])
def mix_kernel(
    q, queue, stats, mixed, n, m, span, d, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """stats (2, parts, n): maximum and sum of exp2(s - maximum); mixed (parts, n, d): the sum of
    exp2(s - maximum) queue; s = scale q . queue / |q|."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.minimum(row, n - 1)
    squares = tl.zeros((BM,), tl.float32)
    for c0 in range(0, d, BK):
        x = load(q, i, c0 + tl.arange(0, BK), d).to(tl.float32)
        squares += tl.sum(x * x, 1)
    scale_i = scale / length(squares)
    top = tl.full((BM,), _NONE, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    c = tl.program_id(2) * BD + tl.arange(0, BD)
    if BK == BD:
        x = load(q, i, c, d)
    start = tl.program_id(1) * span
    for k0 in range(start, tl.minimum(start + span, m), BN):
        k = k0 + tl.arange(0, BN)
        there = tl.minimum(k, m - 1)
        if BK == BD:
            y = load(queue, there, c, d)
            s = multiply(x, tl.trans(y), tl.zeros((BM, BN), tl.float32))
        else:
            s = logits(q, queue, i, there, d, BM, BN, BK)
            y = load(queue, there, c, d)
        s = tl.where((k < m)[None, :], s * scale_i[:, None], float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        old = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * old + tl.sum(p, 1)
        acc = weigh(p, y, acc * old[:, None], q.dtype.element_ty)
        top = higher
    part = tl.program_id(1)
    if tl.program_id(2) == 0:
        tl.store(stats + part * n + row, top, mask=row < n)
        tl.store(stats + (tl.num_programs(1) + part) * n + row, total, mask=row < n)
    place = mixed + (part * n + row)[:, None].to(tl.int64) * d + c[None, :]
    tl.store(place, acc, mask=(row < n)[:, None] & (c < d)[None, :])


@triton.jit
def _pull(
    mixed, stats, k, top, total, size_k, row, c, n, parts, d, ROWS: tl.constexpr, BD: tl.constexpr
):
    """sum_m P_m queue_m - k for each row, with k its unit key."""
    g = tl.zeros((ROWS, BD), tl.float32)
    for part in range(parts):
        weight = tl.exp2(tl.load(stats + part * n + row) - top) / total
        g += load(mixed, part * n + row, c, d) * weight[:, None]
    return g - over(load(k, row, c, d).to(tl.float32), size_k)


@triton.jit(do_not_specialize=["n", "parts"])
def finish_kernel(
    q, k, stats, mixed, grad, losses, n, parts, d, scale, factor,
    ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """losses (programs,): sums of softplus(x). grad (n, d): factor sigmoid(x) / |q| times the
    component of `_pull` orthogonal to q."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.minimum(row, n - 1)
    squares_q = tl.zeros((ROWS,), tl.float32)
    squares_k = tl.zeros((ROWS,), tl.float32)
    product = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, d, BD):
        c = c0 + tl.arange(0, BD)
        a, b = load(q, i, c, d).to(tl.float32), load(k, i, c, d).to(tl.float32)
        squares_q += tl.sum(a * a, 1)
        squares_k += tl.sum(b * b, 1)
        product += tl.sum(a * b, 1)
    size_q, size_k = length(squares_q), length(squares_k)

    top = tl.full((ROWS,), _NONE, tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(stats + part * n + i))
    total = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        share = tl.load(stats + (parts + part) * n + i)
        total += share * tl.exp2(tl.load(stats + part * n + i) - top)
    x = ((top - product / size_q / size_k * scale) + tl.log2(total)) * _LN_2
    # softplus and sigmoid from e = exp(-|x|) <= 1. log(1 + e) is multiplied by e / ((1 + e) - 1),
    # which corrects for the rounding of 1 + e.
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    small = tl.where(one == 1.0, e, tl.log(one) * e / tl.where(one == 1.0, 1.0, one - 1.0))
    tl.store(
        losses + tl.program_id(0),
        tl.sum(tl.where(row < n, tl.maximum(x, 0.0) + small, 0.0), 0),
    )
    sigmoid = tl.where(x > 0, 1.0, e) / one

    along = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, d, BD):
        c = c0 + tl.arange(0, BD)
        u = over(load(q, i, c, d).to(tl.float32), size_q)
        along += tl.sum(
            u * _pull(mixed, stats, k, top, total, size_k, i, c, n, parts, d, ROWS, BD), 1
        )
    along = across(along, size_q)
    for c0 in range(0, d, BD):
        c = c0 + tl.arange(0, BD)
        u = over(load(q, i, c, d).to(tl.float32), size_q)
        g = _pull(mixed, stats, k, top, total, size_k, i, c, n, parts, d, ROWS, BD)
        g = (g - u * along[:, None]) * (factor * sigmoid / size_q)[:, None]
        place = grad + i[:, None].to(tl.int64) * d + c[None, :]
        inside = (row < n)[:, None] & (c < d)[None, :]
        tl.store(place, g, mask=inside)


def infonce_queue(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    check(q, k, queue, temperature)
    (n, d), m = q.shape, len(queue)
    num, scale = n * ranks.world, LOG2_E / temperature
    blocks = plan(d, q.dtype if q.dtype == queue.dtype else torch.float32)
    parts, span = split(n, m, blocks)
    stats = q.new_empty((2, parts, n), dtype=torch.float32)
    mixed = q.new_empty((parts, n, d), dtype=torch.float32)
    grid = (cdiv(n, blocks["BM"]), parts, cdiv(d, blocks["BD"]))
    mix_kernel[grid](q, queue, stats, mixed, n, m, span, d, scale, **blocks)
    programs = cdiv(n, ROWS)
    grad = torch.empty_like(q, dtype=torch.float32)
    losses = q.new_empty(programs, dtype=torch.float32)
    finish_kernel[(programs,)](
        q, k, stats, mixed, grad, losses, n, parts, d, scale, 1 / (num * temperature),
        ROWS=ROWS, BD=COLUMNS, num_warps=4,
    )  # fmt: skip
    return ranks.sum_(total(losses, 1 / num)), grad


def builds() -> Iterator[Build]:
    def mix(kind: str, kind_queue: str, d: str, most: float, blocks: dict[str, int]) -> Build:
        blocks = dict(blocks)
        options = blocks.pop("num_warps"), blocks.pop("num_stages")
        return Build(
            f"mix {kind} {kind_queue} {d} {most}", mix_kernel,
            {"q": f"*{kind}:16", "queue": f"*{kind_queue}:16", "stats": "*fp32:16",
             "mixed": "*fp32:16", "n": "i32", "m": "i32", "span": "i32", "d": d, "scale": "fp32"},
            blocks, *options,
        )  # fmt: skip

    def finish(kind: str, d: str) -> Build:
        return Build(
            f"finish {kind} {d}", finish_kernel,
            {"q": f"*{kind}:16", "k": f"*{kind}:16", "stats": "*fp32:16", "mixed": "*fp32:16",
             "grad": "*fp32:16", "losses": "*fp32:16", "n": "i32", "parts": "i32",
             "d": d, "scale": "fp32", "factor": "fp32"},
            {"ROWS": ROWS, "BD": COLUMNS},
        )  # fmt: skip

    for dtype, table in TABLES.items():
        kind = KINDS[dtype]
        for most, blocks in table.items():
            yield mix(kind, kind, "i32:16", most, blocks)
        if kind == "fp16":
            continue  # same as bf16
        yield mix(kind, kind, "i32", math.inf, table[math.inf])
        yield finish(kind, "i32:16")
        yield finish(kind, "i32")
    yield mix("bf16", "fp32", "i32:16", math.inf, TABLES[torch.float32][math.inf])
    yield total_build()
