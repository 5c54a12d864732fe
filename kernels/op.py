"""One dispatcher for every op: reference, compiled CPU or Triton GPU.

An op is a scalar loss of float tensors. Its implementations share one signature,
`(*tensors, **scalars) -> (loss, *gradients)`, except the reference, which returns the loss
alone and gets its gradient from autograd: so no hand-written gradient is ever checked
against itself.

`SSLUS_KERNELS` picks the implementation: `auto` (the default), `reference`, `cpu` or `gpu`.
A named choice that cannot run raises; it never falls back.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "cpu", "gpu")
DTYPES = {
    "cpu": (torch.float32,),
    "gpu": (torch.float32, torch.bfloat16, torch.float16),
}

OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Op:
    """A named loss with up to three implementations; call it like a function.

    >>> loss = vicreg_loss(za, zb, invariance=25.0, variance=25.0, covariance=1.0)
    >>> loss.backward()
    """

    name: str
    reference: Callable[..., Tensor]
    cpu: Callable[..., tuple[Tensor, ...]] | None = None
    gpu: Callable[..., tuple[Tensor, ...]] | None = None
    cases: tuple[dict, ...] = ()  # {"tensors": shapes, "scalars": ...}: parity test, benchmark

    def __post_init__(self):
        if self.name in OPS:
            raise ValueError(f"op {self.name!r} is already registered")
        OPS[self.name] = self

    def __call__(self, *tensors: Tensor, **scalars: float) -> Tensor:
        return self.run(os.environ.get("SSLUS_KERNELS", "auto"), *tensors, **scalars)

    def why_not(self, which: str, x: Tensor) -> str | None:
        """Why the implementation `which` cannot take `x`; None if it can."""
        if which == "reference":
            return None
        if getattr(self, which) is None:
            return "it is not written"
        if which == "cpu" and x.device.type != "cpu":
            return f"the tensors are on {x.device}"
        # Triton's interpreter runs GPU kernels on CPU tensors: how they are tested without one.
        if which == "gpu" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the tensors are on {x.device}"
        if x.dtype not in DTYPES[which]:
            return f"it takes {', '.join(str(d) for d in DTYPES[which])}, not {x.dtype}"
        return None

    def choose(self, x: Tensor) -> str:
        """The implementation that `auto` takes for `x`: the one compiled for its device."""
        native = "gpu" if x.is_cuda else "cpu"
        return "reference" if self.why_not(native, x) else native

    def run(self, which: str, *tensors: Tensor, **scalars: float) -> Tensor:
        """The loss, shape (), from one implementation: a name out of CHOICES."""
        if which not in CHOICES:
            raise ValueError(f"SSLUS_KERNELS: want one of {', '.join(CHOICES)}, got {which!r}")
        if which == "auto":
            which = self.choose(tensors[0])
        if why := self.why_not(which, tensors[0]):
            raise ValueError(f"op {self.name!r}: implementation {which!r} cannot run: {why}")
        if which == "reference":
            return self.reference(*tensors, **scalars)
        return _Fused.apply(getattr(self, which), scalars, *tensors)


class _Fused(torch.autograd.Function):
    """The gradient is computed with the loss; backward only scales it."""

    @staticmethod
    def forward(ctx, implementation, scalars, *tensors):
        # The compiled border refuses strided input; the copy is made here, once, in sight.
        loss, *grads = implementation(*(t.contiguous() for t in tensors), **scalars)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        return None, None, *(grad_loss * g for g in ctx.saved_tensors)


def load_all() -> dict[str, Op]:
    """Import every op folder and return the registry: for tests, benchmarks and the doctor."""
    import sslus.kernels

    for info in pkgutil.iter_modules(sslus.kernels.__path__):
        if info.ispkg:
            importlib.import_module(f"sslus.kernels.{info.name}")
    return OPS
