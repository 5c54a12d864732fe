"""Is the representation alive? Numbers that fall when features collapse."""

import torch
from torch import Tensor

# A collapsed backbone gives every frame the same feature, so that one direction is left. The
# features of a trained or random ResNet lie on tens of directions.
LEAST_RANKME = 2.0
LEAST_SPREAD = 1e-3


@torch.no_grad()
def rankme(h: Tensor) -> float:
    """How many directions the rows of h (B, F) fill: 1 .. min(B, F).

        exp(-sum_k p_k log p_k),    p = singular values / their sum

    Garrido et al. 2023, arXiv:2210.02885, equation 1. Compare values at one B only: B is a
    ceiling.
    """
    s = torch.linalg.svdvals(h.float())
    p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.special.entr(p).sum().exp().item()


@torch.no_grad()
def feature_std(h: Tensor) -> tuple[float, float]:
    """The mean over dimensions of the std over rows, and the same relative to h's RMS."""
    std = h.float().std(dim=0).mean()
    return std.item(), (std / h.float().square().mean().sqrt().clamp_min(1e-12)).item()


def collapse(rank: float, spread: float) -> str | None:
    """A line of warning for a RankMe and a relative std, or None."""
    if rank >= LEAST_RANKME and spread >= LEAST_SPREAD:
        return None
    return (
        f"the features have collapsed (RankMe {rank:.1f}, relative std {spread:.2g}): every frame"
        " gets nearly the same feature. Try a lower --lr, a longer --warmup-steps or a larger"
        " --variance"
    )
