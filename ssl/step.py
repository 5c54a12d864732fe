"""One update of the weights, and three ways to execute it: eager, compiled or as a CUDA graph.

Nothing here waits for a GPU: the returned numbers are read later.
"""

import contextlib
import copy
import inspect
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslus.engine.errors import InputError
from sslus.ssl.loader import Views
from sslus.ssl.methods import checked
from sslus.ssl.optimizers import set_lr
from sslus.ssl.settings import WAYS, Settings
from sslus.ssl.state import State
from sslus.ssl.world import World

TRIAL_STEPS = 8


class Step:
    """Call it with the micro-batches and the learning rate of a step to make one update.

    With several micro-batches, their gradients and losses are averaged; a loss that compares the
    samples of a batch compares only those of one micro-batch. Returns the features of the views of
    the last one, (1 or 2, B, F).

    grad_norm: that of all gradients before clipping, (), of the last update that was asked for it.
    On a CPU it takes 2 % of an update.
    """

    def __init__(self, state: State, settings: Settings, way: str = "eager"):
        self.state, self.settings = state, settings
        self.device = state.world.device
        self.model: nn.Module = state.method
        if state.world.size > 1:
            # Each rank keeps its own statistics; queues and teachers are equal anyway.
            known = inspect.signature(DistributedDataParallel).parameters
            new, old = "forward_sync_buffers", "broadcast_buffers"
            self.model = DistributedDataParallel(
                state.method,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{new if new in known else old: False},
            )
        if way == "compile":
            self.model = torch.compile(self.model)
        # PyTorch's AdamW warns that capturable=True may be slower without a graph; it is not.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        self.graph: _Graph | None = None
        self.way = way
        self.names: tuple[str, ...] = ()
        self.grad_norm: Tensor | None = None
        self.running: deque[torch.cuda.Event] = deque()

    def __call__(self, batches: Iterable[Views], lr: float, with_norm: bool = True) -> Tensor:
        state = self.state
        set_lr(state.optimizer, lr)
        if self.way == "graph":
            (views,) = batches
            if self.graph is None:
                self.graph = _Graph(self, views)
            numbers, features = self.graph(views)
        else:
            numbers, features = self.update(batches, with_norm)
        state.add(self.names, numbers)
        state.step += 1
        state.method.after_step(state.step, self.settings.max_steps)
        if self.device.type == "cuda":
            # At most two steps in flight: more would only hold memory and delay signals.
            self.running.append(torch.cuda.Event(blocking=True))
            self.running[-1].record()
            if len(self.running) > 2:
                self.running.popleft().synchronize()
        return features

    def update(self, batches: Iterable[Views], with_norm: bool = True) -> tuple[Tensor, Tensor]:
        """Forward, backward, optimiser. Returns the loss and its terms as (K,) float32, named by
        `names`, and the features."""
        s, world = self.settings, self.state.world
        total = None
        for i, views in enumerate(batches):
            last = i == s.accumulate - 1
            quiet = contextlib.nullcontext() if last or world.size == 1 else self.model.no_sync()
            with quiet:
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=s.precision == "bf16"
                ):
                    out = self.model(views)
                loss, terms, *features = checked(out, self.state.method)
                # The gradients of the ranks add up to that of the joint loss, but DDP averages
                # them: the factor makes up for that.
                (loss * (world.size / s.accumulate)).backward()
            numbers = torch.stack([loss.detach().float(), *(t.float() for t in terms.values())])
            total = numbers if total is None else total + numbers
        if not self.names and all(p.grad is None for p in self.state.backbone.parameters()):
            raise InputError(
                f"{s.method}: no gradient of the loss reaches the backbone, which would stay as it"
                " is: do not freeze it, nor detach its features"
            )
        if not self.names and world.size > 1:
            self.refuse_unused()
        trained = [p for p in self.state.method.parameters() if p.grad is not None]
        if with_norm or s.clip_norm:
            self.grad_norm = total_norm([p.grad for p in trained])
        if s.clip_norm:
            nn.utils.clip_grads_with_norm_(trained, s.clip_norm, self.grad_norm)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.names = ("loss", *terms)
        seen = torch.stack([h.detach() for h in features if h is not None])
        return total / s.accumulate, seen

    def refuse_unused(self) -> None:
        """DDP would fail in the next step, and the ranks have not exchanged all gradients of this
        one."""
        for name, p in self.state.method.named_parameters():
            if p.requires_grad and p.grad is None:
                raise InputError(
                    f"{self.settings.method}: the loss does not depend on {name}, for whose"
                    " gradient several processes wait: leave it out, or requires_grad_(False)"
                )


def total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients together, shape (). On a CPU by BLAS, in half of torch's time."""
    if grads[0].is_cuda or grads[0].dtype != torch.float32:
        return nn.utils.get_total_norm(grads)
    # Flattened in memory order.
    flat = [g.as_strided((g.numel(),), (1,)) if _is_dense(g) else g.reshape(-1) for g in grads]
    return torch.stack([torch.dot(x, x) for x in flat]).sum().sqrt()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


class _Graph:
    """The update as one CUDA graph, replayed with new views in the same memory.

    Capturing needs a few real updates first, which are undone.
    """

    def __init__(self, step: Step, views: Views):
        self.views = Views(*(None if t is None else t.clone() for t in views))
        before = Snapshot(step.state)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step.update([self.views])
        current = torch.cuda.current_stream()
        current.wait_stream(side)
        self.graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # The loader's thread may allocate meanwhile, which must not break the capture.
            with torch.cuda.graph(self.graph, pool, capture_error_mode="thread_local"):
                self.out = step.update([self.views])
        except Exception:
            # torch leaves an invalid capture half open: its stream stays current, memory that
            # another stream has used is never freed, and the generator refuses to draw ("offset
            # increment outside graph capture"). A generator with a copy of its state draws.
            torch.cuda.set_stream(current)
            with contextlib.suppress(RuntimeError):  # the capture was not invalid
                torch._C._cuda_endAllocateToPool(current.device_index, pool)
                torch._C._cuda_releasePool(current.device_index, pool)  # else it is never freed
            generator = torch.cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        before.restore()

    def __call__(self, views: Views) -> tuple[Tensor, Tensor]:
        for to, new in zip(self.views, views, strict=True):
            if to is not None:
                to.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.out


class Snapshot:
    """A copy of the state, to be restored in place after a trial."""

    def __init__(self, state: State):
        self.state = state
        self.method = {k: v.clone() for k, v in state.method.state_dict().items()}
        self.optimizer = copy.deepcopy(state.optimizer.state_dict()["state"])
        self.rng = torch.get_rng_state()
        self.cuda_rng = None
        if state.world.device.type == "cuda":
            self.cuda_rng = torch.cuda.get_rng_state(state.world.device)
        self.rest = state.window, state.window_names, state.window_steps, state.step

    @torch.no_grad()
    def restore(self) -> None:
        state = self.state
        state.optimizer.zero_grad(set_to_none=True)  # a failed trial may have left gradients
        for k, v in state.method.state_dict().items():
            v.copy_(self.method[k])
        # Momenta that did not exist yet become zero, where all three optimisers start.
        params = [p for g in state.optimizer.param_groups for p in g["params"]]
        for i, p in enumerate(params):
            for k, v in state.optimizer.state[p].items():
                if isinstance(v, Tensor):
                    old = self.optimizer.get(i, {}).get(k)
                    v.zero_() if old is None else v.copy_(old)
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None:
            torch.cuda.set_rng_state(self.cuda_rng, state.world.device)
        state.window, state.window_names, state.window_steps, state.step = self.rest


def possible(way: str, settings: Settings, world: World) -> str | None:
    """Why the step cannot run in this way; None if it can."""
    if way == "graph" and world.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if way == "graph" and world.size > 1:
        return "a graph holds the step of one process"
    if way == "graph" and settings.accumulate > 1:
        return "a graph holds one micro-batch"
    return None


def choose(
    state: State, settings: Settings, views: Callable[[], Views], say: Callable[[str], None]
) -> Step:
    """The step, executed as `settings.step` says; "auto" times all ways for a few steps.

    views: makes one micro-batch. On the CPU "auto" is eager: compiling a ResNet-18 takes minutes,
    which short runs do not win back. The trial leaves `state` unchanged.
    """
    world = state.world
    if settings.step != "auto":
        return Step(state, settings, settings.step)
    if world.device.type != "cuda" or world.size > 1:
        why = "several processes" if world.size > 1 else "compiling on a CPU takes minutes"
        say(f"step: eager ({why}; choose another with --step)")
        return Step(state, settings, "eager")
    before, batch = Snapshot(state), views()
    seconds: dict[str, float] = {}
    for way in (w for w in WAYS if possible(w, settings, world) is None):
        try:
            seconds[way] = _timed(Step(state, settings, way), batch)
        except Exception as e:  # compilers raise errors of any kind; eager needs no compiler
            if way == "eager":
                raise
            why = str(e).partition("\n")[0]
            say(f"step: {way} does not work here ({type(e).__name__}: {why})")
        before.restore()
    best = min(seconds, key=seconds.__getitem__)
    trial = ", ".join(f"{way} {1e3 * t:.1f} ms" for way, t in seconds.items())
    say(f"step: {best} ({trial}; choose another with --step)")
    return Step(state, settings, best)


def _timed(step: Step, batch: Views) -> float:
    """Median seconds per step, without the first ones, which compile and capture."""
    for _ in range(3):
        step([batch], step.settings.lr)
    times = []
    for _ in range(TRIAL_STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step([batch], step.settings.lr)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
