"""The training loop: frame store -> two views -> backbone -> method -> run folder.

runs/<name>/config.json             every setting, the shards' digest, versions
            metrics.jsonl           one line every `log_every` steps
            curves.png              the same, drawn
            checkpoint.pt           everything that exact resume needs
            backbone.safetensors    the result
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError, Interrupted
from sslus.engine.plan import Plan, nearby
from sslus.engine.store import FrameStore
from sslus.ssl import backbones, checkpoints, curves, health, methods, optimizers
from sslus.ssl.loader import Batch, Loader
from sslus.ssl.views import parse as parse_views

PRECISIONS = ("auto", "fp32", "bf16")
PAIRS = ("same", "nearby")
CURVES_EVERY_SECONDS = 120.0  # drawing takes about a second


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run. None = chosen when the run starts, and recorded."""

    method: str = "vicreg"
    backbone: str | None = None  # resnet50 on CUDA, resnet18 on the CPU
    init: str = "random"  # random, imagenet, or a file of weights
    image_size: int | None = None  # side of a view in pixels: 224 on CUDA, 96 on the CPU
    batch_size: int | None = None  # frames; two views each: 256 on CUDA, 64 on the CPU
    epochs: int | None = None  # 100, if max_steps is not given either
    max_steps: int | None = None  # the run ends at whichever comes first
    optimizer: str = "adamw"
    lr: float | None = None  # at the peak; see optimizers.default_lr
    weight_decay: float | None = None  # AdamW 0.05, LARS 1e-6
    warmup_steps: int | None = None  # a tenth of the steps, at most 10 epochs
    final_lr: float = 0.001  # where the cosine ends, as a share of the peak
    precision: str = "auto"  # bf16 autocast on CUDA; fp32 on the CPU
    seed: int = 0
    views: str = "ultrasound"  # a preset of ssl/views.py, and fields of it: "simclr,p_blur=0"
    pairs: str = "same"  # both views from one frame, or the second from a "nearby" one
    max_seconds: float = 1.5  # how far away nearby is; IVPP: VICReg 0.5, SimCLR 1.5, Barlow 3
    pair_weights: bool = False  # nearby pairs count for less the further apart they are

    def resolved(self, device: torch.device, num_frames: int) -> "Settings":
        """The same with every None and `auto` decided; raises InputError for bad values."""
        cuda = device.type == "cuda"
        lars = self.optimizer == "lars"
        batch_size = self.batch_size or (256 if cuda else 64)
        per_epoch = Plan(num_frames, batch_size, self.seed).steps_per_epoch
        epochs = self.epochs or (None if self.max_steps else 100)
        counts = [n for n in (epochs and epochs * per_epoch, self.max_steps) if n]
        num_steps = min(counts)
        default_warmup = min(num_steps // 10, 10 * per_epoch)
        # bf16 on a CPU without AMX measured 15 times slower than fp32 (ResNet-18, 96 px).
        precision = ("bf16" if cuda else "fp32") if self.precision == "auto" else self.precision
        settings = dataclasses.replace(
            self,
            backbone=self.backbone or ("resnet50" if cuda else "resnet18"),
            image_size=self.image_size or (224 if cuda else 96),
            batch_size=batch_size,
            epochs=epochs,
            max_steps=num_steps,
            lr=self.lr or optimizers.default_lr(self.optimizer, batch_size),
            weight_decay=(1e-6 if lars else 0.05)
            if self.weight_decay is None
            else self.weight_decay,
            warmup_steps=default_warmup if self.warmup_steps is None else self.warmup_steps,
            precision=precision,
        )
        parse_views(settings.views)
        if settings.pairs not in PAIRS:
            raise InputError(f"pairs {settings.pairs!r}: want one of {', '.join(PAIRS)}")
        if not settings.max_seconds > 0:
            raise InputError(f"max_seconds must be above 0, got {settings.max_seconds}")
        if settings.precision not in PRECISIONS:
            raise InputError(f"precision {precision!r}: want one of {', '.join(PRECISIONS)}")
        for name in ("image_size", "max_steps", "lr"):
            if not getattr(settings, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(settings, name)}")
        if settings.warmup_steps > num_steps:
            raise InputError(
                f"warmup_steps {settings.warmup_steps} is more than the run's {num_steps} steps"
            )
        return settings


@dataclass(frozen=True)
class TrainResult:
    run: Path
    step: int
    epoch: float
    seconds: float
    metrics: list[dict]  # the lines of metrics.jsonl, from the run's first step on
    warnings: list[str]
    was_finished: bool  # before this call, which did nothing


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device; a named one that is not there raises InputError."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {name!r}: want auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: there is none here (`sslus doctor` says why); or use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def open_run(run: Path, resume: bool) -> dict | None:
    """The config.json of the run to resume, or None for a new one.

    Raises InputError where there is nothing to resume, or something that is not to be touched.
    """
    try:
        recorded = json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        recorded = None
    except (OSError, ValueError) as e:
        raise InputError(f"{run / 'config.json'}: cannot be read: {e}") from e
    if resume and recorded is None:
        raise InputError(f"--resume: {run} holds no run; leave --resume out to start one")
    if not resume and run.exists() and any(run.iterdir()):
        raise InputError(
            f"{run} is there already; --resume continues it, --run DIR starts another one"
        )
    return recorded


def settings_from(config: dict) -> tuple[Settings, object]:
    """The Settings and the method's Config that a config.json records."""
    values = config["settings"]
    method_config = methods.load(values["method"]).Config(**config["method_config"])
    return Settings(**values), method_config


def train(
    shards: Path,
    settings: Settings,
    method_config,
    run: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    threads: int | None = None,
    log_every: int = 10,
    health_every: int = 20,
    checkpoint_every: int = 200,
    report: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Pretrain a backbone on the frames of `shards` and leave it in the folder `run`.

    On the CPU the result is a function of the settings, the seed and the number of threads,
    bit for bit, also across interruptions: SIGTERM and Ctrl-C save and raise Interrupted, a
    killed run loses the steps since the last checkpoint, and `resume` continues either.
    `settings` of a resumed run must be those of its config.json. Every count is in steps;
    `report(samples, total, note)` and `say(line)` tell how it goes.

    Raises InputError for what cannot be used, and when the loss is no longer finite.
    """
    run, say = Path(run), say or (lambda line: None)
    if threads:
        torch.set_num_threads(threads)
    where = pick_device(device)
    recorded = open_run(run, resume)
    store = FrameStore.open(Path(shards))
    settings = settings.resolved(where, len(store))
    plan = Plan(len(store), settings.batch_size, settings.seed)
    config = _config(settings, method_config, shards, store, where)
    if recorded is not None:
        _refuse_changes(run, recorded, config)
    state = _State.build(settings, method_config, where)
    if (run / "checkpoint.pt").exists():
        state.load(checkpoints.load(run / "checkpoint.pt"))
        say(f"resumed at step {state.step} of {settings.max_steps}")
    else:  # a new run, or one stopped before its first checkpoint
        backbones.initialise(state.backbone, settings.init, settings.backbone, say)
    if recorded is None:
        run.mkdir(parents=True, exist_ok=True)
        _write_json(run / "config.json", config)
    checkpoints.rewind_metrics(run / "metrics.jsonl", state.step)
    was_finished = state.step == settings.max_steps

    started = time.monotonic()
    loop = _Loop(run, store, plan, settings, state, where, log_every, health_every, say)
    if not was_finished:
        loop.run_to_end(checkpoint_every, report)
    metrics = checkpoints.read_metrics(run / "metrics.jsonl")
    if not was_finished or not (run / "backbone.safetensors").exists():
        loop.export(metrics)
    return TrainResult(
        run=run,
        step=state.step,
        epoch=state.step / plan.steps_per_epoch,
        seconds=time.monotonic() - started,
        metrics=metrics,
        warnings=loop.warnings,
        was_finished=was_finished,
    )


def _config(settings: Settings, method_config, shards: Path, store, device) -> dict:
    return {
        "format": 1,
        "settings": dataclasses.asdict(settings),
        "method_config": dataclasses.asdict(method_config),
        "shards": {
            "path": str(Path(shards).resolve()),
            "digest": store.digest,
            "num_frames": len(store),
            "num_videos": len(store.video_ids),
            "mean": store.mean,
            "std": store.std,
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    names = ("sslus", "torch", "torchvision", "timm", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _refuse_changes(run: Path, old: dict, new: dict) -> None:
    """A resumed run must do what it would have done; device, threads and paths may change."""
    changed = [
        f"{key} was {was!r}, now {new[part].get(key)!r}"
        for part in ("settings", "method_config")
        for key, was in old[part].items()
        if json.loads(json.dumps(new[part].get(key))) != was
    ]
    if old["shards"]["digest"] != new["shards"]["digest"]:
        changed.append(f"the shards are not those of {old['shards']['path']}")
    if changed:
        raise InputError(
            f"--resume: {run} was started otherwise: {'; '.join(changed)}."
            " Give the same, or start another run with --run DIR"
        )


def _write_json(path: Path, value: dict) -> None:
    with atomic_file(path, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")


@dataclass
class _State:
    """Everything that changes from step to step."""

    backbone: nn.Module
    method: nn.Module
    optimizer: torch.optim.Optimizer
    window: dict[str, Tensor]  # sums over the steps since the last line of metrics
    window_steps: int = 0
    step: int = 0  # steps done

    @classmethod
    def build(cls, settings: Settings, method_config, device: torch.device) -> "_State":
        backbone = backbones.build(settings.backbone, settings.image_size, settings.seed)
        torch.manual_seed(settings.seed + 1)  # + 1: the backbone has used the seed itself
        method = methods.load(settings.method).Method(backbone.num_features, method_config)
        backbone.to(device, memory_format=torch.channels_last)  # 2.7 times faster on the CPU too
        method.to(device)
        optimizer = optimizers.make(
            settings.optimizer, (backbone, method), settings.lr, settings.weight_decay
        )
        return cls(backbone, method, optimizer, {})

    def save(self, path: Path) -> None:
        checkpoints.save(
            path,
            {
                "step": self.step,
                "backbone": self.backbone.state_dict(),
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "window": self.window,
                "window_steps": self.window_steps,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        )

    def load(self, state: dict) -> None:
        self.backbone.load_state_dict(state["backbone"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = next(self.backbone.parameters()).device
        self.window = {k: v.to(device) for k, v in state["window"].items()}
        self.window_steps, self.step = state["window_steps"], state["step"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


class _Loop:
    def __init__(self, run, store, plan, settings, state, device, log_every, health_every, say):
        self.run, self.store, self.plan, self.settings = run, store, plan, settings
        self.state, self.device, self.say = state, device, say
        self.log_every, self.health_every = log_every, health_every
        self.warnings: list[str] = []
        self.note = ""

    def run_to_end(self, checkpoint_every, report) -> None:
        s, state = self.settings, self.state
        state.backbone.train()
        state.method.train()
        drawn = time.monotonic()
        with (
            _Signals() as signals,
            Loader(
                self.store,
                self.batches(state.step),
                parse_views(s.views),
                size=s.image_size,
                seed=s.seed,
                device=self.device,
                threads=self.view_threads(),
            ) as loader,
            (self.run / "metrics.jsonl").open("a") as self.metrics_file,
        ):
            self.say(f"frames: {loader.tier} ({loader.why})")
            batches = iter(loader)
            self.tick = time.monotonic()
            self.waited = 0.0
            while state.step < s.max_steps:
                before = time.monotonic()
                va, vb, weights = next(batches)
                self.waited += time.monotonic() - before
                features = self.one_step(va, vb, weights)
                done = state.step == s.max_steps
                if state.step % self.log_every == 0 or done:
                    self.log(features)
                if report:
                    report(state.step * s.batch_size, s.max_steps * s.batch_size, self.note)
                if state.step % checkpoint_every == 0 or done or signals.seen:
                    self.check_finite()
                    state.save(self.run / "checkpoint.pt")
                    if time.monotonic() - drawn > CURVES_EVERY_SECONDS and not done:
                        curves.draw(
                            checkpoints.read_metrics(self.run / "metrics.jsonl"),
                            self.run / "curves.png",
                        )
                        drawn = time.monotonic()
                if signals.seen and not done:
                    self.export(checkpoints.read_metrics(self.run / "metrics.jsonl"))
                    raise Interrupted(
                        f"stopped at step {state.step} of {s.max_steps}; everything is saved."
                        f" Go on with: sslus train --resume --run {self.run}",
                        signals.seen,
                    )

    def view_threads(self) -> int:
        """On the CPU the step needs the cores, and one thread makes views far faster than it."""
        return 1 if self.device.type == "cpu" else max(1, len(os.sched_getaffinity(0)) - 2)

    def batches(self, step: int) -> Iterator[Batch]:
        """What every step from `step` to the end of the run is made of."""
        left = self.settings.max_steps - step
        epoch, start = divmod(step, self.plan.steps_per_epoch)
        while left > 0:
            for indices in self.plan.epoch(epoch, start):
                if left == 0:
                    return
                yield self.batch(epoch, indices)
                left -= 1
            epoch, start = epoch + 1, 0

    def batch(self, epoch: int, indices: np.ndarray) -> Batch:
        s = self.settings
        if s.pairs == "same":
            return Batch(epoch, indices, indices)
        partners, weights = nearby(
            self.store.video, self.store.time_seconds, indices, s.max_seconds, s.seed, epoch
        )
        return Batch(epoch, indices, partners, weights if s.pair_weights else None)

    def one_step(self, va: Tensor, vb: Tensor, weights: Tensor | None) -> Tensor:
        """One update. Returns the features of the first view, (B, F); never waits for the GPU."""
        s, state = self.settings, self.state
        lr = self.learning_rate(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            # One view after the other: each has its own BatchNorm statistics, as in the paper.
            ha, hb = state.backbone(va), state.backbone(vb)
            loss, terms = state.method(ha, hb, weights)
        loss.backward()
        norm = nn.utils.get_total_norm(
            [
                p.grad
                for m in (state.backbone, state.method)
                for p in m.parameters()
                if p.grad is not None
            ]
        )
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        for name, value in {"loss": loss, **terms, "grad_norm": norm}.items():
            value = value.detach().float()
            state.window[name] = state.window[name] + value if state.window_steps else value
        state.window_steps += 1
        state.step += 1
        state.method.after_step(state.step, s.max_steps)
        return ha.detach()

    def learning_rate(self, step: int) -> float:
        s = self.settings
        return optimizers.learning_rate(step, s.max_steps, s.warmup_steps, s.lr, s.lr * s.final_lr)

    def log(self, features: Tensor) -> None:
        """Write a line with the means since the last one."""
        state = self.state
        means = self.check_finite()
        line = {
            "step": state.step,
            "epoch": round(state.step / self.plan.steps_per_epoch, 4),
            **means,
            "lr": self.learning_rate(state.step - 1),
        }
        if state.step % self.health_every == 0 or state.step == self.settings.max_steps:
            std, spread = health.feature_std(features)
            line |= {"rankme": health.rankme(features), "feature_std": std}
            warning = health.collapse(line["rankme"], spread)
            if warning and not self.warnings:
                self.warnings.append(warning)
                self.say(f"Warning: step {state.step}: {warning}")
        seconds = time.monotonic() - self.tick
        line["samples_per_second"] = state.window_steps * self.settings.batch_size / seconds
        line["data_wait"] = self.waited / seconds
        self.metrics_file.write(json.dumps(line) + "\n")
        self.metrics_file.flush()
        self.note = f"loss {line['loss']:.3f}, data wait {100 * line['data_wait']:.0f} %"
        state.window, state.window_steps = {}, 0
        self.tick, self.waited = time.monotonic(), 0.0

    def check_finite(self) -> dict[str, float]:
        """The window's means. Sums keep a NaN, so that a look at its end sees every step."""
        if not self.state.window_steps:
            return {}
        # One transfer for all: each would make a GPU wait.
        sums = torch.stack(list(self.state.window.values())).tolist()
        for name, value in zip(self.state.window, sums, strict=True):
            if not math.isfinite(value):
                saved = (self.run / "checkpoint.pt").exists()
                raise InputError(
                    f"the {name} is no longer finite (step {self.state.step}): try a lower --lr"
                    f" (it is {self.settings.lr:g}), a longer --warmup-steps or --precision fp32;"
                    + (
                        f" {self.run / 'checkpoint.pt'} holds the last good state"
                        if saved
                        else f" there was no checkpoint yet in {self.run}"
                    )
                )
        return {
            name: value / self.state.window_steps
            for name, value in zip(self.state.window, sums, strict=True)
        }

    def export(self, metrics: list[dict]) -> None:
        """Write what others read: the backbone and the curves."""
        s = self.settings
        backbones.save(
            self.state.backbone,
            self.run / "backbone.safetensors",
            {
                "timm": s.backbone,
                "in_chans": 1,
                "image_size": s.image_size,
                "mean": self.store.mean,
                "std": self.store.std,
                "method": s.method,
                "step": self.state.step,
                "shards_digest": self.store.digest,
            },
        )
        curves.draw(metrics, self.run / "curves.png")


class _Signals:
    """Remembers the first SIGINT or SIGTERM; a second one acts as usual."""

    def __init__(self):
        self.seen = 0

    def __enter__(self) -> "_Signals":
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                self.old[s] = signal.signal(s, self._note)
        return self

    def _note(self, signum, frame) -> None:
        self.seen = signum
        self._restore()

    def _restore(self) -> None:
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def __exit__(self, *exc) -> None:
        self._restore()
