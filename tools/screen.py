"""What a command shows while it runs and when it ends. rich is loaded only here."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

# report(done, total, note): how far a long piece of work is. Any unit; total is never 0.
Report = Callable[[int, int, str], None]

LINE_EVERY_SECONDS = 10.0  # without a terminal: a log, not a moving bar


@contextlib.contextmanager
def progress(label: str, unit: str) -> Iterator[Report]:
    """A bar with rate and time left; on a pipe or in a log a plain line every 10 seconds.

    >>> with progress("decode", "frames") as report:
    ...     report(120, 1000, "3 of 40 videos")
    """
    if not sys.stderr.isatty():
        yield _lines(label, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
    start, first = time.monotonic(), None
    with bar:
        task = bar.add_task(label, total=None, rate="", note="")

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal first
            if first is None:  # a resumed job does not count what an earlier run did
                first = done
            rate = (done - first) / max(time.monotonic() - start, 1e-9)
            bar.update(
                task, completed=done, total=total, rate=f"{_short(rate)} {unit}/s", note=note
            )

        yield report


def _lines(label: str, unit: str) -> Report:
    start = last = time.monotonic()
    first = None

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last, first
        if first is None:
            first = done
        now = time.monotonic()
        if now - last < LINE_EVERY_SECONDS and done < total:
            return
        if done == total and last == float("inf"):
            return
        last = now if done < total else float("inf")
        rate = (done - first) / max(now - start, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
        note = f", {note}" if note else ""
        print(
            f"{label}: {done:,}/{total:,} {unit}, {_short(rate)}/s{left}{note}",
            file=sys.stderr,
            flush=True,
        )

    return report


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def summary(rows: dict[str, str], *, warnings: list[str] = (), next_command: str = "") -> None:
    """The end of a command: aligned `name value` lines, warnings, and what to type next."""
    width = max((len(name) for name in rows), default=0)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    for line in warnings:
        print(f"Warning: {line}", file=sys.stderr)
    if next_command:
        print(f"\nNext: {next_command}")
    sys.stdout.flush()
