"""The training loop: batches, updates, and everything that is logged and kept on the way."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from sslus.engine.errors import InputError, Interrupted
from sslus.engine.plan import Plan, have_nearby, nearby
from sslus.engine.stream import StreamStore
from sslus.engine.system import usable_cores
from sslus.ssl import backbones, checkpoints, curves, health, methods, optimizers, step
from sslus.ssl.loader import Batch, Loader, Store, Views
from sslus.ssl.metrics_log import MetricsLog
from sslus.ssl.online import Online
from sslus.ssl.settings import Options, Settings
from sslus.ssl.signals import Signals
from sslus.ssl.state import State
from sslus.ssl.views import parse as parse_views
from sslus.ssl.world import Agreement

CURVES_EVERY_SECONDS = 120.0  # drawing takes about a second
TIME_IS_UP = 1000  # in place of a signal's number, and the number of none


class Loop:
    def __init__(
        self,
        run: Path,
        store: Store,
        plan: Plan,
        settings: Settings,
        state: State,
        options: Options,
        tier: str,
        report: Callable[[int, int, str], None] | None,
        say: Callable[[str], None],
    ):
        self.run, self.store, self.plan, self.settings = run, store, plan, settings
        self.state, self.options, self.tier = state, options, tier
        self.report, self.say = report, say
        self.world, self.device = state.world, state.world.device
        self.per_epoch = plan.steps_per_epoch / settings.accumulate
        # Now: a method's file may be edited or gone later.
        method = methods.load(settings.method)
        self.comparable = getattr(method, "COMPARABLE_LOSS", True)
        self.num_views = 1 if getattr(method, "ONE_VIEW", False) else 2
        self.log = MetricsLog(run, settings, options, state.step, self.world, say)
        self.signum = 0  # of a signal that arrived when there was nothing left to stop
        if settings.pairs == "nearby":
            self.check_reach()
        self.online: Online | None = None
        if options.online_every and isinstance(store, StreamStore):
            raise InputError("--online-every: frames are streamed, so labels are not known yet")
        if options.online_every:  # every rank checks the labels; only rank 0 evaluates
            online = Online(store, settings.image_size, settings.seed, self.device)
            if online.why_not:
                raise InputError(f"--online-every: {online.why_not}")
            self.online = online if self.world.is_main else None
            if settings.dual_task:
                say("--online-every: --dual-task learns the same labels, so its scores flatter")

    def check_reach(self) -> None:
        """Raise InputError if no frame has another one in reach, say so if some have none: the
        views of these are of one frame, as without nearby pairs."""
        store, reach = self.store, self.settings.max_seconds
        alone = np.count_nonzero(~have_nearby(store.video, store.time_seconds, reach))
        if alone == len(store):
            steps = np.diff(store.time_seconds)[np.diff(store.video) == 0]
            raise InputError(
                f"--pairs nearby: no frame has another one of its video within --max-seconds"
                f" {reach:g}; they are {np.median(steps):.2g} seconds apart: give more seconds, or"
                " make the shards with more frames (--stride, --rate)"
            )
        if alone:
            self.say(
                f"--pairs nearby: {alone:,} of {len(store):,} frames have no other one of their"
                f" video within {reach:g} seconds; both their views are of the same frame"
            )

    def run_to_end(self) -> None:
        s, state = self.settings, self.state
        num_frames = s.batch_size * s.accumulate
        self.drawn = self.started = time.monotonic()
        agreed = Agreement(self.world)
        with (
            Signals() as signals,
            Loader(
                self.store,
                self.batches(state.step),
                parse_views(s.views)[: self.num_views],
                size=s.image_size,
                seed=s.seed,
                device=self.device,
                threads=self.view_threads(),
                wanted_tier=self.tier,
            ) as loader,
            self.log,
        ):
            self.say(f"frames: {loader.tier} ({loader.why})")
            if self.look_is_due() and not self.has_looked():  # it was stopped before
                self.look(signals, agreed)
            batches = iter(loader)
            update = step.choose(state, s, lambda: loader.at_once(next(self.batches(0))), self.say)
            loader.gpu_waits()  # discard those of the trial
            self.log.restart_clock()
            while state.step < s.max_steps:
                lr, line = self.learning_rate(state.step), self.line_is_due(state.step + 1)
                features = update(self.take(batches), lr, with_norm=line)
                self.log.add_step(loader.gpu_waits())
                done = state.step == s.max_steps
                if line:
                    epoch, window = state.step / self.per_epoch, state.take_window()
                    self.log.add_line(state.step, epoch, lr, window, update.grad_norm, features)
                if self.report and self.world.is_main:
                    self.report(state.step * num_frames, s.max_steps * num_frames, self.log.note)
                stop = agreed(signals.seen or (TIME_IS_UP if self.time_is_up() else 0))
                look = self.look_is_due()
                if state.step % self.options.checkpoint_every == 0 or done or stop or look:
                    self.checkpoint()
                if stop == TIME_IS_UP and not done:
                    break
                if stop and stop != TIME_IS_UP and (look or not done):
                    self.stopped(stop, agreed)
                if look:
                    self.look(signals, agreed)
            agreed.settle()
            self.signum = max(int(x) for x in self.world.gather(torch.tensor(signals.seen)))

    def take(self, batches: Iterator[Views]) -> Iterator[Views]:
        """The micro-batches of a step, each when the one before it is done with."""
        for number in range(self.settings.accumulate):
            before = time.monotonic()
            try:
                views = next(batches)
            except InputError as e:  # such as a network that fails while frames are streamed
                # One process alone, and nothing of the step is computed yet: there is a state to
                # save.
                if self.world.size > 1 or number or not self.state.step:
                    raise
                self.checkpoint()
                raise InputError(
                    f"{e}. Step {self.state.step} of {self.settings.max_steps} is saved, from"
                    " which --resume goes on"
                ) from e
            self.log.add_wait(time.monotonic() - before)
            yield views

    def look(self, signals: Signals, agreed: Agreement) -> None:
        """kNN and linear probe on the shards' labels, after the checkpoint of this step. A signal
        ends it, since it may take minutes; a resumed run begins it again."""
        found, stop = None, 0
        if self.online:
            found = self.online(self.state.backbone, lambda: signals.seen != 0)
            stop = 0 if found else signals.seen
        if stop := int(self.world.gather(torch.tensor(stop))[0]):
            self.stopped(stop, agreed)
        if found:
            # Before the line is written, after which a resumed run would not look.
            self.keep(("knn_accuracy", found["knn_accuracy"]))
            self.log.add_look(self.state.step, found)

    def has_looked(self) -> bool:
        lines = checkpoints.read_metrics(self.run / "metrics.jsonl")
        return any("knn_accuracy" in m and m["step"] == self.state.step for m in lines)

    def is_finished(self) -> bool:
        return self.state.step == self.settings.max_steps and (
            not self.look_is_due() or self.has_looked()
        )

    def time_is_up(self) -> bool:
        limit = self.options.time_limit
        return limit is not None and time.monotonic() - self.started > limit

    def line_is_due(self, step: int) -> bool:
        return step % self.options.log_every == 0 or step == self.settings.max_steps

    def look_is_due(self) -> bool:
        """Whether the last step was the first of an epoch with an online evaluation, or the end."""
        step, s = self.state.step, self.settings
        if not self.options.online_every or step == 0:
            return False
        every = self.options.online_every * self.plan.steps_per_epoch  # batches
        before, now = (n * s.accumulate // every for n in (step - 1, step))
        return step == s.max_steps or now > before

    def view_threads(self) -> int:
        """1 on the CPU: the step needs the cores, and one thread keeps up with it easily."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # that share this machine's cores
        cores = usable_cores() // processes
        return 1 if self.device.type == "cpu" else max(1, cores - 1)

    def batches(self, step: int) -> Iterator[Batch]:
        """The batches of all steps from `step` to the end of the run, `accumulate` per step."""
        left = (self.settings.max_steps - step) * self.settings.accumulate
        epoch, start = divmod(step * self.settings.accumulate, self.plan.steps_per_epoch)
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

    def learning_rate(self, step: int) -> float:
        s = self.settings
        return optimizers.learning_rate(step, s.max_steps, s.warmup_steps, s.lr, s.lr * s.final_lr)

    def checkpoint(self) -> None:
        self.log.flush()
        if self.state.window_steps:
            self.refuse_not_finite(self.state.window_names, self.state.window.tolist())
        # The last update may have broken the weights after a loss that was finite.
        values = [x for x in self.state.method.state_dict().values() if x.is_floating_point()]
        norm = torch.stack(torch._foreach_norm(values)).sum().item()
        self.refuse_not_finite(("norm of the weights",), [norm])
        self.state.save(self.run / "checkpoint.pt")
        if not self.world.is_main:
            return
        # A loss that was kept before changes nothing: it is not better than itself.
        self.keep(self.score(self.log.loss))
        if time.monotonic() - self.drawn > CURVES_EVERY_SECONDS:
            self.draw()
            self.drawn = time.monotonic()

    def keep(self, score: tuple[str, float] | None) -> None:
        checkpoints.keep(self.run / "checkpoint.pt", self.state.step, self.options.keep, score)

    def keep_again(self) -> None:
        """For the checkpoint from which the run goes on: a kill may have come before `keep`."""
        lines = checkpoints.read_metrics(self.run / "metrics.jsonl")
        losses = [m["loss"] for m in lines if "loss" in m]
        self.keep(self.score(losses[-1] if losses else None))

    def score(self, loss: float | None) -> tuple[str, float] | None:
        """What makes a checkpoint the best: its loss, unless looks at labelled frames decide, or
        losses of different steps cannot be compared."""
        if loss is None or self.options.online_every or not self.comparable:
            return None
        return "-loss", -loss

    def refuse_not_finite(self, names: tuple[str, ...], values: list[float]) -> None:
        health.refuse_not_finite(names, values, self.state.step, self.settings.lr, self.run)

    def stopped(self, signum: int, agreed: Agreement) -> None:
        agreed.settle()
        if self.world.is_main:
            self.export_backbone()  # not the curves: a scheduler may not give the seconds they take
        self.world.barrier()
        raise Interrupted(
            f"stopped at step {self.state.step} of {self.settings.max_steps}; everything is saved",
            signum,
        )

    def export(self) -> None:
        """Write the backbone and the curves."""
        self.export_backbone()
        self.draw()

    def export_backbone(self) -> None:
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
                "method": methods.name_of(s.method),
                "step": self.state.step,
                "shards_digest": self.store.digest,
            },
        )

    def draw(self) -> None:
        curves.draw(checkpoints.read_metrics(self.run / "metrics.jsonl"), self.run / "curves.png")
