"""Atomic files and folders: they exist complete or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sslus.engine.errors import name_file


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` survive a power cut, where the file system can sync folders:
    those that a virtual machine shares with its host cannot."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:
            name_file(e, folder)
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(
    path: Path, mode: str = "wb", *, durable: bool = True, private: bool = False
) -> Iterator[IO]:
    """A file that appears under `path` only when the block ends without an exception.

    It is written as `<path>.tmp`, synced and renamed; text is UTF-8, whatever the machine's
    encoding. On an exception the temporary file is removed, and an earlier file at `path` stays as
    it was. Without `durable` nothing is synced: this is safe if the process is killed, but after a
    power cut the file may exist with wrong content, which its reader must detect. `private`: only
    the user can read it, also where it is copied to. An OSError names `path`, if it names no file.
    """
    temporary = path.with_name(path.name + ".tmp")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600 if private else 0o666)

    try:
        encoding = None if "b" in mode else "utf-8"
        with open(temporary, mode, encoding=encoding, opener=opener) as f:
            yield f
            f.flush()
            if durable:
                os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException as e:
        name_file(e, path)
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under `path` only when the block ends without an exception.

    Yields a temporary folder beside it, after removing leftovers of an earlier crash. The caller
    must sync the files that it writes there. A folder that exists at `path` is replaced. An
    OSError names `path`, if it names no file.
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
    except BaseException as e:
        name_file(e, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Clean up after a crash inside atomic_folder(path). The caller must be the only writer."""
    temporary, old = _beside(path)
    if old.exists() and not path.exists():  # crashed between the renames: this is the only copy
        old.rename(path)
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a folder is while it is written, and while it is replaced. The names are hidden ones,
    such as nobody gives to a copy."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
