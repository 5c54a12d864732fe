"""BatchNorm with the statistics of the batch joined over all ranks, on the CPU too.

PyTorch's SyncBatchNorm runs only on GPUs. On CPUs this one replaces it, so that the loss of W ranks
equals that of one process with the whole batch.
"""

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm over the joint batch; weights and their names do not change."""
    if device.type == "cuda":
        return convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.forward = _Joined(child)
    return module


class _Joined:
    """The forward pass of one BatchNorm; an object, so that the module can be deep-copied."""

    def __init__(self, module: _BatchNorm):
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        m = self.module
        if not m.training:
            return type(m).forward(m, x)
        x = normalised(x, m)
        return m.act(m.drop(x)) if isinstance(m, BatchNormAct2d) else x


def normalised(x: Tensor, m: _BatchNorm) -> Tensor:
    """Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1, over the rows of all ranks.

    x: (B, C, ...). Normalises with the biased variance; the running one is unbiased, as in PyTorch.
    """
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    num = dist.get_world_size() * x.numel() // x.shape[1]
    wide = x if x.dtype == torch.float64 else x.float()
    mean = _Sum.apply(wide.sum(dims)) / num
    centred = wide - mean.view(shape)
    var = _Sum.apply(centred.square().sum(dims)) / num
    if m.track_running_stats:
        with torch.no_grad():
            m.num_batches_tracked += 1
            rate = 1 / m.num_batches_tracked.item() if m.momentum is None else m.momentum
            m.running_mean.lerp_(mean, rate)
            m.running_var.lerp_(var * num / (num - 1), rate)
    y = centred * (var + m.eps).rsqrt().view(shape)
    if m.affine:
        y = y * m.weight.view(shape) + m.bias.view(shape)
    return y.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over the ranks. Their losses are one joint loss, so the gradient is a sum as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        g = g.clone()
        dist.all_reduce(g)
        return g
