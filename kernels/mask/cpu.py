"""Masks on the CPU: glue around cpu.cpp.

The loss takes two passes. The first draws each sample's mask, stores it as a row of a table, and
counts the hidden pixels; the counts, summed over the ranks, give sum w. It reads the target only if
the mask depends on the sector. The second reads prediction and target and writes the gradient.
"""

import torch
from torch import Tensor

from sslus.kernels.mask.reference import check, check_weights, plan
from sslus.kernels.ranks import Ranks


def mask_fill(
    x: Tensor,
    target: Tensor,
    ids: Tensor,
    out: Tensor,
    *,
    background: float,
    fill: float,
    **scalars,
) -> None:
    """Writes x into out, both (B, 1, H, W) float32 or bfloat16, with `fill` where hidden."""
    from sslus.kernels import _cpu

    p = plan(*x.shape[-2:], background=background, **scalars)
    _cpu.mask_fill(x, target, ids, out, p.numbers, background, fill, torch.get_num_threads())


def masked_mse(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor,
    *,
    background: float,
    hole: float,
    rest: float,
    ranks: Ranks,
    **scalars,
) -> tuple[Tensor, Tensor]:
    """The loss () float32 and the gradient of the prediction."""
    from sslus.kernels import _cpu

    check(prediction, target, ids)
    check_weights(hole, rest)
    threads = torch.get_num_threads()
    p = plan(*prediction.shape[-2:], background=background, **scalars)
    # Each row: the rectangles, then for each cell 1 if it is hidden (rectangles: in the sector).
    table = torch.empty((len(ids), 4 * p.num + p.cells), dtype=torch.int32)
    hidden = _cpu.mask_table(target, ids.long(), table, p.numbers, background, threads)
    count = ranks.sum_(torch.tensor([hidden, prediction.numel()]))
    hidden, pixels = count.tolist()
    total = hole * hidden + rest * (pixels - hidden)
    gradient = torch.empty_like(prediction)
    losses = torch.empty(len(ids), dtype=torch.float64)
    _cpu.masked_mse(
        prediction, target, table, gradient, losses, p.numbers, hole / total, rest / total, threads
    )
    return ranks.sum_(losses.sum()).float(), gradient
