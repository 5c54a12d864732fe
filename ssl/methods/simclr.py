"""SimCLR: find the other view of a frame among the views of all frames.

    L = mean over the 2B views i of  log sum_{k != i} exp(s_ik) - s_ip      s_ik = cos(z_i, z_k) / T

p: the other view of i. All other frames of the batch are negatives, so larger batches make the
task harder and the features better. A pair's weight scales the loss of both its views, as in IVPP
(arXiv:2403.07715). Chen, Kornblith, Norouzi, Hinton 2020, arXiv:2002.05709, with the three-layer
projector of version 2, arXiv:2006.10029. The complete formula is in sslus.kernels.ntxent.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslus.engine.errors import InputError
from sslus.kernels.ntxent import ntxent_loss
from sslus.kernels.ranks import Ranks, group_name
from sslus.ssl.heads import mlp, widths
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output


@dataclass(frozen=True)
class Config:
    projector: str = field(
        default="1024-1024-128",
        metadata={"help": "Layer widths of the projector; the paper has 2048-2048-128."},
    )
    temperature: float = field(
        default=0.2, metadata={"help": "The lower, the more the hardest negatives dominate."}
    )

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature}: want more than 0")


RECIPES = {
    "default": {"views": "ultrasound", "zero_init_residual": True},
    # Version 2, section 3: learning rate 0.1 sqrt(4096) = 6.4, warm-up for 5 % of 800 epochs,
    # weight decay 1e-4, a projector as wide as the features. Views: appendix A of version 1.
    # Temperature, and how blocks start: the authors' code.
    "paper": {
        "backbone": "resnet50", "image_size": 224, "batch_size": 4096, "epochs": 800,
        "optimizer": "lars", "base_lr": 0.4, "weight_decay": 1e-4, "warmup_epochs": 40,
        "final_lr": 0.0, "views": "simclr", "projector": "2048-2048-128", "temperature": 0.1,
        "zero_init_residual": True,
    },
    "study": {
        "backbone": "resnet50", "image_size": 256, "batch_size": 160, "epochs": 10,
        "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-4, "warmup_epochs": 0,
        "final_lr": 0.0, "views": "simclr", "projector": "512-128", "temperature": 0.5,
    },
}  # fmt: skip


class Method(nn.Module):
    def __init__(self, backbone: nn.Module, config: Config, image_size: int):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, *widths(config.projector), last_norm=True)
        self.temperature = config.temperature

    def forward(self, views: Views) -> Output:
        # All 2B views form one batch, over which BatchNorm takes its statistics, as in the paper.
        h = self.backbone(torch.cat([views.va, views.vb]))
        za, zb = self.projector(h).chunk(2)
        with torch.autocast(za.device.type, enabled=False):
            za, zb = za.float(), zb.float()
            if views.weights is None:
                loss = ntxent_loss(za, zb, temperature=self.temperature)
            else:
                loss = weighted_ntxent(za, zb, views.weights, self.temperature)
        ha, hb = h.chunk(2)
        return Output(loss, {}, ha, hb)

    def after_step(self, step: int, num_steps: int) -> None:
        """SimCLR keeps no state between steps."""


def weighted_ntxent(za: Tensor, zb: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """NT-Xent over all ranks, in which weights[i] scales the loss of both views of pair i: ().

    za, zb: (B, D) float32; weights: (B,) float32. In plain PyTorch, with 2N x 2N logits: 64 MiB
    for a joint batch of N = 2048.
    """
    ranks = Ranks.named(group_name(None))
    # Every row of logits involves the views of all ranks, so each rank's gradient needs all rows.
    u = torch.cat([F.normalize(ranks.join_with_gradient(z), dim=1) for z in (za, zb)])
    logits = (u @ u.T / temperature).fill_diagonal_(float("-inf"))
    others = torch.arange(len(u), device=u.device).roll(len(u) // 2)
    each = F.cross_entropy(logits, others, reduction="none")
    return (each * ranks.join(weights).repeat(2)).mean()
