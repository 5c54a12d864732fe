"""One file per method. The file's name is the method's name on the command line.

A method file holds a docstring (what it computes, from which paper) and

    class Config                        a frozen dataclass; its fields become command-line options
                                        (type, default, metadata help; numbers are 0 or more,
                                        or metadata least)

    RECIPES: dict[str, dict]            values for fields of `Config` and of train.Settings:
                                        "default" for ultrasound, "paper" and "study"

    class Method(nn.Module):            everything that is trained or kept from step to step
        __init__(backbone, config: Config, image_size: int)
                                        backbone: a timm model, (B, 1, H, W) -> (B, F), F its
                                        `num_features`, kept as `self.backbone`
        forward(views: Views) -> Output called once per step; every rank passes its own rows
        after_step(step: int, num_steps: int) -> None
                                        called after each update, step = 1 .. num_steps; moves
                                        an EMA teacher, for example
        normalised_by(mean, std) -> None
                                        optional; called once, with the mean and standard
                                        deviation that views are normalised with

    TWO_VIEWS = False                   optional: the method uses single frames, not pairs
    check_views(first, second) -> None  optional: raises InputError for unsuitable views

The loss is that of the batch joined over all ranks, and its gradient at this rank's rows is
complete (see sslus.kernels.ranks). Nothing else in the project names the method.
"""

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from sslus.engine.errors import InputError

RECIPES = ("default", "paper", "study")


class Output(NamedTuple):
    """What a method computes from one batch of views."""

    loss: Tensor  # () float32
    terms: dict[str, Tensor]  # its parts, each (), detached, for the log
    features: Tensor  # (B, F), the backbone's features of the first view, not detached
    others: Tensor | None = None  # (B, F), those of the second view, if the backbone sees it


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    if name not in names():
        raise InputError(f"no method {name!r}; there are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def recipe(name: str, which: str) -> tuple[dict, object]:
    """A method's values under a recipe: (values for train.Settings, its Config).

    "default" trains well on ultrasound with few GPUs or none; "paper" has the values of the
    original paper; "study" the script defaults of arXiv:2407.21738, on 575 fetal heart videos.
    Raises InputError for unknown methods and recipes.
    """
    if which not in RECIPES:
        raise InputError(f"recipe {which!r}: want one of {', '.join(RECIPES)}")
    module = load(name)
    own = {f.name for f in dataclasses.fields(module.Config)}
    values = module.RECIPES[which]
    config = module.Config(**{k: v for k, v in values.items() if k in own})
    return {k: v for k, v in values.items() if k not in own}, config
