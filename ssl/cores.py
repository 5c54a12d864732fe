"""The threads that may be asked for, and what other programs leave of the CPU's cores."""

import os
from pathlib import Path

MOST_THREADS = 1024  # a mistyped number must not start them all
STAT = Path("/proc/stat")


class Cores:
    """Counts the cores that other programs keep busy, from when it is made.

    The threads of a step wait for each other several hundred times. If one of them shares its core
    with another program, all wait whenever it is that program's turn, and two threads can be many
    times slower than one.
    """

    def __init__(self):
        self.before = _seconds()

    def advice(self, threads: int) -> str | None:
        """What to say if `threads` find too few free cores; None without Linux's /proc/stat."""
        if self.before is None or (now := _seconds()) is None:
            return None
        total, busy, own = (b - a for a, b in zip(self.before, now, strict=True))
        if total < 0.5:  # second of all cores together: too short to tell
            return None
        cores = os.cpu_count() or 1
        others = cores * max(0.0, busy - own) / total
        fewer = max(1, int(cores - others + 0.25))
        if threads <= fewer:
            return None
        return (
            f"other programs keep {others:.1f} of the {cores} cores busy, and each step waits for"
            f" its slowest thread: --threads {fewer} may be several times faster"
        )


def _seconds() -> tuple[float, float, float] | None:
    """CPU seconds since the start: of all cores, thereof busy, and those of this process."""
    try:
        fields = STAT.read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, idle, wait, irq, softirq, steal = (
        int(x) / os.sysconf("SC_CLK_TCK") for x in fields[1:9]
    )
    busy = user + nice + system + irq + softirq
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return busy + idle + wait + steal, busy, own
