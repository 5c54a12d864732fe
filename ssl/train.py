"""The training loop: frame store -> two views -> backbone -> method -> run folder.

runs/<name>/config.json             every setting, the shards' digest, versions
            metrics.jsonl           one line every `log_every` steps
            curves.png              the same, drawn
            checkpoint.pt           everything that an exact resume needs
            checkpoints/            the last few checkpoints, and the best one
            backbone.safetensors    the result
"""

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.engine.lock import alone
from sslus.engine.plan import Plan
from sslus.engine.stream import StreamStore, is_url
from sslus.ssl import backbones, checkpoints, methods, optimizers
from sslus.ssl.cores import Cores
from sslus.ssl.loader import Store, open_store, plan_of
from sslus.ssl.loader import tier as tier_of
from sslus.ssl.loop import Loop, Options
from sslus.ssl.memory import keep_freed_memory
from sslus.ssl.state import State
from sslus.ssl.step import WAYS, possible
from sslus.ssl.versions import versions
from sslus.ssl.views import parse as parse_views
from sslus.ssl.world import World, enter, pays_bf16

FORMAT = 3  # of config.json; incremented when a run can no longer be continued exactly
TOO_LARGE = 2**63  # for a whole number: PyTorch raises OverflowError or worse
LARGEST = torch.finfo(torch.float32).max
CHOICES = {
    "optimizer": (None, *optimizers.OPTIMIZERS),
    "pairs": ("same", "nearby"),
    "precision": ("auto", "fp32", "bf16"),
    "batch_norm": ("sync", "per-rank"),
    "step": ("auto", *WAYS),
}
ABOVE_0 = (
    "image_size", "accumulate", "epochs", "max_steps", "lr", "base_lr", "max_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run. None: chosen when the run starts, and recorded."""

    method: str = "vicreg"
    backbone: str | None = None  # resnet50 on CUDA, resnet18 on the CPU
    init: str = "random"  # random, imagenet, or a file of weights
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
            views=self.views or methods.recipe(self.method, "default")[0]["views"],
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
        if not getattr(module, "TWO_VIEWS", True) and (self.pairs == "nearby" or self.pair_weights):
            raise InputError(
                f"{self.method} learns from single frames: leave out --pairs nearby and"
                " --pair-weights"
            )
        if self.pair_weights and self.pairs == "same":
            raise InputError("--pair-weights: needs --pairs nearby")
        if hasattr(module, "check_views"):
            module.check_views(*views)


@dataclass(frozen=True)
class TrainResult:
    run: Path
    shards: str  # folder or URL
    step: int
    epoch: float
    seconds: float
    metrics: list[dict]  # the lines of metrics.jsonl, from the first step of the run on
    warnings: list[str]
    was_finished: bool  # already before this call, which did nothing
    stopped: bool  # before the end, by the time limit
    signum: int  # of a signal that arrived during the last step, or 0


def open_run(run: Path, resume: bool, world: World) -> dict | None:
    """The config.json of the run to resume, or None for a new run.

    Every rank must call it. Processes that torchrun has restarted resume without being told to.
    Raises InputError if there is nothing to resume, or an existing run would be overwritten.
    """
    recorded, why = None, None
    try:
        recorded = json.loads((run / "config.json").read_text())
        recorded["settings"]["method"]
        if recorded["format"] != FORMAT:
            why = f"{run} was started by another version of sslus and cannot be continued exactly"
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f"{run / 'config.json'} is damaged ({type(e).__name__}: {e})"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    # Resume only a run that this very torchrun (the parent process in all its attempts) has begun.
    # The first process decides: on other machines the parent has another process id.
    again = restarted and why is None and recorded and recorded.get("launcher") == os.getppid()
    resume = resume or bool(world.gather(torch.tensor(bool(again)))[0])
    if why and (resume or recorded is None):
        raise InputError(f"{why}; start another run with --run DIR")
    if resume and recorded is None:
        raise InputError(f"--resume: {run} holds no run; leave out --resume to start one")
    # A run that was killed while it wrote its first file has left nothing to continue.
    if not resume and run.exists() and any(path.suffix != ".tmp" for path in run.iterdir()):
        raise InputError(
            f"{run} already exists; --resume continues it, --run DIR starts another run"
        )
    return recorded


def recorded_options(run: Path) -> dict:
    """The options of a run recorded in its config.json; {} if that cannot be read."""
    try:
        return dict(json.loads((run / "config.json").read_text())["how"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # open_run reports what is wrong with it


def settings_from(config: dict) -> tuple[Settings, object]:
    """The Settings and the method's Config that a config.json records."""
    values = config["settings"]
    module = methods.load(values["method"])
    try:
        return Settings(**values), module.Config(**config["method_config"])
    except (KeyError, TypeError) as e:
        raise InputError(f"config.json of the run: written by another version ({e})") from e


def train(
    shards: str | Path,
    settings: Settings,
    method_config,
    run: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    tier: str = "auto",
    threads: int | None = None,
    options: Options | None = None,
    report: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Pretrain a backbone on the frames of `shards` and write it to the folder `run`.

    shards: a folder or a URL; tier: where its frames are kept, see sslus.ssl.loader.
    On the CPU the result depends only on the settings, the seed and the numbers of threads and
    processes, bit for bit, even across interruptions: SIGTERM and Ctrl-C save and raise
    Interrupted, a killed run loses the steps since the last checkpoint, and `resume` continues
    either. The `settings` of a resumed run must be those of its config.json. `options` change what
    is logged and kept, not the result. If torchrun has started several processes, all must call
    this in the same way; a restarted process continues from the last checkpoint by itself.
    `report(samples, total, note)` and `say(line)` report progress, on rank 0.

    Raises InputError for invalid input, and if the loss is no longer finite.
    """
    run, options = Path(run), options or Options()
    if threads:
        torch.set_num_threads(threads)
    world, cores = enter(device), Cores()
    if world.device.type == "cpu":
        keep_freed_memory()
    if not world.is_main or say is None:
        say = _nothing
    how = {"device": device, "tier": tier, "threads": threads} | {
        k: v for k, v in dataclasses.asdict(options).items() if k != "time_limit"
    }
    with _alone_in(run, world), _fastest_convolutions(world):
        recorded = open_run(run, resume, world)
        _check_config(method_config)
        store = _open_store(shards, tier, settings.pairs, world)
        tier_of(store, world.device, tier)  # raises before a run folder is created or changed
        asked, settings = settings, _resolved(settings, len(store), world)
        plan = _plan(settings, store, world)
        config = _config(settings, method_config, shards, store, world)
        if recorded is not None:
            _refuse_changes(run, recorded, config)
            # A resumed run keeps its recorded configuration, except where the shards are now.
            config = recorded | {"shards": config["shards"]}
            if (asked.max_steps or 0) > settings.max_steps:
                say(f"--max-steps: the run keeps its length, {settings.max_steps} steps")
        if settings.warmup_steps > settings.max_steps:  # a resumed run hears first what it changed
            raise InputError(
                f"warmup_steps {settings.warmup_steps} is more than the run's"
                f" {settings.max_steps} steps"
            )
        config["how"] = how
        where = "GPU" if world.device.type == "cuda" else "CPU"
        say(
            f"{settings.method}: {settings.backbone} at {settings.image_size} px, batches of"
            f" {settings.batch_size}, {settings.max_steps} steps, {settings.precision} on the"
            f" {where}"
        )
        state = _state(run, settings, method_config, store, world, say)
        loop = Loop(run, store, plan, settings, state, options, tier, report, say)
        single = world.device.type == "cpu" and world.size == 1  # else ranks count as others
        if single and (advice := cores.advice(torch.get_num_threads())):
            say(advice)
        world.barrier()  # all ranks have read the folder before one changes it
        if world.is_main:
            run.mkdir(exist_ok=True)
            if config != recorded:
                _write_json(run / "config.json", config)
            checkpoints.rewind_metrics(run / "metrics.jsonl", state.step)
            if state.step:
                loop.keep_again()
        was_finished = loop.is_finished()
        started = time.monotonic()
        if not was_finished:
            loop.run_to_end()
        if world.is_main and backbones.step_of(run / "backbone.safetensors") != state.step:
            loop.export()
        world.barrier()
        return TrainResult(
            run=run,
            shards=config["shards"]["path"],
            step=state.step,
            epoch=state.step * settings.accumulate / plan.steps_per_epoch,
            seconds=time.monotonic() - started,
            metrics=checkpoints.read_metrics(run / "metrics.jsonl"),
            warnings=loop.log.warnings,
            was_finished=was_finished,
            stopped=state.step < settings.max_steps,
            signum=loop.signum,
        )


@contextlib.contextmanager
def _alone_in(run: Path, world: World) -> Iterator[None]:
    """Hold the lock of a run; rank 0 does it for all."""
    if not world.is_main:
        yield
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{run}: another process is training there; wait for it, or choose another --run"
    here = run.absolute()  # `.` has no name
    with alone(here.with_name(f".{here.name}.lock"), busy):
        yield


@contextlib.contextmanager
def _fastest_convolutions(world: World) -> Iterator[None]:
    """On a GPU, let cuDNN benchmark its algorithms, once per shape: shapes do not change."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or world.device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _check_config(method_config) -> None:
    for field in dataclasses.fields(method_config):
        value = getattr(method_config, field.name)
        least = field.metadata.get("least", 0)
        if type(value) in (int, float) and not least <= value < TOO_LARGE:
            raise InputError(f"{field.name} {value}: want a number from {least}, below 2**63")


def _nothing(line: str) -> None:
    pass


def _open_store(shards: str | Path, tier: str, pairs: str, world: World) -> Store:
    """Open the store; rank 0 builds it if it is missing, and the others follow its choice."""
    if world.is_main:
        store = open_store(shards, tier, pairs)
    world.barrier()
    streams = torch.tensor([world.is_main and isinstance(store, StreamStore)])
    if world.gather(streams)[0]:
        tier = "stream"
    return store if world.is_main else open_store(shards, tier, pairs)


def _resolved(settings: Settings, num_frames: int, world: World) -> Settings:
    """The resolved settings, the same on all ranks; raises InputError for what cannot run here."""
    settings = settings.resolved(world.device, num_frames)
    # Machines may differ in what is faster.
    mixed = world.gather(torch.tensor(settings.precision == "bf16"))[0]
    settings = dataclasses.replace(settings, precision="bf16" if mixed else "fp32")
    if why := settings.step != "auto" and possible(settings.step, settings, world):
        raise InputError(f"step {settings.step!r}: {why}")
    return settings


def _state(
    run: Path, settings: Settings, method_config, store: Store, world: World, say: Callable
) -> State:
    """The state of the last checkpoint of the run, or the initial one."""
    grey = store.mean, store.std

    def initialise(backbone) -> None:
        backbones.initialise(
            backbone, settings.init, settings.backbone, say,
            image_size=settings.image_size, grey=grey,
        )  # fmt: skip

    saved = (run / "checkpoint.pt").exists()  # false if stopped before the first one
    if not saved and (run / "checkpoints").exists():  # it would start over and overwrite everything
        raise InputError(
            f"{run} has lost its checkpoint.pt; copy the newest of {run / 'checkpoints'} there, or"
            " start another run with --run DIR"
        )
    state = State.build(
        settings, method_config, world, len(store.label_names), grey, None if saved else initialise
    )
    if saved:
        state.load(run / "checkpoint.pt")
        say(f"resumed at step {state.step} of {settings.max_steps}")
    return state


def _plan(settings: Settings, store: Store, world: World) -> Plan:
    if settings.batch_size % world.size:
        raise InputError(
            f"--batch-size {settings.batch_size} is not a multiple of the {world.size} processes"
        )
    if settings.batch_size < 2 * world.size:
        raise InputError(
            f"--batch-size {settings.batch_size}: want at least 2 frames for each of the"
            f" {world.size} processes"
        )
    return plan_of(store, settings.batch_size, settings.seed, world.rank, world.size)


def _config(
    settings: Settings, method_config, shards: str | Path, store: Store, world: World
) -> dict:
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(settings),
        "method_config": dataclasses.asdict(method_config),
        "shards": {
            "path": str(shards) if is_url(shards) else str(Path(shards).resolve()),
            "streamed": isinstance(store, StreamStore),
            "digest": store.digest,
            "num_frames": len(store),
            "num_videos": store.num_videos,
            "mean": store.mean,
            "std": store.std,
        },
        "device": torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else platform.machine(),
        "processes": world.size,
        "launcher": os.getppid(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _refuse_changes(run: Path, old: dict, new: dict) -> None:
    """A resumed run must continue as it began; only device, threads and paths may change."""
    changed = [
        f"{key} was {was!r}, now {new[part].get(key)!r}"
        for part in ("settings", "method_config")
        for key, was in old[part].items()
        if key != "step"  # how an update is executed, not what it computes
        and json.loads(json.dumps(new[part].get(key))) != was
    ]
    if old["shards"].get("streamed", False) != new["shards"]["streamed"]:
        changed.append("frames were streamed or not (--tier), which changes order and views")
    if old["shards"]["digest"] != new["shards"]["digest"]:
        changed.append(f"the shards are not those of {old['shards']['path']}")
    if changed:
        raise InputError(
            f"--resume: {run} was started with other settings: {'; '.join(changed)}."
            " Use the same, or start another run with --run DIR; with"
            f" --init {run / 'backbone.safetensors'} it begins with these weights"
        )


def _write_json(path: Path, value: dict) -> None:
    with atomic_file(path, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
