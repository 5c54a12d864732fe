"""`sslus train`: the options of the loop, and those of the method that is named."""

import click

METHOD = "vicreg"  # the default; its file is not imported before a command line is read
ALL = "all"


class TrainCommand(click.Command):
    """Adds the fields of the method's Config as options, once the command line names it."""

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
        help=f.metadata["help"] + " (method)",
    )


@click.command("train", cls=TrainCommand)
@click.argument("shards", type=click.Path(), default="shards")
@click.option("--method", default=METHOD, show_default=True)  # its help names the methods there are
@click.option(
    "--recipe",
    type=click.Choice(["default", "paper", "study"]),
    default="default",
    show_default=True,
    help="Values of options that are not given: for ultrasound, of the original paper, or of the"
    " study arXiv:2407.21738.",
)
@click.option(
    "--backbone", help="Any timm model.  [default: resnet18 on the CPU, resnet50 on CUDA]"
)
@click.option("--init", default="random", show_default=True, help="random, imagenet or a FILE.")
@click.option("--image-size", type=int, help="Side of a view, pixels.  [default: 96 CPU, 224 CUDA]")
@click.option(
    "--batch-size",
    type=int,
    help="Frames, on all GPUs together, two views each.  [default: 64 CPU, 256 CUDA]",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batches a step: their gradients are averaged. A loss compares the samples of one batch.",
)
@click.option(
    "--views",
    metavar="PRESET[,FIELD=VALUE...]",
    help="How views differ: ultrasound, simclr, barlowtwins, autoencoder or inpainting; look at"
    " them with `sslus views`.  [default: the method's]",
)
@click.option(
    "--pairs",
    type=click.Choice(["same", "nearby"]),
    default="same",
    show_default=True,
    help="nearby: the second view comes from another frame of the same video.",
)
@click.option(
    "--max-seconds",
    type=float,
    default=1.5,
    show_default=True,
    help="How far away nearby is. (A run's own limit is --time-limit.)",
)
@click.option("--pair-weights", is_flag=True, help="Nearby pairs count less the further apart.")
@click.option(
    "--dual-task",
    type=float,
    default=0.0,
    metavar="WEIGHT",
    help="Also learn the labels in the shards: the weight of that cross-entropy.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="[default: 100 without --max-steps]")
@click.option("--max-steps", type=click.IntRange(min=1), help="Ends the run if epochs do not.")
@click.option("--optimizer", help="adamw, lars or sgd.  [default: adamw]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: from the batch size]")
@click.option("--base-lr", type=float, help="The same for 256 frames a step: scales with them.")
@click.option("--weight-decay", type=float, help="[default: adamw 0.05, lars 1e-6, sgd 1e-4]")
@click.option("--warmup-steps", type=int, help="[default: a tenth of the steps, <= 10 epochs]")
@click.option("--warmup-epochs", type=float, help="The same in epochs.")
@click.option("--clip-norm", type=float, help="Scale gradients down to this norm.")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="fp32 or bf16; auto: bf16 on GPUs, and for ResNets on CPUs with AMX.",
)
@click.option(
    "--step",
    type=click.Choice(["auto", "eager", "compile", "graph"]),
    default="auto",
    show_default=True,
    help="How an update runs: torch.compile, a CUDA graph; auto tries them on one GPU.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides every random choice.")
@click.option("--run", type=click.Path(), help="Folder of the run.  [default: runs/METHOD]")
@click.option("--resume", is_flag=True, help="Continue the run, exactly; settings are the run's.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--tier",
    type=click.Choice(["auto", "gpu", "ram", "disk", "stream"]),
    default="auto",
    show_default=True,
    help="Where frames are kept: in the GPU's memory, in memory, on disk, or nowhere, decoded"
    " anew from the shards each time.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Start so many processes, a GPU each, by torchrun (with --device cpu: without GPUs).",
)
@click.option(
    "--batch-norm",
    type=click.Choice(["sync", "per-rank"]),
    default="sync",
    show_default=True,
    help="Several GPUs: statistics over all of them, or of each.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]")
@click.option(
    "--log-every", type=click.IntRange(min=1), default=10, show_default=True, help="Steps."
)
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), default=200, show_default=True, help="Steps."
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Checkpoints to keep, beside the newest and the best.",
)
@click.option(
    "--online-every",
    type=click.IntRange(min=0),
    default=0,
    metavar="EPOCHS",
    help="kNN and linear probe on the labels in the shards, by patient.  [default: never]",
)
@click.option(
    "--time-limit", type=float, metavar="SECONDS", help="Save and stop after it; --resume goes on."
)
@click.option("--rebuild-store", is_flag=True, help="Decode the shards into frames anew.")
@click.pass_context
def command(ctx, shards, run, gpus, rebuild_store, **given):
    """Pretrain a backbone on the frames of SHARDS (default: shards/), without labels.

    SHARDS is a folder, or a URL (s3://, gs://, https://), whose frames are streamed.

    \b
    sslus train --method vicreg                         a run with the defaults
    sslus train --max-steps 300 --run runs/quick        a short one
    sslus train --resume --run runs/quick               go on after an interruption
    sslus train --gpus 4 --batch-size 1024              four GPUs, one batch
    torchrun --nproc-per-node 4 -m -- sslus.tools train --batch-size 1024
                                                        the same; more machines: see torchrun;
                                                        without the `--` it takes --run for its own
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
            "--max-seconds: how far apart --pairs nearby may lie; to end a run after some time"
            " there is --time-limit SECONDS"
        )
    for one, other in (("lr", "base_lr"), ("warmup_steps", "warmup_epochs")):
        if {one, other} <= named:
            one, other = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise InputError(f"{one} and {other} say the same in two ways; give one of them")
    if given["time_limit"] is not None and not given["time_limit"] >= 0:  # NaN too
        raise InputError(f"--time-limit {given['time_limit']:g}: want seconds from 0")
    if given["method"] == ALL:
        _train_all(shards, run, given, named)
    else:
        try:
            _show(_train(shards, run, given, named))
        except Interrupted as e:
            raise Interrupted(f"{e}. Go on with: {_resume(run)}", e.signum) from None
    leave()


# Options that change what is told and kept, not the result.
OPTIONS = ("log_every", "checkpoint_every", "keep", "online_every", "time_limit")
WHERE = ("device", "tier", "threads")  # which do not either
NOT_FOR_ALL = ("method", "recipe", "resume", "rebuild_store", "time_limit")  # each call's own


def _resume(run, how: str = "") -> str:
    """The command that goes on with a run, which has recorded all but the number of processes."""
    import os
    import shlex

    from sslus.tools.cli import EXIT_CODE_FILE

    run, size = shlex.quote(str(run)), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and EXIT_CODE_FILE not in os.environ:
        return f"the same torchrun command with --resume --run {run}"
    return f"sslus train{how} --resume --run {run}" + (f" --gpus {size}" if size > 1 else "")


def _train(shards: str, run, given: dict, named: set[str]):
    """One run; returns its TrainResult. `named`: what of `given` the command line names."""
    import contextlib
    import dataclasses

    from sslus.engine.errors import InputError
    from sslus.engine.stream import is_url
    from sslus.ssl import methods
    from sslus.ssl import train as loop
    from sslus.ssl.loader import open_store
    from sslus.ssl.loop import Options
    from sslus.ssl.world import enter
    from sslus.tools.screen import progress

    given = dict(given)
    rebuild_store, recipe = given.pop("rebuild_store"), given.pop("recipe")
    resume = given.pop("resume")
    if resume:
        how = loop.recorded_options(run)
        given |= {k: v for k, v in how.items() if k in given and k not in named}
    device, tier, threads = (given.pop(name) for name in ("device", "tier", "threads"))
    options = Options(**{name: given.pop(name) for name in OPTIONS})
    # Before the frame store is built: whoever waits for it hears if that fails.
    world = enter(device)
    settled = {k: v for k, v in given.items() if k in named or k == "method"}
    config = loop.open_run(run, resume, world)
    if config is None:
        values, method_config = methods.recipe(given["method"], recipe)
        # An option that is given takes those of the recipe with it that belong to another value.
        if "base_lr" in settled:
            values.pop("lr", None)
        if "optimizer" in settled and settled["optimizer"] != values.get("optimizer", "adamw"):
            for name in ("lr", "base_lr", "weight_decay"):
                values.pop(name, None)
        settings = loop.Settings(**{**_settings(given), **values})
    elif recipe != "default":
        raise InputError("--recipe: a run that is resumed has its values already; leave it out")
    else:  # the run's settings, but for what this command line names: the loop compares them
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
    # One log: the other processes are silent.
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
            say=lambda line: click.echo(line, err=True),
        )


def _settings(values: dict) -> dict:
    """The values that are fields of the loop's Settings."""
    import dataclasses

    from sslus.ssl.train import Settings

    known = {f.name for f in dataclasses.fields(Settings)}
    return {k: v for k, v in values.items() if k in known}


def _train_all(shards: str, folder, given: dict, named: set[str]) -> None:
    """The methods one after the other, each in its own folder; a finished one is not touched.

    What the command line names is kept in <folder>/all.json: resumed, the methods that had not
    begun get the same.
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
    from sslus.tools.screen import summary

    if given["recipe"] != "default":
        raise InputError("--method all: an equal number of steps is not what the recipes have")
    record = folder / "all.json"
    going = _resume(folder, " --method all")
    if given["resume"]:
        try:
            before = json.loads(record.read_text())
            recorded_shards, options = before["shards"], dict(before["options"])
            if before.get("format") != 2:
                raise ValueError("of another version of sslus")
        except FileNotFoundError as e:
            raise InputError(f"--resume: {folder} holds no run of --method all") from e
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{record}: cannot be used ({e}); start another --run DIR") from e
        # What does not change the methods' results may be told otherwise, from now on.
        options |= {k: given[k] for k in named & {*OPTIONS, *WHERE} - {*NOT_FOR_ALL}}
        given = given | {k: v for k, v in options.items() if k not in named}
        shards = shards if "shards" in named else recorded_shards
        named = named | set(options) | {"shards"}
    else:
        begun = any((folder / name / "config.json").exists() for name in methods.names())
        if begun and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            raise InputError(f"{folder} is there already; go on with: {going}")
        options = {k: v for k, v in given.items() if k in named and k not in NOT_FOR_ALL}
        # What a device decides is the same for all methods, wherever the last ones are trained.
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
            click.echo(f"{name} -> {run}", err=True)
        try:
            result = _train(shards, run, mine, named)
        except Interrupted as e:
            raise Interrupted(f"{name}: {e}. Go on with: {going}", e.signum) from None
        except NotFinite as e:
            if os.environ.get("WORLD_SIZE", "1") != "1":  # the others may hear of it a step later
                raise
            failed.append(name)
            click.echo(f"Error: {name}: {e}", err=True)
            continue
        if result.signum and not result.stopped and name != methods.names()[-1]:
            raise Interrupted(f"{name} is finished. Go on with: {going}", result.signum)
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


def _torchrun(num: int) -> int:
    """This command line again, in `num` processes on this machine; returns the exit code."""
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
        # torchrun would give each a single thread.
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num)))
        process = subprocess.Popen(torchrun, env=env)
        # A terminal's Ctrl-C reaches the processes by itself; they save, and this one waits.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        while process.poll() is None:
            time.sleep(0.2)
            if code.exists():  # one has given up: the others may wait for it for long
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
    import shlex

    from sslus.engine.stream import is_url

    there = " --shards shards/" if is_url(shards) else ""  # it wants them on a disk
    return f"sslus evaluate {shlex.quote(str(run))}{there} --labels labels.csv"


def _facts(result) -> dict[str, str]:
    """Speed, loss and features, as far as they are known: a short run may not have come so far."""
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
        rows["state"] = f"was finished already ({result.step} steps); nothing was done"
    if result.stopped:
        rows["state"] = f"the time was up at step {result.step}; everything is saved"
    rows |= {
        "trained": f"{result.step:,} steps, {result.epoch:.1f} epochs",
        "time": f"{result.seconds:,.0f} s",
        **_facts(result),
        "curves": str(result.run / "curves.png"),
        "backbone": str(result.run / "backbone.safetensors"),
    }
    return rows
