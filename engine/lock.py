"""One process at a time in a folder."""

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from sslus.engine.errors import InputError

UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems have no locks


@contextlib.contextmanager
def alone(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, which is made and stays; a process that dies lets go of it.

    Raises InputError(busy) while another process holds it. A file, because a folder's lock is
    not seen by other machines on NFS; where the file system knows no locks nothing is held.
    """
    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(busy) from e
        except OSError as e:
            if e.errno not in UNKNOWN:
                raise
        yield
