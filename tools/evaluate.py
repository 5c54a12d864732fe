"""`sslus evaluate`: linear probe, nearest neighbours and fine-tuning."""

import click

from sslus.ssl.cores import MOST_THREADS


@click.command("evaluate", short_help="Measure a backbone with labels, split by patient.")
@click.argument("run", nargs=-1, required=True, type=click.Path(), metavar="RUN...")
@click.option(
    "--labels",
    type=click.Path(),
    required=True,
    help="CSV file with the columns path,label,patient[,split]; paths are relative to it.",
)
@click.option(
    "--protocol", default="linear", show_default=True,
    help="linear, knn or finetune; or several, separated by commas.",
)  # fmt: skip
@click.option(
    "--fractions", default="1,10,100", show_default=True,
    help="Percentages of the training videos of each class, at least one, whose labels are used;"
    " the study arXiv:2407.21738 has 1,5,10,25,50,100.",
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True,
    help="Number of repetitions, each with new folds and new subsets of the labels.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1),
    help="Training steps of each fine-tuning.  [default: 100 on a CPU, 1000 on a GPU]",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(),
    help="Folder to write; for several runs, one in it for each.  [default: RUN/evaluation]",
)  # fmt: skip
@click.option("--shards", type=click.Path(), help="Folder of shards.  [default: that of RUN]")
@click.option(
    "--device", metavar="[auto|cpu|cuda]", default="auto", show_default=True,
    help="Where features are computed and backbones fine-tuned; auto: on a GPU if there is one.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS),
    help="CPU threads, for all that is computed.  [default: all cores]",
)  # fmt: skip
def command(run, labels, protocol, fractions, seeds, steps, out, shards, device, threads):
    """Measure what the backbone in the folder RUN is worth, with labels, split by patient.

    Several runs are compared in a table at the end.

    \b
    Protocols:
    linear    a linear probe on frozen features
    knn       the 20 nearest training frames vote, on the same features
    finetune  the backbone is trained together with a linear head. This takes
              seeds x folds x fractions x 2 trainings: 90 by default, about an hour
              on one core for a ResNet-18 at 96 px. If stopped, the same command
              resumes.

    The same backbone at random initialisation and the majority class are evaluated on the same
    frames, folds and labels for comparison. The folds are stratified and split by patient: 5, or
    fewer if a class has fewer patients. A `split` column (train, test or val) replaces them; what
    it marks as val is not used, since nothing is tuned.

    Prints a table of macro-F1 per frame and per video, balanced accuracy and AUROC, and writes
    report.md, results.json, confusion.png and predictions.csv, with the class probabilities of
    each tested video: for the linear probe to the output folder itself, for the other protocols to
    a subfolder of their own. The local/ folder of the shards is needed.

    \b
    sslus evaluate runs/vicreg --labels videos/labels.csv
    sslus evaluate runs/vicreg --labels videos/labels.csv --fractions 10,100 --seeds 5 -o report
    sslus evaluate runs/vicreg --labels videos/labels.csv --protocol linear,knn
    sslus evaluate runs/vicreg --labels videos/labels.csv --protocol finetune --seeds 1
    sslus evaluate runs/all/*/ --labels videos/labels.csv
    """
    from pathlib import Path

    from sslus.engine.errors import InputError
    from sslus.engine.labels import labelled_videos
    from sslus.ssl.report import PROTOCOLS
    from sslus.ssl.runs import check, check_evaluation
    from sslus.tools.screen import argument, progress, summary, tell

    try:
        percents = tuple(float(part) for part in fractions.split(","))
    except ValueError as e:
        raise InputError(f"--fractions {fractions!r}: want percents like 1,10,100") from e
    protocols = dict.fromkeys(protocol.split(","))
    if not protocols.keys() <= set(PROTOCOLS):  # before the first has taken an hour
        raise InputError(
            f"--protocol {protocol!r}: want one of {', '.join(PROTOCOLS)}, or several,"
            " separated by commas"
        )
    if steps and "finetune" not in protocols:
        raise InputError("--steps: are those of --protocol finetune, which is not given")
    runs, labels = [Path(one) for one in run], Path(labels)
    outs = [out and Path(out) / (one.resolve().name if len(runs) > 1 else "") for one in runs]
    if out and len(set(outs)) < len(outs):
        raise InputError("-o: two of the runs have folders of the same name; leave it out")
    # Before the first is evaluated, and PyTorch imported, which takes seconds.
    check_evaluation(percents, seeds)
    for folder in dict.fromkeys(check(one, shards)[1] for one in runs):
        labelled_videos(labels, folder)

    from sslus.ssl.evaluate import evaluate

    results, shared = {}, {}
    for one, to in zip(runs, outs, strict=True):
        for name in protocols:
            if len(runs) > 1:
                tell(f"{one}: {name}")
            result = results[one, name] = evaluate(
                one, labels, out=to, shards=shards, protocol=name, percents=percents,
                num_seeds=seeds, steps=steps, device=device, threads=threads, shared=shared,
                stage=progress,
            )  # fmt: skip
            show(result)
    if len(runs) > 1:
        _print(*compared(results))
        return
    again = f"sslus train {argument(result.shards)} --method all"
    summary({}, next_command=f"{again}   (the same for every method)")


def compared(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table that compares runs, from {(run, protocol): Evaluation}."""
    from sslus.ssl import report

    header = ["run", "protocol", "labels", "macro-F1", "random init"]
    header += ["macro-F1\nper video", "AUROC\nper video"]
    cells = []
    for (run, protocol), result in results.items():
        _, rows = report.table(result)
        num = (len(rows) - 1) // 2  # the run's, those of random weights, the majority class
        for (_, labels, f1, video_f1, _, auroc, _), (_, _, random_f1, *_) in zip(
            rows[:num], rows[num:-1], strict=True
        ):
            cells.append([str(run), protocol, labels, f1, random_f1, video_f1, auroc])
    return header, cells


def show(result) -> None:
    from sslus.ssl import report
    from sslus.tools.screen import summary

    _print(*report.table(result))
    summary(
        {
            "protocol": report.PROTOCOLS[result.protocol],
            "data": f"{result.num_frames:,} frames, {result.num_videos} videos,"
            f" {result.num_patients} patients, {len(result.names)} classes",
            "split": f"{result.split}; {result.spread}",
            "tested on": result.tested,
            "report": str(result.out / "report.md"),
            "numbers": str(result.out / "results.json"),
            "predictions": str(result.out / "predictions.csv"),
            "picture": str(result.out / "confusion.png"),
        },
        warnings=result.warnings,
    )


def _print(header: list[str], cells: list[list[str]]) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sslus.tools.screen import tell

    shown = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in header:
        shown.add_column(name, overflow="fold")  # an ellipsis would hide which run it is
    for row in cells:
        shown.add_row(*row)
    # Runs may be called a[lr=1] or :x:, which is neither style nor an emoji. A log or a pipe has no
    # width of its own; 80 columns would break every row.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    with console.capture() as captured:
        console.print(shown)
    tell(captured.get(), sys.stdout)
