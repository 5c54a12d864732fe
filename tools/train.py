"""`sslus train`: the options of the loop, and those of the method that is named."""

import click

METHOD = "vicreg"  # the default; its file is not imported before a command line is read


class TrainCommand(click.Command):
    """Adds the fields of the method's Config as options, once the command line names it."""

    def parse_args(self, ctx, args):
        import dataclasses

        from sslus.ssl import methods

        module = methods.load(_named(args))
        own = [_option(f) for f in dataclasses.fields(module.Config)]
        ctx.meta["method_options"] = [p.name for p in own]
        self.params = self.params[: self.num_common] + own
        self.epilog = "\n\n".join("\b\n" + part for part in module.__doc__.strip().split("\n\n"))
        return super().parse_args(ctx, args)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_common = len(self.params)


def _named(args: list[str]) -> str:
    for i, arg in enumerate(args):
        if arg == "--method" and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith("--method="):
            return arg.removeprefix("--method=")
    return METHOD


def _option(f) -> click.Option:
    return click.Option(
        ["--" + f.name.replace("_", "-")],
        type=f.type,
        default=f.default,
        show_default=True,
        help=f.metadata["help"] + " (method)",
    )


@click.command("train", cls=TrainCommand)
@click.argument("shards", type=click.Path(), default="shards")
@click.option("--method", default=METHOD, show_default=True, help="How to learn without labels.")
@click.option(
    "--backbone", help="Any timm model.  [default: resnet18 on the CPU, resnet50 on CUDA]"
)
@click.option("--init", default="random", show_default=True, help="random, imagenet or a FILE.")
@click.option("--image-size", type=int, help="Side of a view, pixels.  [default: 96 CPU, 224 CUDA]")
@click.option("--batch-size", type=int, help="Frames, two views each.  [default: 64 CPU, 256 CUDA]")
@click.option(
    "--views", default="ultrasound", show_default=True, metavar="PRESET[,FIELD=VALUE...]",
    help="How views differ: ultrasound, simclr, barlowtwins, autoencoder or inpainting; look at"
    " them with `sslus views`.",
)  # fmt: skip
@click.option(
    "--pairs", type=click.Choice(["same", "nearby"]), default="same", show_default=True,
    help="nearby: the second view comes from another frame of the same video.",
)  # fmt: skip
@click.option(
    "--max-seconds", type=float, default=1.5, show_default=True, help="How far away nearby is."
)
@click.option("--pair-weights", is_flag=True, help="Nearby pairs count less the further apart.")
@click.option("--epochs", type=click.IntRange(min=1), help="[default: 100 without --max-steps]")
@click.option("--max-steps", type=click.IntRange(min=1), help="Ends the run if epochs do not.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw or lars.")
@click.option("--lr", type=float, help="Peak learning rate.  [default: from the batch size]")
@click.option("--weight-decay", type=float, help="[default: adamw 0.05, lars 1e-6]")
@click.option("--warmup-steps", type=int, help="[default: a tenth of the steps, <= 10 epochs]")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32 or bf16.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides every random choice.")
@click.option("--run", type=click.Path(), help="Folder of the run.  [default: runs/METHOD]")
@click.option("--resume", is_flag=True, help="Continue the run, exactly; settings are the run's.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]")
@click.option(
    "--log-every", type=click.IntRange(min=1), default=10, show_default=True, help="Steps."
)
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), default=200, show_default=True, help="Steps."
)
@click.option("--rebuild-store", is_flag=True, help="Decode the shards into frames anew.")
@click.pass_context
def command(
    ctx,
    shards,
    method,
    run,
    resume,
    device,
    threads,
    log_every,
    checkpoint_every,
    rebuild_store,
    **rest,
):
    """Pretrain a backbone on the frames of SHARDS (default: shards/), without labels.

    \b
    sslus train --method vicreg                         a run with the defaults
    sslus train --max-steps 300 --run runs/quick        a short one
    sslus train --resume --run runs/quick               go on after an interruption
    """
    import dataclasses
    from pathlib import Path

    from click.core import ParameterSource

    from sslus.engine.store import FrameStore
    from sslus.ssl import methods
    from sslus.ssl import train as loop
    from sslus.tools.screen import progress, summary

    run = Path(run or f"runs/{method}")
    own = {name: rest.pop(name) for name in ctx.meta["method_options"]}
    config = loop.open_run(run, resume)
    if config is None:
        settings = loop.Settings(method=method, **rest)
        method_config = methods.load(method).Config(**own)
    else:  # the run's settings, but for what this command line names: the loop compares them
        named = {
            name: value
            for name, value in {"method": method, **rest, **own}.items()
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        settings, method_config = loop.settings_from(config)
        method_config = dataclasses.replace(
            method_config, **{k: v for k, v in named.items() if k in own}
        )
        settings = dataclasses.replace(settings, **{k: v for k, v in named.items() if k not in own})
        if ctx.get_parameter_source("shards") is not ParameterSource.COMMANDLINE:
            shards = config["shards"]["path"]

    if rebuild_store or not (Path(shards) / "store").exists():
        with progress("frame store", "frames") as report:
            FrameStore.open(Path(shards), rebuild=rebuild_store, threads=threads, report=report)
    with progress("train", "samples") as report:
        result = loop.train(
            Path(shards),
            settings,
            method_config,
            run,
            resume=resume,
            device=device,
            threads=threads,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            report=report,
            say=lambda line: click.echo(line, err=True),
        )
    summary(_rows(result), warnings=result.warnings, next_command=_next(result))


def _next(result) -> str:
    return f"sslus evaluate {result.run} --labels labels.csv"


def _rows(result) -> dict[str, str]:
    first, last = result.metrics[0], result.metrics[-1]
    speeds = sorted(m["samples_per_second"] for m in result.metrics)
    waits = sorted(m["data_wait"] for m in result.metrics)
    rows = {"run": str(result.run)}
    if result.was_finished:
        rows["state"] = f"was finished already ({result.step} steps); nothing was done"
    rows |= {
        "trained": f"{result.step:,} steps, {result.epoch:.1f} epochs",
        "time": f"{result.seconds:,.0f} s",
        "speed": f"{speeds[len(speeds) // 2]:,.1f} samples/s (two views each),"
        f" {100 * waits[len(waits) // 2]:.0f} % of the time waiting for data",
        "loss": f"{first['loss']:.3f} (steps 1-{first['step']}) -> {last['loss']:.3f}"
        f" (to step {last['step']})",
        "features": f"RankMe {last['rankme']:.1f}, mean std {last['feature_std']:.3g}",
        "curves": str(result.run / "curves.png"),
        "backbone": str(result.run / "backbone.safetensors"),
    }
    return rows
