"""NT-Xent (SimCLR): find the other view of a sample among the views of all samples.

    L = mean over the 2N views i of  log sum_{k != i} exp(s_ik) - s_ip      s_ik = cos(u_i, u_k) / T

u: the 2N rows of za and zb; p: the other view of i; T: temperature, greater than 0. Computed with
log-sum-exp, it does not overflow at any temperature. za, zb: (N, D) float; negatives come from all
ranks.

Chen, Kornblith, Norouzi, Hinton 2020, arXiv:2002.05709, equation 1 and algorithm 1.
"""

from sslus.kernels.ntxent import cpu, reference
from sslus.kernels.op import Op


def _gpu(*tensors, **scalars):  # imports triton only when needed; it may be missing
    from sslus.kernels.ntxent import gpu

    return gpu.ntxent(*tensors, **scalars)


ntxent_loss = Op(
    "ntxent",
    reference=reference.ntxent,
    cpu=cpu.ntxent,
    gpu=_gpu,
    wide=True,
    cases=tuple(
        {"tensors": [(n, d), (n, d)], "scalars": {"temperature": t}}
        for n, d, t in [
            (1, 3, 0.5), (2, 1, 0.5), (7, 5, 0.1), (5, 300, 0.1), (33, 129, 0.01), (65, 65, 0.2)
        ]
    ),
)  # fmt: skip
