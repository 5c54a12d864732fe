"""One file per method. The file's name is the method's name on the command line.

A file elsewhere is named by its path, which ends in .py: its code runs only where a caller names
it, never because a run's config.json does. A method file holds a docstring (what it computes, from
which paper) and

    class Config                        a frozen dataclass; its fields become command-line options
                                        (type, default, metadata help; numbers are 0 or more,
                                        or metadata least)

    RECIPES: dict[str, dict]            values for fields of `Config` and of train.Settings:
                                        "default" for ultrasound; a file of your own may lack
                                        "paper" and "study"

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

    PAIRS = False                       optional: the method uses single frames, not pairs
    ONE_VIEW = True                     optional: the method uses views.va alone, so no other view
                                        is made; views.vb is views.va
    COMPARABLE_LOSS = False             optional: the task itself changes from step to step, so that
                                        the lowest loss does not mark the best checkpoint
    check_views(first, second) -> None  optional: raises InputError for unsuitable views

The loss is that of the batch joined over all ranks, and its gradient at this rank's rows is
complete (see sslus.kernels.ranks). Nothing else in the project names the method.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, get_type_hints

from torch import Tensor, nn

from sslus.engine.errors import InputError
from sslus.ssl.curves import KNOWN, ONLINE

RECIPES = ("default", "paper", "study")
TAKEN = {*KNOWN, *ONLINE}  # names in the lines of metrics.jsonl, which no term may have
PAGE = Path(__file__).parents[1] / "README.md"  # is installed, and shows a method of your own


class Output(NamedTuple):
    """What a method computes from one batch of views."""

    loss: Tensor  # () float32
    terms: dict[str, Tensor]  # its parts, each (), detached, for the log
    features: Tensor  # (B, F), the backbone's features of the first view, not detached
    others: Tensor | None = None  # (B, F), those of the second view, if the backbone sees it


def checked(out: Output, method: nn.Module, taken: set[str] = TAKEN) -> Output:
    """What the method's forward returned; raises InputError if nothing can be learned from it, or a
    term has one of the names `taken`."""
    if not isinstance(out, Output):
        why = f"want an Output of sslus.ssl.methods, got {_kind(out)}"
    elif not isinstance(out.loss, Tensor) or out.loss.ndim:
        why = f"want a loss of shape (), got {_kind(out.loss)}"
    elif not out.loss.requires_grad:
        why = "the loss has no gradient: it was detached, or computed without one"
    elif wrong := [t for t in out.terms.values() if not isinstance(t, Tensor) or t.ndim]:
        why = f"want terms that are tensors of shape (), got {_kind(wrong[0])}"
    elif hiding := taken & out.terms.keys():
        why = f"a term named {min(hiding)!r} would hide what the log says under this name"
    elif not isinstance(out.features, Tensor) or out.features.ndim != 2:
        why = f"want the backbone's features, (B, F), got {_kind(out.features)}"
    elif out.others is not None and _kind(out.others) != _kind(out.features):
        why = f"want features of both views, got {_kind(out.features)} and {_kind(out.others)}"
    else:
        return out
    code = inspect.unwrap(type(method).forward).__code__
    raise InputError(f"{code.co_filename}, line {code.co_firstlineno}: forward: {why}")


def _kind(x) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def is_file(method: str | Path) -> bool:
    """Whether the method is a file of the user's, rather than one of `names()`."""
    return str(method).endswith(".py")


def name_of(method: str | Path) -> str:
    """>>> name_of("vicreg"), name_of("losses/my_method.py")
    ('vicreg', 'my_method')
    """
    return Path(method).stem if is_file(method) else str(method)


def load(method: str | Path) -> ModuleType:
    """The module of a method; raises InputError for what is not one. Runs the code of a file."""
    if is_file(method):
        return _run_file(*_read_file(method))
    if method not in names():
        raise InputError(
            f"no method {method!r}; there are: {', '.join(names())}, or the path of a .py file"
        )
    return importlib.import_module(f"{__name__}.{method}")


def about_file(method: str | Path) -> dict | None:
    """What a run records of the file that holds its method; None for one of `names()`."""
    if not is_file(method):
        return None
    path, code = _read_file(method)
    return {"path": str(path), "sha256": hashlib.sha256(code).hexdigest()}


def _read_file(method: str | Path) -> tuple[Path, bytes]:
    path, name = Path(method).resolve(), name_of(method)
    if name in (*names(), "all"):
        raise InputError(f"{method}: {name!r} is already a method of sslus; rename the file")
    if not re.fullmatch(r"[\w-]+", name):  # it names the run and a row of the report
        raise InputError(f"{method}: want a file name of letters, digits, _ and - only")
    try:
        return path, path.read_bytes()
    except OSError as e:
        raise InputError(f"{method}: cannot be read ({e.strerror})") from e


@functools.cache  # once per content: the classes of a file are the same at every call
def _run_file(path: Path, code: bytes) -> ModuleType:
    """Runs `code`, of which the digest is taken, and no .pyc that might lie beside it."""
    name = f"sslus_method_{path.stem}"  # not the file's own name, which may be that of a package
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(code, path, "exec"), module.__dict__)
        config = getattr(module, "Config", None)
        fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
        for f in fields:  # after `from __future__ import annotations` types are strings
            f.type = get_type_hints(config)[f.name]
    except (Exception, SystemExit) as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f", line {f.lineno}" for f in frames if f.filename == str(path)]
        raise InputError(f"{path}{''.join(lines[-1:])}: {type(e).__name__}: {e}") from e
    recipes, method = (getattr(module, name, None) for name in ("RECIPES", "Method"))
    wanted = {
        "a dataclass Config": dataclasses.is_dataclass(config),
        "fields of Config of type int, float, str or bool, with defaults": all(
            f.type in (int, float, str, bool) and f.default is not dataclasses.MISSING
            for f in fields
        ),
        'a dict RECIPES with "default"': isinstance(recipes, dict) and "default" in recipes,
        "a class Method(nn.Module) with after_step": isinstance(method, type)
        and issubclass(method, nn.Module)
        and hasattr(method, "after_step"),
    }
    if lacks := [what for what, there in wanted.items() if not there]:
        raise InputError(f"{path}: lacks {'; '.join(lacks)} (see Your own method in {PAGE})")
    return module


def recipe(name: str | Path, which: str) -> tuple[dict, object]:
    """A method's values under a recipe: (values for train.Settings, its Config).

    "default" trains well on ultrasound with few GPUs or none; "paper" has the values of the
    original paper; "study" the script defaults of arXiv:2407.21738, on 575 fetal heart videos.
    Raises InputError for unknown methods and recipes.
    """
    if which not in RECIPES:
        raise InputError(f"recipe {which!r}: want one of {', '.join(RECIPES)}")
    module = load(name)
    if which not in module.RECIPES:
        raise InputError(f"{name}: has no recipe {which!r}, only {', '.join(module.RECIPES)}")
    own = {f.name for f in dataclasses.fields(module.Config)}
    values = module.RECIPES[which]
    config = module.Config(**{k: v for k, v in values.items() if k in own})
    return {k: v for k, v in values.items() if k not in own}, config
