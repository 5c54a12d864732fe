"""A lock that admits one process at a time to a folder."""

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sslus.engine.errors import InputError

UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems have no locks


@contextlib.contextmanager
def alone(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created and not removed; if the process dies, the
    lock is released.

    Raises InputError(busy) while another process holds it. It is a file because on NFS other
    machines do not see a lock on a folder. On a file system without locks, nothing is held.
    """
    with path.open("w") as f:
        try:
            lock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(busy) from e
        yield


def lock(file: IO, how: int = fcntl.LOCK_EX) -> None:
    """Lock an open file until it is closed; nothing where the file system knows no locks."""
    try:
        fcntl.flock(file, how)
    except OSError as e:
        if e.errno not in UNKNOWN:
            raise
