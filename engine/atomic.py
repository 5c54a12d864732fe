"""Files and folders that are there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb", *, durable: bool = True) -> Iterator[IO]:
    """A file that appears under `path` only when the block ends without an exception.

    Written as `<path>.tmp`, synced, renamed. On any exception the temporary file is removed
    and what was at `path` before is untouched. Without `durable` nothing is synced: a killed
    process loses nothing, but after a power cut the file may be there with other content, which
    whoever reads it must notice.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open(mode) as f:
            yield f
            f.flush()
            if durable:
                os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under `path` only when the block ends without an exception.

    Yields a temporary folder beside it; leftovers of an earlier crash are removed first.
    The caller syncs the files it writes in it. A folder already at `path` is replaced.
    """
    temporary, old = _beside(path)
    remove_leftovers(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_folder(temporary)
        if path.exists():
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """What a crash inside atomic_folder(path) left behind. Only for who may write there alone."""
    temporary, old = _beside(path)
    if old.exists() and not path.exists():  # between its two renames: the only whole one
        old.rename(path)
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a folder is while it is made, and while another takes its place: names that nobody
    gives to a copy."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
