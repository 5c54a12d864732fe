"""BarlowTwins in plain PyTorch: the definition that every kernel is measured against."""

import torch
from torch import Tensor


def barlow(za: Tensor, zb: Tensor, *, off_diagonal: float) -> Tensor:
    """Equation 1. za, zb: (N, D) float, N >= 2. Returns the loss, shape ()."""
    n, d = check(za, zb)
    wide = torch.float64 in (za.dtype, zb.dtype)
    a, b = (standardised(z.double() if wide else z.float()) for z in (za, zb))
    c = a.T @ b / n  # equation 2
    # Masked, not "all minus the diagonal": that difference cancels when the rest is small.
    eye = torch.eye(d, dtype=torch.bool, device=c.device)
    off = c.masked_fill(eye, 0).square().sum()
    return (c.diagonal() - 1).square().sum() + off_diagonal * off


def standardised(z: Tensor) -> Tensor:
    z = z - z.mean(dim=0)
    # As nn.BatchNorm1d in the authors' code: biased, 1e-5 inside the root.
    return z / (z.square().mean(dim=0) + 1e-5).sqrt()


def check(za: Tensor, zb: Tensor, world: int = 1) -> tuple[int, int]:
    """N over all ranks and D, of inputs that can be compared."""
    if za.ndim != 2 or za.shape != zb.shape or len(za) * world < 2:
        raise ValueError(
            "barlow: want two (N, D) tensors with N >= 2,"
            f" got {tuple(za.shape)} and {tuple(zb.shape)}"
        )
    return len(za) * world, za.shape[1]
