"""NT-Xent in plain PyTorch: the definition that every kernel is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ntxent(za: Tensor, zb: Tensor, *, temperature: float) -> Tensor:
    """Equation 1, averaged as in algorithm 1. za, zb: (N, D) float. Returns the loss, ()."""
    n, _ = check(za, zb, temperature)
    u = torch.cat([z if z.dtype == torch.float64 else z.float() for z in (za, zb)])
    u = F.normalize(u, dim=1)
    logits = (u @ u.T / temperature).fill_diagonal_(float("-inf"))
    positives = torch.cat([logits.diagonal(n), logits.diagonal(-n)])
    return (logits.logsumexp(dim=1) - positives).mean()


def check(za: Tensor, zb: Tensor, temperature: float) -> tuple[int, int]:
    if za.ndim != 2 or za.shape != zb.shape:
        raise ValueError(
            f"ntxent: want two (N, D) tensors, got {tuple(za.shape)} and {tuple(zb.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"ntxent: want a temperature greater than 0, got {temperature}")
    return za.shape
