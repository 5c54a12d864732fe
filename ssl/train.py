"""One training run, from the shards to its folder; the loop itself is in loop.py.

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
from sslus.engine.stream import StreamStore
from sslus.engine.urls import is_url, shown
from sslus.ssl import backbones, checkpoints, methods
from sslus.ssl.cores import Cores
from sslus.ssl.loader import Store, open_store, plan_of
from sslus.ssl.loader import tier as tier_of
from sslus.ssl.loop import Loop
from sslus.ssl.memory import keep_freed_memory
from sslus.ssl.runs import check_type
from sslus.ssl.settings import Options, Settings, check_config, refuse_changes
from sslus.ssl.state import State
from sslus.ssl.step import possible
from sslus.ssl.versions import versions
from sslus.ssl.world import World, enter

FORMAT = 4  # of config.json; incremented when a run can no longer be continued exactly


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
        else:
            check_type("method_config", recorded["method_config"], dict)
            check_type("launcher", recorded["launcher"], int)
            for name, kind in {"path": str, "digest": str, "streamed": bool}.items():
                check_type(name, recorded["shards"][name], kind)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        why = f"{run / 'config.json'} is damaged ({type(e).__name__}: {e})"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    # Resume only a run that this very torchrun (the parent process in all its attempts) has begun.
    # The first process decides: on other machines the parent has another process id.
    again = restarted and why is None and recorded and recorded["launcher"] == os.getppid()
    resume = resume or bool(world.gather(torch.tensor(bool(again)))[0])
    if why and (resume or recorded is None):
        raise InputError(f"{why}; start another run with --run DIR")
    if resume and recorded is None:
        raise InputError(f"--resume: {run} holds no run; leave out --resume to start one")
    if resume:
        return recorded
    if run.exists() and not _has_nothing(run, recorded):
        raise InputError(
            f"{run} already exists; --resume continues it, --run DIR starts another run"
        )
    return None


def _has_nothing(run: Path, recorded: dict | None) -> bool:
    """Whether a run ended before its first number or checkpoint, for lack of memory, say: then it
    may be started again in the same folder, with other settings too."""
    if recorded is None:  # killed while it wrote its first file; any other file is a stranger's
        return all(path.suffix == ".tmp" for path in run.iterdir())
    metrics = run / "metrics.jsonl"
    numbers = metrics.exists() and metrics.stat().st_size > 0
    return not numbers and not (run / "checkpoint.pt").exists()


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
    processes, bit for bit, even across interruptions: Ctrl-C, SIGTERM, SIGHUP save and raise
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
        check_config(method_config)
        store = _open_store(shards, tier, settings.pairs, world)
        tier_of(store, world.device, tier)  # raises before a run folder is created or changed
        wanted_steps = settings.max_steps or 0
        settings = _resolved(settings, len(store), world)
        plan = _plan(settings, store, world)
        config = _config(settings, method_config, shards, store, world)
        if recorded is not None:
            refuse_changes(run, recorded, config)
            # A resumed run keeps its recorded configuration, except where the shards are now.
            config = recorded | {"shards": config["shards"]}
            if wanted_steps > settings.max_steps:
                say(f"--max-steps: the run keeps its length, {settings.max_steps} steps")
        if settings.warmup_steps > settings.max_steps:  # a resumed run hears first what it changed
            raise InputError(
                f"warmup_steps {settings.warmup_steps} is more than the run's"
                f" {settings.max_steps} steps"
            )
        config["how"] = how
        where = "GPU" if world.device.type == "cuda" else "CPU"
        say(
            f"{config['settings']['method']}: {settings.backbone} at {settings.image_size} px,"
            f" batches of {settings.batch_size}, {settings.max_steps} steps,"
            f" {settings.precision} on the {where}"
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
        # A run that went back to an older checkpoint has the end of its former course there.
        weights, end = run / "backbone.safetensors", state.step
        if world.is_main and not (was_finished and backbones.step_of(weights) == end):
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
        "settings": dataclasses.asdict(settings) | {"method": methods.name_of(settings.method)},
        "method_file": methods.about_file(settings.method),
        "method_config": dataclasses.asdict(method_config),
        "shards": {
            "path": shown(shards) if is_url(shards) else str(Path(shards).resolve()),
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


def _write_json(path: Path, value: dict) -> None:
    with atomic_file(path, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
