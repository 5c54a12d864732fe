"""BYOL's loss on the CPU: dL/dp = (u cos - v) 2 / (N |p|), with u, v the unit vectors.

Extra floats: 5 N D. Across ranks, each keeps its own rows.
"""

import torch
from torch import Tensor

from sslus.kernels.byol.reference import check
from sslus.kernels.products import unit, unit_gradient, work
from sslus.kernels.ranks import Ranks


def byol(
    pa: Tensor, pb: Tensor, ta: Tensor, tb: Tensor, *, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    check(pa, pb, ta, tb)
    n = len(pa) * ranks.world
    loss = torch.zeros((), dtype=torch.float64)
    grads = []
    for p, t in ((pa, tb), (pb, ta)):
        u, length = unit(work(p))
        pull = u - unit(work(t))[0]
        loss += pull.square().sum(dtype=torch.float64)
        grads.append(unit_gradient(pull.mul_(2 / n), u, length))
    return (ranks.sum_(loss) / n).to(torch.float32), *grads
