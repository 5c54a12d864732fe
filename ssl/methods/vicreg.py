"""VICReg: keep each dimension's variance up and the dimensions uncorrelated.

    L = 25 mse(za, zb) + 25 (v(za) + v(zb)) / 2 + (c(za) + c(zb))

v(z): how far the standard deviations of z lie below 1, on average; c(z): the sum of the squared
off-diagonal covariances of z, divided by its width. It needs neither negatives nor a teacher, so
small batches work. Bardes, Ponce, LeCun 2022, arXiv:2105.04906. The complete formula is in
sslus.kernels.vicreg.
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
    # The paper's 8192-8192-8192 was made for ImageNet: 138 M weights, ten times a ResNet-18.
    projector: str = field(
        default="2048-2048-2048",
        metadata={"help": "Layer widths of the projector; the paper has 8192-8192-8192."},
    )
    invariance: float = field(
        default=25.0, metadata={"help": "Weight of the mean squared distance between the views."}
    )
    variance: float = field(
        default=25.0, metadata={"help": "Weight of the hinge loss that keeps the variance up."}
    )
    covariance: float = field(
        default=1.0, metadata={"help": "Weight of the term that decorrelates dimensions."}
    )


RECIPES = {
    "default": {"views": "ultrasound", "zero_init_residual": True},
    # Section 4 and appendix C of the paper, and its authors' code.
    "paper": {
        "backbone": "resnet50", "image_size": 224, "batch_size": 2048, "epochs": 1000,
        "optimizer": "lars", "base_lr": 0.2, "weight_decay": 1e-6, "warmup_epochs": 10,
        "views": "barlowtwins", "projector": "8192-8192-8192", "zero_init_residual": True,
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
        # One view after the other, so that each has its own BatchNorm statistics, as in the paper.
        ha, hb = self.backbone(views.va), self.backbone(views.vb)
        za, zb = self.projector(ha), self.projector(hb)
        # These are sums of squares over B x D entries: bfloat16 would keep only two digits.
        with torch.autocast(za.device.type, enabled=False):
            za, zb = za.float(), zb.float()
            loss = vicreg_loss(za, zb, views.weights, **self.weights)
            terms = vicreg_terms(za, zb, loss, views.weights, **self.weights)
        return Output(loss, terms, ha, hb)

    def after_step(self, step: int, num_steps: int) -> None:
        """VICReg keeps no state between steps."""
