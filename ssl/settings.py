"""The settings of a run, and which source of a value wins.

    new run        command line > recipe > default
    --resume       command line > config.json of the run > default

What the command line gives is called `asked` and holds the options by their names (`batch_size`),
without those that were left out. What is still None or "auto" after that is chosen for the device
by `Settings.resolved`, and config.json records what was chosen. There are three kinds of options:

    Settings, Config of the method         determine the result; a resumed run must keep them
    WHERE, Options                         where it runs, what is logged and kept: free to change
    resume, recipe, time_limit ...         hold for one call and are not recorded
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sslus.engine.errors import InputError
from sslus.engine.plan import Plan
from sslus.ssl import methods, optimizers
from sslus.ssl.cores import MOST_THREADS
from sslus.ssl.runs import check_type
from sslus.ssl.views import parse as parse_views
from sslus.ssl.world import LEAST_FOR_BF16, pays_bf16

WAYS = ("eager", "compile", "graph")  # to execute an update, see ssl/step.py
WHERE = {"device": "auto", "tier": "auto", "threads": None}  # and their defaults
WHERE_KINDS = {"device": str, "tier": str, "threads": int | None}
TOO_LARGE = 2**63  # for a whole number: PyTorch raises OverflowError or worse
LARGEST = torch.finfo(torch.float32).max
CHOICES = {
    "optimizer": (None, *optimizers.OPTIMIZERS),
    "pairs": ("same", "nearby"),
    "precision": ("auto", "fp32", "bf16"),
    "batch_norm": ("sync", "per-rank"),
    "step": ("auto", *WAYS),
}
LEAST = {"log_every": 1, "health_every": 1, "checkpoint_every": 1, "keep": 0, "online_every": 0}
ABOVE_0 = (
    "image_size", "accumulate", "epochs", "max_steps", "lr", "base_lr", "clip_norm", "max_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run. None: chosen when the run starts, and recorded."""

    method: str = "vicreg"  # or the path of a .py file, see ssl/methods/__init__.py
    backbone: str | None = None  # resnet50 on CUDA, resnet18 on the CPU
    init: str = "random"  # random, imagenet, or a file of weights
    zero_init_residual: bool = False  # residual blocks add nothing at first: backbones.build
    image_size: int | None = None  # side of a view in pixels: 224 on CUDA, 96 on the CPU
    batch_size: int | None = None  # frames over all ranks: 256 on CUDA, 64 on the CPU
    accumulate: int = 1  # batches per step, whose gradients are averaged
    epochs: int | None = None  # 100, if max_steps is not given either
    max_steps: int | None = None  # the run ends at whichever comes first
    optimizer: str | None = None  # adamw
    lr: float | None = None  # peak learning rate; see optimizers.default_lr
    base_lr: float | None = None  # if lr is not given: lr = base_lr x frames per step / 256
    weight_decay: float | None = None  # see optimizers.default_weight_decay
    warmup_steps: int | None = None  # a tenth of the steps, at most 10 epochs
    warmup_epochs: float | None = None  # used if warmup_steps is not given
    final_lr: float = 0.001  # end of the cosine schedule, as a fraction of the peak
    clip_norm: float | None = None  # gradients with a larger norm are scaled down to it
    precision: str = "auto"  # bf16 autocast where that is faster, see pays_bf16; else fp32
    seed: int = 0
    views: str | None = None  # a preset of ssl/views.py, and fields of it: "simclr,p_blur=0"
    pairs: str = "same"  # both views from one frame, or the second from a "nearby" one
    max_seconds: float = 1.5  # largest distance of a pair; IVPP: VICReg 0.5, SimCLR 1.5, Barlow 3
    pair_weights: bool = False  # weight nearby pairs less the further apart they are
    dual_task: float = 0.0  # weight of a cross-entropy on the labelled frames
    batch_norm: str = "sync"  # statistics over the joint batch of all ranks, or "per-rank"
    step: str = "auto"  # how an update is executed: eager, compile or graph

    def resolved(self, device: torch.device, num_frames: int) -> "Settings":
        """These settings with every None and `auto` resolved; raises InputError for bad values."""
        self._check_values()
        cuda = device.type == "cuda"
        optimizer = self.optimizer or "adamw"
        batch_size = (256 if cuda else 64) if self.batch_size is None else self.batch_size
        batches = Plan(num_frames, batch_size, self.seed).steps_per_epoch
        if self.accumulate > batches:
            raise InputError(
                f"accumulate {self.accumulate}: an epoch has only {batches} full batches"
            )
        per_epoch = batches / self.accumulate
        epochs = self.epochs or (None if self.max_steps else 100)
        # In whole numbers: as a product of floats, 15 x (49 / 3) is a little less than 245.
        counts = [epochs and max(1, epochs * batches // self.accumulate), self.max_steps]
        num_steps = min(n for n in counts if n)
        warmup = self.warmup_steps
        if warmup is None and self.warmup_epochs is not None:
            warmup = min(num_steps, round(self.warmup_epochs * per_epoch))
        if warmup is None:
            warmup = min(num_steps // 10, round(10 * per_epoch))
        frames = batch_size * self.accumulate
        lr, weight_decay = self.lr, self.weight_decay
        if lr is None and self.base_lr is not None:
            lr = self.base_lr * frames / 256
        if lr is None:
            lr = optimizers.default_lr(optimizer, frames)
        if weight_decay is None:
            weight_decay = optimizers.default_weight_decay(optimizer)
        backbone = self.backbone or ("resnet50" if cuda else "resnet18")
        image_size = (224 if cuda else 96) if self.image_size is None else self.image_size
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if pays_bf16(device, backbone, image_size) else "fp32"
        if precision == "bf16" and not cuda and image_size < LEAST_FOR_BF16:
            raise InputError(
                f"precision bf16: images of {image_size} px are too small for it on a CPU, whose"
                " convolutions would return wrong gradients; use fp32, or"
                f" {LEAST_FOR_BF16} px or more"
            )
        usual = methods.recipe(self.method, "default")[0]
        views = self.views or usual.get("views", "ultrasound")
        settings = dataclasses.replace(
            self,
            backbone=backbone,
            image_size=image_size,
            batch_size=batch_size,
            epochs=epochs,
            max_steps=num_steps,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup,
            precision=precision,
            views=views,
        )
        settings._check_views()
        return settings

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) not in (int, float):
                continue
            if field.name in ABOVE_0 and not value > 0:  # true for NaN too
                raise InputError(f"{field.name} must be above 0, got {value}")
            if type(value) is int and not 0 <= value < TOO_LARGE:
                raise InputError(f"{field.name} {value}: want a whole number from 0, below 2**63")
            if not 0 <= value <= LARGEST:
                raise InputError(f"{field.name} {value}: want a number from 0 to {LARGEST:.0e}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise InputError(
                    f"{name} {value!r}: want one of {', '.join(filter(None, choices))}"
                )

    def _check_views(self) -> None:
        """Whether the method can use the views and pairs of these resolved settings."""
        module = methods.load(self.method)
        views = parse_views(self.views, self.image_size)
        if not getattr(module, "PAIRS", True) and (self.pairs == "nearby" or self.pair_weights):
            raise InputError(
                f"{methods.name_of(self.method)} learns from single frames: leave out"
                " --pairs nearby and --pair-weights"
            )
        if self.pair_weights and self.pairs == "same":
            raise InputError("--pair-weights: needs --pairs nearby")
        if hasattr(module, "check_views"):
            module.check_views(*views)


@dataclass(frozen=True)
class Options:
    """What is logged and kept of a run, in steps. Its result does not depend on these.

    Raises InputError for a number below LEAST.
    """

    log_every: int = 10
    health_every: int = 50  # if not a multiple of log_every, delayed to the next log line
    checkpoint_every: int = 200
    keep: int = 2  # checkpoints to keep in checkpoints/, besides the best one
    online_every: int = 0  # epochs between online evaluations (kNN, linear probe); 0: never
    time_limit: float | None = None  # seconds, after which the run saves and stops

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} {getattr(self, name)!r:.40}: want a whole number from {least}"
                )


def of_new_run(asked: dict, recipe: str = "default") -> tuple[Settings, object]:
    """The Settings and the method's Config: what is asked, else the recipe's, else defaults."""
    method = asked.get("method", Settings.method)
    values, config = methods.recipe(method, recipe)
    if unknown := values.keys() - _names(Settings):
        raise InputError(f"{method}: recipe {recipe!r} sets {', '.join(unknown)}: no such option")
    # What is asked also removes the recipe's values that belonged to what it replaces.
    for other, same in (
        ("base_lr", "lr"), ("warmup_epochs", "warmup_steps"), ("max_steps", "epochs"),
    ):  # fmt: skip
        if other in asked:
            values.pop(same, None)
    usual = values.get("optimizer", "adamw")
    if asked.get("optimizer", usual) != usual:
        for name in ("lr", "base_lr", "weight_decay"):
            values.pop(name, None)
        fields = dataclasses.fields(config)
        other = {f.name: f.default for f in fields if f.metadata.get("of_optimizer")}
        config = dataclasses.replace(config, **other)
    return _replaced(Settings(**values), config, asked)


def of_resumed_run(asked: dict, recorded: dict) -> tuple[Settings, object]:
    """The Settings and the method's Config: what is asked, else what config.json has recorded.

    `refuse_changes` finds what is asked and differs, once it is resolved.
    """
    return _replaced(*settings_from(recorded, asked.get("method")), asked)


def how(asked: dict, recorded: dict | None = None) -> tuple[dict, Options]:
    """(device, tier and threads by these names; Options): what is asked, else what config.json
    has recorded as `how`, else defaults. Raises InputError for a number out of range."""
    found = (recorded or {}) | asked
    where = WHERE | _part(found, WHERE)
    if where["threads"] is not None and not 1 <= where["threads"] <= MOST_THREADS:
        raise InputError(f"threads {where['threads']!r:.40}: want 1 to {MOST_THREADS}")
    return where, Options(**_part(found, _names(Options)))


def recorded_how(run: Path) -> dict:
    """What `how` was when a run last started; {} if that cannot be read, which train.open_run
    reports. Raises InputError for values of a wrong type or out of range."""
    try:
        found = dict(json.loads((run / "config.json").read_text())["how"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    _check_types(found, WHERE_KINDS | _kinds(Options))
    try:
        how({}, found)
    except InputError as e:
        raise _edited(e) from e
    return found


def settings_from(config: dict, method: str | None = None) -> tuple[Settings, object]:
    """The Settings and the method's Config that a config.json records.

    A run may come from someone else, so its config.json does not choose what code runs: a file of
    a method is loaded only if the caller names it (`method`), and only if it has not changed.
    """
    try:
        values = dict(config["settings"])
        if config.get("method_file") or values["method"] not in methods.names():
            if not methods.is_file(method or ""):
                raise InputError(
                    f"--resume: the run's method {values['method']!r} is in a file, whose code runs"
                    f" only if you name it: --method FILE (it was {config['method_file']['path']})"
                )
            if changed := _changed_file(config, methods.about_file(method)):
                raise InputError(f"--resume: {changed}; put it back, or start another --run DIR")
            values["method"] = method
        module, own = methods.load(values["method"]), dict(config["method_config"])
        settings, method_config = Settings(**values), module.Config(**own)
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"config.json of the run: written by another version ({e}); start another --run DIR"
        ) from e
    _check_types(values, _kinds(Settings))
    _check_types(own, _kinds(module.Config))
    return settings, method_config


def _check_types(values: dict, kinds: dict[str, type]) -> None:
    try:
        for name in values.keys() & kinds.keys():
            check_type(name, values[name], kinds[name])
    except TypeError as e:
        raise _edited(e) from e


def _edited(why: Exception) -> InputError:
    return InputError(
        f"config.json of the run: damaged ({why}); put it back, or start another --run DIR"
    )


def check_config(method_config) -> None:
    """Raise InputError for a number outside the bounds that its field declares."""
    for field in dataclasses.fields(method_config):
        value = getattr(method_config, field.name)
        least = field.metadata.get("least", 0)
        if type(value) in (int, float) and not least <= value < TOO_LARGE:
            raise InputError(f"{field.name} {value}: want a number from {least}, below 2**63")


def refuse_changes(run: Path, old: dict, new: dict) -> None:
    """A resumed run must continue as it began; only device, threads and paths may change."""
    changed = [
        f"{key} was {was!r}, now {new[part].get(key)!r}"
        for part in ("settings", "method_config")
        for key, was in old[part].items()
        if key != "step"  # how an update is executed, not what it computes
        and json.loads(json.dumps(new[part].get(key))) != was
    ]
    if file := _changed_file(old, new["method_file"]):
        changed.append(file)
    if old["shards"]["streamed"] != new["shards"]["streamed"]:
        changed.append("frames were streamed or not (--tier), which changes order and views")
    if old["shards"]["digest"] != new["shards"]["digest"]:
        changed.append(f"the shards are not those of {old['shards']['path']}")
    if changed:
        raise InputError(
            f"--resume: {run} was started with other settings: {'; '.join(changed)}."
            " Use the same, or start another run with --run DIR; with"
            f" --init {run / 'backbone.safetensors'} it begins with these weights"
        )


def _changed_file(recorded: dict, now: dict | None) -> str | None:
    was = (recorded.get("method_file") or {}).get("sha256")
    if now is None or now["sha256"] == was:
        return None
    return (
        f"the method's file {now['path']} is not the one that the run began with (sha256"
        f" {now['sha256']:.12}..., was {was!s:.12}...)"
    )


def _replaced(settings: Settings, config, asked: dict) -> tuple[Settings, object]:
    config = dataclasses.replace(config, **_part(asked, _names(config)))
    return dataclasses.replace(settings, **_part(asked, _names(Settings))), config


def _part(values: dict, names) -> dict:
    return {name: values[name] for name in names if name in values}


def _names(kind) -> list[str]:
    return list(_kinds(kind))


def _kinds(kind) -> dict[str, type]:
    return {f.name: f.type for f in dataclasses.fields(kind)}
