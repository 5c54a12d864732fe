"""BYOL: predict the teacher's projection of one view from the other view.

    L = mean_i (2 - 2 cos(pa_i, tb_i)) + mean_i (2 - 2 cos(pb_i, ta_i))

pa, pb: (N, D) float, the student's predictions for both views; ta, tb: (N, D) float, the EMA
teacher's projections, which are constants (stop-gradient). Each term is the squared distance of
unit vectors, in both directions.

Grill et al. 2020, arXiv:2006.07733, equation 2 and the symmetric loss after it.
"""

from sslus.kernels.byol import cpu, reference
from sslus.kernels.op import Op


def _gpu(*tensors, **scalars):  # imports triton only when needed; it may be missing
    from sslus.kernels.byol import gpu

    return gpu.byol(*tensors, **scalars)


byol_loss = Op(
    "byol",
    reference=reference.byol,
    cpu=cpu.byol,
    gpu=_gpu,
    wide=True,
    cases=tuple(
        {"tensors": [(n, d)] * 4, "scalars": {}} for n, d in [(1, 1), (2, 7), (33, 129), (130, 65)]
    ),
)
