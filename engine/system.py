"""What Linux offers and macOS lacks, with a replacement for each."""

import contextlib
import os
from pathlib import Path
from typing import IO


def usable_cores() -> int:
    """The number of cores that this process may use; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that programs can still get, at most those of the container; half of all the machine's
    memory, where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    facts = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
    num_bytes = 1024 * facts["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" if it has none
        num_bytes = min(num_bytes, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return num_bytes


def will_need(file: IO, start: int, num_bytes: int) -> None:
    """Ask the system to load a part of the file into memory, if it takes such advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, num_bytes, os.POSIX_FADV_WILLNEED)


def allocate(file: IO, num_bytes: int) -> None:
    """Make an empty file as large as this: with all its space, if the system can, so that a full
    disk shows up now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    else:
        os.truncate(file.fileno(), num_bytes)


def sync_data(file: IO) -> None:
    """Wait until what was written to the file is on the disk."""
    getattr(os, "fdatasync", os.fsync)(file.fileno())
