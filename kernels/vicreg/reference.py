"""VICReg in plain PyTorch: the definition that every kernel is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def vicreg(
    za: Tensor, zb: Tensor, *, invariance: float, variance: float, covariance: float
) -> Tensor:
    """za, zb: (N, D) float, N >= 2. Returns the loss, shape ()."""
    if za.ndim != 2 or za.shape != zb.shape or len(za) < 2:
        raise ValueError(
            "vicreg: want two (N, D) tensors with N >= 2,"
            f" got {tuple(za.shape)} and {tuple(zb.shape)}"
        )
    return (
        invariance * invariance_term(za, zb)
        + variance * (variance_term(za) + variance_term(zb)) / 2
        + covariance * (covariance_term(za) + covariance_term(zb))
    )


def invariance_term(za: Tensor, zb: Tensor) -> Tensor:
    return F.mse_loss(za, zb)


def variance_term(z: Tensor) -> Tensor:
    # 1e-4 inside the root bounds its slope where a dimension is dead.
    return F.relu(1 - (z.var(dim=0, unbiased=True) + 1e-4).sqrt()).mean()


def covariance_term(z: Tensor) -> Tensor:
    n, d = z.shape
    z = z - z.mean(dim=0)
    cov = z.T @ z / (n - 1)
    # Masked, not "all minus the diagonal": that difference cancels when the rest is small.
    eye = torch.eye(d, dtype=torch.bool, device=z.device)
    return cov.masked_fill(eye, 0).square().sum() / d
