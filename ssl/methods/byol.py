"""BYOL: predict an EMA teacher's projection of one view from the other view, without negatives.

    L = mean_i (2 - 2 cos(pa_i, tb_i)) + mean_i (2 - 2 cos(pb_i, ta_i))
    teacher <- m teacher + (1 - m) student,   m = 1 - (1 - momentum) (cos(pi k / K) + 1) / 2

pa, pb: the student's predictions for the two views; ta, tb: the teacher's projections; k = 0 ..
K - 1: the steps of the run, so m starts at `momentum` and rises, but stays below 1. A pair's weight
scales its terms of both means. Grill et al. 2020, arXiv:2006.07733, equation 2 and section 3.1.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslus.engine.errors import InputError
from sslus.kernels.byol import byol_loss
from sslus.ssl.heads import follow, joint_mean, mlp, teacher_of, widths
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output


@dataclass(frozen=True)
class Config:
    projector: str = field(
        default="2048-256",
        metadata={"help": "Layer widths of the projector; the paper has 4096-256."},
    )
    predictor: int = field(
        default=2048, metadata={"help": "Width of the predictor's hidden layer."}
    )
    momentum: float = field(
        default=0.99,
        metadata={"help": "EMA momentum of the teacher in the first step; the paper has 0.996."},
    )

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum {self.momentum}: want 0 or more, and less than 1")
        if self.predictor < 1:
            raise InputError(f"predictor {self.predictor}: want a width of at least 1")


RECIPES = {
    # The paper's 0.996 is for 1000 epochs; its appendix uses 0.99 for 100 and 300. Blocks do not
    # start at 0: the first teacher would be nearly blind, and all later ones learn from it.
    "default": {"views": "ultrasound"},
    # Section 3.2; views: appendix B, table 6; how blocks start: the ResNet of Haiku, which it uses.
    "paper": {
        "backbone": "resnet50", "image_size": 224, "batch_size": 4096, "epochs": 1000,
        "optimizer": "lars", "base_lr": 0.2, "weight_decay": 1.5e-6, "warmup_epochs": 10,
        "final_lr": 0.0, "views": "barlowtwins", "projector": "4096-256", "predictor": 4096,
        "momentum": 0.996, "zero_init_residual": True,
    },
    "study": {
        "backbone": "resnet50", "image_size": 256, "batch_size": 160, "epochs": 10,
        "optimizer": "lars", "lr": 0.2, "weight_decay": 1.5e-6, "warmup_epochs": 0,
        "final_lr": 0.0, "views": "simclr", "projector": "1024-256", "predictor": 1024,
        "momentum": 0.996,
    },
}  # fmt: skip


class Method(nn.Module):
    def __init__(self, backbone: nn.Module, config: Config, image_size: int):
        super().__init__()
        self.backbone = backbone
        layers = widths(config.projector)
        self.projector = mlp(backbone.num_features, *layers)
        self.predictor = mlp(layers[-1], config.predictor, layers[-1])
        # In training mode, as in the paper: its BatchNorm uses the statistics of the batch.
        self.teacher = teacher_of(self.backbone, self.projector)
        self.momentum = config.momentum

    def forward(self, views: Views) -> Output:
        # One view after the other, so that each has its own BatchNorm statistics.
        ha, hb = self.backbone(views.va), self.backbone(views.vb)
        student = [self.predictor(self.projector(h)) for h in (ha, hb)]
        with torch.no_grad():
            teacher = [self.teacher(v) for v in (views.va, views.vb)]
        with torch.autocast(ha.device.type, enabled=False):
            pa, pb, ta, tb = (z.float() for z in (*student, *teacher))
            if views.weights is None:
                loss = byol_loss(pa, pb, ta, tb)
            else:
                each = distance(pa, tb) + distance(pb, ta)
                loss = joint_mean(views.weights * each)
        return Output(loss, {}, ha, hb)

    def after_step(self, step: int, num_steps: int) -> None:
        follow(self.teacher, (self.backbone, self.projector), self.rate(step - 1, num_steps))

    def rate(self, k: int, num_steps: int) -> float:
        """1 - m. Never 0: with k = K it would be, and the teacher would not move."""
        return (1 - self.momentum) * (math.cos(math.pi * k / num_steps) + 1) / 2


def distance(p: Tensor, t: Tensor) -> Tensor:
    """2 - 2 cos between the rows of p and t, as the squared distance of unit vectors: (B,)."""
    return (F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(1)
