"""BarlowTwins on a GPU, in Triton: gram_gpu.py describes both forms, their launches and cost.

The gradients are those of cpu.py. At N = 256, D = 8192: 6 launches, forward and backward together.
With N = 2 the gradient would almost cancel; gram_gpu._to_input then uses its exact form.
"""

from collections.abc import Iterator

from torch import Tensor

from sslus.kernels import gram_gpu
from sslus.kernels.aot import Build
from sslus.kernels.barlow.reference import check
from sslus.kernels.ranks import Ranks


def barlow(
    za: Tensor, zb: Tensor, *, off_diagonal: float, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = check(za, zb, ranks.world)
    form = gram_gpu.gram if n < d else gram_gpu.tiled
    return form(za, zb, None, gram_gpu.Loss(True, n, d, float(off_diagonal)), ranks)


def builds() -> Iterator[Build]:
    return gram_gpu.builds(barlow=True)
