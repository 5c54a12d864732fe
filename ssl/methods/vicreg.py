"""VICReg: keep each dimension's variance up and the dimensions uncorrelated.

    L = 25 mse(za, zb) + 25 (v(za) + v(zb)) / 2 + (c(za) + c(zb))

v(z): how far the standard deviations of z lie below 1; c(z): the squared off-diagonal
covariances of z over its width. No negatives, no teacher, so it works with small batches.
Bardes, Ponce, LeCun 2022, arXiv:2105.04906. The formula in full: sslus.kernels.vicreg.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sslus.kernels.vicreg import vicreg_loss, vicreg_terms
from sslus.ssl.heads import mlp, widths


@dataclass(frozen=True)
class Config:
    # The paper's 8192-8192-8192 is made for ImageNet: 138 M weights, ten times a ResNet-18.
    projector: str = field(
        default="2048-2048-2048",
        metadata={"help": "Widths of the projector's layers; the paper has 8192-8192-8192."},
    )
    invariance: float = field(
        default=25.0, metadata={"help": "Weight of the distance between the two views."}
    )
    variance: float = field(
        default=25.0, metadata={"help": "Weight of the hinge that keeps dimensions alive."}
    )
    covariance: float = field(
        default=1.0, metadata={"help": "Weight of the term that decorrelates dimensions."}
    )


class Method(nn.Module):
    def __init__(self, features: int, config: Config):
        super().__init__()
        self.projector = mlp(features, *widths(config.projector))
        self.weights = {
            "invariance": config.invariance,
            "variance": config.variance,
            "covariance": config.covariance,
        }

    def forward(
        self, ha: Tensor, hb: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ha, hb: (B, F) features of two views; weights: (B,) of the pairs' distances.

        Returns the loss, (), and its three terms.
        """
        pairs = () if weights is None else (weights,)
        za, zb = self.projector(ha), self.projector(hb)
        # Sums of squares over B x D entries: bfloat16 would keep two digits of them.
        with torch.autocast(za.device.type, enabled=False):
            za, zb = za.float(), zb.float()
            loss = vicreg_loss(za, zb, *pairs, **self.weights)
            return loss, vicreg_terms(za, zb, loss, *pairs, **self.weights)

    def after_step(self, step: int, num_steps: int) -> None:
        """VICReg keeps nothing from one step to the next."""
