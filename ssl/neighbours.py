"""Weighted k nearest neighbours: what features are worth without training on them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 20
TEMPERATURE = 0.07
BLOCK = 1 << 22  # cosines at a time; a block takes some 130 MB


def knn(x: np.ndarray, y: np.ndarray, query: np.ndarray, num_classes: int) -> np.ndarray:
    """The class with most `votes`: (Q,) int64; of equal ones, the first."""
    return votes(x, y, query, num_classes).argmax(1)


@torch.no_grad()
def votes(
    x: np.ndarray,
    y: np.ndarray,
    query: np.ndarray,
    num_classes: int,
    *,
    device: torch.device | str = "cpu",
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The votes of the most similar training frames: (Q, num_classes) float64.

        votes_c = sum of exp(cosine(query, x_i) / 0.07) over the 20 nearest i with y_i = c

    x: (N, F) features with labels y, (N,) int64; query: (Q, F). If N < 20, all frames vote. Of
    equally near frames, the first ones vote. Computed on `device`, which needs memory for x and
    query in float64; report(number of queries done) is called after each block. Wu et al. 2018,
    arXiv:1805.01978, section 3.4.
    """
    x, query = _unit(x, device), _unit(query, device)
    y = torch.from_numpy(y).to(device)
    k, rows = min(NEIGHBOURS, len(x)), max(1, BLOCK // len(x))
    number = torch.arange(len(x), device=device)
    total = torch.zeros(len(query), num_classes, dtype=torch.float64, device=device)
    for start in range(0, len(query), rows):
        cosine = query[start : start + rows] @ x.T
        # Rounding distances to multiples of 2^-29 gives equal frames equal distances, whatever the
        # order of summation in float64. The frame's number in the low bits makes all keys
        # different, so that the nearest ones are the same everywhere.
        key = ((1 - cosine) * 2**29).round_().long().bitwise_left_shift_(32).bitwise_or_(number)
        near = key.topk(k, largest=False).values.bitwise_and_(0xFFFFFFFF)
        weight = (cosine.gather(1, near) / TEMPERATURE).exp_()
        part = total[start : start + rows]
        for i, w in zip(y[near].split(1, dim=1), weight.split(1, dim=1), strict=True):
            part.scatter_add_(1, i, w)  # one addition to each row: in the same order on a GPU
        report(start + len(part))
    return total.cpu().numpy()


def _unit(x: np.ndarray, device: torch.device | str) -> Tensor:
    x = torch.from_numpy(x).to(device, torch.float64)
    return x / x.norm(dim=1, keepdim=True).clamp_min_(1e-12)
