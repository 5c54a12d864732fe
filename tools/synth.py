"""`sslus synth`: synthetic fetal heart clips to try everything out with."""

import os
import shlex
from pathlib import Path

import click


@click.command("synth")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--videos", default=40, show_default=True, help="Number of clips.")
@click.option("--patients", default=10, show_default=True, help="Number of patients.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--size", type=int, help="Longer side in pixels.  [default: each machine's own]")
@click.option(
    "--seconds",
    nargs=2,
    type=float,
    default=(2.0, 6.0),
    metavar="LOW HIGH",
    help="Shortest and longest clip.  [default: 2 6]",
)
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one a core]")
def command(out, videos, patients, seed, size, seconds, jobs):
    """Make synthetic ultrasound clips of the fetal heart, with labels.

    A speckle phantom: scatterers that move with a beating heart, a beam, attenuation and
    shadows, log compression, a sector. Five planes: 4CH, LVOT, RVOT, 3VV, non-heart. Writes
    H.264 MP4 files and labels.csv (path,label,patient) into OUT. It is no patient data and
    proves nothing about patients; it lets you run and judge every step without any.

    A run that was interrupted goes on when the same command is given again.

    \b
    sslus synth videos/
    sslus synth small/ --videos 10 --patients 5 --size 256 --seconds 1 2
    """
    from sslus.engine.phantom import PLANES, Settings, synth
    from sslus.tools.screen import progress, summary

    settings = Settings(videos, patients, seed, size, seconds)
    jobs = jobs or os.cpu_count() or 1
    with progress("synth", "clips") as report:
        made = synth(out, settings, jobs, report)
    kept = f", {videos - made} were there already" if made < videos else ""
    summary(
        {
            "clips": f"{videos} of {patients} patients, {len(PLANES)} planes{kept}",
            "labels": str(out / "labels.csv"),
        },
        next_command=f"sslus shard {shlex.quote(str(out))}",
    )
