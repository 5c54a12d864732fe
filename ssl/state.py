"""Everything in a run that changes from step to step, saved and restored exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sslus.engine.errors import InputError
from sslus.ssl import backbones, batchnorm, checkpoints, methods, optimizers
from sslus.ssl.dual import DualTask
from sslus.ssl.settings import Settings
from sslus.ssl.world import World


class Window(NamedTuple):
    """Sums of the loss and its terms over some steps."""

    names: tuple[str, ...]
    sums: Tensor  # (K,) float32
    num_steps: int


@dataclass
class State:
    """method: all weights, including those of the backbone, a teacher and a queue. window...: the
    Window of the steps since the last line of metrics."""

    method: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    window: Tensor | None = None
    window_names: tuple[str, ...] = ()
    window_steps: int = 0
    step: int = 0  # number of updates done

    @classmethod
    def build(
        cls,
        settings: Settings,
        method_config,
        world: World,
        num_classes: int = 0,
        grey: tuple[float, float] = (0.0, 1.0),
        initialise: Callable[[nn.Module], None] | None = None,
    ) -> "State":
        """settings: resolved. num_classes: number of labels in the shards. grey: the mean and std
        (0 to 1) with which views are normalised. initialise: gives the backbone its initial
        weights, before a method copies it as a teacher."""
        s = settings
        backbone = backbones.build(s.backbone, s.image_size, s.seed, s.zero_init_residual)
        if initialise:
            initialise(backbone)
        torch.manual_seed(s.seed + 1)  # + 1: the backbone has used the seed itself
        method = methods.load(s.method).Method(backbone, method_config, s.image_size)
        if getattr(method, "backbone", None) is not backbone:  # else told when it is written
            raise InputError(
                f"{s.method}: Method must keep the backbone that it is given as self.backbone"
            )
        if hasattr(method, "normalised_by"):
            method.normalised_by(*grey)
        if s.dual_task:
            method = DualTask(method, num_classes, s.dual_task)
        # 2.7 times faster on the CPU too.
        method.to(world.device, memory_format=torch.channels_last)
        if world.size > 1 and s.batch_norm == "sync":
            method = batchnorm.synchronise(method, world.device)
        method.train()
        if not any(p.requires_grad for p in method.parameters()):
            raise InputError(
                f"{s.method}: no gradient of the loss reaches the backbone, which would stay as it"
                " is, as nothing in the method can be trained: do not freeze all of it"
            )
        optimizer = optimizers.make(s.optimizer, method, s.lr, s.weight_decay)
        if world.size > 1:  # ranks must draw different numbers for dropout and the like
            torch.manual_seed(s.seed + 1 + world.rank)
        return cls(method, optimizer, world)

    @property
    def backbone(self) -> nn.Module:
        return self.method.backbone

    def save(self, path: Path) -> None:
        """Every rank must call it; rank 0 writes."""
        rng = self.world.gather(torch.get_rng_state())
        cuda_rng = []
        if self.world.device.type == "cuda":
            cuda_rng = self.world.gather(torch.cuda.get_rng_state(self.world.device))
        if not self.world.is_main:
            return
        checkpoints.save(
            path,
            {
                "step": self.step,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "window": self.window,
                "window_names": list(self.window_names),
                "window_steps": self.window_steps,
                "rng": rng,
                "cuda_rng": cuda_rng,
            },
        )

    def load(self, path: Path) -> None:
        state = checkpoints.load(path)
        try:
            self.method.load_state_dict(state["method"])
            # Keep what belongs to the device: the learning rate's tensor, set before each step.
            groups = self.optimizer.param_groups
            own = [{k: g[k] for k in ("lr", "capturable") if k in g} for g in groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, kept in zip(self.optimizer.param_groups, own, strict=True):
                group.update(kept)
        except (KeyError, RuntimeError, ValueError) as e:
            raise InputError(f"checkpoint {path}: belongs to another model: {e}") from e
        window = state["window"]
        self.window = None if window is None else window.to(self.world.device)
        self.window_names = tuple(state["window_names"])
        self.window_steps, self.step = state["window_steps"], state["step"]
        if self.world.rank < len(state["rng"]):  # a rank without a saved state keeps its own seed
            torch.set_rng_state(state["rng"][self.world.rank])
        if self.world.rank < len(state["cuda_rng"]) and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][self.world.rank], self.world.device)

    def add(self, names: tuple[str, ...], values: Tensor) -> None:
        """Add the numbers of one step to the window. As sums keep NaNs, none is overlooked."""
        self.window = self.window + values if self.window_steps else values.clone()
        self.window_names, self.window_steps = names, self.window_steps + 1

    def take_window(self) -> Window:
        """The window, which starts anew."""
        taken = Window(self.window_names, self.window, self.window_steps)
        self.window, self.window_steps = None, 0
        return taken
