"""`sslus views`: draw what the network sees."""

from pathlib import Path

import click

IMAGE_SIZE = 224  # the default


@click.command("views", short_help="Draw pairs of views of some frames.")
@click.argument("shards", type=click.Path(), default="shards")
@click.option(
    "--preset", default="ultrasound", show_default=True, metavar="PRESET[,FIELD=VALUE...]",
    help="ultrasound, simclr, barlowtwins, autoencoder or inpainting, with fields to change.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("views.png"),
              show_default=True, help="PNG file to write.")  # fmt: skip
@click.option("--frames", default=6, show_default=True, help="Number of frames, one per column.")
@click.option(
    "--image-size", default=IMAGE_SIZE, show_default=True, help="Side of a view in pixels."
)
@click.option(
    "--seed", default=0, show_default=True,
    help="Random seed for choosing frames and drawing views.",
)  # fmt: skip
@click.option(
    "--pairs", type=click.Choice(["same", "nearby"]), default="same", show_default=True,
    help="same: both views come from one frame; nearby: the second comes from another frame of the"
    " same video.",
)  # fmt: skip
@click.option(
    "--max-seconds", default=1.5, show_default=True,
    help="With --pairs nearby: largest distance in seconds between the frames.",
)  # fmt: skip
def command(shards, preset, out, frames, image_size, seed, pairs, max_seconds):
    """Draw some frames of SHARDS (default: shards/) with two views of each, as a PNG.

    Each column shows one frame as it is stored, its first view and its second view, generated
    as in training. Look at this picture before a long run: the network cannot learn what the
    views destroy. The parts that --method inpainting hides from its view are not drawn.

    \b
    sslus views
    sslus views shards --preset simclr,min_area=0.2 -o simclr.png
    """
    import shlex

    from sslus.engine.errors import InputError
    from sslus.engine.labels import real
    from sslus.engine.manifest import read_manifest
    from sslus.engine.store import FrameStore
    from sslus.engine.urls import is_url, shown
    from sslus.tools.screen import argument, progress, summary

    if frames < 1 or image_size < 1:
        raise InputError("--frames and --image-size: want at least 1")
    if is_url(shards):
        raise InputError(
            f"{shown(shards)}: want a folder of shards, not a URL; copy them to a disk first"
        )
    if out.is_dir():
        raise InputError(f"-o {out}: is a folder; name a file in it, such as views.png")
    if out.exists() and not out.is_file():  # the picture would take the place of /dev/null
        raise InputError(f"-o {out}: is a device or a pipe; name a file, such as views.png")
    read_manifest(Path(shards))  # PyTorch takes longer to import than to see what is wrong here

    from sslus.ssl import methods
    from sslus.ssl.views import PRESETS, parse, picture

    parse(preset, image_size)  # the frame store takes longer still
    with progress("frame store", "frames") as report:
        store = FrameStore.open(Path(shards), report=report)
    within = max_seconds if pairs == "nearby" else None
    place = real(out)  # a link, as /dev/stdout is one, would be replaced, too
    picture(store, preset, place, num=frames, size=image_size, seed=seed, max_seconds=within)
    base = preset.partition(",")[0]
    method = base if base in methods.names() else "vicreg"
    if pairs == "nearby" and not getattr(methods.load(method), "PAIRS", True):
        method = "vicreg"
    going = ["--method", method, "--views", preset]
    if image_size != IMAGE_SIZE:  # a blur that suits it may be refused at another size
        going += ["--image-size", str(image_size)]
    if pairs == "nearby":
        going += ["--pairs", pairs, "--max-seconds", f"{max_seconds:g}"]
    summary(
        {
            "picture": str(out), "preset": preset,
            "others": ", ".join(name for name in PRESETS if name != base),
        },
        next_command=f"sslus train {argument(shards)} {shlex.join(going)}",
    )  # fmt: skip
