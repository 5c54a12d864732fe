"""`sslus evaluate`: the linear probe."""

import click


@click.command("evaluate")
@click.argument("run", type=click.Path())
@click.option(
    "--labels",
    type=click.Path(),
    required=True,
    help="CSV with the columns path,label,patient[,split].",
)
@click.option("--protocol", default="linear", show_default=True, help="linear.")
@click.option(
    "--fractions", default="1,10,100", show_default=True,
    help="Percent of the training videos whose labels the probe sees.",
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True,
    help="Repetitions with other folds and other subsets.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(), help="Folder.  [default: RUN/evaluation]")
@click.option("--shards", type=click.Path(), help="[default: those the run was trained on]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def command(run, labels, protocol, fractions, seeds, out, shards, device):
    """Judge the backbone of RUN by a linear probe on frozen features, patients kept apart.

    The same backbone at random initialisation and the majority class stand beside it, on the
    same frames, folds and labels. Without a `split` column, stratified folds by patient.

    \b
    sslus evaluate runs/vicreg --labels videos/labels.csv
    sslus evaluate runs/vicreg --labels videos/labels.csv --fractions 10,100 --seeds 5 -o report
    """
    from pathlib import Path

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sslus.engine.errors import InputError
    from sslus.ssl import evaluate
    from sslus.tools.screen import progress, summary

    try:
        percents = tuple(float(part) for part in fractions.split(","))
    except ValueError as e:
        raise InputError(f"--fractions {fractions!r}: want percents like 1,10,100") from e
    result = evaluate.evaluate(
        Path(run), Path(labels), out=out and Path(out), shards=shards and Path(shards),
        protocol=protocol, percents=percents, num_seeds=seeds, device=device, stage=progress,
    )  # fmt: skip
    header, cells = evaluate.table(result)
    shown = Table(*header, box=box.SIMPLE_HEAD)
    for row in cells:
        shown.add_row(*row)
    # A log or a pipe has no width of its own; 80 columns would break every row.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(shown)
    summary(
        {
            "data": f"{result.num_frames:,} frames, {result.num_videos} videos,"
            f" {result.num_patients} patients, {len(result.names)} classes",
            "split": f"{result.split}; ± is the standard deviation over {seeds} seeds",
            "report": str(result.out / "report.md"),
            "numbers": str(result.out / "results.json"),
            "picture": str(result.out / "confusion.png"),
        },
        warnings=result.warnings,
        next_command=f"sslus train {result.shards} --method all   (the same for every method)",
    )
