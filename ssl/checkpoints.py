"""Checkpoints and the metrics file: what a run needs to resume exactly."""

import io
import json
import os
import shutil
from pathlib import Path

import torch

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError

FORMAT = 1


def save(path: Path, state: dict) -> None:
    """Atomically write tensors and plain values to `path`."""
    # Serialised in memory first: torch reports a full disk as a RuntimeError without the cause.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    with atomic_file(path) as f:
        f.write(buffer.getbuffer())


def keep(path: Path, step: int, num: int, score: tuple[str, float] | None) -> None:
    """Keep the checkpoint `path` of `step` among the last `num`, and as the best if it is that.

    They go to the folder checkpoints/ beside it: step-<step>.pt, best.pt, and best.json with the
    score of the best: its name and value, higher is better; None: unknown. Of two names the newer
    counts. These are hard links, so a checkpoint that is kept twice is stored once.
    """
    folder = path.parent / "checkpoints"
    folder.mkdir(exist_ok=True)
    for half in folder.glob("*.tmp"):  # of a process that was killed
        half.unlink()
    this = folder / f"step-{step:08d}.pt"
    if num:
        _link(path, this)
    # Later ones are of a course that the run has left, for an older checkpoint.
    later, kept = [], []
    for p in sorted(folder.glob("step-*.pt")):
        (later if p > this else kept).append(p)
    for old in later + kept[: -num or None]:
        old.unlink()
    best = folder / "best.json"
    try:
        before = json.loads(best.read_text()) if best.exists() else {}
        better = score is not None and (before.get("of") != score[0] or score[1] > before["score"])
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise InputError(
            f"{best}: damaged ({e}); delete it, and the next checkpoint is best"
        ) from e
    if better:
        _link(path, folder / "best.pt")
        with atomic_file(best, "w") as f:
            json.dump({"step": step, "of": score[0], "score": score[1]}, f)


def _link(path: Path, to: Path) -> None:
    if to.exists() and to.samefile(path):  # renaming a link to itself would leave both names
        return
    new = to.with_suffix(".tmp")
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:  # not every file system has links
        shutil.copyfile(path, new)
    new.replace(to)


def load(path: Path) -> dict:
    """The state that `save` wrote; raises InputError for anything else. Never unpickles code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as e:  # torch.load raises a dozen kinds of errors
        older = _intact_before(path)
        raise InputError(
            f"checkpoint {path}: cannot be read ({type(e).__name__}); "
            + (
                f"copy {older} over it and resume from there"
                if older
                else "delete the run's folder and start again, or put back a copy"
            )
        ) from e
    if found != FORMAT:
        raise InputError(f"checkpoint {path}: format {found}, but this version reads {FORMAT}")
    return state


def _intact_before(path: Path) -> Path | None:
    """The newest kept checkpoint that is not the damaged `path` itself, by its other name."""
    kept = sorted((path.parent / "checkpoints").glob("step-*.pt"), reverse=True)
    return next((p for p in kept if path.exists() and not p.samefile(path)), None)


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, without a last line that a crash has truncated."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                found.append(json.loads(line))
                found[-1]["step"]  # each has one
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"{path}, line {number}: damaged ({e}); delete the line") from e
    return found


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`: the run resumes there and writes them again."""
    with atomic_file(path, "w") as f:
        f.writelines(json.dumps(m) + "\n" for m in read_metrics(path) if m["step"] <= step)
