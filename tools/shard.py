"""`sslus shard`: videos to shards."""

import shlex
from pathlib import Path

import click

from sslus.tools.screen import progress, summary

SHOWN_PROBLEMS = 5
TRY_AGAIN = (
    "refused files are not tried again by themselves: once the cause is gone, add --force to the"
    " same command"
)


@click.command("shard", short_help="Decode videos into shards for training.")
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH..."
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("shards"), show_default=True,
    help="Folder to write.",
)  # fmt: skip
@click.option(
    "--size", type=int, default=256, show_default=True,
    help="Side of the stored square in pixels. The longer side of the image is scaled to it"
    " (antialiased); the aspect ratio is kept by padding the other side with black.",
)  # fmt: skip
@click.option("--stride", type=int, help="Keep every N-th frame.  [default: 5]")
@click.option("--rate", type=float, help="Keep at most HZ frames a second, by the time stamps.")
@click.option("--all", "every", is_flag=True, help="Keep every frame.")
@click.option("--quality", type=int, default=95, show_default=True, help="JPEG quality, 1 to 100.")
@click.option(
    "--labels", type=click.Path(path_type=Path),
    help="CSV file with the columns path,label,patient; paths relative to it. Labels go into the"
    " shards, patients as keyed hashes. Not needed for pretraining.",
)  # fmt: skip
@click.option("--jobs", type=int, help="Worker processes.  [default: one a core]")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="cuda: decode on the GPU's video engines or fail; auto: each file where it can be.",
)  # fmt: skip
@click.option(
    "--decoder", type=click.Choice(["auto", "pyav", "dali"]), default="auto", show_default=True,
    help="pyav reads every format on the CPU; dali reads H.264, HEVC, MPEG-4, VP8 and VP9 on a GPU,"
    " or MJPEG, VP8 and VP9 on the CPU.",
)  # fmt: skip
@click.option(
    "--frames-per-shard", type=int, default=1000, show_default=True, help="Most frames in one tar."
)
@click.option(
    "--key", type=click.Path(path_type=Path),
    help="File with 64 hex digits from which ids are made. Default: a random key, kept in"
    " OUT/local. Give OUT/local/key of another run to get the same ids.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Write nothing unless every file is whole.")
@click.option(
    "--force", is_flag=True, help="Replace shards of other videos or settings, or damaged ones."
)
def command(paths, out, size, stride, rate, every, quality, labels, jobs, device, decoder,
            frames_per_shard, key, strict, force):  # fmt: skip
    """Decode the videos in PATH... (folders are searched) into shards for training.

    Every container and codec that FFmpeg reads; of several videos in one file, the one that
    FFmpeg takes for the best. Links to folders are counted but not followed: name the folders
    they lead to. Luma comes straight from the decoder, in full range. Frames are scaled, shuffled
    across all videos and stored as grey JPEGs in tar files that webdataset and NVIDIA DALI read
    (a .idx index lies beside each), with manifest.json.

    \b
    sslus shard videos/
    sslus shard clinic-a/ clinic-b/ -o shards-10hz --rate 10
    sslus shard videos/ --labels videos/labels.csv

    Privacy: a frame is called <id>-<number>, where the id is a keyed hash of the file's name.
    File names, the key and the ledger (one line a file: frames expected, decoded and kept, or
    why it was refused) are in OUT/local, readable by you alone; share the rest without it.
    The pixels are stored as they are: text burnt into the image stays in it.

    Stop it at any time; the same command goes on from there. Exit code 3: the shards are complete,
    but some file was refused or gave fewer frames than it announces. The same command does not
    try such files again; with --force it does, and makes all shards anew.
    """
    from sslus.engine.errors import InputError
    from sslus.engine.shard import Settings, shard

    if sum(x is not None for x in (stride, rate)) + every > 1:
        raise InputError("choose one of --stride, --rate and --all")
    if every:
        stride = 1
    elif stride is None and rate is None:
        stride = 5
    settings = Settings(size, stride, rate, quality, frames_per_shard)
    with progress("shard", "videos") as report:
        result = shard(
            paths, out, settings, labels=labels, key=key, jobs=jobs, device=device,
            decoder=decoder, strict=strict, force=force, report=report,
        )  # fmt: skip
    show(result)
    return 3 if result.problems else 0


def show(result) -> None:
    """The account: every file and every frame is in it."""
    from sslus.engine.video import FOLDER_LINKS

    ledger, manifest = result.ledger, result.manifest
    expected = sum(r["expected_frames"] for r in ledger)
    decoded = sum(r["decoded_frames"] for r in ledger)
    by = ", ".join(f"{n} with {name}" for name, n in manifest.decoders.items())
    size_mb = sum(s["bytes"] for s in manifest.shards) / 1e6
    note = "already there, nothing done" if result.already else f"{result.seconds:.1f} s"
    if result.resumed:
        note += f", {result.resumed} videos were decoded before"
    rows = {
        "videos": f"{manifest.num_videos} of {len(ledger)} ({by})",
        "frames": f"{decoded:,} decoded of {expected:,} expected, {manifest.num_frames:,} kept"
        f" ({manifest.settings['select']})",
        "shards": f"{len(manifest.shards)} in {result.out} ({size_mb:,.1f} MB), {note}",
        "digest": manifest.digest[:16],
    }
    files = result.ignored.copy()
    links = files.pop(FOLDER_LINKS, 0)
    if files:
        kinds = ", ".join(f"{n} {kind}" for kind, n in files.most_common(5))
        rows["not videos"] = f"{files.total()} files passed over ({kinds})"
    if links:
        rows["links"] = f"{links} to folders not followed; name those folders too if you want them"
    several = sum(r.get("other_streams", 0) > 0 for r in ledger)
    if several:
        rows["streams"] = f"{several} files hold more than one video; the best of each was taken"
    if manifest.labels:
        rows["labels"] = f"{', '.join(manifest.labels)}; {result.unlabelled} videos without one"
    problems = result.problems
    warnings = [f"{r['status']}: {r['source']}: {r['why']}" for r in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        warnings.append(
            f"{len(problems) - SHOWN_PROBLEMS} more files are not whole;"
            f" all are in {result.out / 'local' / 'ledger.jsonl'}"
        )
    if any(r["status"] == "refused" for r in problems):
        warnings.append(TRY_AGAIN)
    where = "" if result.out == Path("shards") else f" {shlex.quote(str(result.out))}"
    summary(rows, warnings=warnings, next_command=f"sslus train{where} --method vicreg")
