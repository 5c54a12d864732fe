"""VICReg: keep each dimension's variance up and the dimensions uncorrelated.

    L = 25 mse(za, zb) + 25 (v(za) + v(zb)) / 2 + (c(za) + c(zb))

v(z): how far the standard deviations of z lie below 1; c(z): the squared off-diagonal
covariances of z over its width. No negatives, no teacher, so it works with small batches.
Bardes, Ponce, LeCun 2022, arXiv:2105.04906. The formula in full: sslus.kernels.vicreg.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from sslus.kernels.vicreg import vicreg_loss, vicreg_terms
from sslus.ssl.heads import mlp, widths
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output


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


RECIPES = {
    "default": {"views": "ultrasound"},
    # Section 4 and appendix C of the paper, and its authors' code.
    "paper": {
        "backbone": "resnet50", "image_size": 224, "batch_size": 2048, "epochs": 1000,
        "optimizer": "lars", "base_lr": 0.2, "weight_decay": 1e-6, "warmup_epochs": 10,
        "views": "barlowtwins", "projector": "8192-8192-8192",
    },
    "study": {
        "backbone": "resnet50", "image_size": 256, "batch_size": 2048, "epochs": 1000,
        "optimizer": "lars", "base_lr": 0.2, "weight_decay": 1e-6, "warmup_epochs": 10,
        "views": "barlowtwins", "projector": "8192-8192-8192",
    },
}  # fmt: skip


class Method(nn.Module):
    def __init__(self, backbone: nn.Module, config: Config, image_size: int):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, *widths(config.projector))
        self.weights = {
            "invariance": config.invariance,
            "variance": config.variance,
            "covariance": config.covariance,
        }

    def forward(self, views: Views) -> Output:
        # One view after the other: each has its own BatchNorm statistics, as in the paper.
        ha, hb = self.backbone(views.va), self.backbone(views.vb)
        za, zb = self.projector(ha), self.projector(hb)
        pairs = () if views.weights is None else (views.weights,)
        # Sums of squares over B x D entries: bfloat16 would keep two digits of them.
        with torch.autocast(za.device.type, enabled=False):
            za, zb = za.float(), zb.float()
            loss = vicreg_loss(za, zb, *pairs, **self.weights)
            terms = vicreg_terms(za, zb, loss, *pairs, **self.weights)
        return Output(loss, terms, ha, hb)

    def after_step(self, step: int, num_steps: int) -> None:
        """VICReg keeps nothing from one step to the next."""
