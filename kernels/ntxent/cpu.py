"""NT-Xent on the CPU: the 2N x 2N logits in bands of rows, consumed as they are computed.

With P_ik = exp(s_ik - lse_i) the gradient is

    dL/du_i = (sum_k (P_ik + P_ki) u_k - 2 u_p) / (2 N T)

As s is symmetric, P_ki needs the lse of row k but not its logits: across ranks, each computes the
logits of its own rows against all, and the lse are gathered.

This takes two products of 4 N^2 D multiplications, where autograd of the definition takes three; if
the logits do not fit into one band, they are computed twice. Extra floats: 2 bands, 10 N D.
"""

import torch
from torch import Tensor

from sslus.kernels.ntxent.reference import check
from sslus.kernels.products import unit, unit_gradient, work
from sslus.kernels.ranks import Ranks

BAND = 1 << 24  # logits at a time: 64 MiB


def ntxent(
    za: Tensor, zb: Tensor, *, temperature: float, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = check(za, zb, temperature)
    (ua, length_a), (ub, length_b) = unit(work(za)), unit(work(zb))
    own = torch.cat([ua, ub])
    u = torch.cat([ranks.join(ua), ranks.join(ub)])
    num = len(u)
    # The indices in u of this rank's 2 n views, and of the other view of each.
    rows = torch.arange(n) + ranks.rank * n
    rows = torch.cat([rows, rows + num // 2])
    others = (rows + num // 2) % num
    band = max(1, BAND // num)
    starts = range(0, 2 * n, band)

    def logits(start: int) -> Tensor:
        s = (own[start : start + band] @ u.T).div_(temperature)
        return s.scatter_(1, rows[start : start + band, None], float("-inf"))

    lse, positives = own.new_empty(2 * n), own.new_empty(2 * n)
    for start in starts:
        s = logits(start)
        lse[start : start + band] = s.logsumexp(1)
        # One of these very logits: from another sum, its rounding would be most of a small loss.
        positives[start : start + band] = s.gather(1, others[start : start + band, None])[:, 0]
        if len(starts) > 1:
            del s
    loss = ranks.sum_((lse - positives).sum(dtype=torch.float64)) / num
    every = torch.cat([ranks.join(half) for half in lse.split(n)])

    grad = torch.empty_like(own)
    for start in starts:
        if len(starts) > 1:
            s = logits(start)
        p = (s - lse[start : start + band, None]).exp_()
        p += s.sub_(every).exp_()
        # Where the views agree, this weight is all but 0. Subtracted from the product, u_p would
        # leave the rounding of the product.
        other = others[start : start + band, None]
        p.scatter_add_(1, other, p.new_full(other.shape, -2))
        torch.mm(p, u, out=grad[start : start + band])
        del s, p  # freed before the next band is allocated
    grad.div_(num * temperature)
    ga, gb = grad.split(n)
    return (
        loss.to(torch.float32),
        unit_gradient(ga, ua, length_a),
        unit_gradient(gb, ub, length_b),
    )
