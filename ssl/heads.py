"""Projectors, predictors and EMA teachers, which accompany a backbone during training."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sslus.engine.errors import InputError
from sslus.kernels.ranks import Ranks, group_name


def mlp(*widths: int, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear-BN-ReLU blocks, then a linear layer: (B, widths[0]) -> (B, widths[-1]).

    norm=False: Linear-ReLU blocks. last_norm: a BatchNorm without scale or shift at the end.
    """
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-2], widths[1:-1], strict=True):
        # No bias before a BatchNorm, which would subtract it.
        layers += [nn.Linear(a, b, bias=not norm), *([nn.BatchNorm1d(b)] if norm else [])]
        layers += [nn.ReLU(inplace=True)]
    layers += [nn.Linear(widths[-2], widths[-1], bias=not norm)]
    if last_norm:
        layers += [nn.BatchNorm1d(widths[-1], affine=False)]
    return nn.Sequential(*layers)


def widths(text: str) -> list[int]:
    """>>> widths("2048-2048-512")
    [2048, 2048, 512]
    """
    try:
        numbers = [int(part) for part in text.split("-")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"projector {text!r}: want widths like 2048-2048-2048")
    return numbers


def teacher_of(*modules: nn.Module) -> nn.Sequential:
    """A copy of `modules` in sequence, without gradients; updated by `follow`."""
    return nn.Sequential(*copy.deepcopy(modules)).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: Iterable[nn.Module], rate: float) -> None:
    """teacher += rate (student - teacher) for every weight: an exponential moving average.

    The teacher has its own BatchNorm statistics: in training mode, those of its batch.
    """
    weights = [p for module in student for p in module.parameters()]
    torch._foreach_lerp_(list(teacher.parameters()), weights, rate)


def joint_mean(rows: Tensor) -> Tensor:
    """The mean of (B,) over the rows of all ranks, with the gradient at this rank's rows."""
    return joint_sum(rows.mean() / Ranks.named(group_name(None)).world)


def joint_sum(own: Tensor) -> Tensor:
    """The sum of () over all ranks, with the gradient at this rank's term."""
    rest = Ranks.named(group_name(None)).sum_(own.detach().clone()) - own.detach()
    return own + rest
