"""`sslus shard`: videos to shards."""

from collections import Counter
from pathlib import Path

import click

from sslus.tools.screen import argument, count, progress, summary

SHOWN_PROBLEMS = 5
TRY_AGAIN = (
    "refused files are not retried automatically: once the cause is fixed, add --force to the"
    " same command"
)


@click.command("shard", short_help="Decode videos into shards for training.")
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH..."
)
@click.option(
    "--images", is_flag=True,
    help="Take the pictures in folders, too (PNG, JPEG, BMP, TIFF, WebP), each as a video of one"
    " frame, which is always kept.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("shards"), show_default=True,
    help="Folder to write.",
)  # fmt: skip
@click.option(
    "--size", type=int, default=256, show_default=True,
    help="Side of the stored square frames in pixels. The image's longer side is scaled to it"
    " (antialiased); black padding preserves the aspect ratio.",
)  # fmt: skip
@click.option("--stride", type=int, help="Keep every N-th frame.  [default: 5]")
@click.option(
    "--rate", type=float, metavar="HZ",
    help="Keep at most HZ frames per second, by their timestamps.",
)  # fmt: skip
@click.option("--all", "every", is_flag=True, help="Keep every frame.")
@click.option("--quality", type=int, default=95, show_default=True, help="JPEG quality, 1 to 100.")
@click.option(
    "--region", default="all", show_default=True, metavar="REGION",
    help="Part of the image to keep; the rest is cropped or black. auto: the part that moves, which"
    " leaves out text around the ultrasound (files in which nothing moves are refused);"
    " LEFT,TOP,WIDTH,HEIGHT: this box, in pixels. Decodes on the CPU.",
)  # fmt: skip
@click.option(
    "--labels", type=click.Path(path_type=Path),
    help="CSV file with the columns path,label,patient[,split]; paths are relative to it. Labels"
    " are stored in the shards, except where split is test or val; patients as keyed hashes. Not"
    " needed for pretraining.",
)  # fmt: skip
@click.option(
    "--jobs", type=int,
    help="Worker processes.  [default: one per core, at most 7 if they decode on a GPU]",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="cuda: decode on the GPU's video engine (NVDEC) or fail; auto: use it for the files that"
    " it supports, and the CPU for the rest.",
)  # fmt: skip
@click.option(
    "--decoder", type=click.Choice(["auto", "pyav", "dali"]), default="auto", show_default=True,
    help="pyav reads every format, on the CPU; dali reads H.264, HEVC, MPEG-4, VP8 and VP9 on a"
    " GPU, or MJPEG, VP8 and VP9 on the CPU; auto uses dali on a GPU and pyav for the rest.",
)  # fmt: skip
@click.option(
    "--frames-per-shard",
    type=int,
    default=1000,
    show_default=True,
    help="Largest number of frames in one tar file.",
)
@click.option(
    "--key", type=click.Path(path_type=Path),
    help="File with 64 hex digits, the key from which ids are made; give OUT/local/key of other"
    " shards to get the same ids.  [default: a random key, kept in OUT/local]",
)  # fmt: skip
@click.option(
    "--strict", is_flag=True, help="Write no shards unless every file decodes completely."
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace existing shards (made from other videos, labels or settings, or damaged), and"
    " retry refused files. Videos whose frames stay the same are not decoded again.",
)
def command(paths, images, out, size, stride, rate, every, quality, region, labels, jobs, device,
            decoder, frames_per_shard, key, strict, force):  # fmt: skip
    """Decode the videos in PATH... (files, or folders to search) into shards for training.

    Reads every container and codec that FFmpeg reads; if a file holds several videos, the one
    that FFmpeg considers best. Reads ultrasound DICOM files, with or without an extension; their
    frames are cropped to the ultrasound regions that the file declares. Links to folders and
    hidden folders are counted but not searched: name them, too, to include them.

    Writes tar files for webdataset and NVIDIA DALI (each with a .idx index) and manifest.json.
    Frames are the decoder's full-range luma, scaled, stored as greyscale JPEGs and shuffled across
    all videos.

    \b
    sslus shard videos/
    sslus shard clinic-a/ clinic-b/ -o shards-10hz --rate 10
    sslus shard videos/ --labels videos/labels.csv
    sslus shard videos/ --region auto
    sslus shard pictures/ --images

    Privacy: a frame is named <id>-<number>, where the id is a keyed hash of the file name. File
    names, the key and the ledger (one line per file: frames expected, decoded and kept, or why it
    was refused) are in OUT/local, readable only by you; leave that folder out when you share the
    shards. Of the header of a DICOM file, only what describes the pixels is used.

    Text burnt into the image, often the patient's name, stays there, except outside the regions
    that a DICOM file declares. --region auto removes it where it stands still beside what moves,
    and leaves out frames that show another screen than most of the video. It decodes each file
    twice. Pictures, in which nothing moves, are refused then. Look at the frames before you share
    them (sslus views): text that is drawn into the ultrasound or into a moving trace, or that moves
    itself, is not removed.

    You can stop at any time; the same command resumes. The exit code is 3 if the shards are
    complete but some file was refused or gave fewer frames than it announces. The same command
    does not retry such files; with --force it does, and rebuilds all shards.

    To add videos or labels to finished shards, add --force: the frames of the other videos are
    taken from the old shards.
    """
    from sslus.engine.errors import InputError
    from sslus.engine.shard import Settings, shard

    if sum(x is not None for x in (stride, rate)) + every > 1:
        raise InputError("choose one of --stride, --rate and --all")
    if every:
        stride = 1
    elif stride is None and rate is None:
        stride = 5
    settings = Settings(size, stride, rate, quality, region.replace(" ", ""), frames_per_shard)
    with progress("shard", "videos") as report:
        result = shard(
            paths, out, settings, images=images, labels=labels, key=key, jobs=jobs, device=device,
            decoder=decoder, strict=strict, force=force, report=report,
        )  # fmt: skip
    show(result)
    return 3 if result.problems else 0


def show(result) -> None:
    """Print the summary, which accounts for every file and every frame."""
    ledger, manifest = result.ledger, result.manifest
    expected = sum(r["expected_frames"] for r in ledger)
    decoded = sum(r["decoded_frames"] for r in ledger)
    by = ", ".join(f"{n} with {name}" for name, n in manifest.decoders.items())
    size_mb = sum(s["bytes"] for s in manifest.shards) / 1e6
    note = "already complete, nothing done" if result.already else f"{result.seconds:.1f} s"
    if result.resumed:
        note += f", {count(result.resumed, 'video')} decoded before"
    if result.reused:
        note += f", {count(result.reused, 'video')} taken from the old shards"
    rows = {
        "videos": f"{manifest.num_videos} of {len(ledger)} ({by})",
        "frames": f"{decoded:,} decoded of {expected:,} expected, {manifest.num_frames:,} kept"
        f" ({manifest.settings['select']})",
        "shards": f"{len(manifest.shards)} in {result.out} ({size_mb:,.1f} MB), {note}",
        "digest": manifest.digest[:16],
        **_not_taken(result.ignored.copy()),
        **_parts_of_images(ledger, manifest.settings["region"]),
    }
    if manifest.labels or result.held_out:
        unlabelled = count(result.unlabelled, "video")
        rows["labels"] = f"{', '.join(manifest.labels) or 'none'}; {unlabelled} without a label"
        if result.held_out:
            rows["labels"] += f"; those of {count(result.held_out, 'test or val video')} left out"
    where = "" if result.out == Path("shards") else f" {argument(result.out)}"
    summary(rows, warnings=_warnings(result), next_command=f"sslus train{where} --method vicreg")


def _not_taken(files: Counter) -> dict[str, str]:
    """Rows about what was found beside the videos."""
    from sslus.engine.sources import FILE_LINKS, FOLDER_LINKS, HIDDEN_FOLDERS, num_pictures

    rows = {}
    links, hidden = files.pop(FOLDER_LINKS, 0), files.pop(HIDDEN_FOLDERS, 0)
    again = files.pop(FILE_LINKS, 0)
    if files:
        kinds = ", ".join(f"{n} {kind}" for kind, n in files.most_common(5))
        rows["not videos"] = f"{count(files.total(), 'file')} skipped ({kinds})"
        if pictures := num_pictures(files):
            rows["not videos"] += f"; --images takes the {count(pictures, 'picture')} among them"
    if links:
        rows["links"] = f"{links} to folders, not followed; to include those folders, name them too"
    if again:
        rows["linked"] = f"{again} further links to a file, each of which was taken once"
    if hidden:
        rows["hidden"] = f"{count(hidden, 'folder')} not searched; to include them, name them too"
    return rows


def _parts_of_images(ledger: list[dict], region: str) -> dict[str, str]:
    """Rows about what of the files went into the shards."""
    rows = {}
    several = sum(r["other_streams"] > 0 for r in ledger)
    if several:
        rows["streams"] = f"{count(several, 'file')} with several videos; the best of each was used"
    if uncropped := [r["codec"] for r in ledger if r["uncropped"] and r["kept_frames"]]:
        still = all(codec.startswith("picture ") for codec in uncropped)
        better = "LEFT,TOP,WIDTH,HEIGHT" if still else "auto"
        rows["uncropped"] = (
            f"{count(len(uncropped), 'file')} kept whole, with any text in the image; --region"
            f" {better} removes what stands beside the ultrasound"
        )
    if region != "all":
        cut = _cropped(ledger)
        rows["region"] = f"{region}: {count(len(cut), 'file')} cropped to it"
        if region == "auto" and (everywhere := sum(map(_moves_everywhere, cut))):
            rows["region"] += (
                f"; in {everywhere} of them (nearly) the whole image moves: any text in it stays"
            )
    return rows


def _cropped(ledger: list[dict]) -> list[dict]:
    return [r for r in ledger if r["region"] is not None and r["kept_frames"]]


def _warnings(result) -> list[str]:
    region, warnings = result.manifest.settings["region"], exposed(result.out)
    if result.new_ids:
        warnings.append(
            f"the key of the old shards was not in {result.out / 'local'}, so all videos and"
            " patients have new ids; what has noted the old ones matches no more"
        )
    if result.broken:
        warnings.append(
            f"{count(len(result.broken), 'old shard')} missing or damaged ({result.broken[0]}"
            f"{', ...' * (len(result.broken) > 1)}); videos with frames there were decoded again"
        )
    sizes = {(r["width"], r["height"]) for r in _cropped(result.ledger)}
    if region not in ("all", "auto") and len(sizes) > 1:
        warnings.append(f"--region {region} was used for images of {len(sizes)} sizes")
    problems = result.problems
    warnings += [f"{r['status']}: {r['source']}: {r['why']}" for r in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        warnings.append(
            f"{count(len(problems) - SHOWN_PROBLEMS, 'more file')} refused or incomplete; see"
            f" {result.out / 'local' / 'ledger.jsonl'} for all"
        )
    if any(r["status"] == "refused" for r in problems):
        warnings.append(TRY_AGAIN)
    return warnings


def exposed(out: Path) -> list[str]:
    """A warning if local/ of these shards can be read by others."""
    from sslus.engine.shard_folder import ShardFolder

    if ShardFolder(out).is_private():
        return []
    return [
        f"others can read {out / 'local'}, which has the names of files and patients: the file"
        " system there does not keep permissions; protect this folder"
    ]


def _moves_everywhere(line: dict) -> bool:
    from sslus.engine.region import NEARLY_ALL

    _, _, width, height = map(int, line["region"].split(","))
    return width * height > NEARLY_ALL * line["width"] * line["height"]
