"""The log of a run: metrics.jsonl, TensorBoard, and warnings about what the numbers show."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sslus.engine.errors import Interrupted
from sslus.ssl import board, checkpoints, health
from sslus.ssl.settings import Options, Settings
from sslus.ssl.state import Window
from sslus.ssl.world import World


@dataclass
class _Pending:
    """A line of metrics whose numbers may not have arrived from the GPU yet."""

    line: dict
    window: Window
    grad_norm: Tensor
    features: Tensor | None
    arrived: object  # a CUDA event, or None
    gpu_waits: list[tuple]  # pairs of CUDA events between which the GPU waited for views
    seconds: float  # covered by the line


class MetricsLog:
    """Writes metrics.jsonl and TensorBoard, between `with` and its end; only rank 0 does so.

    On a GPU a line is written when its numbers have arrived, while later steps already run; on the
    CPU, at once. Raises NotFinite when a number is written that is NaN or infinite.

    warnings: what was said about the features and the loss; note: the newest line in short; loss:
    that of the newest line, None before the first.
    """

    def __init__(
        self,
        run: Path,
        settings: Settings,
        options: Options,
        step: int,
        world: World,
        say: Callable[[str], None],
    ):
        """settings: resolved; step: where the run begins."""
        self.run, self.settings, self.world, self.say = run, settings, world, say
        self.step, self.health_every = step, options.health_every
        self.last_health = step - step % options.log_every
        self.pending: deque[_Pending] = deque()
        self.warnings: list[str] = []
        self.collapsed = False
        self.note = ""
        self.loss: float | None = None

    def __enter__(self) -> "MetricsLog":
        past = checkpoints.read_metrics(self.run / "metrics.jsonl")
        self.divergence = health.Divergence([m["loss"] for m in past if "loss" in m])
        self.file = self.board = None
        if self.world.is_main:
            self.file = (self.run / "metrics.jsonl").open("a")
            self.board = board.Board(self.run, self.step)
        self.restart_clock()
        return self

    def __exit__(self, kind, *exc) -> None:
        if kind is None or kind is Interrupted:
            self.flush()
        if self.file:
            self.file.close()
            self.board.close()

    def restart_clock(self) -> None:
        """Count time and steps from now on, for the speed in the next line."""
        self.tick, self.num_steps = time.monotonic(), 0
        self.waited, self.gpu_waits = 0.0, []

    def add_wait(self, seconds: float) -> None:
        """The loop has waited for views."""
        self.waited += seconds

    def add_step(self, gpu_waits: list[tuple]) -> None:
        """A step is done, in which the GPU waited for views between these pairs of events."""
        self.num_steps += 1
        self.gpu_waits += gpu_waits

    def add_line(
        self,
        step: int,
        epoch: float,
        lr: float,
        window: Window,
        grad_norm: Tensor,
        features: Tensor,
    ) -> None:
        """Begin the line of a step with the means of the window, the gradient norm of this step,
        and sometimes a look at features (V, N, F), those of all ranks together. Every rank calls
        this at the same steps."""
        seconds, s = time.monotonic() - self.tick, self.settings
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "lr": lr,
            "samples_per_second": self.num_steps * s.batch_size * s.accumulate / seconds,
            "data_wait": self.waited / seconds,
        }
        due = step // self.health_every > self.last_health // self.health_every
        if due or step == s.max_steps:
            self.last_health = step
            features = self.world.join(features)
        else:
            features = None
        arrived = None
        if window.sums.is_cuda:
            line["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            window = window._replace(sums=window.sums.to("cpu", non_blocking=True))
            grad_norm = grad_norm.to("cpu", non_blocking=True)
            features = features if features is None else features.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(
            _Pending(line, window, grad_norm, features, arrived, self.gpu_waits, seconds)
        )
        self.restart_clock()
        self.flush(wait=False)

    def add_look(self, step: int, found: dict[str, float]) -> None:
        """Write a line of its own for an online evaluation, whose time does not count."""
        self._out({"step": step, **found})
        self.say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
        self.restart_clock()

    def flush(self, wait: bool = True) -> None:
        """Write the lines whose numbers have arrived; with `wait`, wait for the others, so that
        what comes after is never on a disk without them."""
        while self.pending:
            p = self.pending[0]
            if p.arrived is not None:
                if not wait and not p.arrived.query():
                    return
                p.arrived.synchronize()
            self.pending.popleft()
            self._write(p)
        if wait and self.file:
            os.fsync(self.file.fileno())

    def _write(self, p: _Pending) -> None:
        names, step = p.window.names, p.line["step"]
        values, norm = p.window.sums.tolist(), p.grad_norm.item()
        health.refuse_not_finite(
            (*names, "grad_norm"), [*values, norm], step, self.settings.lr, self.run
        )
        idle = sum(before.elapsed_time(after) for before, after in p.gpu_waits) / 1000
        p.line["data_wait"] = min(1.0, p.line["data_wait"] + idle / p.seconds)
        means = {name: v / p.window.num_steps for name, v in zip(names, values, strict=True)}
        line = {k: p.line[k] for k in ("step", "epoch")} | means | {"grad_norm": norm} | p.line
        if p.features is not None and self.world.is_main:
            found, collapsed = health.look(p.features)
            line |= found
            self.say(f"step {step}: " + ", ".join(_shown(line, names)))
            if collapsed and not self.collapsed:
                self.collapsed = True
                self._warn(step, collapsed)
        if away := self.divergence(line["loss"]):
            self._warn(step, away)
        self.loss = line["loss"]
        self.note = f"loss {self.loss:.3f}, data wait {100 * line['data_wait']:.0f} %"
        self._out(line)

    def _warn(self, step: int, warning: str) -> None:
        self.warnings.append(warning)
        self.say(f"Warning: step {step}: {warning}")

    def _out(self, line: dict) -> None:
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.board.write(line)


def _shown(line: dict, names: tuple[str, ...]) -> Iterator[str]:
    """The parts of a line of metrics, for the screen."""
    terms = [n for n in names if n != "loss"]
    yield f"loss {line['loss']:.4g}" + (
        f" ({', '.join(f'{n} {line[n]:.3g}' for n in terms)})" if terms else ""
    )
    for name, label in (
        ("lr", "lr"),
        ("grad_norm", "gradient norm"),
        ("rankme", "RankMe"),
        ("feature_std", "feature std"),
        ("dead_features", "dead"),
        ("alignment", "alignment"),
        ("uniformity", "uniformity"),
        ("samples_per_second", "samples/s"),
        ("data_wait", "data wait"),
        ("gpu_memory_gib", "GPU GiB"),
    ):
        if name in line:
            yield f"{label} {line[name]:.3g}"
