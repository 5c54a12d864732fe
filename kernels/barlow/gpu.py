"""BarlowTwins on a GPU, in Triton: both forms, their launches and their cost are in gram_gpu.py.

The gradients are those of cpu.py. At N = 256, D = 8192: 6 launches, forward and backward together.
With N = 2, where the gradient is all but cancelled, what cancels is left out: see _to_input.
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
