"""Backbones: any timm model with one input channel and no classifier."""

import difflib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import Conv2dSame
from torch import Tensor, nn

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.ssl.small_maps import use_products


def build(name: str, image_size: int, seed: int, zero_init_residual: bool = False) -> nn.Module:
    """The backbone `name` for (B, 1, image_size, image_size) -> (B, F), F = `num_features`.

    zero_init_residual: residual blocks of ResNets and their like add nothing to their input at
    first, as the last BatchNorm in each has weight 0 (Goyal et al. 2017, arXiv:1706.02677, section
    5.1). Other models have no such choice. An untrained ResNet-18 then sees less than a tenth of
    the pixels.

    Random weights depend only on these arguments; the caller's random state is not changed. Raises
    InputError for unknown names and impossible sizes.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise InputError(
            f"backbone {name!r}: timm has no such model"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            options = {"in_chans": 1, **_options(name, image_size)}
            model = _created(name, seed, zero_init_residual, options)
            width = model.eval()(torch.zeros(1, 1, image_size, image_size)).shape[1]
        except (AssertionError, RuntimeError, ValueError) as e:
            why = str(e) or "the size does not suit it"  # an assertion may say nothing
            raise InputError(f"backbone {name!r} cannot be built at {image_size} px: {why}") from e
    model.num_features = width  # timm's is that of the last map; some models widen after pooling
    return use_products(model.train())


def _created(name: str, seed: int, zero_init_residual: bool, options: dict) -> nn.Module:
    torch.manual_seed(seed)
    try:
        return timm.create_model(name, zero_init_last=zero_init_residual, **options)
    except TypeError:  # ResNets and their like take it, other models have nothing to set to 0
        torch.manual_seed(seed)
        return timm.create_model(name, **options)


def _options(name: str, image_size: int | None) -> dict:
    config = timm.models.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size  # vision transformers with a fixed grid
    return {"num_classes": 0} | ({"img_size": image_size} if fixed and image_size else {})


def initialise(
    backbone: nn.Module,
    init: str,
    name: str,
    say: Callable[[str], None],
    *,
    image_size: int | None = None,
    grey: tuple[float, float] | None = None,
) -> None:
    """Give `backbone`, a timm model `name`, the weights `init`: random, imagenet or a file.

    image_size: the size it was built for. grey: mean and standard deviation (of values in 0..1)
    with which its input is normalised; needed to fold a three-channel stem (see `fold`). `say`
    gets a line that says what matched. Raises InputError for weights that cannot be read,
    downloaded or used.
    """
    if init == "random":
        return
    if init == "imagenet":
        source, weights = f"timm's {name}", _pretrained(name, image_size)
    else:
        source, weights = init, read(Path(init))
    say(fill(backbone, weights, source, grey))


def _pretrained(name: str, image_size: int | None) -> dict[str, Tensor]:
    """timm's pretrained weights of a model, including its three-channel stem."""
    if not timm.is_model_pretrained(name):
        raise InputError(f"--init imagenet: timm has no weights of {name}; give --init FILE")
    try:
        model = timm.create_model(name, pretrained=True, **_options(name, image_size))
    except Exception as e:  # a download can raise errors of three libraries
        raise InputError(
            f"--init imagenet: the weights of {name} cannot be downloaded ({type(e).__name__});"
            " run once with a network, which fills the cache, or give --init FILE"
        ) from e
    return model.state_dict()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, or a torch.save file that holds only tensors (a state
    dict, or one under `state_dict`, `model` or `backbone`; `method` in a run's checkpoint).
    Raises InputError if it cannot be read."""
    if not path.is_file():
        raise InputError(
            f"--init {path}: no such file; want random, imagenet or a file, such as the"
            " backbone.safetensors of a run"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model", "backbone", "method"):
            if isinstance(weights.get(key), dict):
                weights = weights[key]
                break
        return {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    except pickle.UnpicklingError as e:  # torch's own message advises to run what is in the file
        raise InputError(
            f"--init {path}: cannot be read as weights: damaged, or more than tensors; save the"
            " state_dict() alone"
        ) from e
    except Exception as e:  # the two readers raise a dozen kinds of errors
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise InputError(f"--init {path}: cannot be read as weights: {reason}") from e


def fill(
    backbone: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    grey: tuple[float, float] | None = None,
) -> str:
    """Load `weights` into `backbone`, a timm model, in place; returns a line on what matched.

    A tensor matches if name and shape are equal, after removing a prefix of all names in the file
    (`module.`, `backbone.`) and folding a three-channel stem into one channel. Raises InputError if
    nothing matches or the stem cannot be folded.
    """
    own = backbone.state_dict()
    prefix = _prefix(own, weights)
    weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    notes = [f"`{prefix}` removed from their names"] if prefix else []
    colours = [k for k in weights if k in own and _is_stem(weights[k], own[k])]
    if colours:
        weights = fold(backbone, colours, weights, grey)
        notes.append(f"the three channels of {colours[0]} folded into one")
    matched = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    if not any(v.ndim for v in matched.values()):  # BatchNorm's counters match those of any net
        raise InputError(
            f"--init {source}: 0 of {len(own)} tensors match this backbone in name and shape"
            f" (file: {next(iter(weights), 'empty')}...; backbone: {next(iter(own))}...)"
        )
    backbone.load_state_dict(matched, strict=False)
    other = {k for k in own.keys() & weights.keys() if k not in matched}
    for what, keys in (
        ("of another shape", {f"{k} {_by(weights[k])}, here {_by(own[k])}" for k in other}),
        ("kept random", own.keys() - weights.keys()),
        ("not used", weights.keys() - own.keys()),
    ):
        if keys:
            notes.append(f"{what}: {', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''}")
    return "; ".join([f"{len(matched)} of {len(own)} tensors loaded from {source}", *notes])


def _prefix(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """The prefix of the names in the file with which most of them match."""
    first = next(iter(own))
    found = (k.removesuffix(first) for k in weights if k.endswith(first))
    prefixes = ["", *(p for p in found if p.endswith("."))]
    return max(prefixes, key=lambda p: sum(p + k in weights for k in own))


def _by(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "()"


def _is_stem(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.ndim == ours.ndim == 4 and (theirs.shape[1], ours.shape[1]) == (3, 1)


def fold(
    backbone: nn.Module,
    colours: list[str],
    weights: dict[str, Tensor],
    grey: tuple[float, float] | None,
) -> dict[str, Tensor]:
    """`weights` for three normalised channels -> the same for one: a new dictionary.

    colours: the names of the stem's weights. grey: mean and std of our pixels.

    A grey value g is the colour (g, g, g). The three-channel model gets x_c = (g - m_c) / s_c, with
    timm's m and s for it; ours gets y = (g - mean) / std. So the stem's sum_c w_c * x_c is
    w' * y + b with

        w' = sum_c w_c std / s_c        b = sum_c w_c (mean - m_c) / s_c, summed over the window

    b goes into the stem's bias or, if it has none, into the running mean of the BatchNorm after
    it. The result is equal wherever the window lies inside the image. At the edge, zero padding
    now stands for the mean of our pixels instead of the mean of each colour, which no one-channel
    convolution can reproduce.

    Raises InputError if no BatchNorm follows a stem without bias, or if the stem transforms its
    weights.
    """
    stem = colours[0].removesuffix(".weight")
    if grey is None:
        raise ValueError(f"{stem} has three channels in the file: give the mean and std (grey)")
    (mean, std), rgb = grey, backbone.pretrained_cfg
    conv = backbone.get_submodule(stem)
    w = weights[f"{stem}.weight"].double()
    gain, shift = (
        torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1)
        for v in (
            [std / s for s in rgb["std"]],
            [(mean - m) / s for m, s in zip(rgb["mean"], rgb["std"], strict=True)],
        )
    )
    offset = (w * shift).sum((1, 2, 3))
    key, sign = f"{stem}.bias", 1
    if key not in weights:
        names = [n for n, _ in backbone.named_modules()]
        after = names[names.index(stem) + 1]
        key, sign = f"{after}.running_mean", -1
    linear = type(conv) in (nn.Conv2d, Conv2dSame)  # others transform their weights first
    if len(colours) > 1 or not linear or key not in weights:
        raise InputError(
            f"--init: the three-channel stem {stem} of {type(backbone).__name__} cannot be"
            " folded into one channel; use another backbone, or weights for one channel"
        )
    old = weights[key]
    return weights | {
        f"{stem}.weight": (w * gain).sum(1, keepdim=True).to(old.dtype),
        key: (old.double() + sign * offset).to(old.dtype),
    }


def add_to_digest(digest, backbone: nn.Module) -> None:
    """Add the weights, which must be on the CPU, and their names to a hashlib digest."""
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())


def step_of(path: Path) -> int | None:
    """The step of the run at which `save` wrote `path`; None if that is missing or damaged."""
    try:
        data = path.read_bytes()
        safetensors.torch.load(data)
    except (FileNotFoundError, SafetensorError):
        return None
    return step_in(data)


def step_in(data: bytes) -> int | None:
    """The same from the bytes of a whole file."""
    return json.loads(_split(data)[0].get("__metadata__", {}).get("step", "null"))


def _split(data: bytes) -> tuple[dict, memoryview]:
    """The header of a safetensors file, and its tensors: first come 8 bytes with the length of
    the header, which is JSON."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), memoryview(data)[end:]


def save(backbone: nn.Module, path: Path, about: dict) -> None:
    """Write the weights as safetensors, with `about` as JSON strings in the file's header.

    >>> timm.create_model("resnet18", in_chans=1, num_classes=0).load_state_dict(
    ...     safetensors.torch.load_file("backbone.safetensors"))
    """
    weights = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    data = safetensors.torch.save(weights, {k: json.dumps(v) for k, v in about.items()})
    header, tensors = _split(data)
    # safetensors puts `about` in a random order: equal weights would make files of unequal digests.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    with atomic_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.write(tensors)
