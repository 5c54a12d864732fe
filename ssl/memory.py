"""How the C library treats the memory of tensors that are freed."""

import ctypes
import platform

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
