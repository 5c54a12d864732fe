"""InfoNCE with a queue in plain PyTorch: the definition that every kernel is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce_queue(q: Tensor, k: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Equation 1. q, k: (N, D), queue: (M, D), float. Returns the loss, shape ()."""
    check(q, k, queue, temperature)
    wide = torch.float64 in (q.dtype, k.dtype, queue.dtype)
    q, k, queue = (z.double() if wide else z.float() for z in (q, k, queue))
    q, k, queue = F.normalize(q, dim=1), F.normalize(k, dim=1).detach(), queue.detach()
    positives = (q * k).sum(dim=1) / temperature
    logits = torch.cat([positives[:, None], q @ queue.T / temperature], dim=1)
    return (logits.logsumexp(dim=1) - positives).mean()


def check(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> None:
    matrices = q.ndim == queue.ndim == 2 and q.shape == k.shape
    if not matrices or queue.shape[1] != q.shape[1] or not len(queue):
        raise ValueError(
            "infonce_queue: want q and k of (N, D) and a queue of (M, D), M >= 1,"
            f" got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(queue.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"infonce_queue: want a temperature greater than 0, got {temperature}")
