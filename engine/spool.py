"""The first pass of sharding: a worker process decodes a video into a spool of its own.

A spool is two files, <id>.jpegs and <id>.json: the JPEGs one after the other, and a record of the
video, from which its ledger line is made, with the places of the JPEGs.
"""

import contextlib
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from sslus.engine.atomic import atomic_file
from sslus.engine.dicom import DicomBackend
from sslus.engine.errors import InputError, out_of_memory
from sslus.engine.picture import CODEC as PICTURE
from sslus.engine.picture import PictureBackend
from sslus.engine.prepare import moments
from sslus.engine.region import WHOLE, Region, find
from sslus.engine.settings import Settings
from sslus.engine.sources import probe
from sslus.engine.video import Backend, Prepared, PyavBackend, VideoError, VideoInfo

GONE = -1, -1  # the `stamp` of a file that is not there


def choose_backends(device: str, decoder: str) -> list[tuple[str, str]]:
    """The decoders to try for each file, in order, as (decoder, device).

    device: "cpu" or "cuda" (InputError if it cannot be used), or "auto", which uses a GPU if there
    is one that decodes. decoder: "pyav" reads every format, on the CPU; "dali" reads what NVDEC
    supports on a GPU, or MJPEG, VP8 and VP9 on the CPU; "auto" is dali on a GPU, and pyav for the
    rest.
    """
    pyav = [("pyav", "cpu")]
    if decoder == "pyav" and device == "cuda":
        raise InputError("--decoder pyav runs on the CPU; with cuda use --decoder dali")
    if decoder == "pyav" or (decoder == "auto" and device == "cpu"):
        return pyav
    from sslus.engine.dali import why_not

    on = "cuda" if device == "auto" else device
    why = why_not(on)  # here, once, rather than for every file
    if device == decoder == "auto":
        return pyav if why else [("dali", on), *pyav]
    if why and device == "auto":
        on = "cpu"
        why = why_not(on)
    if why:
        raise InputError(f"dali: {why}")
    return [("dali", on)]


def _make_backend(name: str, device: str) -> Backend:
    if name == "pyav":
        return PyavBackend()
    from sslus.engine.dali import DaliBackend

    return DaliBackend(device)


_worker_backends: list[Backend] = []  # of this worker process


def start_worker(backends: list[tuple[str, str]]) -> None:
    """Called once in each worker process, with what choose_backends returned."""
    _worker_backends.extend(_make_backend(*b) for b in backends)


def spool_path(work: Path, video_id: str) -> Path:
    return work / f"{video_id}.json"


def jpegs_path(work: Path, video_id: str) -> Path:
    return work / f"{video_id}.jpegs"


def spool_video(
    path: Path, video_id: str, settings: Settings, work: Path, by_last: bool = False
) -> dict:
    """Decode one video into <id>.jpegs and <id>.json in `work`. Returns what the latter holds.

    Neither file is synced to disk, which would take some 20 ms per video: a later run that
    resumes from them checks that they are complete.

    A file that cannot be decoded gives a record with status "refused"; only write errors are
    raised. `by_last`: try only the last of the worker's decoders.
    """
    start = time.monotonic()
    record = {**_refusal(path), "frames": []}
    backends = _worker_backends[-1:] if by_last else _worker_backends
    try:
        with _blamed(path):
            info = probe(path)
            instead = {"dicom": DicomBackend, PICTURE: PictureBackend}.get(info.codec.split()[0])
            if instead:  # what PyAV is for videos
                backends = [instead() if isinstance(b, PyavBackend) else b for b in backends]
            record |= {
                "codec": info.codec, "width": info.width, "height": info.height,
                "rate_hz": round(info.rate_hz, 3), "expected_frames": info.num_frames,
                "other_streams": info.other_streams, "uncropped": info.uncropped,
            }  # fmt: skip
            if region := _region(path, info, settings.region, backends[-1]):
                backends = [type(backends[-1])(region)]
                record |= {"region": str(region.box), "uncropped": False}
            reasons = [(b, b.refuses(info)) for b in backends]
        able = [b for b, why in reasons if why is None]
        if not able:
            raise VideoError(path, "; ".join(f"{b.name}: {why}" for b, why in reasons))
        for backend in able:
            tried = _decode_video(path, video_id, info, backend, settings, work)
            # If a decoder loses frames, the next one is tried; the result of the last one counts.
            if tried["decoded_frames"] == info.num_frames and not tried["corrupt_frames"]:
                break
        record |= tried
    except VideoError as e:
        record["why"] = e.why
    else:
        now = stamp(path)
        _judge(record, changed=now != record["stamp"] and now != GONE)
    record["seconds"] = round(time.monotonic() - start, 3)
    keep_record(work, video_id, record)
    return without_frames(record)


def keep_record(work: Path, video_id: str, record: dict) -> None:
    """Write the second file of a spool, which makes it complete."""
    with atomic_file(spool_path(work, video_id), "w", durable=False) as f:
        f.write(json.dumps(record))  # json.dump encodes in Python, ten times slower


def _region(path: Path, info: VideoInfo, text: str, backend) -> Region | None:
    """What of the images is used; None for all, or what a DICOM file declares."""
    if text == WHOLE:
        return None
    declared = backend.declared(path) if isinstance(backend, DicomBackend) else None
    with contextlib.closing(backend.images(path)) as images:
        found = find(text, images, info.num_frames, declared)
    if isinstance(found, str):
        raise VideoError(path, found)
    return found


def _refusal(path: Path, why: str = "") -> dict:
    """The record of a file about which nothing is known."""
    return {
        "codec": None, "width": None, "height": None, "rate_hz": None, "other_streams": 0,
        "uncropped": False, "region": None,
        "expected_frames": 0, "decoded_frames": 0, "kept_frames": 0,
        "status": "refused", "why": why, "seconds": 0.0, "decoder": None, "corrupt_frames": 0,
        "other_screens": 0,
        "stamp": stamp(path), "sum": 0, "squares": 0, "crc32": 0,
    }  # fmt: skip


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """For code that only reads a file: whatever it raises means that this file is refused, unless
    memory has run out."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        if out_of_memory(e):
            raise InputError(
                f"{path}: memory ran out while it was read; raise the limit (`ulimit -v`) or give"
                " fewer --jobs; the same command resumes from here"
            ) from e
        said = f"{type(e).__name__}: {e}".splitlines()[0]
        raise VideoError(path, f"its decoder failed ({said})") from e


def _blamed_frames(path: Path, frames: Iterator[Prepared]) -> Iterator[Prepared]:
    with _blamed(path):  # what is done with a frame raises where it is done, not in here
        yield from frames


def _decode_video(
    path: Path, video_id: str, info, backend: Backend, settings: Settings, work: Path
) -> dict:
    import simplejpeg

    keep = settings.selector(info.tick_seconds)
    decoded = corrupt = elsewhere = total = squares = offset = crc32 = 0
    frames, why = [], ""
    with atomic_file(jpegs_path(work, video_id), durable=False) as f:
        try:
            frames_of = backend.prepared(path, info, keep, settings.size, settings.quality)
            for frame in _blamed_frames(path, frames_of):
                decoded += 1
                corrupt += frame.corrupt
                elsewhere += frame.elsewhere
                if frame.image is None:
                    continue
                jpeg = frame.jpeg or simplejpeg.encode_jpeg(
                    frame.image[..., None], settings.quality, "GRAY", "Gray"
                )
                s, q = moments(frame.image)
                total += s
                squares += q
                f.write(jpeg)
                crc32 = zlib.crc32(jpeg, crc32)
                frames.append((frame.index, round(frame.time_seconds, 6), offset, len(jpeg)))
                offset += len(jpeg)
        except VideoError as e:
            why = e.why
    return {
        "decoded_frames": decoded, "corrupt_frames": corrupt, "kept_frames": len(frames),
        "other_screens": elsewhere,
        "decoder": backend.name, "why": why, "sum": total, "squares": squares, "crc32": crc32,
        "frames": frames,
    }  # fmt: skip


def _judge(record: dict, changed: bool) -> None:
    """Status and reason from the counts, and whether the file has changed since `probe`."""
    expected, decoded = record["expected_frames"], record["decoded_frames"]
    if record["why"]:  # perhaps the disk failed: a run that goes on from here reads the file again
        record["stamp"] = None
    reasons = [record["why"]] if record["why"] else []
    if decoded != expected:
        reasons.append(f"{decoded} of {expected} frames could be decoded")
    if changed:  # as while it is copied; what has come since is in none of the counts
        reasons.append("it changed while it was read; once it is whole, --force reads it again")
    if record["corrupt_frames"]:
        reasons.append(f"{record['corrupt_frames']} damaged frames were left out")
    if record["other_screens"]:
        reasons.append(
            f"{record['other_screens']} frames show another screen than most and were left out"
        )
    record["status"] = "incomplete" if reasons else "ok"
    if not record["kept_frames"]:
        record["status"] = "refused"
        reasons = reasons or ["no frame was kept"]
    record["why"] = "; ".join(reasons)


def crash_record(path: Path) -> dict:
    """The record of a file on which the worker process died."""
    return _refusal(path, "the decoder crashed on it (or was killed, perhaps for lack of memory)")


def whole_spool(work: Path, video_id: str) -> dict | None:
    """The record of a spool; None if it is missing or, after a power cut, incomplete."""
    try:
        record = json.loads(spool_path(work, video_id).read_text())
        crc32 = 0
        with jpegs_path(work, video_id).open("rb") as f:
            while block := f.read(1 << 20):
                crc32 = zlib.crc32(block, crc32)
    except (FileNotFoundError, ValueError):
        return None
    return record if crc32 == record.get("crc32") else None


def without_frames(record: dict) -> dict:
    """The part of a record that stays in memory: nothing that grows with the frames."""
    return {k: v for k, v in record.items() if k != "frames"}


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time, so that a replaced file is decoded again."""
    try:
        stat = path.stat()
    except OSError:
        return GONE
    return stat.st_size, stat.st_mtime_ns
