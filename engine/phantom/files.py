"""The clips as files: H.264 in MP4, and their labels."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError, Interrupted
from sslus.engine.phantom.clips import VERSION, Clip, Settings, clips
from sslus.engine.phantom.film import Film
from sslus.engine.workers import follow_parent, uninterrupted


def write_clip(settings: Settings, clip: Clip, folder: Path) -> int:
    """Write one clip as H.264 in MP4, atomically. Returns the number of its frames."""
    film = Film(settings, clip)
    h, w = film.canvas.shape
    # Limited range and neutral chroma: what players expect and scanners export.
    studio = np.round(16 + np.arange(256) * (219 / 255)).astype(np.uint8)
    encoded = io.BytesIO()
    with av.open(encoded, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=film.rate_hz)
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.codec_context.color_range = 1
        # One thread, so that the bytes do not depend on the number of cores.
        stream.options = {"crf": "20", "preset": "veryfast", "threads": "1"}
        planes = np.full((h * 3 // 2, w), 128, np.uint8)
        for image in film:
            planes[:h] = studio[image]
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    with atomic_file(folder / clip.name) as f:
        f.write(encoded.getbuffer())
    return len(film)


def synth(
    out: Path,
    settings: Settings,
    jobs: int = 1,
    report: Callable[[int, int, str], None] | None = None,
) -> int:
    """Write all clips and `labels.csv` into `out`. Returns the number of clips that were missing.

    On one machine the bytes depend on `settings` alone, not on `jobs`. On another processor a pixel
    in 1000 may differ by a grey level, because numpy and numba round otherwise, and x264 makes
    other bytes even of the same frames; the labels stay. A folder left by an interrupted run with
    the same settings is completed. Raises InputError for any other folder that is not empty, or if
    a worker process is killed, and Interrupted after Ctrl-C or SIGTERM.
    """
    out = Path(out)
    wanted = json.dumps({"phantom": VERSION, **asdict(settings)}, indent=1) + "\n"
    note = out / "synth.json"
    if out.exists():
        if not out.is_dir():
            raise InputError(f"synth {out}: is a file; name a new folder")
        there = note.read_text() if note.is_file() else None
        begun = note.with_name(note.name + ".tmp")  # all that is there of a run killed as it began
        if there != wanted and any(path != begun for path in out.iterdir()):
            raise InputError(
                f"synth {out}: the folder is not empty and holds no clips of these settings;"
                " name a new one"
            )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(note, "w") as f:
        f.write(wanted)
    todo = clips(settings)
    missing = [c for c in todo if not _is_there(out / c.name)]
    done, frames = len(todo) - len(missing), 0
    if report:
        report(done, len(todo), "")
    try:
        with _stop_on_sigterm():
            for n in _write_all(settings, missing, out, jobs):
                done, frames = done + 1, frames + n
                if report:
                    report(done, len(todo), f"{frames:,} frames")
    except (KeyboardInterrupt, Interrupted) as e:
        raise Interrupted(
            f"synth {out}: {sum(_is_there(out / c.name) for c in todo)} of {len(todo)} clips are"
            " kept; the same command resumes from there",
            getattr(e, "signum", signal.SIGINT),
        ) from None
    except BrokenProcessPool as e:
        raise InputError(
            f"synth {out}: a worker process was killed, perhaps for lack of memory; the same"
            " command resumes, with fewer --jobs if need be"
        ) from e
    with atomic_file(out / "labels.csv", "w") as f:
        f.write("path,label,patient\n")
        f.writelines(f"{c.name},{c.label},{c.patient}\n" for c in todo)
    return len(missing)


def _is_there(clip: Path) -> bool:
    """A file without content, as a copy onto a full disk leaves it, counts as missing."""
    return clip.exists() and clip.stat().st_size > 0


def _write_all(settings, missing, out, jobs) -> Iterator[int]:
    if jobs == 1 or len(missing) < 2:
        for clip in missing:
            yield write_clip(settings, clip, out)
        return
    # The first clip is made in this process, so that compiled kernels are cached for all workers.
    yield write_clip(settings, missing[0], out)
    todo = iter(missing[1:])
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(missing) - 1), multiprocessing.get_context("spawn"), follow_parent
    )

    def submit(number: int) -> set[concurrent.futures.Future]:
        with uninterrupted():
            return {
                pool.submit(write_clip, settings, c, out) for c in itertools.islice(todo, number)
            }

    with pool:
        # No clip waits in the pool's queue: after Ctrl-C only those in progress are finished.
        working = submit(jobs)
        while working:
            done, working = concurrent.futures.wait(
                working, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                working |= submit(1)
                yield future.result()


@contextlib.contextmanager
def _stop_on_sigterm():
    def stop(signum, frame):
        raise Interrupted("terminated", signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
