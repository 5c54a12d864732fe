"""VICReg on a GPU, in Triton: gram_gpu.py describes both forms, their launches and their cost.

The gradients are those of cpu.py. At N = 256, D = 8192: 6 launches, forward and backward together.
"""

from collections.abc import Iterator

from torch import Tensor

from sslus.kernels import gram_gpu
from sslus.kernels.aot import Build
from sslus.kernels.ranks import Ranks
from sslus.kernels.vicreg.reference import check


def vicreg(
    za: Tensor,
    zb: Tensor,
    weights: Tensor | None = None,
    *,
    invariance: float,
    variance: float,
    covariance: float,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = check(za, zb, weights, ranks.world)
    loss = gram_gpu.Loss(
        barlow=False, n=n, d=d, off=covariance / d,
        pull=invariance / (n * d), hinge=variance / (2 * d),
    )  # fmt: skip
    form = gram_gpu.gram if n < d else gram_gpu.tiled
    return form(za, zb, weights, loss, ranks)


def builds() -> Iterator[Build]:
    return gram_gpu.builds(barlow=False)
