"""The dual task: learn from the labelled frames in the same training loop.

    L = L_method + weight * mean over labelled frames of cross-entropy(W h + b, label)

h: the backbone's features of the first view. Frames without a label are ignored in the second
term. Migliorelli et al. 2024, Comput Biol Med 174:108430, on SimCLR; here on any method.
"""

import torch.nn.functional as F
from torch import nn

from sslus.engine.errors import InputError
from sslus.kernels.ranks import Ranks, group_name
from sslus.ssl.heads import joint_sum
from sslus.ssl.loader import Views
from sslus.ssl.methods import TAKEN, Output, checked

TERM = "cross_entropy"  # in the log


class DualTask(nn.Module):
    """A method with an additional classifier; used like the method."""

    def __init__(self, method: nn.Module, num_classes: int, weight: float):
        super().__init__()
        if num_classes < 2:
            raise InputError(
                f"--dual-task: want at least two labels in the shards, got {num_classes};"
                " make the shards with `sslus shard ... --labels labels.csv`"
            )
        self.method, self.weight = method, weight
        self.classifier = nn.Linear(method.backbone.num_features, num_classes)

    @property
    def backbone(self) -> nn.Module:
        return self.method.backbone

    def forward(self, views: Views) -> Output:
        loss, terms, features, others = checked(self.method(views), self.method, TAKEN | {TERM})
        logits = self.classifier(features).float()
        total = F.cross_entropy(logits, views.labels, ignore_index=-1, reduction="sum")
        labelled = Ranks.named(group_name(None)).sum_((views.labels >= 0).sum())
        joint = joint_sum(total / labelled.clamp(min=1))
        terms = terms | {TERM: joint.detach()}
        return Output(loss + self.weight * joint, terms, features, others)

    def after_step(self, step: int, num_steps: int) -> None:
        self.method.after_step(step, num_steps)
