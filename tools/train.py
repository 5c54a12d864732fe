"""`sslus train`: the options of the training loop and of the chosen method."""

import click

from sslus.ssl.cores import MOST_THREADS

METHOD = "vicreg"  # the default; its file is not imported before the command line is parsed
ALL = "all"
SHARDS = "shards"  # the default too


class TrainCommand(click.Command):
    """Adds the fields of the Config of the method named on the command line as options."""

    def parse_args(self, ctx, args):
        import dataclasses

        from sslus.engine.errors import InputError
        from sslus.ssl import methods

        self.params = self.params[: self.num_common]
        method = next(p for p in self.params if p.name == "method")
        method.help = (
            f"{', '.join(methods.names())}; or {ALL}: in turn, equally many steps each; or the path"
            f" of a .py file with a method of your own, as shown in {methods.PAGE}"
        )
        if (name := _named(args)) != ALL:
            module = methods.load(name)
            _, config = methods.recipe(name, "default")
            fields = dataclasses.fields(config)
            if taken := {p.name for p in self.params} & {f.name for f in fields}:
                raise InputError(
                    f"{name}: Config has {', '.join(sorted(taken))}, which sslus train has already;"
                    " rename it"
                )
            self.params = self.params + [_option(f, getattr(config, f.name)) for f in fields]
            text = (module.__doc__ or "").strip().split("\n\n")
            self.epilog = "\n\n".join("\b\n" + part for part in text)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            field = e.option_name.removeprefix("--").replace("-", "_")
            owners = [
                other for other in methods.names()
                if field in {f.name for f in dataclasses.fields(methods.load(other).Config)}
            ]  # fmt: skip
            if owners:
                whose = f"--method {' and '.join(owners)}, not of {name}"
                raise click.UsageError(f"{e.option_name} is an option of {whose}", ctx) from e
            raise

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
        help=(f.metadata.get("help", "") + " (method option)").strip(),
    )


@click.command("train", cls=TrainCommand, short_help="Pretrain a backbone without labels.")
@click.argument("shards", type=click.Path(), default=SHARDS)
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
    "--zero-init-residual/--no-zero-init-residual",
    help="Whether residual blocks (of ResNets) add nothing to their input at first.  [default: as"
    " the recipe has it: for methods with two views, except byol]",
)
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
    "--pair-weights",
    is_flag=True,
    help="With --pairs nearby: weight pairs less the further apart. The losses of simclr, moco and"
    " barlowtwins are then plain PyTorch.",
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
    "--threads", type=click.IntRange(1, MOST_THREADS),
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
    help="How many of the last checkpoints to keep in checkpoints/, besides the best.",
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
def command(ctx, run, gpus, **given):
    """Pretrain a backbone on the frames of SHARDS (default: shards/), without labels.

    SHARDS is a folder, or a URL (s3://, gs://, https://) from which frames are streamed. From a
    folder, they are decoded once, into a frame store beside the shards.

    Writes to the folder of the run: backbone.safetensors (the result), curves.png, metrics.jsonl,
    config.json and checkpoints. Ctrl-C, SIGTERM or a closed terminal (SIGHUP)
    saves and stops; --resume continues.

    `sslus train --method NAME --help` also lists the options of the method NAME. NAME may be the
    path of a .py file with a loss of your own.

    \b
    sslus train --method vicreg                         a run with the defaults
    sslus train --max-steps 300 --run runs/quick        a short run
    sslus train --resume --run runs/quick               continue after an interruption
    sslus train --method my_method.py                   a method of your own
    sslus train --gpus 4 --batch-size 1024              four GPUs, one batch
    torchrun --nproc-per-node 4 -m -- sslus.tools train --batch-size 1024
                                                        the same; for several machines, see
                                                        torchrun (without the `--`, torchrun
                                                        takes --run as its own option)
    """
    import os
    from pathlib import Path

    from click.core import ParameterSource

    from sslus.engine.errors import InputError
    from sslus.tools.cli import EXIT_CODE_FILE

    if gpus is not None and EXIT_CODE_FILE not in os.environ:  # else this is one of them
        from sslus.tools.launch import torchrun

        ctx.exit(torchrun(gpus))
    asked = {
        name: value
        for name, value in given.items()
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if "max_seconds" in asked and asked.get("pairs") != "nearby" and not asked.get("resume"):
        raise InputError(
            "--max-seconds limits the distance of --pairs nearby, which is not given; to limit the"
            " run time, use --time-limit SECONDS"
        )
    for one, other in (("lr", "base_lr"), ("warmup_steps", "warmup_epochs")):
        if one in asked and other in asked:
            one, other = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise InputError(f"{one} and {other} set the same value; give only one of them")
    if not asked.get("time_limit", 0) >= 0:  # NaN too
        raise InputError(f"--time-limit {asked['time_limit']:g}: want 0 seconds or more")
    from sslus.ssl import methods
    from sslus.ssl.world import leave
    from sslus.tools.training import train_all, train_one

    method = asked.get("method", METHOD)
    train = train_all if method == ALL else train_one
    train(Path(run or f"runs/{methods.name_of(method)}"), asked)
    leave()
