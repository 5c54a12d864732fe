"""VICReg on the CPU: BLAS for the products, closed-form gradients, no D x D matrix.

With x the centred z, v_j = |x_j|^2 / (N - 1), s_j = sqrt(v_j + 1e-4), both forms are exact:

    form   when     covariance term, times D                     products      extra floats
    Gram   N < D    |x x^T|_F^2 / (N - 1)^2 - sum_j v_j^2        3.25 N^2 D    2 N^2 + 2 N D
    tiled  N >= D   |tiles of x^T x / (N - 1), diagonal 0|^2     3.25 N D^2    4 N D + 512 D

A product of N^2 D stands for 2 N^2 D operations; autograd of the definition takes 6 N D^2. Only
5/8 of a symmetric matrix are computed. The extra floats hold the two gradients. Where the Gram
form's difference cancels, it is made again in float64, at twice the memory and three times the
time: few dimensions with nearly all of the variance.

Gradient: dL/dz = 2 / (N - 1) x M, where M = dL/dcov has 2 covariance / D cov_ij off its diagonal
and -[s_j < 1] variance / (4 D s_j) on it, plus the invariance term's. x M has zero mean because
x has, so that centring needs no gradient of its own. In the Gram form cov x^T = x^T (x x^T).
"""

import torch
from torch import Tensor

from sslus.kernels.products import (
    LEFT,
    TILE,
    add_gram,
    blocks,
    centred,
    centred_rows,
    dot,
    mirror,
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
    return loss.to(torch.float32), *(g.to(z.dtype) for g, z in zip(grads, (za, zb), strict=True))


def gram(za, zb, weights, n, factors, ranks, dtype=torch.float32):
    """Across ranks each takes its share of the columns, and the N x N matrices are added."""
    invariance, variance, covariance = factors
    d = za.shape[1]
    views = [ranks.to_columns(work(z)) for z in (za, zb)]
    pair = None if weights is None else ranks.join(work(weights))[:, None]
    width = views[0].shape[1]

    grads = [torch.empty_like(z, dtype=dtype) for z in views]  # first x, then its gradient
    v = views[0].new_empty(2, width, dtype=dtype)
    k = views[0].new_zeros(2, n, n, dtype=dtype)
    for cols in blocks(n, width):
        for i, z in enumerate(views):
            x = centred(z[:, cols], dtype)
            v[i, cols] = x.square().sum(0)
            add_gram(k[i], x)
            grads[i][:, cols] = x
            del x  # or the next would be made beside it
    v /= n - 1
    for i in range(2):
        mirror(k[i])
    ranks.sum_(k)

    s = (v + 1e-4).sqrt_()
    hinge = (1 - s).clamp_(min=0).sum(dtype=torch.float64)
    *diagonal, hinge = ranks.sum_(torch.stack([*v.double().square().sum(1), hinge]))
    total = [dot(k[i], k[i]) / (n - 1) ** 2 for i in range(2)]
    off = [t - g for t, g in zip(total, diagonal, strict=True)]
    if dtype != torch.float64 and any(o < LEFT * t for o, t in zip(off, total, strict=True)):
        del grads, k
        return gram(za, zb, weights, n, factors, ranks, torch.float64)

    slope = v * (-4 * covariance / (d * (n - 1)))
    slope -= (s < 1) * (variance / (2 * d * (n - 1))) / s
    squares = torch.zeros((), dtype=torch.float64)
    for cols in blocks(n, width):
        pull = views[0][:, cols].to(dtype) - views[1][:, cols]
        squares += weighted_squares(pull, pair)
        for i, sign in enumerate((1, -1)):
            x = grads[i][:, cols]
            g = (x * slope[i, cols]).add_(pull, alpha=sign * 2 * invariance / (n * d))
            x.copy_(g.addmm_(k[i], x, alpha=4 * covariance / (d * (n - 1) ** 2)))
            del g
        del pull
    loss = invariance / (n * d) * ranks.sum_(squares)
    loss += variance / (2 * d) * hinge + covariance / d * sum(off)
    return loss, *(ranks.to_rows(g.to(z.dtype), d) for g, z in zip(grads, views, strict=True))


def weighted_squares(pull: Tensor, pair: Tensor | None) -> Tensor:
    """Sum of the squares times the pairs' weights, float64, (); `pull` is weighted in place."""
    if pair is None:
        return dot(pull, pull)
    weighted = pull * pair
    total = dot(pull, weighted)
    pull.copy_(weighted)
    return total


def tiled(za, zb, weights, n, factors, ranks):
    """Across ranks each keeps its rows, and the tiles are added as they are made."""
    invariance, variance, covariance = factors
    d = za.shape[1]
    pull = work(za) - work(zb)
    squares = weighted_squares(pull, None if weights is None else work(weights)[:, None])
    loss = invariance / (n * d) * ranks.sum_(squares)
    grads = []
    for z, sign in ((za, 1), (zb, -1)):
        x, v = centred_rows(work(z), torch.float32, n, ranks)
        s = v.div_(n - 1).add_(1e-4).sqrt_()
        loss += variance / (2 * d) * (1 - s).clamp_(min=0).sum(dtype=torch.float64)
        slope = (s < 1) * (-variance / (2 * d * (n - 1))) / s
        g = pull * (sign * 2 * invariance / (n * d))
        for a in range(0, d, TILE):
            b = min(a + TILE, d)
            tile = ranks.sum_(x[:, a:].T @ x[:, a:b]).div_(n - 1)  # rows a to d of columns a to b
            square, below = tile[: b - a], tile[b - a :]
            square.diagonal().zero_()  # no sum from which it would have to be subtracted again
            loss += covariance / d * (dot(square, square) + 2 * dot(below, below))
            tile *= 4 * covariance / (d * (n - 1))
            square.diagonal().copy_(slope[a:b])
            g[:, a:b].addmm_(x[:, a:], tile)
            g[:, b:].addmm_(x[:, a:b], below.T)
        grads.append(g)
    return loss, *grads
