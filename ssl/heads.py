"""Projectors: what stands between the backbone and the loss, and is thrown away after."""

from torch import nn

from sslus.engine.errors import InputError


def mlp(*widths: int) -> nn.Sequential:
    """Linear-BN-ReLU blocks, then a bare linear: (B, widths[0]) -> (B, widths[-1])."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-2], widths[1:-1], strict=True):
        # No bias: the BatchNorm that follows would subtract it.
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))


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
