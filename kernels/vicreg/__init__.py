"""VICReg: views alike, every dimension alive, no two dimensions saying the same.

    L = invariance * mse(za, zb)
      + variance   * (v(za) + v(zb)) / 2      v(z) = mean_j relu(1 - sqrt(var_j(z) + 1e-4))
      + covariance * (c(za) + c(zb))          c(z) = sum_{i != j} cov(z)_ij^2 / D

za, zb: (N, D) float; variance and covariance over the N rows, unbiased (N - 1).
Bardes, Ponce, LeCun 2022, arXiv:2105.04906, equations 1 to 6, with the halved variance term
of the authors' code: the weights 25, 25, 1 belong to that form.
"""

import torch
from torch import Tensor

from sslus.kernels.op import Op
from sslus.kernels.vicreg import reference

vicreg_loss = Op(
    "vicreg",
    reference=reference.vicreg,
    cases=tuple(
        {
            "tensors": [(n, d), (n, d)],
            "scalars": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
        }
        for n, d in [(2, 1), (2, 7), (7, 5), (33, 129), (64, 32), (31, 257), (130, 65)]
    ),
)


@torch.no_grad()
def vicreg_terms(
    za: Tensor, zb: Tensor, loss: Tensor, *, invariance: float, variance: float, covariance: float
) -> dict[str, Tensor]:
    """The three unweighted terms of a loss that `vicreg_loss` has just returned, for a log.

    The covariance term is what is left of the loss, so that a log costs N x D work and not
    a second N x D x D: no more exact than the loss's own last digits.
    """
    inv = reference.invariance_term(za, zb)
    var = (reference.variance_term(za) + reference.variance_term(zb)) / 2
    rest = loss.detach() - invariance * inv - variance * var
    cov = rest / covariance if covariance else torch.zeros_like(rest)
    return {"invariance": inv, "variance": var, "covariance": cov}
