"""Memory that costs less than what is given by default."""

import contextlib
import ctypes
import mmap
import platform

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep what tensors give back for the next ones, instead of returning it to the kernel.

    A step on the CPU frees and takes the same gigabyte of activations again and again; by default
    glibc maps each large one anew, and the kernel clears its pages (a tenth of a ResNet-18's step
    at 96 px). The process stays as large as its largest moment. Nothing happens without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def large_pages(length: int) -> np.ndarray:
    """(length,) float32, zeros, in pages of 2 MiB where the system has them to give.

    A view of 224 x 224 lies in 50 pages of 4 KiB, and to look those up is a tenth of the time in
    which a CPU makes it.
    """
    block = mmap.mmap(-1, max(1, 4 * length), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not on this system: small pages serve
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.float32, length)
