"""VICReg in plain PyTorch: the definition that every kernel is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def vicreg(
    za: Tensor,
    zb: Tensor,
    weights: Tensor | None = None,
    *,
    invariance: float,
    variance: float,
    covariance: float,
) -> Tensor:
    """Equation 6. za, zb: (N, D) float, N >= 2; weights: (N,) or None. Returns the loss, ()."""
    check(za, zb, weights)
    za, zb = (z if z.dtype == torch.float64 else z.float() for z in (za, zb))
    return (
        invariance * invariance_term(za, zb, weights)
        + variance * (variance_term(za) + variance_term(zb)) / 2
        + covariance * (covariance_term(za) + covariance_term(zb))
    )


def check(za: Tensor, zb: Tensor, weights: Tensor | None, world: int = 1) -> tuple[int, int]:
    """N over all ranks and D, of inputs that can be compared."""
    if za.ndim != 2 or za.shape != zb.shape or len(za) * world < 2:
        raise ValueError(
            "vicreg: want two (N, D) tensors with N >= 2,"
            f" got {tuple(za.shape)} and {tuple(zb.shape)}"
        )
    if weights is not None and weights.shape != za.shape[:1]:
        raise ValueError(f"vicreg: want {len(za)} weights, got {tuple(weights.shape)}")
    return len(za) * world, za.shape[1]


def invariance_term(za: Tensor, zb: Tensor, weights: Tensor | None) -> Tensor:
    """Equation 5, over D; each pair times its weight."""
    if weights is None:
        return F.mse_loss(za, zb)
    return ((za - zb).square().mean(dim=1) * weights.detach()).mean()


def variance_term(z: Tensor) -> Tensor:
    """Equations 1 and 2."""
    return hinge(z.var(dim=0, unbiased=True))


def hinge(variances: Tensor) -> Tensor:
    # 1e-4 inside the root bounds its slope where a dimension is dead.
    return F.relu(1 - (variances + 1e-4).sqrt()).mean()


def covariance_term(z: Tensor) -> Tensor:
    """Equations 3 and 4."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    cov = z.T @ z / (n - 1)
    # Masked, not "all minus the diagonal": that difference cancels when the rest is small.
    eye = torch.eye(d, dtype=torch.bool, device=z.device)
    return cov.masked_fill(eye, 0).square().sum() / d
