"""What a command shows while it runs and when it ends. Loads rich only where it is needed."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from sslus.engine.errors import InputError

# report(done, total, note): the progress of a long task, in any unit; total is never 0.
Report = Callable[[int, int, str], None]

LINE_EVERY_SECONDS = 10.0  # without a terminal, where lines replace the bar


@contextlib.contextmanager
def progress(label: str, unit: str) -> Iterator[Report]:
    """A progress bar with rate and time left; in a pipe or a log, a line every 10 seconds.

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
    rate_of = _Rate()
    with bar:
        task = bar.add_task(label, total=None, rate="", note="")

        def report(done: int, total: int, note: str = "") -> None:
            rate = rate_of(done)
            shown = f"{_short(rate)} {unit}/s" if rate else ""
            bar.update(task, completed=done, total=total, rate=shown, note=note)

        yield report


class _Rate:
    """The rate since the first call: neither set-up nor the work of an earlier run counts."""

    def __init__(self):
        self.start, self.first = 0.0, None

    def __call__(self, done: int) -> float:
        """Units per second; 0 until it is known."""
        now = time.monotonic()
        if self.first is None:
            self.start, self.first = now, done
        return (done - self.first) / max(now - self.start, 1e-9)


def _lines(label: str, unit: str) -> Report:
    last, at_end, rate_of = time.monotonic(), False, _Rate()

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last, at_end
        now, rate = time.monotonic(), 0 if at_end else rate_of(done)
        ended = done == total and not at_end
        if now - last < LINE_EVERY_SECONDS and not ended:
            return
        last, at_end = now, done == total
        parts = [f"{label}: {done:,}/{total:,} {unit}"]
        if rate:
            parts.append(f"{_short(rate)}/s")
            if done < total:
                parts.append(f"{(total - done) / rate:,.0f} s left")
        tell(", ".join(parts + [note] * bool(note)), sys.stderr)

    return report


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def summary(rows: dict[str, str], *, warnings: Sequence[str] = (), next_command: str = "") -> None:
    """Print the end of a command: aligned `name value` lines, warnings and the next command."""
    width = max((len(name) for name in rows), default=0)
    for name, value in rows.items():
        tell(f"{name:<{width}}  {one_line(value)}", sys.stdout)
    for line in warnings:
        tell(f"Warning: {one_line(line)}", sys.stderr)
    if next_command:
        tell(f"\nNext: {next_command}", sys.stdout)


def one_line(text: str) -> str:
    """The text with control characters escaped: file names may hold line breaks, or sequences
    that a terminal obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 file, 2 files."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def argument(path: Path | str) -> str:
    """A path as a command line needs it: relative if it is below the current folder, quoted."""
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def tell(line: str, stream: IO[str] | None = None) -> None:
    """Print a line, to stderr by default. A reader that has left (`sslus ... | head`) neither
    stops nor fails the command."""
    stream = stream or sys.stderr
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:  # all that follows, and the flush at the end, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as e:  # such as the full disk of `> log`: no fault of the command's own files
        raise InputError(f"{stream.name}: cannot be written to ({e.strerror or e})") from e
