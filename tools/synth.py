"""`sslus synth`: synthetic fetal heart clips for trying everything out."""

from pathlib import Path

import click


@click.command("synth")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--videos", default=40, show_default=True, help="Number of clips to make.")
@click.option("--patients", default=10, show_default=True, help="Number of patients in all.")
@click.option(
    "--seed", default=0, show_default=True,
    help="Random seed; on one machine, the same seed gives the same bytes.",
)  # fmt: skip
@click.option(
    "--size", type=int,
    help="Longer side in pixels.  [default: that of each simulated scanner]",
)  # fmt: skip
@click.option(
    "--seconds",
    nargs=2,
    type=float,
    default=(2.0, 6.0),
    metavar="LOW HIGH",
    help="Shortest and longest clip, in seconds.  [default: 2 6]",
)
@click.option("--jobs", type=click.IntRange(1), help="Worker processes.  [default: one per core]")
def command(out, videos, patients, seed, size, seconds, jobs):
    """Make synthetic ultrasound clips of the fetal heart, with labels.

    Writes H.264 MP4 files and labels.csv (columns path,label,patient) to the folder OUT.

    The clips come from a speckle phantom: scatterers that move with a beating heart, beam,
    attenuation, shadows, log compression and a sector. They show five planes: 4CH, LVOT, RVOT,
    3VV and non-heart. This is not patient data, and results on it prove nothing about patients;
    it lets you try and check every step without patient data.

    An interrupted run resumes when you give the same command again.

    \b
    sslus synth videos/
    sslus synth small/ --videos 10 --patients 5 --size 256 --seconds 1 2
    """
    from sslus.engine.phantom.clips import PLANES, Settings
    from sslus.engine.phantom.files import synth
    from sslus.engine.system import usable_cores
    from sslus.tools.screen import argument, count, progress, summary

    settings = Settings(videos, patients, seed, size, seconds)
    jobs = jobs or usable_cores()
    with progress("synth", "clips") as report:
        made = synth(out, settings, jobs, report)
    kept = f", {videos - made} already there" if made < videos else ""
    summary(
        {
            "made": f"{count(videos, 'clip')} of {count(patients, 'patient')},"
            f" {len(PLANES)} planes{kept}",
            "labels": str(out / "labels.csv"),
        },
        next_command=f"sslus shard {argument(out)}",
    )
