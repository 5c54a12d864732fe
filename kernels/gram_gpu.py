"""Triton kernels shared by BarlowTwins and VICReg.

With X, Y (N, D) the views and C = X^T Y / m, both losses are a sum over columns plus a factor
times the sum of C_ij^2 off the diagonal. In VICReg X = Y, one centred view, and m = N - 1; this
is done for each of the two views. In BarlowTwins X and Y are the two standardised views, and
m = N. There are two exact forms, neither of which stores a D x D matrix; the equations are in the
docstrings of the two cpu.py. In the Gram form K = x x^T, (N, N), one for each view.

    Gram form (N < D)                                      grid at N = 256, D = 8192, bf16
    1 columns    means, variances, planes of x             256 (32 columns each)
    2 multiply   partial sums of K                         10 tiles x 13 parts of D x 2 views
    3 gram_sum   add the parts, mirror K, sum its squares  36 tiles of 32 x 32, lower triangle
    4 exact      recompute what was lost to cancellation   256 x 2, which usually do nothing
    5 *apply     gradients from K x; the loss              VICReg 128 x 4 x 2, BarlowTwins 256 x 2
    6 backward   scale by the upstream gradient, cast to the inputs' type: scale_gpu.py

    Tiled form (N >= D): 1 and 6 once, and 2, 3 and 5 for every strip of 512 columns, which makes
    14 launches at N = 4096, D = 2048
    2 multiply   partial sums of C, D x 512
    3 strip_sum  add the parts, zero the diagonal, sum the squares
    5 apply      gradients of these columns from x C; the loss so far

On one rank the host never waits for the device, sums have a fixed order (no atomics), and
addresses do not depend on values, so all of it can be captured in a CUDA graph.

Precision. float32 is multiplied as three TF32 products. Half precision (bfloat16 or float16) is
split into two bfloat16 planes, x = hi + lo, with 16 significant bits together. A single plane
would have an error of 2^-9 in x and thus in K, whereas the definition computes the loss in
float32. K and C are stored as such planes too. A product is hi hi + hi lo + lo hi, accumulated in
float32; K also gets lo lo, since on its diagonal all lo lo terms are positive and add up. Partial
sums of the loss are added in float64. The relative error of the covariance term alone is then
below 1e-6, provided that rounding errors average out. With fewer than FEW rows or columns a single
one may dominate, so half precision then uses float32 planes, as float32 does.

Cancellation. The Gram form computes the off-diagonal sum as |K|^2 (BarlowTwins: <Ka, Kb>) minus
the squared diagonal entries of C. Both come from the same rounded planes, so the rounding of the
planes cancels. If less than LEFT of the total remains, K is too inaccurate for the gradient as
well, and tiles of C must be computed instead. The host must not read the sums, so `exact` is
always launched; its programs read them, and either return or replace the view's gradient and sum.

Matrix products, in units of N^2 D (Gram) or N D^2 (tiled) multiplications: Gram 2 x (5/8 + 1)
(10 of 16 tiles at N = 256), tiled 2 x (1 + 1). Tiled BarlowTwins computes C twice, by columns and
by rows, so that no gradient has to be accumulated in memory. In half precision each takes three
bfloat16 products; x x^T takes four.

Memory, at most 4 (N^2 + N D) floats: planes 2 N D; gradients, float32 until backward scales them,
2 N D; Gram: K 2 N^2, whose parts use the memory of the gradients; tiled: 2 (parts + 1) D x 512.
The number of parts is what 264 programs need and the memory allows, less what rounding each one
up to whole blocks leaves empty: 13 at N = 256, D = 8192, bf16.

Across ranks, in the Gram form each rank takes all rows of its D / world columns, and K is summed;
in the tiled form each keeps its own rows, and C is summed. As `exact` needs all columns, the host
then does read whether the sum cancels, and if so switches to the tiled form.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, starmap
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslus.kernels.aot import Build
from sslus.kernels.products import LEFT
from sslus.kernels.ranks import Ranks
from sslus.kernels.tiles import cdiv

FEW = 64  # rows or columns; below, launches take nearly all of the time, in any precision
WIDTH = 512  # columns of a strip: its three launches fill a GPU, and D x 512 is small beside N x D
PROGRAMS = 264  # two per multiprocessor of an H100
SMALL = 512  # rows; above, half precision computes x x^T in tiles of 128
WHOLE = 256  # rows that a program of barlow_apply holds at once; half as many if ragged
_LEFT = tl.constexpr(LEFT)
_VICREG_EPS = tl.constexpr(1e-4)
_BARLOW_EPS = tl.constexpr(1e-5)
# Rows of `sums`, float64: 0, the terms without matrix products; then sums of squares, two rows
# each (view a, view b): the diagonal of C; all of C; C off the diagonal, if computed by `exact`.
DIAGONAL, ALL = 1, 3
_DIRECT, _EXACT = tl.constexpr(0), tl.constexpr(5)
_DIAGONAL, _ALL = tl.constexpr(DIAGONAL), tl.constexpr(ALL)
NUM_SUMS = 7


@dataclass(frozen=True)
class Loss:
    """The factors of a loss's terms; n and d count the rows and columns of all ranks."""

    barlow: bool
    n: int
    d: int
    off: float  # factor of the sum of C_ij^2 off the diagonal
    pull: float = 0.0  # VICReg: factor of the weighted sum of (za - zb)^2
    hinge: float = 0.0  # VICReg: factor of the sum of relu(1 - s)

    @property
    def m(self) -> int:
        return self.n if self.barlow else self.n - 1

    @property
    def slope(self) -> float:
        """The factor of C_ij y_j in dL/dx_i, i != j. In VICReg x_i occurs in both C_ij and C_ji."""
        return (2 if self.barlow else 4) * self.off / self.m


class Kind(NamedTuple):
    """What block sizes depend on, besides the kernel."""

    half: bool  # planes are bfloat16, else float32
    ragged: bool  # N or D is not a multiple of 16: no vector loads, and more registers


@triton.jit
def _rows(p, r, c, N, D):
    """(R, C) float32 at rows r and columns c of (N, D); 0 outside."""
    inside = (r[:, None] < N) & (c[None, :] < D)
    return tl.load(p + r[:, None].to(tl.int64) * D + c[None, :], mask=inside, other=0).to(
        tl.float32
    )


@triton.jit
def _planes(hi, lo, r, c, N, D, LOW: tl.constexpr):
    x = _rows(hi, r, c, N, D)
    if LOW:
        x += _rows(lo, r, c, N, D)
    return x


@triton.jit
def _store(hi, lo, place, x, inside, LOW: tl.constexpr):
    high = x.to(hi.dtype.element_ty)
    tl.store(hi + place, high, mask=inside)
    if LOW:
        tl.store(lo + place, (x - high.to(tl.float32)).to(lo.dtype.element_ty), mask=inside)


@triton.jit
def _add_up(parts, count):
    i = tl.arange(0, 256)
    total = tl.zeros((256,), tl.float64)
    for start in range(0, count, 256):
        total += tl.load(parts + start + i, mask=start + i < count, other=0)
    return tl.sum(total, 0)


@triton.jit
def _cancels(sums, P, view, num_columns, num_tiles, BARLOW: tl.constexpr):
    """1 if less than LEFT of the view's sum of squares lies off the diagonal, else 0."""
    if BARLOW:
        view = view * 0  # both views share one C
    every = _add_up(sums + (view + _ALL) * P, num_tiles)
    rest = every - _add_up(sums + (view + _DIAGONAL) * P, num_columns)
    return (rest < every * _LEFT).to(tl.int32)


@triton.jit
def _write_loss(
    sums, loss, P, off, num_columns, num_tiles, num_exact, strip, BARLOW: tl.constexpr
):  # fmt: skip
    total = _add_up(sums + P * _DIRECT, num_columns)
    for view in tl.static_range(1 if BARLOW else 2):
        rest = _add_up(sums + (view + _ALL) * P, num_tiles)
        if strip == 0:
            every = rest
            rest = every - _add_up(sums + (view + _DIAGONAL) * P, num_columns)
            if (num_exact > 0) & (rest < every * _LEFT):
                rest = _add_up(sums + (view + _EXACT) * P, num_exact)
        total += off * rest
    tl.store(loss, total.to(tl.float32))


@triton.jit
def columns(
    za, zb, weights, hi, lo, col, sums, N, D, P, pull, hinge, off, slope,
    BARLOW: tl.constexpr, LOW: tl.constexpr, WEIGHTED: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Planes hi, lo (2, N, D) of x, coefficients col (., D) for the gradients, partial sums.

    Rows of col, VICReg: 0, 1: the coefficient of -x in the gradient of a and b, for K x; 2, 3: the
    same for x C with zero diagonal. BarlowTwins: 0, 1: 1 / s of a and b; 2: the coefficient of the
    other view, for K x; 3: the same for x C with zero diagonal; 4: the part of the sum of x dL/dx
    over the rows that needs no matrix product.
    """
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    ok = c < D
    n = tl.cast(N, tl.float32)
    # Subtract the first row before the mean: exact for collapsed (constant) columns.
    first_a = tl.load(za + c, mask=ok, other=0).to(tl.float32)[None, :]
    first_b = tl.load(zb + c, mask=ok, other=0).to(tl.float32)[None, :]
    mean_a = tl.zeros((BD,), tl.float32)
    mean_b = tl.zeros((BD,), tl.float32)
    for start in range(0, N, BN):
        r = start + tl.arange(0, BN)
        here = (r < N)[:, None]
        mean_a += tl.sum(tl.where(here, _rows(za, r, c, N, D) - first_a, 0.0), 0)
        mean_b += tl.sum(tl.where(here, _rows(zb, r, c, N, D) - first_b, 0.0), 0)
    mean_a = (mean_a / n)[None, :]
    mean_b = (mean_b / n)[None, :]
    var_a = tl.zeros((BD,), tl.float32)
    var_b = tl.zeros((BD,), tl.float32)
    for start in range(0, N, BN):
        r = start + tl.arange(0, BN)
        here = (r < N)[:, None]
        a = tl.where(here, _rows(za, r, c, N, D) - first_a - mean_a, 0.0)
        b = tl.where(here, _rows(zb, r, c, N, D) - first_b - mean_b, 0.0)
        var_a += tl.sum(a * a, 0)
        var_b += tl.sum(b * b, 0)
    if BARLOW:
        var_a /= n
        var_b /= n
        # Times 0: NaN where a variance has overflowed, whose column would look like a perfect one.
        root_a = 1 / tl.sqrt_rn(var_a + _BARLOW_EPS) + var_a * 0
        root_b = 1 / tl.sqrt_rn(var_b + _BARLOW_EPS) + var_b * 0
    else:
        var_a /= n - 1
        var_b /= n - 1
        root_a = tl.full((BD,), 1.0, tl.float32)
        root_b = root_a

    # The diagonal of C is computed from the rounded planes, as is |K|^2, from which its squares
    # are subtracted.
    diagonal_a = tl.zeros((BD,), tl.float32)
    diagonal_b = tl.zeros((BD,), tl.float32)
    squares = tl.zeros((BD,), tl.float32)
    for start in range(0, N, BN):
        r = start + tl.arange(0, BN)
        here = (r < N)[:, None]
        a = _rows(za, r, c, N, D)
        b = _rows(zb, r, c, N, D)
        if not BARLOW:
            far = a - b
            far *= far
            if WEIGHTED:
                far *= tl.load(weights + r, mask=r < N, other=0).to(tl.float32)[:, None]
            squares += tl.sum(far, 0)
        a = tl.where(here, a - first_a - mean_a, 0.0) * root_a[None, :]
        b = tl.where(here, b - first_b - mean_b, 0.0) * root_b[None, :]
        place = r[:, None].to(tl.int64) * D + c[None, :]
        inside = here & ok[None, :]
        view = tl.cast(N, tl.int64) * D
        _store(hi, lo, place, a, inside, LOW)
        _store(hi + view, lo + view, place, b, inside, LOW)
        if BARLOW:
            far = a - b
            squares += tl.sum(far * far, 0)
        if LOW:
            high_a = a.to(hi.dtype.element_ty).to(tl.float32)
            high_b = b.to(hi.dtype.element_ty).to(tl.float32)
            a = high_a + (a - high_a).to(hi.dtype.element_ty).to(tl.float32)
            b = high_b + (b - high_b).to(hi.dtype.element_ty).to(tl.float32)
        if BARLOW:
            diagonal_a += tl.sum(a * b, 0)
        else:
            diagonal_a += tl.sum(a * a, 0)
            diagonal_b += tl.sum(b * b, 0)

    if BARLOW:
        # C_jj - 1. It is small where the views agree, so it is not computed as a difference.
        low = -0.5 * (squares / n + (root_a * root_a + root_b * root_b) * _BARLOW_EPS)
        direct = (low * low).to(tl.float64)
        tl.store(col + c, root_a, mask=ok)
        tl.store(col + D + c, root_b, mask=ok)
        tl.store(col + 2 * D + c, 2 * (low - off * diagonal_a / n) / n, mask=ok)
        tl.store(col + 3 * D + c, 2 * low / n, mask=ok)
        tl.store(col + 4 * D + c, 2 * low * (1 + low), mask=ok)
    else:
        s_a = tl.sqrt_rn(var_a + _VICREG_EPS)
        s_b = tl.sqrt_rn(var_b + _VICREG_EPS)
        own_a = tl.where(s_a < 1, hinge / ((n - 1) * s_a), 0.0)
        own_b = tl.where(s_b < 1, hinge / ((n - 1) * s_b), 0.0)
        alive = tl.maximum(1 - s_a, 0.0) + tl.maximum(1 - s_b, 0.0)
        direct = pull * squares.to(tl.float64) + hinge * alive.to(tl.float64)
        tl.store(col + 2 * D + c, own_a, mask=ok)
        tl.store(col + 3 * D + c, own_b, mask=ok)
        tl.store(col + c, own_a + slope * diagonal_a / (n - 1), mask=ok)
        tl.store(col + D + c, own_b + slope * diagonal_b / (n - 1), mask=ok)
    part = sums + tl.program_id(0)
    m = tl.cast(N, tl.float64) if BARLOW else tl.cast(N, tl.float64) - 1
    diagonal_a = diagonal_a.to(tl.float64) / m
    diagonal_b = diagonal_b.to(tl.float64) / m
    tl.store(part + P * _DIRECT, tl.sum(tl.where(ok, direct, 0.0), 0))
    tl.store(part + P * _DIAGONAL, tl.sum(diagonal_a * diagonal_a, 0))
    tl.store(part + P * (_DIAGONAL + 1), tl.sum(diagonal_b * diagonal_b, 0))


@triton.jit
def _triangle(p):
    """The p-th pair (i, j) with i >= j, row by row."""
    i = ((tl.sqrt((8 * p + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit
def _dot(xh, xl, yh, yl, z, LOW: tl.constexpr, LOWEST: tl.constexpr = False):
    """z + x y. z is added outside the tensor cores: they truncate when they accumulate, so that
    over a long sum all errors would have the same sign. max_num_imprecise_acc keeps the compiler
    from moving that addition into the dot.

    LOWEST: include lo lo. The products of one block do accumulate inside, the smallest first: each
    addition outside would take as many registers as z.
    """
    if LOW:
        if LOWEST:
            t = tl.dot(xl, yl, max_num_imprecise_acc=1)
            t = tl.dot(xl, yh, t)
        else:
            t = tl.dot(xl, yh, max_num_imprecise_acc=1)
        t = tl.dot(xh, yl, t)
        return z + tl.dot(xh, yh, t)
    return tl.dot(xh, yh, z, input_precision="tf32x3")  # tf32x3 itself adds z outside


@triton.jit(do_not_specialize=["other"])
def multiply(
    hi, lo, parts_a, parts_b, N, D, start, width, chunk, other,
    STRIP: tl.constexpr, LOW: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of one part of x x^T (N, N) or, with STRIP, of x^T y (D, width).

    y is view a for parts_a and view b for parts_b, (parts, ., .) float32; x is the same view as y
    or, if `other` is 1, the other one. Each part is summed over `chunk` columns (STRIP: rows). With
    STRIP, only columns start to start + width of y are used.
    """
    part = tl.program_id(1)
    view = tl.program_id(2)
    x = tl.where(other != 0, 1 - view, view).to(tl.int64) * N * D
    y = view.to(tl.int64) * N * D
    if STRIP:
        across = tl.cdiv(width, BT)
        i = tl.program_id(0) // across
        j = tl.program_id(0) % across
        height, length = D, N
    else:
        i, j = _triangle(tl.program_id(0))
        height, length = N, D
        width = N
    side = tl.arange(0, BT)
    depth = tl.arange(0, BK)
    r = i * BT + side
    c = j * BT + side
    z = tl.zeros((BT, BT), tl.float32)
    for k0 in range(part * chunk, tl.minimum((part + 1) * chunk, length), BK):
        k = k0 + depth
        # Within a block 32-bit offsets suffice; 64-bit ones would take more registers.
        if STRIP:
            corner_x = x + tl.cast(k0, tl.int64) * D + i * BT
            corner_y = y + tl.cast(k0, tl.int64) * D + start + j * BT
            from_x = depth[None, :] * D + side[:, None]
            from_y = depth[:, None] * D + side[None, :]
        else:
            corner_x = x + (i * BT).to(tl.int64) * D + k0
            corner_y = y + (j * BT).to(tl.int64) * D + k0
            from_x = side[:, None] * D + depth[None, :]
            from_y = side[None, :] * D + depth[:, None]
        in_x = (r[:, None] < height) & (k[None, :] < length)
        in_y = (c[None, :] < width) & (k[:, None] < length)
        xh = tl.load(hi + corner_x + from_x, mask=in_x, other=0)
        yh = tl.load(hi + corner_y + from_y, mask=in_y, other=0)
        if LOW:
            xl = tl.load(lo + corner_x + from_x, mask=in_x, other=0)
            yl = tl.load(lo + corner_y + from_y, mask=in_y, other=0)
        else:
            xl, yl = xh, yh
        z = _dot(xh, xl, yh, yl, z, LOW, LOWEST=not STRIP)
    parts = parts_a if view == 0 else parts_b
    parts += part.to(tl.int64) * height * width
    inside = (r[:, None] < height) & (c[None, :] < width)
    tl.store(parts + r[:, None].to(tl.int64) * width + c[None, :], z, mask=inside)


@triton.jit
def gram_sum(
    parts_a, parts_b, kh, kl, sums, N, P, num_parts, m,
    BARLOW: tl.constexpr, LOW: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Planes kh, kl (2, N, N) of K from the parts of its lower triangle; sums of squares."""
    i, j = _triangle(tl.program_id(0))
    r = i * BS + tl.arange(0, BS)
    c = j * BS + tl.arange(0, BS)
    inside = (r[:, None] < N) & (c[None, :] < N)
    place = r[:, None].to(tl.int64) * N + c[None, :]
    mirrored = r[:, None] + c[None, :].to(tl.int64) * N
    square = tl.cast(N, tl.int64) * N
    a = tl.zeros((BS, BS), tl.float32)
    b = tl.zeros((BS, BS), tl.float32)
    for s in range(num_parts):
        a += tl.load(parts_a + s * square + place, mask=inside, other=0)
        b += tl.load(parts_b + s * square + place, mask=inside, other=0)
    _store(kh, kl, place, a, inside, LOW)
    _store(kh + square, kl + square, place, b, inside, LOW)
    if i != j:
        _store(kh, kl, mirrored, a, inside, LOW)
        _store(kh + square, kl + square, mirrored, b, inside, LOW)
    # In float64, as in `columns`: the diagonal is subtracted from this sum, so both must be
    # divided by exactly the same m^2.
    m = tl.cast(m, tl.float64)
    twice = tl.where(i == j, 1, 2) / (m * m)
    a = a.to(tl.float64)
    b = b.to(tl.float64)
    part = sums + P * _ALL + tl.program_id(0)
    if BARLOW:
        tl.store(part, twice * tl.sum(tl.sum(a * b, 1), 0))
    else:
        tl.store(part, twice * tl.sum(tl.sum(a * a, 1), 0))
        tl.store(part + P, twice * tl.sum(tl.sum(b * b, 1), 0))


@triton.jit(do_not_specialize=["first"])
def strip_sum(
    parts, ch, cl, squares, sums, D, P, start, width, num_parts, first, m,
    LOW: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Planes ch, cl (2, D, width) of C, with zero diagonal, from its parts; sums of squares.

    squares (2, D / BS, width): those of each column of a tile. first: index of this strip's first
    partial sum.
    """
    view = tl.program_id(2)
    i = tl.program_id(0)
    r = i * BS + tl.arange(0, BS)
    c = tl.program_id(1) * BS + tl.arange(0, BS)
    inside = (r[:, None] < D) & (c[None, :] < width)
    place = r[:, None].to(tl.int64) * width + c[None, :]
    size = tl.cast(D, tl.int64) * width
    z = tl.zeros((BS, BS), tl.float32)
    for s in range(num_parts):
        z += tl.load(parts + (view * num_parts + s) * size + place, mask=inside, other=0)
    z = tl.where(r[:, None] == (start + c)[None, :], 0.0, z / m)
    _store(ch + view * size, cl + view * size, place, z, inside, LOW)
    z *= z
    column = tl.sum(z, 0)
    row = view * tl.num_programs(0) + i
    tl.store(squares + row * width + c, column, mask=c < width)
    part = first + i * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + (view + _ALL) * P + part, tl.sum(column.to(tl.float64), 0))


@triton.jit
def _product(
    left_hi, left_lo, right_hi, right_lo, r, c, N, K, D, LOW: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(BN, BD) at rows r and columns c of left (N, K) times right (K, D)."""
    z = tl.zeros((BN, BD), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        from_left = r[:, None].to(tl.int64) * K + k[None, :]
        in_left = (r[:, None] < N) & (k[None, :] < K)
        from_right = k[:, None].to(tl.int64) * D + c[None, :]
        in_right = (k[:, None] < K) & (c[None, :] < D)
        xh = tl.load(left_hi + from_left, mask=in_left, other=0)
        yh = tl.load(right_hi + from_right, mask=in_right, other=0)
        if LOW:
            xl = tl.load(left_lo + from_left, mask=in_left, other=0)
            yl = tl.load(right_lo + from_right, mask=in_right, other=0)
        else:
            xl, yl = xh, yh
        z = _dot(xh, xl, yh, yl, z, LOW)
    return z


@triton.jit
def _pull(za, zb, weights, r, c, view, N, D, WEIGHTED: tl.constexpr):
    """Weighted za - zb for view a, its negative for view b."""
    z = _rows(za, r, c, N, D) - _rows(zb, r, c, N, D)
    if WEIGHTED:
        z *= tl.load(weights + r, mask=r < N, other=0).to(tl.float32)[:, None]
    return tl.where(view == 0, z, -z)


@triton.jit
def _to_input(g, x, mean, root, PAIR: tl.constexpr):
    """dL/dz from g = dL/dx; x is z standardised, root = 1 / s, mean: of g x over the rows.

    PAIR: with N = 2 rows x is (u, -u) and g is (w, -w), so the difference is w (1 - u^2); computed
    as a difference, it would be nothing but rounding error.
    """
    if PAIR:
        g *= (root * root * _BARLOW_EPS)[None, :]  # 1 - u^2
    else:
        g -= x * mean[None, :]
    return g * root[None, :]


@triton.jit(do_not_specialize=["strip"])
def apply(
    left_hi, left_lo, right_hi, right_lo, hi, lo, za, zb, weights, col, squares, sums, loss,
    ga, gb, N, D, K, start, width, P, num_columns, num_tiles, num_exact, num_squares, strip,
    scale, pull, off, rows,
    BARLOW: tl.constexpr, LOW: tl.constexpr, WEIGHTED: tl.constexpr,
    PAIR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of a gradient. Its matrix product, scale times left times right, is K x, or x C for
    columns start to start + width. The first program also writes the loss.

    strip: 1 for x C, which is always the case for BarlowTwins. rows: N over all ranks; N is that of
    this rank.
    """
    view = tl.program_id(2)
    v = view.to(tl.int64)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    r = tl.program_id(1) * BN + tl.arange(0, BN)
    at = start + c
    ok = c < width
    left = (1 - v if BARLOW else v) * N * K
    right = v * K * width
    g = scale * _product(
        left_hi + left, left_lo + left, right_hi + right, right_lo + right,
        r, c, N, K, width, LOW, BN, BD, BK,
    )  # fmt: skip
    own = v * N * D
    x = _planes(hi + own, lo + own, r, at, N, D, LOW)
    if BARLOW:
        other = (1 - v) * N * D
        y = _planes(hi + other, lo + other, r, at, N, D, LOW)
        g += y * tl.load(col + 3 * D + at, mask=ok, other=0)[None, :]
        mean = tl.load(col + 4 * D + at, mask=ok, other=0)
        for i in range(num_squares):
            row = squares + (view * num_squares + i) * width
            mean += 2 * off * tl.load(row + c, mask=ok, other=0)
        root = tl.load(col + view * D + at, mask=ok, other=0)
        g = _to_input(g, x, mean / rows, root, PAIR)
    else:
        row = 2 * strip + view
        g -= x * tl.load(col + row * D + at, mask=ok, other=0)[None, :]
        g += pull * _pull(za, zb, weights, r, at, view, N, D, WEIGHTED)
    kept = N  # rows to write: none if `exact` has written this gradient
    if num_exact > 0:
        kept = N * (1 - _cancels(sums, P, view, num_columns, num_tiles, BARLOW))
    inside = (r[:, None] < kept) & ok[None, :]
    out = ga if view == 0 else gb
    place = r[:, None].to(tl.int64) * D + at[None, :]
    tl.store(out + place, g, mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (view == 0):
        _write_loss(sums, loss, P, off, num_columns, num_tiles, num_exact, strip, BARLOW)


@triton.jit
def barlow_apply(
    kh, kl, hi, lo, col, sums, loss, ga, gb,
    N, D, P, num_columns, num_tiles, num_exact, scale, off,
    LOW: tl.constexpr, ONE: tl.constexpr, PAIR: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Whole columns of a gradient, since the mean needs all rows, from scale times K x, with K of
    the other view. The first program also writes the loss.

    ONE: all rows fit into one tile. Otherwise dL/dx is kept in the gradient's memory.
    """
    view = tl.program_id(1)
    v = view.to(tl.int64)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    ok = c < D
    k = (1 - v) * N * N
    own = v * N * D
    other = (1 - v) * N * D
    out = ga if view == 0 else gb
    to_other = tl.load(col + 2 * D + c, mask=ok, other=0)[None, :]
    root = tl.load(col + view * D + c, mask=ok, other=0)
    kept = N  # see `apply`
    if num_exact > 0:
        kept = N * (1 - _cancels(sums, P, view, num_columns, num_tiles, True))
    mean = tl.zeros((BD,), tl.float32)
    if ONE:
        r = tl.arange(0, BN)
        g = scale * _product(
            kh + k, kl + k, hi + own, lo + own, r, c, N, N, D, LOW, BN, BD, BK
        )  # fmt: skip
        g += _planes(hi + other, lo + other, r, c, N, D, LOW) * to_other
        x = _planes(hi + own, lo + own, r, c, N, D, LOW)
        mean = tl.sum(g * x, 0) / tl.cast(N, tl.float32)
        g = _to_input(g, x, mean, root, PAIR)
        inside = (r[:, None] < kept) & ok[None, :]
        place = r[:, None].to(tl.int64) * D + c[None, :]
        tl.store(out + place, g, mask=inside)
    else:
        for start in range(0, N, BN):
            r = start + tl.arange(0, BN)
            g = scale * _product(
                kh + k, kl + k, hi + own, lo + own, r, c, N, N, D, LOW, BN, BD, BK
            )  # fmt: skip
            g += _planes(hi + other, lo + other, r, c, N, D, LOW) * to_other
            mean += tl.sum(g * _planes(hi + own, lo + own, r, c, N, D, LOW), 0)
            inside = (r[:, None] < kept) & ok[None, :]
            place = r[:, None].to(tl.int64) * D + c[None, :]
            tl.store(out + place, g, mask=inside)
        mean /= tl.cast(N, tl.float32)
        tl.debug_barrier()  # below, threads read what other threads of the program wrote
        for start in range(0, N, BN):
            r = start + tl.arange(0, BN)
            inside = (r[:, None] < kept) & ok[None, :]
            place = r[:, None].to(tl.int64) * D + c[None, :]
            g = tl.load(out + place, mask=inside, other=0)
            x = _planes(hi + own, lo + own, r, c, N, D, LOW)
            g = _to_input(g, x, mean, root, False)
            tl.debug_barrier()  # no thread may write before all have read
            tl.store(out + place, g, mask=inside)
    if (tl.program_id(0) == 0) & (view == 0):
        _write_loss(sums, loss, P, off, num_columns, num_tiles, num_exact, 0, True)


@triton.jit
def exact(
    hi, lo, za, zb, weights, col, sums, ga, gb, N, D, P, num_columns, num_tiles, m, slope,
    pull, off,
    BARLOW: tl.constexpr, LOW: tl.constexpr, WEIGHTED: tl.constexpr, PAIR: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Where the Gram form's sum cancels: gradient and sum from tiles of C, slow as the definition.

    A program computes the tiles of its columns one after the other and accumulates x C in ga or gb.
    """
    view = tl.program_id(1)
    if _cancels(sums, P, view, num_columns, num_tiles, BARLOW) != 0:
        v = view.to(tl.int64)
        c = tl.program_id(0) * BD + tl.arange(0, BD)
        ok = c < D
        own = v * N * D
        left = (1 - v if BARLOW else v) * N * D
        out = ga if view == 0 else gb
        squares = tl.zeros((BD,), tl.float32)
        for k0 in range(0, D, BK):
            k = k0 + tl.arange(0, BK)
            tile = tl.zeros((BK, BD), tl.float32)
            for start in range(0, N, BN):
                r = start + tl.arange(0, BN)
                from_x = left + r[None, :].to(tl.int64) * D + k[:, None]
                in_x = (r[None, :] < N) & (k[:, None] < D)
                from_y = own + r[:, None].to(tl.int64) * D + c[None, :]
                in_y = (r[:, None] < N) & ok[None, :]
                xh = tl.load(hi + from_x, mask=in_x, other=0)
                yh = tl.load(hi + from_y, mask=in_y, other=0)
                xl, yl = xh, yh
                if LOW:
                    xl = tl.load(lo + from_x, mask=in_x, other=0)
                    yl = tl.load(lo + from_y, mask=in_y, other=0)
                tile = _dot(xh, xl, yh, yl, tile, LOW)
            tile = tl.where(k[:, None] == c[None, :], 0.0, tile / m)
            squares += tl.sum(tile * tile, 0)
            high = tile.to(hi.dtype.element_ty)
            low = high
            if LOW:
                low = (tile - high.to(tl.float32)).to(hi.dtype.element_ty)
            for start in range(0, N, BN):
                r = start + tl.arange(0, BN)
                from_x = left + r[:, None].to(tl.int64) * D + k[None, :]
                in_x = (r[:, None] < N) & (k[None, :] < D)
                xh = tl.load(hi + from_x, mask=in_x, other=0)
                xl = xh
                if LOW:
                    xl = tl.load(lo + from_x, mask=in_x, other=0)
                place = r[:, None].to(tl.int64) * D + c[None, :]
                inside = (r[:, None] < N) & ok[None, :]
                g = tl.load(out + place, mask=inside & (k0 > 0), other=0)
                g = _dot(xh, xl, high, low, g, LOW)
                tl.debug_barrier()  # no thread may write before all have read, and vice versa
                tl.store(out + place, g, mask=inside)
                tl.debug_barrier()
        mean = squares  # unused for VICReg
        if BARLOW:
            mean = (tl.load(col + 4 * D + c, mask=ok, other=0) + 2 * off * squares) / N
        for start in range(0, N, BN):
            r = start + tl.arange(0, BN)
            place = r[:, None].to(tl.int64) * D + c[None, :]
            inside = (r[:, None] < N) & ok[None, :]
            g = slope * tl.load(out + place, mask=inside, other=0)
            x = _planes(hi + own, lo + own, r, c, N, D, LOW)
            if BARLOW:
                other = (1 - v) * N * D
                diagonal = tl.load(col + 3 * D + c, mask=ok, other=0)
                y = _planes(hi + other, lo + other, r, c, N, D, LOW)
                root = tl.load(col + view * D + c, mask=ok, other=0)
                g = _to_input(g + y * diagonal[None, :], x, mean, root, PAIR)
            else:
                g -= x * tl.load(col + (2 + view) * D + c, mask=ok, other=0)[None, :]
                g += pull * _pull(za, zb, weights, r, c, view, N, D, WEIGHTED)
            tl.debug_barrier()
            tl.store(out + place, g, mask=inside)
        part = sums + (view + _EXACT) * P + tl.program_id(0)
        tl.store(part, tl.sum(squares.to(tl.float64), 0))


Blocks = tuple[dict[str, int], int, int]  # block sizes, num_warps, num_stages


def _table(kind: Kind) -> dict[str, Blocks]:
    """Block sizes that compile without register spills for sm_80, sm_90 and sm_100. To time others
    on a GPU: bench/blocks.py."""
    half, ragged = kind.half, kind.ragged
    n = 64 if half else 128
    return {
        "columns": ({"BN": 128, "BD": 32}, 8, 1),
        "multiply 64": ({"BT": 64, "BK": 64 if half and not ragged else 32}, 8 if ragged else 4, 3),
        "multiply 128": ({"BT": 128, "BK": 16 if ragged else 32}, 8, 3),  # half precision only
        "gram_sum": ({"BS": 32}, 4, 1),
        "strip_sum": ({"BS": 64}, 8, 1),
        "apply": ({"BN": n, "BD": 4096 // n, "BK": 32}, 8, 3),
        "barlow_apply 256": ({"BN": 256, "BD": 32, "BK": 32}, 8, 3),  # not ragged
        "barlow_apply 128": ({"BN": 128, "BD": 32, "BK": 32}, 8, 3),
        "exact": ({"BN": 32, "BD": 32, "BK": 32}, 8, 1),
    }


TABLES = {kind: _table(kind) for kind in starmap(Kind, product((False, True), repeat=2))}


def _launch(kernel, name: str, grid: tuple, *args, kind: Kind, **flags) -> None:
    constants, num_warps, num_stages = TABLES[kind][name]
    kernel[grid](
        *args, LOW=kind.half, **flags, **constants,
        num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _size(name: str, block: str, kind: Kind) -> int:
    return TABLES[kind][name][0][block]


def _parts(name: str, tiles: int, length: int, kind: Kind, most: int) -> tuple[int, int]:
    """Number and length of the parts (at most `most`) that a contraction is split into, so that
    the launch fills the device."""
    step = _size(name, "BK", kind)
    parts = max(1, min(cdiv(PROGRAMS, tiles), cdiv(length, 4 * step), most))
    chunk = cdiv(length, parts * step) * step
    return cdiv(length, chunk), chunk


def _kind(za: Tensor, zb: Tensor, loss: Loss) -> Kind:
    """The kind for these za and zb, whose shape across ranks differs from the loss's n and d."""
    half = torch.float32 not in (za.dtype, zb.dtype) and min(loss.n, loss.d) >= FEW
    return Kind(half, ragged=any(size % 16 for size in za.shape))


def _triangular(n: int) -> int:
    return n * (n + 1) // 2


def _columns(za, zb, weights, loss: Loss, num_sums: int, kind: Kind) -> tuple[Tensor, ...]:
    """Launches `columns`; za, zb: all rows of these columns. Returns planes hi and lo (2, n, d),
    col, sums, with room for num_sums in each row, and the number of partial sums from here."""
    n, d = za.shape
    new = za.new_empty
    hi = new((2, n, d), dtype=torch.bfloat16 if kind.half else torch.float32)
    lo = torch.empty_like(hi) if kind.half else hi
    col = new((5 if loss.barlow else 4, d), dtype=torch.float32)
    blocks = cdiv(d, _size("columns", "BD", kind))
    sums = new((NUM_SUMS, max(blocks, num_sums)), dtype=torch.float64)
    _launch(
        columns, "columns", (blocks,), za, zb, za if weights is None else weights, hi, lo, col,
        sums, n, d, sums.shape[1], loss.pull, loss.hinge, loss.off, loss.slope,
        kind=kind, BARLOW=loss.barlow, WEIGHTED=weights is not None,
    )  # fmt: skip
    return hi, lo, col, sums, blocks


def _add_sums(sums: Tensor, num_columns: int, ranks: Ranks) -> int:
    """Adds up the partial sums of `columns` over all ranks, if several; returns their number."""
    if ranks.world == 1:
        return num_columns
    sums[:ALL, 0] = ranks.sum_(sums[:ALL, :num_columns].sum(1))
    return 1


def _all_columns(col: Tensor, d: int, ranks: Ranks) -> Tensor:
    """The coefficients of all columns, from all ranks; the first d % world have one column more."""
    every = col.new_zeros(len(col), d)
    first = ranks.rank * (d // ranks.world) + min(ranks.rank, d % ranks.world)
    every[:, first : first + col.shape[1]] = col
    return ranks.sum_(every)


def gram(
    za: Tensor, zb: Tensor, weights: Tensor | None, loss: Loss, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by the Gram form; za, zb (N, D) and weights (N,) of this rank."""
    rows = za, zb, weights
    za, zb = ranks.to_columns(za), ranks.to_columns(zb)
    kind = _kind(za, zb, loss)  # of this rank's columns: a third of 8192 is ragged, for example
    weights = None if weights is None else ranks.join(weights)
    n, d = za.shape
    new = za.new_empty
    tiles = _triangular(cdiv(n, _size("gram_sum", "BS", kind)))
    exact_blocks = cdiv(d, _size("exact", "BD", kind))
    hi, lo, col, sums, num_columns = _columns(za, zb, weights, loss, max(tiles, exact_blocks), kind)
    num_columns = _add_sums(sums, num_columns, ranks)
    P = sums.shape[1]

    name = "multiply 128" if kind.half and n > SMALL else "multiply 64"
    pairs = _triangular(cdiv(n, _size(name, "BT", kind)))
    num_parts, chunk = _parts(name, 2 * pairs, d, kind, d // n)
    ga, gb = (torch.empty_like(z, dtype=torch.float32) for z in (za, zb))
    # The parts can use the memory of the gradients: they are consumed before those are written.
    parts = (ga, gb) if n <= d else new((2, n, n), dtype=torch.float32)
    _launch(
        multiply, name, (pairs, num_parts, 2), hi, lo, *parts, n, d, 0, 0, chunk, 0,
        kind=kind, STRIP=False,
    )  # fmt: skip
    if ranks.world > 1:
        added = [p.view(-1)[: num_parts * n * n].view(num_parts, n, n).sum(0) for p in parts]
        parts, num_parts = ranks.sum_(torch.stack(added)), 1
    kh = new((2, n, n), dtype=hi.dtype)
    kl = torch.empty_like(kh) if kind.half else kh
    _launch(
        gram_sum, "gram_sum", (tiles,), *parts, kh, kl, sums, n, P, num_parts, float(loss.m),
        kind=kind, BARLOW=loss.barlow,
    )  # fmt: skip

    pull = ga if weights is None else weights
    if ranks.world == 1:
        _launch(
            exact, "exact", (exact_blocks, 2), hi, lo, za, zb, pull, col, sums, ga, gb,
            n, d, P, num_columns, tiles, float(loss.m), loss.slope, 2 * loss.pull, loss.off,
            kind=kind, BARLOW=loss.barlow, WEIGHTED=weights is not None, PAIR=n == 2,
        )  # fmt: skip
    else:
        views = 1 if loss.barlow else 2
        every = sums[ALL : ALL + views, :tiles].sum(1)
        if (every - sums[DIAGONAL : DIAGONAL + views, 0] < LEFT * every).any():
            return tiled(*rows, loss, ranks)
        exact_blocks = 0  # decided: a kernel that adds up in another order must not differ

    out = new((), dtype=torch.float32)
    if loss.barlow:
        one = n <= (WHOLE // 2 if kind.ragged else WHOLE)
        name = "barlow_apply 256" if one and not kind.ragged else "barlow_apply 128"
        _launch(
            barlow_apply, name, (cdiv(d, _size(name, "BD", kind)), 2),
            kh, kl, hi, lo, col, sums, out, ga, gb, n, d, P,
            num_columns, tiles, exact_blocks, loss.slope / loss.m, loss.off,
            kind=kind, ONE=one, PAIR=n == 2,
        )  # fmt: skip
    else:
        grid = _apply_grid(n, d, kind)
        _launch(
            apply, "apply", grid, kh, kl, hi, lo, hi, lo, za, zb, pull, col, col, sums, out, ga, gb,
            n, d, n, 0, d, P, num_columns, tiles, exact_blocks, 0, 0,
            loss.slope / loss.m, 2 * loss.pull, loss.off, float(n),
            kind=kind, BARLOW=False, WEIGHTED=weights is not None, PAIR=False,
        )  # fmt: skip
    return out, ranks.to_rows(ga, loss.d), ranks.to_rows(gb, loss.d)


def _apply_grid(n: int, width: int, kind: Kind) -> tuple[int, int, int]:
    return (
        cdiv(width, _size("apply", "BD", kind)),
        cdiv(n, _size("apply", "BN", kind)),
        2,
    )


def tiled(
    za: Tensor, zb: Tensor, weights: Tensor | None, loss: Loss, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by strips of C; za, zb (N, D) and weights (N,) of this rank."""
    kind = _kind(za, zb, loss)
    n, d = za.shape
    new = za.new_empty
    side = _size("strip_sum", "BS", kind)
    heights = cdiv(d, side)
    tiles = heights * cdiv(WIDTH, side) * cdiv(d, WIDTH)
    everybody = None if weights is None else ranks.join(weights)
    hi, lo, col, sums, num_columns = _columns(
        ranks.to_columns(za), ranks.to_columns(zb), everybody, loss, tiles, kind
    )
    num_columns = _add_sums(sums, num_columns, ranks)
    if ranks.world > 1:
        hi = torch.stack([ranks.to_rows(x, d) for x in hi])
        lo = torch.stack([ranks.to_rows(x, d) for x in lo]) if kind.half else hi
        col = _all_columns(col, d, ranks)
    P = sums.shape[1]

    name = "multiply 128" if kind.half else "multiply 64"
    out = new((), dtype=torch.float32)
    ga, gb = (torch.empty_like(z, dtype=torch.float32) for z in (za, zb))
    done = 0
    for start in range(0, d, WIDTH):
        width = min(WIDTH, d - start)
        bt = _size(name, "BT", kind)
        pairs = cdiv(d, bt) * cdiv(width, bt)
        num_parts, chunk = _parts(name, 2 * pairs, n, kind, 2 * n * n // (d * width) - 1)
        parts = new((2, num_parts, d, width), dtype=torch.float32)
        _launch(
            multiply, name, (pairs, num_parts, 2),
            hi, lo, *parts, n, d, start, width, chunk, int(loss.barlow),
            kind=kind, STRIP=True,
        )  # fmt: skip
        if ranks.world > 1:
            parts, num_parts = ranks.sum_(parts.sum(1)), 1
        ch = new((2, d, width), dtype=hi.dtype)
        cl = torch.empty_like(ch) if kind.half else ch
        squares = new((2, heights, width), dtype=torch.float32)
        across = cdiv(width, side)
        _launch(
            strip_sum, "strip_sum", (heights, across, 2), parts, ch, cl, squares, sums,
            d, P, start, width, num_parts, done, float(loss.m),
            kind=kind,
        )  # fmt: skip
        done += heights * across
        _launch(
            apply, "apply", _apply_grid(n, width, kind),
            hi, lo, ch, cl, hi, lo, za, zb, ga if weights is None else weights, col, squares,
            sums, out, ga, gb, n, d, d, start, width, P, num_columns, done, 0, heights, 1,
            loss.slope, 2 * loss.pull, loss.off, float(loss.n),
            kind=kind, BARLOW=loss.barlow, WEIGHTED=weights is not None,
            PAIR=loss.barlow and loss.n == 2,
        )  # fmt: skip
        del parts, ch, cl, squares  # freed before those of the next strip are allocated
    return out, ga, gb


def builds(barlow: bool) -> Iterator[Build]:
    """Every build that can be chosen when N and D are multiples of 16, for bfloat16 and float32
    inputs; float16 differs only in the inputs of `columns`, `apply` and `exact`.

    Ragged shapes have no vector loads: they are slower and need more registers. Of those builds,
    only the ones that used to spill are included; with the present block sizes they do not. Half
    precision in float32 planes (fewer than FEW rows or columns) is left out: it is too short to
    matter.
    """
    flags = {"BARLOW": barlow, "WEIGHTED": not barlow, "PAIR": False}
    for half in (True, False):
        for name, kernel, choice, ragged in [
            ("columns", columns, {}, False),
            ("multiply 64", multiply, {"STRIP": False}, False),
            ("multiply 64", multiply, {"STRIP": False}, True),
            ("multiply 128", multiply, {"STRIP": False}, False),
            ("multiply 128", multiply, {"STRIP": False}, True),
            ("multiply 128" if half else "multiply 64", multiply, {"STRIP": True}, False),
            ("gram_sum", gram_sum, {}, False),
            ("strip_sum", strip_sum, {}, False),
            ("exact", exact, {}, False),
            ("apply", apply, {}, False),
            *([("apply", apply, {}, True)] if half and not barlow else []),
            *([("barlow_apply 256", barlow_apply, {"ONE": True}, False)] if barlow else []),
            *([("barlow_apply 128", barlow_apply, {"ONE": True}, True)] if barlow else []),
            *([("barlow_apply 128", barlow_apply, {"ONE": False}, False)] if barlow else []),
        ]:
            if name == "multiply 128" and not half:
                continue
            blocks, num_warps, num_stages = TABLES[Kind(half, ragged)][name]
            known = {"LOW": half} | flags | choice | blocks
            constants = {k: v for k, v in known.items() if k in kernel.arg_names}
            signature = {k: _type(k, half) for k in kernel.arg_names if k not in constants}
            if ragged:
                signature |= dict.fromkeys(signature.keys() & {"N", "D", "K", "width"}, "i32")
            label = " ".join(
                [name, "bf16" if half else "fp32", *(f"{k}={v}" for k, v in choice.items())]
            )
            yield Build(
                label + " ragged" * ragged, kernel, signature, constants, num_warps, num_stages
            )


def _type(name: str, half: bool) -> str:
    """Triton's type of a kernel argument."""
    if name in ("N", "D", "K", "start", "width", "chunk"):
        return "i32:16"
    if name in ("P", "other", "first", "strip") or name.startswith("num_"):
        return "i32"
    if name in ("scale", "slope", "pull", "hinge", "off", "m", "rows"):
        return "fp32"
    if name in ("weights", "col", "squares", "parts", "parts_a", "parts_b", "loss", "ga", "gb"):
        return "*fp32:16"
    if name == "sums":
        return "*fp64:16"
    return "*bf16:16" if half else "*fp32:16"
