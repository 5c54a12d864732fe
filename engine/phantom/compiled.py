"""Loops compiled by numba."""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """The function in machine code, which is kept for the next process where that is possible.

    It is not where both the installed package and the user's cache folder are read-only, as for
    the user of many a container; each process compiles then, which takes seconds.
    """
    try:
        return numba.njit(function, cache=True, fastmath=True, nogil=True)
    except RuntimeError:  # numba has found no folder that it can write to
        return numba.njit(function, fastmath=True, nogil=True)
