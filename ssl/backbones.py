"""Backbones: any timm model with one input channel and no classifier."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import nn

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError


def build(name: str, image_size: int, seed: int) -> nn.Module:
    """The backbone `name` for (B, 1, image_size, image_size) -> (B, F), F = `num_features`.

    Its random weights depend on (name, image_size, seed) only; the caller's random state is
    left as it was.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise InputError(
            f"backbone {name!r}: timm has no such model"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    options = {}
    config = timm.models.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:  # vision transformers fix their grid
        options["img_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, in_chans=1, num_classes=0, **options)
        except (AssertionError, RuntimeError, ValueError) as e:
            raise InputError(f"backbone {name!r} cannot be built at {image_size} px: {e}") from e


def initialise(backbone: nn.Module, init: str, name: str, say: Callable[[str], None]) -> None:
    """Give `backbone`, a timm model `name`, the weights `init`: random, imagenet or a file."""
    if init == "random":
        return
    if init != "imagenet":
        say(load(backbone, Path(init)))
        return
    try:  # timm sums the stem's weights over RGB
        trained = timm.create_model(name, in_chans=1, num_classes=0, pretrained=True)
    except Exception as e:  # the download's errors are those of three libraries
        raise InputError(
            f"--init imagenet: the weights of {name} cannot be fetched ({type(e).__name__});"
            " run once with a network, which fills the cache, or give --init FILE"
        ) from e
    missing, unexpected = backbone.load_state_dict(trained.state_dict(), strict=False)
    say(f"ImageNet weights of {name}; kept random: {len(missing)}, not used: {len(unexpected)}")


def load(backbone: nn.Module, path: Path) -> str:
    """Fill `backbone` in place from a file; returns a line that says what matched.

    `path`: safetensors, or a file of torch.save with tensors only (a state dict, or one under
    `state_dict`, `model` or `backbone`). A tensor matches if name and shape are the same.
    Raises InputError if the file cannot be read or nothing matches.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--init {path}: there is no such file; want random, imagenet or a file")
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model", "backbone"):
                if isinstance(weights.get(key), dict):
                    weights = weights[key]
                    break
    except Exception as e:  # both readers raise a dozen kinds; to the user they are one
        reason = str(e).strip().splitlines()[0][:200]
        raise InputError(f"--init {path}: cannot be read as weights: {reason}") from e
    own = backbone.state_dict()
    matched = {
        k: v
        for k, v in weights.items()
        if k in own and isinstance(v, torch.Tensor) and v.shape == own[k].shape
    }
    if not matched:
        raise InputError(
            f"--init {path}: 0 of {len(own)} tensors match this backbone in name and shape"
            f" (file: {next(iter(weights), 'empty')}...; backbone: {next(iter(own))}...)"
        )
    backbone.load_state_dict(matched, strict=False)
    left = sorted(own.keys() - matched.keys())
    extra = sorted(weights.keys() - matched.keys())
    line = f"{len(matched)} of {len(own)} tensors loaded from {path}"
    if left:
        line += f"; kept random: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
    if extra:
        line += f"; not used: {', '.join(extra[:3])}{', ...' if len(extra) > 3 else ''}"
    return line


def save(backbone: nn.Module, path: Path, about: dict) -> None:
    """Write the weights as safetensors, with `about` as JSON strings in the file's header.

    >>> timm.create_model("resnet18", in_chans=1, num_classes=0).load_state_dict(
    ...     safetensors.torch.load_file("backbone.safetensors"))
    """
    weights = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    data = safetensors.torch.save(weights, {k: json.dumps(v) for k, v in about.items()})
    with atomic_file(path) as f:
        f.write(data)
