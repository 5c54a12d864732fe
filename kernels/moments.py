"""Means and variances of the columns of two views, from which logged terms are computed.

One pass over the views; across ranks, only six numbers per column are summed, and no rows gathered.
They are for logs alone, so SSLUS_KERNELS does not select how they are computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sslus.kernels import _cpu
from sslus.kernels.products import work
from sslus.kernels.ranks import Ranks


class Moments(NamedTuple):
    """Per column, over the rows of all ranks; variances are biased.

    The last is the variance of za - zb, which is small where the views agree and therefore cannot
    be derived from the others.
    """

    means: Tensor  # (2, D): of za and of zb
    variances: Tensor  # (2, D)
    of_difference: Tensor  # (D,)


@torch.no_grad()
def moments(za: Tensor, zb: Tensor, ranks: Ranks) -> Moments:
    """za, zb: (N, D) float, the rows of this rank."""
    compiled = za.device.type == "cpu" and {za.dtype, zb.dtype} <= {torch.float32, torch.bfloat16}
    own = _moments_cpu(za, zb) if compiled else _in_torch(za, zb)
    if ranks.world > 1:
        x = own.double()  # in float32, subtracting the squared means would leave rounding errors
        means = torch.cat([x[:2], x[:1] - x[1:2]])
        joint = ranks.sum_(torch.cat([means, x[2:] + means.square()])) / ranks.world
        variances = (joint[3:] - joint[:3].square()).clamp(min=0)
        own = torch.cat([joint[:2], variances]).to(own.dtype)
    return Moments(own[:2], own[2:4], own[4])


def _in_torch(za: Tensor, zb: Tensor) -> Tensor:
    za, zb = work(za), work(zb)
    (var_a, mean_a), (var_b, mean_b) = (torch.var_mean(z, 0, correction=0) for z in (za, zb))
    return torch.stack([mean_a, mean_b, var_a, var_b, (za - zb).var(0, correction=0)])


@torch.library.custom_op("sslus::moments_cpu", mutates_args=())
def _moments_cpu(za: Tensor, zb: Tensor) -> Tensor:
    """(5, D) float32. torch takes several times as long for a variance over the rows."""
    out = za.new_empty(5, za.shape[1], dtype=torch.float32)
    _cpu.moments(za.contiguous(), zb.contiguous(), out, torch.get_num_threads())
    return out


@_moments_cpu.register_fake
def _(za, zb):
    return za.new_empty(5, za.shape[1], dtype=torch.float32)
