"""`sslus train`: the options of the training loop and of the chosen method."""

import click

METHOD = "vicreg"  # the default; its file is not imported before the command line is parsed
ALL = "all"


class TrainCommand(click.Command):
    """Adds the fields of the Config of the method named on the command line as options."""

    def parse_args(self, ctx, args):
        import dataclasses

        from sslus.ssl import methods

        self.params = self.params[: self.num_common]
        method = next(p for p in self.params if p.name == "method")
        method.help = f"{', '.join(methods.names())}; or {ALL}: in turn, equally many steps each."
        if (name := _named(args)) != ALL:
            module = methods.load(name)
            _, config = methods.recipe(name, "default")
            fields = dataclasses.fields(config)
            self.params = self.params + [_option(f, getattr(config, f.name)) for f in fields]
            text = module.__doc__.strip().split("\n\n")
            self.epilog = "\n\n".join("\b\n" + part for part in text)
        return super().parse_args(ctx, args)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_common = len(self.params)


def _named(args: list[str]) -> str:
    name = METHOD
    for i, arg in enumerate(args):  # as click does: the last one counts
        if arg == "--method" and i + 1 < len(args):
            name = args[i + 1]
        elif arg.startswith("--method="):
            name = arg.removeprefix("--method=")
    return name


def _option(f, default) -> click.Option:
    return click.Option(
        ["--" + f.name.replace("_", "-")],
        type=f.type,
        default=default,
        show_default=True,
        help=f.metadata["help"] + " (method option)",
    )


@click.command("train", cls=TrainCommand, short_help="Pretrain a backbone without labels.")
@click.argument("shards", type=click.Path(), default="shards")
@click.option("--method", default=METHOD, show_default=True)  # its help names the methods there are
@click.option(
    "--recipe",
    type=click.Choice(["default", "paper", "study"]),
    default="default",
    show_default=True,
    help="Where the values of options that are not given come from: default, for ultrasound; the"
    " method's original paper; or the study arXiv:2407.21738.",
)
@click.option(
    "--backbone", help="Name of any timm model.  [default: resnet18 on the CPU, resnet50 on CUDA]"
)
@click.option(
    "--init", default="random", show_default=True, metavar="random|imagenet|FILE",
    help="Initial weights: random, timm's ImageNet weights, or those in FILE.",
)  # fmt: skip
@click.option(
    "--image-size", type=int, help="Side of a view in pixels.  [default: 96 CPU, 224 CUDA]"
)
@click.option(
    "--batch-size",
    type=int,
    help="Frames per batch, over all GPUs; two views each.  [default: 64 CPU, 256 CUDA]",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batches per step, whose gradients are averaged (gradient accumulation). The loss"
    " still compares only samples of the same batch.",
)
@click.option(
    "--views",
    metavar="PRESET[,FIELD=VALUE...]",
    help="Augmentation preset: ultrasound, simclr, barlowtwins, autoencoder or inpainting;"
    " `sslus views` draws them.  [default: the method's]",
)
@click.option(
    "--pairs",
    type=click.Choice(["same", "nearby"]),
    default="same",
    show_default=True,
    help="same: both views come from one frame; nearby: the second comes from another frame of"
    " the same video.",
)
@click.option(
    "--max-seconds",
    type=float,
    default=1.5,
    show_default=True,
    help="With --pairs nearby: largest distance in seconds between the frames. (To limit the run"
    " itself, use --time-limit.)",
)
@click.option(
    "--pair-weights", is_flag=True, help="With --pairs nearby: weight pairs less the further apart."
)
@click.option(
    "--dual-task",
    type=float,
    default=0.0,
    metavar="WEIGHT",
    help="Also learn the labels in the shards, with a cross-entropy of this weight.  [default: 0,"
    " off]",
)
@click.option(
    "--epochs", type=click.IntRange(min=1),
    help="Length of the run in epochs.  [default: 100, unless --max-steps is given]",
)  # fmt: skip
@click.option(
    "--max-steps", type=click.IntRange(min=1),
    help="Length of the run in steps; with --epochs, the shorter of the two.",
)  # fmt: skip
@click.option("--optimizer", metavar="[adamw|lars|sgd]", help="Optimizer.  [default: adamw]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: set by the batch size]")
@click.option(
    "--base-lr", type=float,
    help="Peak learning rate for 256 frames per step; scaled linearly.",
)  # fmt: skip
@click.option(
    "--weight-decay", type=float,
    help="Weight decay.  [default: adamw 0.05, lars 1e-6, sgd 1e-4]",
)  # fmt: skip
@click.option(
    "--warmup-steps", type=int,
    help="Steps of learning-rate warm-up.  [default: a tenth of the run, at most 10 epochs]",
)  # fmt: skip
@click.option("--warmup-epochs", type=float, help="Length of the warm-up in epochs instead.")
@click.option("--clip-norm", type=float, help="Clip gradients to this norm.")
@click.option(
    "--precision",
    metavar="[auto|fp32|bf16]",
    default="auto",
    show_default=True,
    help="fp32 or bf16 (mixed precision); auto: bf16 on GPUs, and for ResNets on CPUs with AMX or"
    " AVX-512 bf16.",
)
@click.option(
    "--step",
    type=click.Choice(["auto", "eager", "compile", "graph"]),
    default="auto",
    show_default=True,
    help="How an update is executed: eagerly, with torch.compile, or as a CUDA graph; auto tries"
    " them if there is one GPU.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random choice.")
@click.option("--run", type=click.Path(), help="Folder of the run.  [default: runs/METHOD]")
@click.option("--resume", is_flag=True, help="Continue the run exactly, with its own settings.")
@click.option(
    "--device", metavar="[auto|cpu|cuda]", default="auto", show_default=True,
    help="Where to train; auto: on a GPU if there is one.",
)  # fmt: skip
@click.option(
    "--tier",
    type=click.Choice(["auto", "gpu", "ram", "disk", "stream"]),
    default="auto",
    show_default=True,
    help="Where decoded frames are kept: in GPU memory, in RAM or on disk; stream decodes them"
    " from the shards each time instead. auto chooses by size.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Train on this many GPUs of this machine: starts one process per GPU with torchrun"
    " (with --device cpu, processes without GPUs).",
)
@click.option(
    "--batch-norm",
    type=click.Choice(["sync", "per-rank"]),
    default="sync",
    show_default=True,
    help="With several GPUs: BatchNorm statistics over all of them, or of each separately.",
)
@click.option(
    "--threads", type=click.IntRange(min=1),
    help="CPU threads; on the CPU, no more than there are free cores.  [default: all cores]",
)  # fmt: skip
@click.option(
    "--log-every", type=click.IntRange(min=1), default=10, show_default=True,
    help="Steps between lines of metrics.jsonl.",
)  # fmt: skip
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), default=200, show_default=True,
    help="Steps between checkpoints.",
)  # fmt: skip
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Checkpoints to keep besides the newest and the best.",
)
@click.option(
    "--online-every",
    type=click.IntRange(min=0),
    default=0,
    metavar="EPOCHS",
    help="Every so many epochs, run kNN and a linear probe on the labels in the shards, split by"
    " patient.  [default: 0, never]",
)
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="Save and stop after it; --resume continues.",
)
@click.option("--rebuild-store", is_flag=True, help="Decode the shards into a new frame store.")
@click.pass_context
def command(ctx, shards, run, gpus, rebuild_store, **given):
    """Pretrain a backbone on the frames of SHARDS (default: shards/), without labels.

    SHARDS is a folder, or a URL (s3://, gs://, https://) from which frames are streamed. From a
    folder, they are decoded once, into a frame store beside the shards.

    Writes to the folder of the run: backbone.safetensors (the result), curves.png, metrics.jsonl,
    config.json and checkpoints. Ctrl-C or SIGTERM saves and stops; --resume continues.

    `sslus train --method NAME --help` also lists the options of the method NAME.

    \b
    sslus train --method vicreg                         a run with the defaults
    sslus train --max-steps 300 --run runs/quick        a short run
    sslus train --resume --run runs/quick               continue after an interruption
    sslus train --gpus 4 --batch-size 1024              four GPUs, one batch
    torchrun --nproc-per-node 4 -m -- sslus.tools train --batch-size 1024
                                                        the same; for several machines, see
                                                        torchrun (without the `--`, torchrun
                                                        takes --run as its own option)
    """
    from pathlib import Path

    from click.core import ParameterSource

    from sslus.engine.errors import InputError, Interrupted
    from sslus.ssl.world import leave

    if gpus is not None:
        ctx.exit(_torchrun(gpus))
    run = Path(run or f"runs/{given['method']}")
    given["rebuild_store"] = rebuild_store
    named = {
        name
        for name in ("shards", *given)
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if "max_seconds" in named and given["pairs"] != "nearby" and not given["resume"]:
        raise InputError(
            "--max-seconds limits the distance of --pairs nearby, which is not given; to limit the"
            " run time, use --time-limit SECONDS"
        )
    for one, other in (("lr", "base_lr"), ("warmup_steps", "warmup_epochs")):
        if {one, other} <= named:
            one, other = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise InputError(f"{one} and {other} set the same value; give only one of them")
    if given["time_limit"] is not None and not given["time_limit"] >= 0:  # NaN too
        raise InputError(f"--time-limit {given['time_limit']:g}: want 0 seconds or more")
    if given["method"] == ALL:
        _train_all(shards, run, given, named)
    else:
        try:
            _show(_train(shards, run, given, named))
        except Interrupted as e:
            raise Interrupted(f"{e}. Continue with: {_resume(run)}", e.signum) from None
    leave()


# Options that change what is logged and kept, not the result.
OPTIONS = ("log_every", "checkpoint_every", "keep", "online_every", "time_limit")
WHERE = ("device", "tier", "threads")  # nor do these, but for streaming, which draws anew
NOT_FOR_ALL = ("method", "recipe", "resume", "rebuild_store", "time_limit")  # set by each call


def _resume(run, how: str = "") -> str:
    """The command that continues a run, which has recorded all but the number of processes."""
    import os

    from sslus.tools.cli import EXIT_CODE_FILE
    from sslus.tools.screen import argument

    run, size = argument(run), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and EXIT_CODE_FILE not in os.environ:
        return f"the same torchrun command with --resume --run {run}"
    return f"sslus train{how} --resume --run {run}" + (f" --gpus {size}" if size > 1 else "")


def _train(shards: str, run, given: dict, named: set[str]):
    """One run; returns its TrainResult. `named`: the names in `given` set on the command line."""
    import contextlib
    import dataclasses

    from sslus.engine.errors import InputError
    from sslus.engine.stream import is_url
    from sslus.ssl import methods
    from sslus.ssl import train as loop
    from sslus.ssl.loader import open_store
    from sslus.ssl.loop import Options
    from sslus.ssl.world import enter
    from sslus.tools.screen import progress, tell

    given = dict(given)
    rebuild_store, recipe = given.pop("rebuild_store"), given.pop("recipe")
    resume = given.pop("resume")
    if resume:
        how = loop.recorded_options(run)
        given |= {k: v for k, v in how.items() if k in given and k not in named}
    device, tier, threads = (given.pop(name) for name in ("device", "tier", "threads"))
    options = Options(**{name: given.pop(name) for name in OPTIONS})
    # Before the frame store is built, so that processes waiting for it hear if that fails.
    world = enter(device)
    settled = {k: v for k, v in given.items() if k in named or k == "method"}
    config = loop.open_run(run, resume, world)
    if config is None:
        values, method_config = methods.recipe(given["method"], recipe)
        # An option that is given removes the values of the recipe that belonged to the old one.
        if "base_lr" in settled:
            values.pop("lr", None)
        if "optimizer" in settled and settled["optimizer"] != values.get("optimizer", "adamw"):
            for name in ("lr", "base_lr", "weight_decay"):
                values.pop(name, None)
            fields = dataclasses.fields(method_config)
            other = {f.name: f.default for f in fields if f.metadata.get("of_optimizer")}
            method_config = dataclasses.replace(method_config, **other)
        settings = loop.Settings(**{**_settings(given), **values})
    elif recipe != "default":
        raise InputError("--recipe: a resumed run already has its values; leave the option out")
    else:  # the run's settings, except what this command line names: the loop compares them
        settings, method_config = loop.settings_from(config)
        if "method" not in named:
            settled.pop("method")
        if "shards" not in named:
            shards = config["shards"]["path"]
    own = {f.name for f in dataclasses.fields(method_config)}
    method_config = dataclasses.replace(
        method_config, **{k: v for k, v in settled.items() if k in own}
    )
    settings = dataclasses.replace(settings, **_settings(settled))

    if _is_main() and not is_url(shards):
        with progress("frame store", "frames") as report:
            open_store(
                shards, tier, settings.pairs, rebuild=rebuild_store, threads=threads, report=report
            )
    # Only the first process shows its progress.
    with progress("train", "samples") if _is_main() else contextlib.nullcontext() as report:
        return loop.train(
            shards,
            settings,
            method_config,
            run,
            resume=resume,
            device=device,
            tier=tier,
            threads=threads,
            options=options,
            report=report,
            say=tell,
        )


def _settings(values: dict) -> dict:
    """Those of the values that are fields of the loop's Settings."""
    import dataclasses

    from sslus.ssl.train import Settings

    known = {f.name for f in dataclasses.fields(Settings)}
    return {k: v for k, v in values.items() if k in known}


def _train_all(shards: str, folder, given: dict, named: set[str]) -> None:
    """Train the methods one after the other, each in its own folder; skip finished ones.

    The options of the command line are kept in <folder>/all.json, so that after a resume the
    methods that had not begun get the same ones.
    """
    import json
    import os
    import time
    from pathlib import Path

    from sslus.engine.atomic import atomic_file
    from sslus.engine.errors import InputError, Interrupted
    from sslus.engine.stream import is_url
    from sslus.ssl import methods
    from sslus.ssl.loop import NotFinite
    from sslus.ssl.train import Settings
    from sslus.ssl.world import enter
    from sslus.tools.screen import summary, tell

    if given["recipe"] != "default":
        raise InputError("--method all: leave --recipe out, since the recipes differ in length")
    record = folder / "all.json"
    going = _resume(folder, " --method all")
    if given["resume"]:
        try:
            before = json.loads(record.read_text())
            recorded_shards, options = before["shards"], dict(before["options"])
            if before.get("format") != 2:
                raise ValueError("written by another version of sslus")
        except FileNotFoundError as e:
            raise InputError(f"--resume: {folder} holds no run of --method all") from e
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{record}: cannot be used ({e}); start another --run DIR") from e
        # What does not change the methods' results may be changed when resuming.
        options |= {k: given[k] for k in named & {*OPTIONS, *WHERE} - {*NOT_FOR_ALL}}
        given = given | {k: v for k, v in options.items() if k not in named}
        shards = shards if "shards" in named else recorded_shards
        named = named | set(options) | {"shards"}
    else:
        begun = any((folder / name / "config.json").exists() for name in methods.names())
        if begun and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            raise InputError(f"{folder} already exists; continue it with: {going}")
        options = {k: v for k, v in given.items() if k in named and k not in NOT_FOR_ALL}
        # Defaults that depend on the device stay the same for all methods, wherever they resume.
        chosen = Settings(**_settings(given) | {"method": methods.names()[0]})
        chosen = chosen.resolved(enter(given["device"]).device, num_frames=2**40)
        for name in ("backbone", "image_size", "batch_size", "precision"):
            options[name] = getattr(chosen, name)
        given, named = given | options, named | set(options)
    if _is_main():
        folder.mkdir(parents=True, exist_ok=True)
        where = shards if is_url(shards) else str(Path(shards).resolve())
        with atomic_file(record, "w") as f:
            json.dump({"format": 2, "shards": where, "options": options}, f, indent=2)
    rows, warnings, limit, start = {}, [], given["time_limit"], time.monotonic()
    failed = []
    for name in methods.names():
        run = folder / name
        mine = given | {
            "method": name,
            "resume": given["resume"] and (run / "config.json").exists(),
        }
        given["rebuild_store"] = False  # once for all
        if limit is not None:
            mine["time_limit"] = max(0.0, limit - (time.monotonic() - start))
        if _is_main():
            tell(f"{name} -> {run}")
        try:
            result = _train(shards, run, mine, named)
        except Interrupted as e:
            raise Interrupted(f"{name}: {e}. Continue with: {going}", e.signum) from None
        except NotFinite as e:
            if os.environ.get("WORLD_SIZE", "1") != "1":  # the others may hear of it a step later
                raise
            failed.append(name)
            tell(f"Error: {name}: {e}")
            _free_memory()
            continue
        _free_memory()
        if result.signum and not result.stopped and name != methods.names()[-1]:
            raise Interrupted(f"{name} is finished. Continue with: {going}", result.signum)
        warnings += [f"{name}: {line}" for line in result.warnings]
        facts = _facts(result)
        rows[name] = "; ".join([f"{result.step:,} steps", *facts.values()])
        if result.stopped:
            break
    if _is_main() and rows:
        summary(
            rows,
            warnings=warnings,
            next_command=going
            if result.stopped
            else _evaluate(folder / next(reversed(rows)), shards),
        )
    if failed:
        raise InputError(f"{', '.join(failed)}: failed, as told above")


def _free_memory() -> None:
    """Give back what the last method used: its weights are part of a cycle of references."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _torchrun(num: int) -> int:
    """Run this command line in `num` processes on this machine; return the exit code."""
    import contextlib
    import os
    import signal
    import subprocess
    import sys
    import tempfile
    import time
    from pathlib import Path

    from sslus.tools.cli import EXIT_CODE_FILE

    args = [a for a in sys.argv[1:] if not a.startswith("--gpus=")]
    if "--gpus" in args:
        at = args.index("--gpus")
        args[at : at + 2] = []
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
        "--max-restarts", "3", "-m", "--", "sslus.tools", *args,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        env = os.environ | {EXIT_CODE_FILE: str(code)}
        # torchrun's own default is one thread per process.
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num)))
        process = subprocess.Popen(torchrun, env=env)
        # Ctrl-C in a terminal reaches the processes directly; they save while this one waits.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        while process.poll() is None:
            time.sleep(0.2)
            if code.exists():  # one has given up; the others might wait for it for long
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.terminate()
        return int(code.read_text()) if code.exists() else process.returncode


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _show(result) -> None:
    from sslus.tools.screen import summary

    going = _resume(result.run) if result.stopped else _evaluate(result.run, result.shards)
    if _is_main():
        summary(_rows(result), warnings=result.warnings, next_command=going)


def _evaluate(run, shards: str) -> str:
    from sslus.engine.stream import is_url
    from sslus.tools.screen import argument

    there = " --shards shards/" if is_url(shards) else ""  # evaluation needs them on a disk
    return f"sslus evaluate {argument(run)}{there} --labels labels.csv"


def _facts(result) -> dict[str, str]:
    """Speed, loss and features, as far as they are known: a short run may lack some."""
    lines = [m for m in result.metrics if "loss" in m]
    looks = [m for m in result.metrics if "rankme" in m]
    facts = {}
    if lines:
        first, last = lines[0], lines[-1]
        speed, wait = (
            sorted(m[key] for m in lines)[len(lines) // 2]
            for key in ("samples_per_second", "data_wait")
        )
        facts["speed"] = (
            f"{speed:,.1f} samples/s (two views each), {100 * wait:.0f} % of the time waiting for"
            " data"
        )
        facts["loss"] = (
            f"{first['loss']:.3f} (steps 1-{first['step']}) -> {last['loss']:.3f}"
            f" (to step {last['step']})"
        )
    if looks:
        look = looks[-1]
        facts["features"] = f"RankMe {look['rankme']:.1f}, mean std {look['feature_std']:.3g}"
    return facts


def _rows(result) -> dict[str, str]:
    rows = {"run": str(result.run)}
    if result.was_finished:
        rows["state"] = f"already finished ({result.step} steps); nothing was done"
    if result.stopped:
        rows["state"] = f"time limit reached at step {result.step}; everything is saved"
    rows |= {
        "trained": f"{result.step:,} steps, {result.epoch:.1f} epochs",
        "time": f"{result.seconds:,.0f} s",
        **_facts(result),
        "curves": str(result.run / "curves.png"),
        "backbone": str(result.run / "backbone.safetensors"),
    }
    return rows
