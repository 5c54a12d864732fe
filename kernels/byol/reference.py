"""BYOL's loss in plain PyTorch: the definition that every kernel is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def byol(pa: Tensor, pb: Tensor, ta: Tensor, tb: Tensor) -> Tensor:
    """Equation 2, both directions. All (N, D) float. Returns the loss, shape ()."""
    check(pa, pb, ta, tb)
    pa, pb, ta, tb = (z if z.dtype == torch.float64 else z.float() for z in (pa, pb, ta, tb))
    return distance(pa, tb) + distance(pb, ta)


def distance(p: Tensor, t: Tensor) -> Tensor:
    # |u - v|^2 of unit vectors is 2 - 2 cos, without its cancellation where they agree.
    difference = F.normalize(p, dim=1) - F.normalize(t, dim=1).detach()
    return difference.square().sum(dim=1).mean()


def check(*z: Tensor) -> None:
    if z[0].ndim != 2 or len({t.shape for t in z}) > 1:
        raise ValueError(
            f"byol: want four (N, D) tensors, got {', '.join(str(tuple(t.shape)) for t in z)}"
        )
