"""MoCo v2: tell a frame's key from the keys of earlier batches, which are kept in a queue.

    L = mean_i  log( exp(q_i . k_i / T) + sum_m exp(q_i . queue_m / T) ) - q_i . k_i / T
    teacher <- momentum teacher + (1 - momentum) student        after each step

q: the student's projection of one view, k: the teacher's of the other, both of unit length. The
queue holds the latest keys of all ranks, without those of this batch, so small batches suffice. A
pair's weight scales its term of the mean.

A query must not recognise its key by shared BatchNorm statistics. So each of the two views has its
own statistics, over the batch of all ranks. With `--batch-norm per-rank`, the keys are shuffled: a
rank's teacher sees every W-th frame of the joint batch of W ranks, so that a query and its key are
normalised among different frames.

He, Fan, Wu, Xie, Girshick 2020, arXiv:1911.05722; version 2: Chen, Fan, Girshick, He 2020,
arXiv:2003.04297. The complete formula is in sslus.kernels.infonce_queue.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslus.engine.errors import InputError
from sslus.kernels.infonce_queue import infonce_queue_loss
from sslus.kernels.ranks import Ranks, group_name
from sslus.ssl.heads import follow, joint_mean, mlp, teacher_of, widths
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output

COMPARABLE_LOSS = False  # it is lowest at first, while the queue still holds random directions


@dataclass(frozen=True)
class Config:
    projector: str = field(
        default="1024-128",
        metadata={"help": "Layer widths of the projector; the paper has 2048-128."},
    )
    # With a longer queue, a frame would be pushed away from its own key of the epoch before.
    queue: int = field(
        default=1024,
        metadata={"help": "Keys kept as negatives; should be well below the number of frames."},
    )
    temperature: float = field(
        default=0.2, metadata={"help": "The lower, the more the hardest negatives dominate."}
    )
    momentum: float = field(
        default=0.99,
        metadata={"help": "EMA momentum of the teacher per step; the paper has 0.999."},
    )
    symmetric: bool = field(
        default=False,
        metadata={"help": "Also use the first view as key of the second: twice the work."},
    )

    def __post_init__(self):
        if self.queue < 1:
            raise InputError(f"queue {self.queue}: want at least one key")
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature}: want more than 0")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum {self.momentum}: want 0 or more, and less than 1")


RECIPES = {
    # Runs have some thousand steps: a teacher that changes by 0.1 % per step would lag behind.
    "default": {"views": "ultrasound", "zero_init_residual": True},
    # Version 2, sections 2 and 3: MLP head, aug+, cosine schedule, 800 epochs; the rest: version 1,
    # section 4.
    "paper": {
        "backbone": "resnet50", "image_size": 224, "batch_size": 256, "epochs": 800,
        "optimizer": "sgd", "base_lr": 0.03, "weight_decay": 1e-4, "warmup_epochs": 0,
        "final_lr": 0.0, "views": "simclr,min_area=0.2,brightness=0.4,contrast=0.4",
        "projector": "2048-128", "queue": 65536, "momentum": 0.999,
    },
    # In the study the momentum rises from 0.996 to 1 over the epochs, where the teacher freezes.
    "study": {
        "backbone": "resnet50", "init": "imagenet", "image_size": 256, "batch_size": 288,
        "epochs": 20, "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "warmup_epochs": 0,
        "final_lr": 0.0, "views": "simclr", "projector": "2048-128", "queue": 4096,
        "temperature": 0.5, "momentum": 0.996,
    },
}  # fmt: skip


class Method(nn.Module):
    def __init__(self, backbone: nn.Module, config: Config, image_size: int):
        super().__init__()
        self.backbone = backbone
        layers = widths(config.projector)
        self.projector = mlp(backbone.num_features, *layers, norm=False)
        self.teacher = teacher_of(self.backbone, self.projector)
        self.temperature, self.momentum = config.temperature, config.momentum
        self.symmetric = config.symmetric
        # Random directions at first; new keys overwrite the oldest ones.
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, layers[-1]), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    def forward(self, views: Views) -> Output:
        ha = self.backbone(views.va)
        hb = self.backbone(views.vb) if self.symmetric else None
        # Autograd may save the queue it is given for backward, and the queue changes below.
        queue = self.queue.clone()
        kb, keys = self.keys(views.vb)
        loss = self.loss(self.projector(ha), kb, queue, views.weights)
        if hb is not None:
            ka, others = self.keys(views.va)
            loss = (loss + self.loss(self.projector(hb), ka, queue, views.weights)) / 2
            keys = torch.cat([keys, others])
        self.enqueue(keys)
        return Output(loss, {}, ha, hb)

    def loss(self, q: Tensor, k: Tensor, queue: Tensor, weights: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q = q.float()
            if weights is None:
                return infonce_queue_loss(q, k, queue, temperature=self.temperature)
            q = F.normalize(q, dim=1)
            positives = (q * k).sum(1) / self.temperature
            logits = torch.cat([positives[:, None], q @ queue.T / self.temperature], 1)
            return joint_mean(weights * (logits.logsumexp(1) - positives))

    @torch.no_grad()
    def keys(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's keys, of unit length: those of this rank's rows, and those of all ranks."""
        ranks = Ranks.named(group_name(None))
        # Row r of every W rows goes to rank r: batches are in random order already.
        shuffled = ranks.join(images)[ranks.rank :: ranks.world]
        keys = F.normalize(self.teacher(shuffled).float(), dim=1)
        joined = ranks.join(keys).unflatten(0, (ranks.world, -1)).transpose(0, 1).flatten(0, 1)
        return ranks.own(joined), joined

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        size = len(self.queue)
        keys = keys[-size:]
        places = torch.arange(len(keys), device=keys.device)
        # The position is a tensor: a CUDA graph or a compiled step would freeze a number.
        self.queue.index_copy_(0, (self.oldest + places) % size, keys)
        self.oldest.copy_((self.oldest + len(keys)) % size)

    def after_step(self, step: int, num_steps: int) -> None:
        follow(self.teacher, (self.backbone, self.projector), 1 - self.momentum)
