"""`sslus merge`: several folders of shards -> one."""

from pathlib import Path

import click


@click.command("merge", short_help="Merge folders of shards, of several clinics say.")
@click.argument("shards", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path),
    help="Folder for the merged shards.",
)  # fmt: skip
def command(shards, out):
    """Merge two or more folders, or URLs, of SHARDS into one, to train on all of them.

    So several clinics can train together that share neither videos nor names: each one makes its
    shards and gives away all but their local/ folder. All must have frames of one size.

    \b
    sslus merge clinic-a/ clinic-b/ s3://clinic-c/shards -o all/
    sslus train all/ --method vicreg

    The shards are verified and linked, so that they take no more space, or copied where the file
    system cannot link. The order of the folders does not matter. Folders that share a video are
    refused. Labels that were stored with --labels are kept; a class is known by its name.

    Where a folder has its local/, its videos are found by sslus evaluate --labels in the merged
    shards too. The same command brings that up to date.
    """
    from sslus.engine.merge import merge
    from sslus.tools.screen import argument, count, progress, summary
    from sslus.tools.shard import exposed

    with progress("merge", "frames") as report:
        result = merge(list(shards), out, report=report)
    manifest = result.manifest
    size_mb = sum(s["bytes"] for s in manifest.shards) / 1e6
    note = "already complete, nothing done" if result.already else f"{result.seconds:.1f} s"
    if result.num_linked:
        note += f", {count(result.num_linked, 'link')} that take no more space"
    rows = {
        "folders": f"{result.num_folders}; with local/, by which evaluation finds videos:"
        f" {result.num_named}",
        "videos": f"{manifest.num_videos:,}",
        "frames": f"{manifest.num_frames:,} ({manifest.settings['select']})",
        "shards": f"{len(manifest.shards)} in {out} ({size_mb:,.1f} MB), {note}",
        "digest": manifest.digest[:16],
    }
    if manifest.labels:
        rows["labels"] = ", ".join(manifest.labels)
    summary(
        rows, warnings=exposed(out), next_command=f"sslus train {argument(out)} --method vicreg"
    )
