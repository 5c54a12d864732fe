"""VICReg: make views agree, keep the variance of every dimension up, decorrelate dimensions.

    L = invariance * mse(za, zb)
      + variance   * (v(za) + v(zb)) / 2      v(z) = mean_j relu(1 - sqrt(var_j(z) + 1e-4))
      + covariance * (c(za) + c(zb))          c(z) = sum_{i != j} cov(z)_ij^2 / D

za, zb: (N, D) float; variance and covariance over the N rows of all ranks, unbiased (N - 1).
An optional third tensor (N,), a constant, weights the distance of each pair: with weight 0 a pair
counts in the statistics but is not pulled together, for example for frames far apart in time.

The shape selects one of two exact forms, neither of which stores a D x D matrix: Gram (N < D,
3.25 N^2 D multiplications) and tiled (N >= D, 3.25 N D^2; 4 on a GPU, which computes all of C);
autograd of the definition takes 6 N D^2. See cpu.py, and gram_gpu.py for the GPU.

Bardes, Ponce, LeCun 2022, arXiv:2105.04906, equations 1 to 6, with the halved variance term
of the authors' code: the weights 25, 25, 1, which are the defaults, belong to that form.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sslus.kernels.moments import moments
from sslus.kernels.op import Op
from sslus.kernels.ranks import Ranks, group_name
from sslus.kernels.vicreg import cpu, reference


def _gpu(*tensors, **scalars):  # imports triton only when needed; it may be missing
    from sslus.kernels.vicreg import gpu

    return gpu.vicreg(*tensors, **scalars)


WEIGHTS = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}

vicreg_loss = Op(
    "vicreg",
    reference=reference.vicreg,
    cpu=cpu.vicreg,
    gpu=_gpu,
    wide=True,
    defaults=WEIGHTS,
    cases=(
        *(
            {"tensors": [(n, d), (n, d)], "scalars": WEIGHTS}
            for n, d in [(2, 1), (2, 7), (7, 5), (33, 129), (64, 32), (31, 257), (130, 65)]
        ),
        {"tensors": [(9, 17), (9, 17), (9,)], "scalars": WEIGHTS},
        {"tensors": [(17, 9), (17, 9), (17,)], "scalars": WEIGHTS},
    ),
)


@torch.no_grad()
def vicreg_terms(
    za: Tensor,
    zb: Tensor,
    loss: Tensor,
    weights: Tensor | None = None,
    *,
    invariance: float,
    variance: float,
    covariance: float,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The three unweighted terms of a `loss` that `vicreg_loss` has just returned, for a log.

    The covariance term is the rest of the loss, so that it costs N x D operations instead of
    another N x D x D; it is no more exact than the last digits of the loss.
    """
    ranks = Ranks.named(group_name(group))
    n = len(za) * ranks.world
    m = moments(za, zb, ranks)
    if weights is None:
        far = m.means[0] - m.means[1]
        inv = torch.addcmul(m.of_difference, far, far).mean()
    else:
        inv = ranks.sum_(reference.invariance_term(za, zb, weights)) / ranks.world
    var = reference.hinge(m.variances * (n / (n - 1)))
    rest = loss.detach().sub(inv, alpha=invariance).sub(var, alpha=variance)
    cov = rest / covariance if covariance else torch.zeros_like(rest)
    return {"invariance": inv, "variance": var, "covariance": cov}
