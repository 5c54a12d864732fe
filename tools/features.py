"""`sslus features`: a backbone's features as a table."""

import click

from sslus.ssl.cores import MOST_THREADS


@click.command("features", short_help="Write a backbone's features as a table.")
@click.argument("run", type=click.Path())
@click.option(
    "-o", "--out", type=click.Path(),
    help="File to write: .csv, or .npz for NumPy.  [default: RUN/features.csv]",
)  # fmt: skip
@click.option(
    "--per", default="video", show_default=True, metavar="[video|frame]",
    help="What a row is: a video, with the mean over its frames, or a frame.",
)  # fmt: skip
@click.option(
    "--names", is_flag=True,
    help="Add the column `path`, of the video: do not share the table then.",
)  # fmt: skip
@click.option("--shards", type=click.Path(), help="Folder of shards.  [default: that of RUN]")
@click.option(
    "--device", metavar="[auto|cpu|cuda]", default="auto", show_default=True,
    help="Where features are computed; auto: on a GPU if there is one.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads.  [default: all]"
)
def command(run, out, per, names, shards, device, threads):
    """Write the features that the backbone in the folder RUN gives to every video.

    For scikit-learn, R or a spreadsheet: a line for each video, with its id in the shards, its
    number of frames, the class and the number of the patient (-1: unknown) if the shards were made
    with --labels, and the features f0, f1, ... of its frames, averaged. Whole frames are used, at
    the image size of the run, and normalised as in training.

    \b
    sslus features runs/vicreg
    sslus features runs/vicreg -o features.npz --per frame
    sslus features runs/vicreg --shards other/shards --names -o mine.csv

    A .npz holds the same columns, each as an array, and the features as `features`, (rows, F).
    """
    from pathlib import Path

    from sslus.ssl.runs import check, check_table
    from sslus.tools.screen import argument, count, progress, summary

    run, out = Path(run), out and Path(out)
    # Before PyTorch is imported, which takes seconds.
    check(run, shards)
    check_table(out or run / "features.csv", per)

    from sslus.ssl.table import write_features

    table = write_features(
        run, out, shards=shards, per=per, names=names, device=device,
        threads=threads, stage=progress,
    )  # fmt: skip
    summary(
        {
            "features": f"{count(table.num_features, 'feature')} of"
            f" {count(table.num_rows, table.per)}, from {count(table.num_frames, 'frame')}",
            "table": str(table.path),
        },
        warnings=["the table holds the paths of the videos"] if names else [],
        next_command=f"sslus evaluate {argument(run)} --labels labels.csv",
    )
