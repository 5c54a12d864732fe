"""VICReg on the CPU: BLAS for the products, closed-form gradients, no D x D matrix.

With x the centred z, v_j = |x_j|^2 / (N - 1), s_j = sqrt(v_j + 1e-4), both forms are exact:

    form   when     covariance term, times D                     products      extra floats
    Gram   N < D    |x x^T|_F^2 / (N - 1)^2 - sum_j v_j^2        3.25 N^2 D    N^2 + 2 N D
    tiled  N >= D   |tiles of x^T x / (N - 1), diagonal 0|^2     3.25 N D^2    3 N D + 512 D

Products are counted in multiplications, of two operations each; autograd of the definition takes
6 N D^2. Only 5/8 of a symmetric matrix is computed. The extra floats include the two gradients;
blocks of columns add a little. If the Gram form's difference cancels for a view, because few
dimensions have most of the variance, it is recomputed for that view in float64, with twice the
N^2 memory and in three times the time.

Gradient: dL/dz = 2 / (N - 1) x M, where M = dL/dcov has 2 covariance / D cov_ij off its diagonal
and -[s_j < 1] variance / (4 D s_j) on it, plus that of the invariance term. x M has zero column
means because x has, so centring needs no gradient of its own. In the Gram form
cov x^T = x^T (x x^T) / (N - 1).
"""

import torch
from torch import Tensor

from sslus.kernels import _cpu
from sslus.kernels.products import (
    LEFT_OF_ONE,
    TILE,
    add_gram,
    again,
    blocks,
    centred_rows,
    dot,
    fresh,
    mirror,
    standardised,
    work,
)
from sslus.kernels.ranks import Ranks
from sslus.kernels.vicreg.reference import check


def vicreg(
    za: Tensor,
    zb: Tensor,
    weights: Tensor | None = None,
    *,
    invariance: float,
    variance: float,
    covariance: float,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = check(za, zb, weights, ranks.world)
    form = gram if n < d else tiled
    loss, *grads = form(za, zb, weights, n, (invariance, variance, covariance), ranks)
    return loss.to(torch.float32), *grads


def gram(za, zb, weights, n, factors, ranks):
    """Across ranks, each takes its share of the columns, and the N x N matrices are summed."""
    invariance, variance, covariance = factors
    d = za.shape[1]
    views = [ranks.to_columns(z) for z in (za, zb)]
    if weights is not None:
        weights = ranks.join(weights.float()).contiguous()
    threads = torch.get_num_threads()
    squares = torch.tensor(_cpu.distance(*views, weights, threads), dtype=torch.float64)
    loss = invariance / (n * d) * ranks.sum_(squares)
    grads = []
    for z, other in (views, views[::-1]):
        pull = (other, weights, 2 * invariance / (n * d))
        part, g = spread(z, pull, n, d, variance, covariance, ranks, torch.float32)
        loss += part
        grads.append(ranks.to_rows(g, d))
    return loss, *grads


def spread(z, pull, n, d, variance, covariance, ranks, dtype):
    """The variance and covariance terms of a view, and its whole gradient. pull, for the gradient
    of the invariance term: the other view, the weights of the pairs, and a factor."""
    width = z.shape[1]
    v, k = z.new_empty(width, dtype=dtype), z.new_zeros(n, n, dtype=dtype)
    grad = fresh(z, torch.float32)
    for cols in blocks(n, width, dtype):
        x, v[cols] = standardised(z[:, cols], dtype, out=grad[:, cols])
        add_gram(k, x)
        del x
    v *= n / (n - 1)
    mirror(k)
    ranks.sum_(k)

    s = (v + 1e-4).sqrt_()
    hinge = (1 - s).clamp_(min=0).sum(dtype=torch.float64)
    diagonal, hinge = ranks.sum_(torch.stack([v.double().square().sum(), hinge]))
    total = dot(k, k) / (n - 1) ** 2
    off = total - diagonal
    if dtype != torch.float64 and off < LEFT_OF_ONE * total:
        del k, grad
        return spread(z, pull, n, d, variance, covariance, ranks, torch.float64)

    slope = v * (-4 * covariance / (d * (n - 1)))
    slope -= (s < 1) * (variance / (2 * d * (n - 1))) / s
    other, weights, factor = pull
    alpha = 4 * covariance / (d * (n - 1) ** 2)
    for cols in blocks(n, width, dtype):
        own, out = z[:, cols], grad[:, cols]
        x = again(own, out, dtype)
        gradient(own, other[:, cols], weights, factor, x, slope[cols], k, alpha, out)
        del x
    return variance / (2 * d) * hinge + covariance / d * off, grad


def gradient(z, other, weights, factor, x, slope, k, alpha, out):
    """out = factor weights (z - other) + slope x + alpha K x, for some columns of a view. In
    float32, x is `out`."""
    if x.dtype == torch.float32:
        threads = torch.get_num_threads()
        _cpu.spread_gradient(z, other, weights, factor, k @ x, alpha, slope, out, threads)
        return
    pulled = (z.to(x.dtype) - other).mul_(factor)
    if weights is not None:
        pulled *= weights[:, None]
    out.copy_(pulled.addcmul_(x, slope).addmm_(k, x, alpha=alpha))


def weighted_squares(pull: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of squares times the weights of the pairs, float64, (); `pull` is weighted in-place."""
    if weights is None:
        return dot(pull, pull)
    weighted = pull * weights
    total = dot(pull, weighted)
    pull.copy_(weighted)
    return total


def tiled(za, zb, weights, n, factors, ranks):
    """Across ranks, each keeps its rows, and the tiles are summed as they are computed."""
    invariance, variance, covariance = factors
    d = za.shape[1]
    pull = za.float() - zb
    squares = weighted_squares(pull, None if weights is None else work(weights)[:, None])
    loss = invariance / (n * d) * ranks.sum_(squares)
    factor = 2 * invariance / (n * d)
    grads = pull * factor, pull.mul_(-factor)  # of the invariance term; the others are added
    for z, g in zip((za, zb), grads, strict=True):
        x, v = centred_rows(z, n, ranks)
        s = v.div_(n - 1).add_(1e-4).sqrt_()
        loss += variance / (2 * d) * (1 - s).clamp_(min=0).sum(dtype=torch.float64)
        slope = (s < 1) * (-variance / (2 * d * (n - 1))) / s
        for a in range(0, d, TILE):
            b = min(a + TILE, d)
            tile = ranks.sum_(x[:, a:].T @ x[:, a:b]).div_(n - 1)  # rows a to d of columns a to b
            square, below = tile[: b - a], tile[b - a :]
            square.diagonal().zero_()  # so that it need not be subtracted from the sum of squares
            loss += covariance / d * (dot(square, square) + 2 * dot(below, below))
            tile *= 4 * covariance / (d * (n - 1))
            square.diagonal().copy_(slope[a:b])
            g[:, a:b].addmm_(x[:, a:], tile)
            g[:, b:].addmm_(x[:, a:b], below.T)
        del x, tile, square, below  # freed before the other view is centred
    return loss, *grads
