"""BarlowTwins: each dimension correlates with itself across the views and with no other.

    L = sum_i (C_ii - 1)^2 + off_diagonal * sum_{i != j} C_ij^2        C = za^T zb / B

za, zb: the projections, each dimension standardised to zero mean and unit variance over the
batch. It needs neither negatives nor a teacher, and was the most robust method in the study
arXiv:2407.21738. With pair weights, the means, the variances and C are all weighted, so that C
remains a correlation (IVPP, arXiv:2403.07715, weights only means and variances). Zbontar, Jing,
Misra, LeCun, Deny 2021, arXiv:2103.03230. The complete formula is in sslus.kernels.barlow.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sslus.kernels.barlow import barlow_loss
from sslus.kernels.moments import moments
from sslus.kernels.ranks import Ranks, group_name
from sslus.ssl.heads import mlp, widths
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output


@dataclass(frozen=True)
class Config:
    # The paper's 8192 are for batches of 2048. In batches of 32 and 64, 512 dimensions learned more
    # than 2048 (bench/LOG.md).
    projector: str = field(
        default="512-512-512",
        metadata={
            "help": "Layer widths of the projector; the paper has 8192-8192-8192 for batches of"
            " 2048."
        },
    )
    off_diagonal: float = field(
        default=0.0051, metadata={"help": "Weight of the term that decorrelates dimensions."}
    )
    scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the whole loss; with LARS it affects only biases and norms.",
            "of_optimizer": True,  # a recipe's value does not survive another optimiser
        },
    )


RECIPES = {
    "default": {"views": "ultrasound", "zero_init_residual": True},
    # Section 2.2 and the authors' code. There, biases and norms have a learning rate of 0.0048
    # instead of 0.2. LARS does not adapt their rate, so scaling the loss by 0.024 is equivalent.
    "paper": {
        "backbone": "resnet50", "image_size": 224, "batch_size": 2048, "epochs": 1000,
        "optimizer": "lars", "base_lr": 0.2, "weight_decay": 1.5e-6, "warmup_epochs": 10,
        "views": "barlowtwins", "projector": "8192-8192-8192", "scale": 0.024,
        "zero_init_residual": True,
    },
    "study": {
        "backbone": "resnet50", "image_size": 256, "batch_size": 2048, "epochs": 1000,
        "optimizer": "lars", "base_lr": 0.2, "weight_decay": 1e-6, "warmup_epochs": 10,
        "views": "barlowtwins", "projector": "8192-8192-8192", "scale": 0.024,
    },
}  # fmt: skip


class Method(nn.Module):
    def __init__(self, backbone: nn.Module, config: Config, image_size: int):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.num_features, *widths(config.projector))
        self.off_diagonal, self.scale = config.off_diagonal, config.scale

    def forward(self, views: Views) -> Output:
        # One view after the other, so that each has its own BatchNorm statistics, as in the paper.
        ha, hb = self.backbone(views.va), self.backbone(views.vb)
        za, zb = self.projector(ha), self.projector(hb)
        # These are sums of squares over D x D entries: bfloat16 would keep only two digits.
        with torch.autocast(za.device.type, enabled=False):
            za, zb = za.float(), zb.float()
            if views.weights is None:
                loss = barlow_loss(za, zb, off_diagonal=self.off_diagonal)
                terms = self.terms(za, zb, loss.detach())
            else:
                loss, terms = weighted_barlow(za, zb, views.weights, self.off_diagonal)
        return Output(self.scale * loss, terms, ha, hb)

    @torch.no_grad()
    def terms(self, za: Tensor, zb: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """The two sums. The second is the rest of the loss: N x D operations, not N x D x D."""
        m = moments(za, zb, Ranks.named(group_name(None)))
        sa, sb = (m.variances + 1e-5).sqrt()
        # C_ii - 1, which is small where the views agree: a subtraction would lose its digits.
        low = ((sa - sb).square() - m.of_difference - 2e-5) / (2 * sa * sb)
        invariance = low.square().sum()
        rest = loss - invariance
        redundancy = rest / self.off_diagonal if self.off_diagonal else torch.zeros_like(rest)
        return {"invariance": invariance, "redundancy": redundancy}

    def after_step(self, step: int, num_steps: int) -> None:
        """Barlow Twins keeps no state between steps."""


def weighted_barlow(
    za: Tensor, zb: Tensor, weights: Tensor, off_diagonal: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with weighted means over the rows of all ranks, and its terms for the log.

    za, zb: (B, D) float32; weights: (B,) float32. In plain PyTorch, with a D x D matrix.
    """
    ranks = Ranks.named(group_name(None))
    w = ranks.join(weights)
    w = (w / w.sum())[:, None]  # how much each row of the joint batch counts
    za, zb = (standardised(ranks.join_with_gradient(z), w) for z in (za, zb))
    c = za.T @ (w * zb)
    eye = torch.eye(len(c), dtype=torch.bool, device=c.device)
    invariance, redundancy = (c.diagonal() - 1).square().sum(), c.masked_fill(eye, 0).square().sum()
    terms = {"invariance": invariance.detach(), "redundancy": redundancy.detach()}
    return invariance + off_diagonal * redundancy, terms


def standardised(z: Tensor, w: Tensor) -> Tensor:
    """z (B, D) with zero mean and unit variance per column, under row weights w (B, 1)."""
    z = z - (w * z).sum(0)
    return z / ((w * z.square()).sum(0) + 1e-5).sqrt()
