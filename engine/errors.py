"""Errors in the user's input or machine, as opposed to mistakes in the code."""

import contextlib
import mmap
import resource
from collections.abc import Iterator
from pathlib import Path

LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
FRAME_BYTES = 64 << 20  # more than one of 8192 x 4320 pixels takes


class InputError(ValueError):
    """What was given cannot be used.

    The message is one line that says what, where and what to do next. The command line
    prints it and exits with 1; a caller of the library can catch it as a ValueError.
    """


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP, after everything worth keeping has been written.

    The message says what was kept and how to continue. The command line exits with
    128 + `signum`. Like KeyboardInterrupt, it is not an Exception, so `except Exception` does
    not swallow it.
    """

    def __init__(self, message: str, signum: int = 2):
        super().__init__(message)
        self.signum = signum


def name_file(error: BaseException, path: Path) -> None:
    """A read or a write that fails, as on a full disk, does not say of which file."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block names `path`, if it names no file."""
    try:
        yield
    except OSError as e:
        name_file(e, path)
        raise


def out_of_memory(error: Exception) -> bool:
    """Whether what a decoder raised is for lack of memory, and no fault of the file.

    Without a limit (`ulimit -v`), the system gives memory before it is there, and refuses only the
    absurd amounts that damaged files ask for. FFmpeg's H.264 decoder calls the data invalid when a
    limit is reached.
    """
    unlimited = all(resource.getrlimit(kind)[0] == resource.RLIM_INFINITY for kind in LIMITS)
    if unlimited or isinstance(error, EOFError):  # no failure: the end of a stream
        return False
    try:
        mmap.mmap(-1, FRAME_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return True
    return isinstance(error, MemoryError | ImportError)  # of a library that did not fit
