"""Videos to shards: decode, prepare, select, write.

There are two passes. First, every video is decoded into a spool of its own (its JPEGs and its
ledger line); finished spools survive an interruption. Then the frames of all spools are written to
shards, in an order given by a hash. So memory use does not grow with the videos (except for some 40
bytes per frame), any order of work gives the same bytes, and a bad file affects only itself.
"""

import contextlib
import hashlib
import json
import os
import resource
import secrets
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sslus.engine import manifest as manifests
from sslus.engine import tar
from sslus.engine.atomic import atomic_file, sync_folder
from sslus.engine.dicom import DicomBackend
from sslus.engine.errors import InputError
from sslus.engine.labels import as_known, read_labels, real
from sslus.engine.lock import alone
from sslus.engine.manifest import Manifest, read_manifest
from sslus.engine.prepare import moments
from sslus.engine.region import WHOLE, Region, find
from sslus.engine.region import parse as parse_region
from sslus.engine.sources import Source, find_videos, probe
from sslus.engine.video import Backend, Prepared, PyavBackend, VideoError, VideoInfo
from sslus.engine.workers import Workers, worker_pool

FRAMES_PER_SHARD = 1000  # some 20 MB at 256 px: enough shards to spread over ranks
LEDGER = "ledger.jsonl"
DECODING = 6  # increased when some file would give other frames or times than before
# Worker processes on a GPU, by default: an H100 or H200 has seven video engines, other GPUs fewer,
# and each process takes half a GB of GPU memory before it decodes.
MOST_ON_GPU = 7
KEY_BYTES = 32
ID_BYTES = 8  # a collision becomes likely at 2^32 videos; it is checked for all the same
# Matroska, FLV and ASF round timestamps to milliseconds, so the difference of two (a frame's and
# the first one's) is off by up to 1 ms. Half a millisecond more absorbs our own rounding.
GRACE_SECONDS = 1.5e-3


@dataclass(frozen=True)
class Settings:
    """What determines the bytes of the shards. Raises InputError for values out of range."""

    size: int = 256
    stride: int | None = 5  # every stride-th frame ...
    rate_hz: float | None = None  # ... or at most this many per second
    quality: int = 95
    region: str = WHOLE  # see region.parse
    frames_per_shard: int = FRAMES_PER_SHARD

    def __post_init__(self):
        if not 16 <= self.size <= 4096:
            raise InputError(f"--size: want 16 to 4096 pixels, got {self.size}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality: want 1 to 100, got {self.quality}")
        parse_region(self.region)
        if (self.stride is None) == (self.rate_hz is None):
            raise InputError("choose one of --stride, --rate and --all")
        if self.stride is not None and self.stride < 1:
            raise InputError(f"--stride: want at least 1, got {self.stride}")
        if self.rate_hz is not None and not 0 < self.rate_hz < float("inf"):
            raise InputError(f"--rate: want a rate above 0 Hz, got {self.rate_hz}")
        if self.frames_per_shard < 1:
            raise InputError(f"--frames-per-shard: want at least 1, got {self.frames_per_shard}")

    def selector(self) -> Callable[[int, float], bool]:
        """A new keep(index, time_seconds) for one video, to be called in frame order."""
        if self.stride is not None:
            return lambda index, time_seconds: index % self.stride == 0
        last = -1
        grace = min(GRACE_SECONDS * self.rate_hz, 0.5)  # in periods

        def keep(index: int, time_seconds: float) -> bool:
            # The first frame in each period of the clock, whatever the video's own rate. Without
            # grace, a timestamp that was rounded down would fall into the period before.
            nonlocal last
            period = int(time_seconds * self.rate_hz + grace)
            due, last = period > last, max(period, last)
            return due

        return keep


@dataclass(frozen=True)
class ShardReport:
    out: Path
    manifest: Manifest
    ledger: list[dict]
    ignored: Counter  # skipped files by extension, and links to folders
    unlabelled: int = 0  # videos without a row in the labels
    resumed: int = 0  # videos already decoded by an earlier, interrupted run
    already: bool = False  # there was nothing to do
    seconds: float = 0.0

    @property
    def problems(self) -> list[dict]:
        """The ledger lines of files that were refused or incomplete."""
        return [r for r in self.ledger if r["status"] != "ok"]


def shard(
    paths: list[Path],
    out: Path,
    settings: Settings | None = None,
    *,
    labels: Path | None = None,
    key: Path | None = None,
    jobs: int | None = None,
    device: str = "auto",
    decoder: str = "auto",
    strict: bool = False,
    force: bool = False,
    report: Callable[[int, int, str], None] | None = None,
) -> ShardReport:
    """Decode the videos under `paths` into WebDataset shards in the folder `out`.

    `labels` is a CSV file (see engine.labels); its labels go into the shards, its patients as
    keyed hashes. `key` is a file with 64 hex digits from which ids are made, so that videos can
    get the ids they have elsewhere; by default a random key is made and kept in `out`/local.
    `jobs` is the number of worker processes (default: one per core, at most MOST_ON_GPU if they
    decode on a GPU); `device` and `decoder` are those of choose_backends. With `strict`, no shards
    are written if any file is refused or incomplete; with `force`, shards that were made otherwise
    are replaced. `report(done, total, note)` is called after each video.

    A second call continues where the first was stopped, or returns at once if all is done. It
    retries refused files only with `force`, since their frames would change shards that may be
    in use. Until the new shards are complete, the old ones, their key and their ledger stay as
    they are; the ledger of a run that was stopped or refused is in local/work. Raises InputError,
    OSError (a full disk) or Interrupted; videos decoded by then are kept.
    """
    start = time.monotonic()
    settings = settings or Settings()
    out = Path(out)
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs: want at least 1, got {jobs}")
    sources, ignored = find_videos(paths, skip=out.resolve())
    marks = _marks(sources, labels)
    on_cpu = settings.region != WHOLE
    if on_cpu and (device == "cuda" or decoder == "dali"):
        raise InputError("--region works on the CPU only: leave out --device and --decoder")
    backends = [("pyav", "cpu")] if on_cpu else choose_backends(device, decoder)
    if jobs is None:
        jobs = len(os.sched_getaffinity(0))
        if backends[0][1] == "cuda":
            jobs = min(jobs, MOST_ON_GPU)
    _refuse_strangers(out)
    with _locked(out) as local:
        secret = _key(local, key)
        ids = _ids(sources, secret)
        request = {
            "settings": asdict(settings), "decoder": [b[0] for b in backends], "decoding": DECODING,
        }  # fmt: skip
        wanted = {s.name: [ids[s.name], *_stamp(s.path)] for s in sources}
        done = _finished(out, request, wanted, marks)
        if done or not (out / manifests.NAME).exists():
            _keep_key(local, secret)  # else the same command would make other ids
        if done and not force:
            shutil.rmtree(local / "work", ignore_errors=True)  # of an abandoned --force
            manifest, ledger = done
            ledger = _moved(local, ledger, {ids[s.name]: str(s.path) for s in sources})
            return ShardReport(out, manifest, ledger, ignored, _unmarked(marks), already=True)
        if (out / manifests.NAME).exists() and not force:
            why = "the shards there are of other videos, labels or settings, damaged, or of another"
            why += " version"
            if not (local / "request.json").exists():
                why = f"has shards, but what they were made from is not in {local}; put that back"
            raise InputError(f"{out}: {why}; --force replaces them, -o writes elsewhere")
        work = _work_folder(local, request, anew=bool(done))
        _keep_key(work, secret)  # a new key, which is not yet the folder's
        job = _Job(sources, ids, marks, secret, settings, work, _resume(sources, ids, work))
        resumed = len(job.records)
        num_workers = min(jobs, len(sources))
        try:
            with worker_pool(num_workers, _start_worker, (backends,), job.told) as workers:
                _decode_all(job, workers, report, several=len(backends) > 1)
                ledger = [_ledger_line(s, ids[s.name], job.records[s.name]) for s in sources]
                _write_ledger(work, ledger)
                _refuse_failure(ledger, strict, work / LEDGER)
                manifest = _write_all(job, workers)
                _swap(out, work, secret)
        finally:
            _remove_halves(work)
        with atomic_file(local / "request.json", "w") as f:
            json.dump({**request, "sources": wanted, "labels": _marks_digest(marks)}, f)
        manifest.write(out)
        shutil.rmtree(work)
    return ShardReport(
        out, manifest, ledger, ignored, _unmarked(marks), resumed, False, time.monotonic() - start
    )


def _refuse_failure(ledger: list[dict], strict: bool, path: Path) -> None:
    problems = [r for r in ledger if r["status"] != "ok"]
    if not problems:
        return
    first = f"The first: {problems[0]['source']}: {problems[0]['why']}; see {path} for all"
    if strict:
        raise InputError(
            f"{len(problems)} of {len(ledger)} files were refused or incomplete, and --strict was"
            f" given; no shards written. {first}"
        )
    if not any(r["kept_frames"] for r in ledger):
        raise InputError(f"none of the {len(ledger)} files gave a frame. {first}")


# ---------------------------------------------------------------- keys, ids, labels


def _key(local: Path, given: Path | None) -> bytes:
    """The secret from which ids are made: the one given, the one kept in local/, or a new one."""
    kept = (local / "key", local / "work" / "key")  # work: of new, incomplete shards
    path = given or next((p for p in kept if p.exists()), None)
    try:
        text = secrets.token_hex(KEY_BYTES) if path is None else Path(path).read_text().strip()
        key = bytes.fromhex(text)
    except OSError as e:
        raise InputError(f"--key {path}: cannot be read ({e})") from e
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        remedy = "" if given else "; put it back, or delete it to get a new key and new ids"
        raise InputError(f"{path}: want {2 * KEY_BYTES} hex digits{remedy}")
    return key


def _keep_key(folder: Path, key: bytes) -> None:
    """Store the key, so that a second run makes the same ids."""
    path, text = folder / "key", key.hex() + "\n"
    if not path.exists() or path.read_bytes() != text.encode():
        with atomic_file(path, "w") as f:
            f.write(text)


def _keyed_hash(key: bytes, kind: str, name: str) -> str:
    """A hash from which names cannot be guessed without the key (BLAKE2b in keyed mode)."""
    return hashlib.blake2b(
        name.encode("utf-8", "surrogateescape"),
        key=key,
        digest_size=ID_BYTES,
        person=kind.encode().ljust(16, b"\0"),
    ).hexdigest()


def _ids(sources: list[Source], key: bytes) -> dict[str, str]:
    ids = {s.name: _keyed_hash(key, "video", s.name) for s in sources}
    if len(set(ids.values())) < len(ids):
        raise InputError("two videos got the same id; delete local/key and start again")
    return ids


@dataclass(frozen=True)
class _Mark:
    label: str | None = None
    patient: str | None = None


def _marks(sources: list[Source], labels: Path | None) -> dict[str, _Mark] | None:
    """Label and patient of each source by its name; None without labels."""
    if labels is None:
        return None
    by_path = {real(s.path): s.name for s in sources}
    marks = {s.name: _Mark() for s in sources}
    missing, rows = [], read_labels(labels)
    for row, path in zip(rows, as_known([row.path for row in rows], by_path), strict=True):
        name = by_path.get(path)
        if name is None:
            missing.append(row.path)
        else:
            marks[name] = _Mark(row.label, row.patient)
    if missing:
        raise InputError(
            f"labels {labels}: {len(missing)} of its videos are not among the videos given,"
            f" the first is {missing[0]}; correct the path or drop the row"
        )
    return marks


@dataclass(frozen=True)
class _Job:
    """One call of `shard`: what its two passes share about the videos."""

    sources: list[Source]
    ids: dict[str, str]  # by the sources' names, like marks and records
    marks: dict[str, _Mark] | None
    key: bytes
    settings: Settings
    work: Path  # where the spools are
    records: dict[str, dict]  # of the decoded videos

    def told(self) -> str:
        return f"{len(self.records)} of {len(self.sources)} videos are decoded"


def _unmarked(marks: dict[str, _Mark] | None) -> int:
    return sum(m.label is None for m in marks.values()) if marks else 0


def _stamp(path: Path) -> tuple[int, int]:
    """Size and modification time, so that a replaced file is decoded again."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


# ---------------------------------------------------------------- the folder


def _refuse_strangers(out: Path) -> None:
    """Only what an earlier run has made is ever replaced: `-o .` may be anybody's folder."""
    if any((out / p).exists() for p in ("local/key", "local/work/key")) or _is_ours(out):
        return
    patterns = (manifests.NAME, "shard-*.tar", "shard-*.idx", "store", "local/*")
    for path in (path for pattern in patterns for path in out.glob(pattern)):
        if path.name != "lock":  # a run that ended before it did anything leaves that
            raise InputError(
                f"{path}: is in the way, and nothing here says that `sslus shard` made it; move it"
                " away, or name another folder with -o"
            )


def _is_ours(out: Path) -> bool:
    """Whether shards are there, of any version, damaged or not, and the manifest says so."""
    try:
        return '"frames_per_shard"' in (out / manifests.NAME).read_text(errors="replace")
    except OSError:
        return False


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """Create `out`/local (mode 700) and hold its lock, so that two runs cannot mix."""
    local = out / "local"
    local.mkdir(parents=True, exist_ok=True)
    local.chmod(0o700)
    with alone(local / "lock", f"{out}: another `sslus shard` is writing here; wait for it"):
        yield local


def _marks_digest(marks: dict[str, _Mark] | None) -> str | None:
    if marks is None:
        return None
    text = json.dumps({n: [m.label, m.patient] for n, m in sorted(marks.items())})
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _finished(out: Path, request: dict, wanted: dict, marks) -> tuple[Manifest, list[dict]] | None:
    """Manifest and ledger, if `out` is complete and holds exactly what is asked for."""
    now = {**request, "sources": wanted, "labels": _marks_digest(marks)}
    if _read_json(out / "local" / "request.json") != json.loads(json.dumps(now)):
        return None
    try:
        manifest = read_manifest(out)
        lines = (out / "local" / LEDGER).read_text().splitlines()
        ledger = [json.loads(line) for line in lines]
    except (OSError, ValueError):  # ValueError: InputError, or neither UTF-8 nor JSON
        return None
    if len(ledger) != len(wanted):
        return None
    for entry in manifest.shards:
        path = out / entry["name"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            return None
    return manifest, ledger


def _moved(local: Path, ledger: list[dict], places: dict[str, str]) -> list[dict]:
    """The ledger with the current paths of the videos, by id; evaluation looks them up there."""
    now = [line | {"source": places[line["id"]]} for line in ledger]
    if now != ledger:
        _write_ledger(local, now)
    return now


def _read_json(path: Path):
    """None if the file does not exist or is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_ledger(folder: Path, ledger: list[dict]) -> None:
    with atomic_file(folder / LEDGER, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in ledger)


def _work_folder(local: Path, request: dict, anew: bool) -> Path:
    """The folder of the spools. Spools of another request are deleted; so are, when a finished
    folder is made `anew`, spools that do not come from an earlier attempt at that."""
    work, stamp = local / "work", local / "work" / "request.json"
    usable = [request | {"anew": a} for a in {True, anew}]
    if work.exists() and _read_json(stamp) not in usable:
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    _remove_halves(work)  # of a run that was killed
    with atomic_file(stamp, "w") as f:
        json.dump(request | {"anew": anew}, f)
    return work


def _remove_halves(work: Path) -> None:
    """Delete files that interrupted workers have left incomplete."""
    for half in work.rglob("*.tmp"):
        half.unlink()


# ---------------------------------------------------------------- decoding


def choose_backends(device: str, decoder: str) -> list[tuple[str, str]]:
    """The decoders to try for each file, in order, as (decoder, device).

    device: "cpu" or "cuda" (InputError if it cannot be used), or "auto", which uses a GPU if there
    is one that decodes. decoder: "pyav" reads every format, on the CPU; "dali" reads what NVDEC
    supports on a GPU, or MJPEG, VP8 and VP9 on the CPU; "auto" is dali on a GPU, and pyav for the
    rest.
    """
    if decoder == "pyav":
        if device == "cuda":
            raise InputError("--decoder pyav runs on the CPU; with cuda use --decoder dali")
        return [("pyav", "cpu")]
    if decoder == "auto" and device == "cpu":
        return [("pyav", "cpu")]
    on = "cuda" if device == "cuda" or (device == "auto" and _gpu_decodes()) else "cpu"
    if decoder == "auto" and on == "cpu":
        return [("pyav", "cpu")]
    if device != "auto" or decoder == "dali":
        from sslus.engine.dali import DaliBackend

        DaliBackend(on)  # raises InputError here, once, rather than for every file
    return [("dali", on)] + ([("pyav", "cpu")] if decoder == "auto" and device == "auto" else [])


def _gpu_decodes() -> bool:
    """Whether DALI is installed and there is a GPU that decodes."""
    from sslus.engine.dali import why_not

    return why_not("cuda") is None


def _make_backend(name: str, device: str) -> Backend:
    if name == "pyav":
        return PyavBackend()
    from sslus.engine.dali import DaliBackend

    return DaliBackend(device)


_worker_backends: list[Backend] = []  # of this worker process


def _start_worker(backends: list[tuple[str, str]]) -> None:
    _worker_backends.extend(_make_backend(*b) for b in backends)


def _spool_path(work: Path, video_id: str) -> Path:
    return work / f"{video_id}.json"


def _jpegs_path(work: Path, video_id: str) -> Path:
    return work / f"{video_id}.jpegs"


def _spool_video(
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
            if info.codec.startswith("dicom "):  # what PyAV is for videos
                backends = [DicomBackend() if isinstance(b, PyavBackend) else b for b in backends]
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
            whole = tried["decoded_frames"] == info.num_frames and not tried["corrupt_frames"]
            # If a decoder loses frames, the next one is tried; the result of the last one counts.
            if whole or backend is able[-1]:
                break
        record |= tried
    except VideoError as e:
        record["why"] = e.why
    else:
        _judge(record)
    record["seconds"] = round(time.monotonic() - start, 3)
    with atomic_file(_spool_path(work, video_id), "w", durable=False) as f:
        f.write(json.dumps(record))  # json.dump encodes in Python, ten times slower
    return _without_frames(record)


def _region(path: Path, info: VideoInfo, text: str, backend) -> Region | None:
    """What of the images is used; None for all, or what a DICOM file declares."""
    if text == WHOLE:
        return None
    declared = None if info.uncropped else backend.declared(path)
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
        "stamp": _stamp(path), "sum": 0, "squares": 0, "crc32": 0,
    }  # fmt: skip


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """For code that only reads a file: whatever it raises means that this file is refused."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        said = f"{type(e).__name__}: {e}".splitlines()[0]
        raise VideoError(path, f"its decoder failed ({said})") from e


def _blamed_frames(path: Path, frames: Iterator[Prepared]) -> Iterator[Prepared]:
    with _blamed(path):  # what is done with a frame raises where it is done, not in here
        yield from frames


def _decode_video(
    path: Path, video_id: str, info, backend: Backend, settings: Settings, work: Path
) -> dict:
    import simplejpeg

    keep = settings.selector()
    decoded = corrupt = elsewhere = total = squares = offset = crc32 = 0
    frames, why = [], ""
    with atomic_file(_jpegs_path(work, video_id), durable=False) as f:
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


def _judge(record: dict) -> None:
    """Status and reason from the counts."""
    expected, decoded = record["expected_frames"], record["decoded_frames"]
    reasons = [record["why"]] if record["why"] else []
    if decoded != expected:
        reasons.append(f"{decoded} of {expected} frames could be decoded")
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


def _resume(sources, ids, work) -> dict[str, dict]:
    """The records, by name, of videos that an earlier run decoded and that did not change since."""
    records = {}
    for s in sources:
        record = _whole_spool(work, ids[s.name])
        if record and tuple(record["stamp"]) == _stamp(s.path) and record["status"] != "refused":
            records[s.name] = _without_frames(record)
    return records


def _whole_spool(work: Path, video_id: str) -> dict | None:
    """The record of a spool; None if it is missing or, after a power cut, incomplete."""
    try:
        record = json.loads(_spool_path(work, video_id).read_text())
        crc32 = 0
        with _jpegs_path(work, video_id).open("rb") as f:
            while block := f.read(1 << 20):
                crc32 = zlib.crc32(block, crc32)
    except (FileNotFoundError, ValueError):
        return None
    return record if crc32 == record.get("crc32") else None


def _without_frames(record: dict) -> dict:
    """The part of a record that stays in memory: nothing that grows with the frames."""
    return {k: v for k, v in record.items() if k != "frames"}


def _decode_all(job: _Job, workers: Workers, report: Callable | None, several: bool) -> None:
    """Add the records of the sources that have none yet.

    A decoder on a GPU may crash its process on some file. If there are `several` decoders, the
    last one is tried on such a file, as on one that has lost frames.
    """
    records = job.records
    todo = [s for s in job.sources if s.name not in records]
    # Large files first, so that no worker is left alone with one at the end.
    todo.sort(key=lambda s: (-_stamp(s.path)[0], s.name))
    frames = sum(r["decoded_frames"] for r in records.values())

    def tell() -> None:
        if report:
            report(len(records), len(job.sources), f"{frames:,} frames")

    tell()
    for by_last in (False, True) if several else (False,):
        tasks = [(s.path, job.ids[s.name], job.settings, job.work, by_last) for s in todo]
        crashed = []
        for number, result in workers.map(_spool_video, tasks):
            source = todo[number]
            if isinstance(result, BrokenProcessPool):
                result = _crashed(source.path, job.ids[source.name], job.work)
                if several and not by_last:
                    crashed.append(source)
                    continue
            if result["status"] == "refused" and not os.path.lexists(source.path):
                raise InputError(
                    f"{source.path}: was there at the start and is gone; if a disk was unmounted,"
                    f" bring it back; {job.told()}; the same command resumes from here"
                )
            records[source.name] = result
            frames += result["decoded_frames"]
            tell()
        todo = crashed


def _crashed(path: Path, video_id: str, work: Path) -> dict:
    Path(f"{_jpegs_path(work, video_id)}.tmp").unlink(missing_ok=True)
    return _refusal(path, "the decoder crashed on it (or was killed, perhaps for lack of memory)")


def _ledger_line(source: Source, video_id: str, record: dict) -> dict:
    hidden = ("sum", "squares", "crc32", "stamp")
    line = {k: v for k, v in record.items() if k not in hidden}
    return {"source": str(source.path), "id": video_id, **line}


# ---------------------------------------------------------------- writing


def _write_all(job: _Job, workers: Workers) -> Manifest:
    """Shuffle the frames of all spools into shards in work/new; return their manifest."""
    kept = [s for s in job.sources if job.records[s.name]["kept_frames"]]
    facts = [_facts(job, s) for s in kept]
    tables = []  # 40 bytes per frame, all that is kept in memory
    for video_id, _, _ in facts:
        frames = json.loads(_spool_path(job.work, video_id).read_text())["frames"]
        tables.append(np.array(frames, np.float64))
    video = np.repeat(np.arange(len(kept), dtype=np.int32), [len(t) for t in tables])
    table = np.concatenate(tables)
    # Sorting by the hash of the key makes the order a function of the frames alone.
    hashes = (
        _hash64(_frame_key(facts[v][0], int(frame)))
        for v, frame in zip(video, table[:, 0], strict=True)
    )
    rank = np.fromiter(hashes, np.uint64, len(table))
    order = np.lexsort((table[:, 0], video, rank))
    num_shards = -(-len(order) // job.settings.frames_per_shard)
    new = job.work / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    names = [f"shard-{i:06d}.tar" for i in range(num_shards)]
    parts = np.array_split(order, num_shards)

    def tasks() -> Iterator[tuple]:
        for name, part in zip(names, parts, strict=True):
            rows = [
                (int(v), int(frame), at, int(offset), int(size))
                for v, (frame, at, offset, size) in zip(
                    video[part], table[part].tolist(), strict=True
                )
            ]
            used = {v: facts[v] for v in {r[0] for r in rows}}
            yield new / name, job.work, used, rows

    entries = [None] * num_shards
    for number, result in workers.map(_write_shard, tasks()):
        if isinstance(result, BrokenProcessPool):
            raise InputError("a worker was killed while writing; run it again") from result
        entries[number] = {"name": names[number], "num_frames": len(parts[number]), **result}
    return _manifest(job, [job.records[s.name] for s in kept], facts, entries)


def _facts(job: _Job, source: Source) -> tuple[str, str | None, str | None]:
    """Id, label and patient of a video, as they go into the shards."""
    mark = (job.marks or {}).get(source.name, _Mark())
    patient = _keyed_hash(job.key, "patient", mark.patient) if mark.patient else None
    return job.ids[source.name], mark.label, patient


def _manifest(job: _Job, records: list[dict], facts: list[tuple], shards: list[dict]) -> Manifest:
    settings, num_frames = job.settings, sum(r["kept_frames"] for r in records)
    pixels = num_frames * settings.size**2
    mean = sum(r["sum"] for r in records) / pixels
    variance = sum(r["squares"] for r in records) / pixels - mean**2
    return Manifest(
        settings={"size": settings.size, "select": _selection(settings),
                  "quality": settings.quality, "region": settings.region,
                  "frames_per_shard": settings.frames_per_shard},
        num_videos=len(records),
        num_frames=num_frames,
        mean=round(mean / 255, 9),
        std=round(max(variance, 0.0) ** 0.5 / 255, 9),
        labels=sorted({label for _, label, _ in facts if label is not None}),
        decoders=dict(sorted(Counter(r["decoder"] for r in records).items())),
        shards=shards,
    ).with_digest()  # fmt: skip


def _selection(settings: Settings) -> str:
    if settings.rate_hz is not None:
        return f"at most {settings.rate_hz:g} frames a second"
    return "all frames" if settings.stride == 1 else f"1 of every {settings.stride} frames"


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _frame_key(video_id: str, frame: int) -> str:
    return f"{video_id}-{frame:06d}"


def _write_shard(path: Path, work: Path, facts: dict, rows: list[tuple]) -> dict:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: none
    spools, most = {}, max(1, min(256, limit // 4))

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for v, frame, time_seconds, offset, size in rows:
            video_id, label, patient = facts[v]
            if v not in spools:
                if len(spools) >= most:
                    os.close(spools.pop(next(iter(spools))))
                spools[v] = os.open(_jpegs_path(work, video_id), os.O_RDONLY)
            jpeg = os.pread(spools[v], size, offset)
            if len(jpeg) != size:
                raise InputError(f"{work}: a spool was cut off; delete this folder and start again")
            fact = {"video": video_id, "frame": frame, "time_seconds": time_seconds,
                    "label": label, "patient": patient}  # fmt: skip
            yield (
                _frame_key(video_id, frame),
                {"jpg": jpeg, "json": json.dumps(fact).encode()},
            )

    try:
        length, sha256 = tar.write_shard(path, samples())
    finally:
        for fd in spools.values():
            os.close(fd)
    return {"bytes": length, "sha256": sha256}


def _swap(out: Path, work: Path, key: bytes) -> None:
    """Replace the old shards, key and ledger by the new ones. Without a manifest, a folder counts
    as unfinished, and the spools still exist: a crash in here costs only the second pass."""
    (out / manifests.NAME).unlink(missing_ok=True)
    shutil.rmtree(out / "store", ignore_errors=True)  # training builds one from the new shards
    for old in [*out.glob("shard-*.tar"), *out.glob("shard-*.idx")]:
        old.unlink()
    for path in sorted((work / "new").iterdir()):
        path.rename(out / path.name)
    _keep_key(out / "local", key)
    (work / LEDGER).replace(out / "local" / LEDGER)
    sync_folder(out / "local")
    sync_folder(out)
