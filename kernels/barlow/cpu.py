"""BarlowTwins on the CPU: BLAS for the products, closed-form gradients, no D x D matrix.

With a, b the standardised views, sa, sb what they were divided by, d_j = C_jj, l = off_diagonal:

    form   when     off-diagonal sum                          products       extra floats
    Gram   N < D    <a a^T, b b^T> / N^2 - sum_j d_j^2        3.25 N^2 D     2 N^2 + 2 N D
    tiled  N >= D   |tiles of a^T b / N, diagonal 0|^2        3 N D^2        3 N D + (N + 2 D) T

Products are counted in multiplications, of two operations each; autograd of the definition takes
3 N D^2. As Gram matrices are symmetric, only 5/8 of each is computed. The extra floats include the
two gradients; T is the width of a tile, at most 1024 and D / 2; blocks of columns add a little.
Where the Gram form's difference cancels, it is recomputed in float64, with twice the N^2 memory.

Gradient: dL/da = b M^T / N and dL/db = a M / N, where M = dL/dC has 2 l C_ij off its diagonal and
2 (d_j - 1) on it; then dL/dza = (dL/da - a m) / sa, with m_j the mean over the rows of
a_ij dL/da_ij. dL/da has zero column means because b has. The formula is exact, including the 1e-5
inside the root.

d_j - 1 is small where the views agree, so it is not computed as a difference:
d_j - 1 = -mean_i (a_ij - b_ij)^2 / 2 - (1e-5 / sa_j^2 + 1e-5 / sb_j^2) / 2.

With N = 2 each column is (1, -1) except for the effect of the 1e-5. The whole gradient comes from
that small difference, so float64 is used. It is also used for up to FEW elements, where it costs
little and rounding errors do not average out.
"""

import torch
from torch import Tensor

from sslus.kernels import _cpu
from sslus.kernels.barlow.reference import check
from sslus.kernels.products import (
    LEFT,
    add_gram,
    again,
    blocks,
    dot,
    fresh,
    mirror,
    standardised,
)
from sslus.kernels.ranks import Ranks

EPS = 1e-5
FEW = 4096
# Columns of a tile, unless D / 2 is smaller. With 512, BLAS is slower, and there are more
# elementwise passes, after each of which threads wait for each other.
WIDEST = 1024


def barlow(
    za: Tensor, zb: Tensor, *, off_diagonal: float, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = check(za, zb, ranks.world)
    form = gram if n < d else tiled
    dtype = torch.float64 if n == 2 or n * d <= FEW else torch.float32
    loss, *grads = form(za, zb, n, off_diagonal, ranks, dtype)
    return loss.to(torch.float32), *grads


def gram(za, zb, n, off_diagonal, ranks, dtype):
    """Across ranks, each takes its share of the columns, and the N x N matrices are summed."""
    d = za.shape[1]
    views = [ranks.to_columns(z) for z in (za, zb)]
    width = views[0].shape[1]

    v = views[0].new_empty(2, width, dtype=dtype)
    low = views[0].new_empty(width, dtype=dtype)  # d_j - 1
    k = views[0].new_zeros(2, n, n, dtype=dtype)
    excess = views[0].new_zeros(2, n, dtype=torch.float64)  # the diagonals of K minus D
    less = k.new_tensor(-1)
    grads = [fresh(z, torch.float32) for z in views]
    for cols in blocks(n, width, dtype):
        pair = []
        for i, z in enumerate(views):
            x, v[i, cols] = standardised(z[:, cols], dtype, EPS, out=grads[i][:, cols])
            pair.append(x)
            add_gram(k[i], x)
            excess[i] += torch.addcmul(less, x, x).sum(1)
        distances(*pair, low[cols])
        del pair, x  # freed before the next block is allocated
    low = (low / n + (EPS / v).sum(0)) / -2
    for i in range(2):
        mirror(k[i])
    ranks.sum_(k)
    ranks.sum_(excess)

    sums = torch.stack([(1 + low).double().square().sum(), low.double().square().sum()])
    diagonal, invariance = ranks.sum_(sums)
    total = dot(k[0], k[1]) / n**2
    if dtype != torch.float64 and total - diagonal < LEFT * total:
        del k, grads
        return gram(za, zb, n, off_diagonal, ranks, torch.float64)

    # A common value of K's diagonal, about D, only scales a in dL/da, and subtracting a m removes
    # all of it but the share EPS / v. Removing it here avoids its rounding error.
    common = excess.mean(1, keepdim=True)
    k.diagonal(dim1=1, dim2=2).copy_(excess - common)
    factor = 2 * off_diagonal / n**2
    left = (EPS * factor) * (d + common).flip(0).to(dtype) / v  # from K of the other view
    w = (low - off_diagonal * (1 + low)) * (2 / n)
    scale = v.rsqrt_()
    for cols in blocks(n, width, dtype):
        out = [g[:, cols] for g in grads]
        pair = [again(z[:, cols], g, dtype, EPS) for z, g in zip(views, out, strict=True)]
        gradients(pair, k, factor, w[cols], left[:, cols], scale[:, cols], out)
        del pair
    loss = invariance + off_diagonal * (total - diagonal)
    return loss, *(ranks.to_rows(g, d) for g in grads)


def distances(a, b, out):
    """out_j = sum_i (a_ij - b_ij)^2; a may be overwritten."""
    if a.dtype == torch.float32:
        _cpu.distances(a, b, out, torch.get_num_threads())
    else:
        torch.sum(a.sub_(b).square_(), 0, out=out)


def gradients(pair, k, factor, w, left, scale, out):
    """out = scale (g + m x) for the columns x of each view, where g = factor K x + w y, with K and
    y those of the other view, and m = left - mean_i g x. In float32, `pair` is `out`."""
    if pair[0].dtype == torch.float32:
        products = k[1] @ pair[0], k[0] @ pair[1]
        _cpu.cross_gradients(*out, *products, w, factor, *left, *scale, torch.get_num_threads())
        return
    for i, x in enumerate(pair):
        g = (pair[1 - i] * w).addmm_(k[1 - i], x, alpha=factor)
        mean = (g * x).sum(0).div_(-len(x)).add_(left[i])
        torch.mul(g.addcmul_(x, mean), scale[i], out=out[i])


def tiled(za, zb, n, off_diagonal, ranks, dtype):
    """Across ranks, each keeps its rows, and the tiles are summed as they are computed.

    Fresh memory and passes over (N, D) would take half of the time that is not spent on products.
    Therefore b is standardised one tile's columns at a time, in reused memory, and a is only
    centred: the tile, which is smaller, is scaled instead of a and its gradient.
    """
    d = za.shape[1]
    width = min(WIDEST, -(-d // 2))
    a, ga, gb = (fresh(z, dtype) for z in (za, za, zb))
    va = centre(za, a, gb, n, ranks)
    ra = va.rsqrt()
    ma = torch.zeros_like(va)  # sums of C * M over each row of C; mb: over each column
    loss = va.new_zeros((), dtype=torch.float64)
    room = a.new_empty(len(a), width)
    for s in range(0, d, width):
        cols = slice(s, min(s + width, d))
        b, spare = room[:, : cols.stop - s], gb[:, cols]  # gb is scratch until it is computed
        vb = centre(zb[:, cols], b, spare, n, ranks)
        rb = vb.rsqrt()
        b *= rb
        low = torch.addcmul(b, a[:, cols], ra[cols], value=-1, out=spare).square_().sum(0)
        low = (ranks.sum_(low) / n + EPS / va[cols] + EPS / vb) / -2  # d_j - 1

        tile = ranks.sum_(a.T @ b).mul_(ra[:, None] / n)
        diagonal = tile[cols].diagonal()
        diagonal.zero_()  # so that it need not be subtracted from the sum of squares
        squares = tile.square()
        mb = squares.sum(0)
        loss += low.double().square().sum() + off_diagonal * mb.sum(dtype=torch.float64)
        mb.mul_(2 * off_diagonal).add_(low * (1 + low), alpha=2)
        ma.add_(squares.sum(1), alpha=2 * off_diagonal)
        ma[cols].add_(low * (1 + low), alpha=2)

        tile *= ra[:, None] * (2 * off_diagonal / n)
        diagonal.copy_(low * ra[cols] * (2 / n))
        ga.addmm_(b, tile.T, beta=0 if s == 0 else 1)
        tile *= rb
        torch.mm(a, tile, out=gb[:, cols]).addcmul_(b, mb * rb, value=-1 / n)
    ga.addcmul_(a, ma / va, value=-1 / n)
    return loss, ga.float(), gb.float()


def centre(z, out, spare, n, ranks):
    """Write z minus its means over the n rows of all ranks to `out`; returns the variances + EPS.

    Makes few passes over all rows rather than many over blocks, as `centred_rows` does: threads
    synchronise less often.
    """
    torch.sub(z, ranks.sum_(z[:1].to(out.dtype, copy=True)).div_(ranks.world), out=out)
    out -= ranks.sum_(out.sum(0)).div_(n)
    v = ranks.sum_(torch.square(out, out=spare).sum(0)).div_(n).add_(EPS)
    # NaN for a variance that has overflowed: divided by it, a column would be 0 in both views, and
    # the loss, which is computed from their difference, that of a perfect one.
    return v.add_(v * 0)
