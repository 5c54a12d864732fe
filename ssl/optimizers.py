"""Optimisers and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn

from sslus.engine.errors import InputError

OPTIMIZERS = ("adamw", "lars", "sgd")


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: the step of each weight is proportional to its norm.

        rate = trust |w| / (|g| + decay |w|)
        v <- momentum v + lr rate (g + decay w)
        w <- w - v

    You, Gitman, Ginsburg 2017, arXiv:1708.03888, algorithm 1. Groups with `adapt=False`
    (biases and norms) take plain momentum steps, with rate = 1. A weight whose norm or gradient is
    zero also has rate 1; otherwise it could never move.
    """

    def __init__(self, params, lr: float | Tensor, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust": trust,
                "adapt": True,
            },
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            lr = group["lr"]
            momenta = [self.state[p]["momentum"] for p in params]
            decay = group["weight_decay"]
            updates = torch._foreach_add([p.grad for p in params], params, alpha=decay)
            if group["adapt"]:
                rates = []
                norms = torch._foreach_norm(params), torch._foreach_norm([p.grad for p in params])
                for w, g in zip(*norms, strict=True):
                    rate = group["trust"] * w / (g + decay * w)
                    rates.append(torch.where((w > 0) & (g > 0), rate, torch.ones_like(rate)))
                torch._foreach_mul_(updates, rates)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_mul_(updates, lr)  # a tensor on a GPU: captured steps read it anew
            torch._foreach_add_(momenta, updates)
            torch._foreach_sub_(params, momenta)


def make(name: str, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimiser of OPTIMIZERS over all trainable weights of `module`.

    Biases, norms and weights that timm lists in `no_weight_decay` (a transformer's class token and
    position embeddings) get neither weight decay nor LARS adaptation. On a GPU the learning rate
    is a tensor there. Raises InputError for another name.
    """
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    params: list[Tensor] = list(named.values())
    plain = {
        f"{where}.{name}".lstrip(".")
        for where, part in module.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
    }
    full = [p for n, p in named.items() if p.ndim > 1 and n not in plain]
    rest = [p for n, p in named.items() if p.ndim <= 1 or n in plain]
    groups = [
        {"params": full, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    cuda = params[0].is_cuda
    rate = torch.tensor(lr, device=params[0].device) if cuda else lr
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=cuda)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=True)
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=rate)
    raise InputError(f"optimizer {name!r}: want one of {', '.join(OPTIMIZERS)}")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def default_weight_decay(name: str) -> float:
    """The weight decay if none is given. SGD: that of MoCo, arXiv:1911.05722."""
    return {"adamw": 0.05, "lars": 1e-6, "sgd": 1e-4}[name]


def default_lr(name: str, batch_size: int) -> float:
    """The peak learning rate if none is given.

    LARS: 0.2 B/256, as VICReg. SGD: 0.03 B/256, as MoCo. AdamW: 1e-3 sqrt(B/256), because Adam's
    learning rate scales with the root of the batch size (Malladi et al. 2022, arXiv:2205.10287).
    """
    if name == "adamw":
        return 1e-3 * math.sqrt(batch_size / 256)
    return {"lars": 0.2, "sgd": 0.03}[name] * batch_size / 256


def learning_rate(step: int, num_steps: int, warmup: int, peak: float, floor: float) -> float:
    """The learning rate of step 0 .. num_steps - 1: linear to `peak`, then a cosine to `floor`.

    Step `warmup - 1` is the first at the peak; the last step is at the floor exactly.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    span = num_steps - 1 - max(warmup - 1, 0)
    t = (step - max(warmup - 1, 0)) / span if span > 0 else 1.0
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * t))
