"""Memory that is cheaper than the default allocations."""

import contextlib
import ctypes
import mmap
import platform

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensors, instead of returning it to the kernel.

    A step on the CPU frees and allocates the same gigabyte of activations over and over; by default
    glibc maps every large block anew, and the kernel clears its pages (a tenth of a ResNet-18 step
    at 96 px). The process stays at its peak size. Does nothing without glibc, nor to tensors on
    ARM, where PyTorch allocates by mimalloc, which keeps most of what is freed anyway.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def large_pages(length: int) -> np.ndarray:
    """(length,) float32 zeros, in huge pages (2 MiB) if the system provides them.

    A view of 224 x 224 spans 50 pages of 4 KiB; their TLB misses take a tenth of the time that a
    CPU needs to make it.
    """
    block = mmap.mmap(-1, max(1, 4 * length), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not supported here: use normal pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.float32, length)
