"""Convolutions of small feature maps on the CPU, as one matrix product each.

The last blocks of a ResNet, which have most of its weights, see 3 x 3 pixels at an image size of
96, and 2 x 2 at 64. PyTorch's convolutions (oneDNN) then reach a tenth of the processor's speed; a
product of all windows of the batch with the weights reaches most of it, two to ten times as much.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_PIXELS = 16  # of the result; beyond, copying the windows costs more than is saved,
LEAST_WEIGHTS = 2**16  # as it does below this many per pixel of the window


def use_products(model: nn.Module) -> nn.Module:
    """Let all suitable convolutions in `model` compute small maps this way; returns `model`.

    Only `forward` changes, not parameters or names. The results differ by rounding.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _suits(module):
            module.__class__ = SmallMapConv2d
    return model


def _suits(conv: nn.Conv2d) -> bool:
    side = conv.kernel_size[0]
    return (
        conv.kernel_size == (side, side)
        and conv.padding == (side // 2, side // 2)
        and conv.padding_mode == "zeros"
        and side in (1, 3)
        and conv.stride in ((1, 1), (2, 2))
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and conv.in_channels * conv.out_channels >= LEAST_WEIGHTS
    )


class SmallMapConv2d(nn.Conv2d):
    """nn.Conv2d for (N, C, h, w); `product` on the CPU, if the result is small."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.stride[0]
        rows, columns = ((n + step - 1) // step for n in x.shape[2:])
        if x.device.type != "cpu" or not 0 < rows * columns <= MOST_PIXELS:
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return product(x, weight, step)


def product(x: Tensor, weight: Tensor, step: int) -> Tensor:
    """F.conv2d(x, weight, stride=step, padding=k // 2) for (N, C, h, w) and (O, C, k, k), k odd.

    The result is channels_last. It has no second derivative.
    """
    return _Product.apply(x, weight, step)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, step):
        ctx.save_for_backward(x, weight)
        ctx.step = step
        rows, columns = ((n + step - 1) // step for n in x.shape[2:])
        y = _windows(x, weight.shape[2], step) @ _matrix(weight).T
        return y.view(len(x), rows, columns, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        step, side = ctx.step, weight.shape[2]
        rows, columns = gradient.shape[2:]
        gradient = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = gradient.T @ _windows(x, side, step)
            dw = dw.view(len(weight), side, side, -1).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[0]:
            taps = (gradient @ _matrix(weight)).view(len(x), rows, columns, side, side, -1)
            dx = _sum_of_windows(taps, step, x.shape[2:]).permute(0, 3, 1, 2).to(x.dtype)
        return dx, dw, None


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, k, k) -> (O, k^2 C); without a copy if it is channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _windows(x: Tensor, side: int, step: int) -> Tensor:
    """The windows of (N, C, h, w), with zeros around it, as rows: (N rows columns, k^2 C)."""
    margin = side // 2
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, margin, margin, margin, margin))
    x = x.unfold(1, side, step).unfold(2, side, step)  # (N, rows, columns, C, k, k)
    return x.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


def _sum_of_windows(taps: Tensor, step: int, size: tuple[int, int]) -> Tensor:
    """The transpose of `_windows`: (N, rows, columns, k, k, C) -> (N, h, w, C).

    Added up in float32 or more.
    """
    num, rows, columns, side, _, channels = taps.shape
    margin = side // 2
    dtype = torch.promote_types(taps.dtype, torch.float32)
    x = taps.new_zeros(num, size[0] + 2 * margin, size[1] + 2 * margin, channels, dtype=dtype)
    for i in range(side):
        for j in range(side):
            x[:, i : i + rows * step : step, j : j + columns * step : step] += taps[:, :, :, i, j]
    return x[:, margin : margin + size[0], margin : margin + size[1]]
