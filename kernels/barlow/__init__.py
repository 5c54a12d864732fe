"""Barlow Twins: each dimension correlates with itself across the views, and with no other.

    L = sum_i (C_ii - 1)^2 + off_diagonal * sum_{i != j} C_ij^2        C = za^T zb / N

with za and zb standardised: each column has zero mean and unit variance over the N rows of all
ranks, with the biased variance (over N) plus 1e-5. za, zb: (N, D) float.

The shape selects one of two exact forms, neither of which stores a D x D matrix: Gram (N < D,
3.25 N^2 D multiplications) and tiled (N >= D, 3 N D^2); autograd of the definition takes 3 N D^2.
See cpu.py, and gram_gpu.py for the GPU.

off_diagonal is 0.0051 by default.

Zbontar, Jing, Misra, LeCun, Deny 2021, arXiv:2103.03230, equations 1 and 2.
"""

from sslus.kernels.barlow import cpu, reference
from sslus.kernels.op import Op


def _gpu(*tensors, **scalars):  # imports triton only when needed; it may be missing
    from sslus.kernels.barlow import gpu

    return gpu.barlow(*tensors, **scalars)


WEIGHTS = {"off_diagonal": 0.0051}  # of the authors' code; 0.005 in the paper

barlow_loss = Op(
    "barlow",
    reference=reference.barlow,
    cpu=cpu.barlow,
    gpu=_gpu,
    wide=True,
    defaults=WEIGHTS,
    cases=tuple(
        {"tensors": [(n, d), (n, d)], "scalars": WEIGHTS}
        for n, d in [(2, 1), (2, 7), (7, 5), (33, 129), (64, 32), (31, 257), (130, 65)]
    ),
)
