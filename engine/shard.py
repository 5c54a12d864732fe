"""Videos to shards: decode, prepare, select, write.

There are two passes. First, every video is decoded into a spool of its own (engine/spool.py);
finished spools survive an interruption. Then the frames of all spools are written to shards, in an
order given by a hash (engine/shuffle.py). So memory use does not grow with the videos (except for
some 40 bytes per frame), any order of work gives the same bytes, and a bad file affects only
itself.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from sslus.engine import manifest as manifests
from sslus.engine.atomic import atomic_file, sync_folder
from sslus.engine.errors import InputError
from sslus.engine.ids import find_key, keep_key, keyed_hash, video_ids
from sslus.engine.labels import as_known, read_labels, real
from sslus.engine.lock import alone
from sslus.engine.manifest import Manifest, read_manifest
from sslus.engine.picture import EXTENSIONS as PICTURES
from sslus.engine.region import WHOLE
from sslus.engine.settings import Settings
from sslus.engine.shuffle import Video, write_all
from sslus.engine.sources import Source, find_videos
from sslus.engine.spool import (
    choose_backends,
    crash_record,
    spool_video,
    stamp,
    start_worker,
    whole_spool,
    without_frames,
)
from sslus.engine.workers import Workers, worker_pool

LEDGER = "ledger.jsonl"
DECODING = 8  # increased when some file would give other frames or times than before
# Worker processes on a GPU, by default: an H100 or H200 has seven video engines, other GPUs fewer,
# and each process takes half a GB of GPU memory before it decodes.
MOST_ON_GPU = 7


@dataclass(frozen=True)
class ShardReport:
    out: Path
    manifest: Manifest
    ledger: list[dict]
    ignored: Counter  # skipped files by extension, and links
    unlabelled: int = 0  # videos without a row in the labels
    held_out: int = 0  # videos whose labels stay out of the shards: split is test
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
    images: bool = False,
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

    With `images`, pictures in folders are taken too, each as a video of one frame. `labels` is a
    CSV file (see engine.labels); its labels go into the shards, its patients as keyed hashes.
    Labels of the test split stay out, since what trains on the shards would learn what it is
    tested on. `key` is a file with 64 hex digits from which ids are made, so that videos can get
    the ids they have elsewhere; by default a random key is made and kept in `out`/local. `jobs` is
    the number of worker processes (default: one per core, at most MOST_ON_GPU if they decode on a
    GPU); `device` and `decoder` are those of choose_backends. With `strict`, no shards are written
    if any file is refused or incomplete; with `force`, shards that were made otherwise are
    replaced. `report(done, total, note)` is called after each video.

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
    sources, ignored = find_videos(paths, skip=real(out), pictures=images)
    marks = _marks(sources, labels, images)
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
        secret = find_key(local, key)
        ids = video_ids(sources, secret)
        request = {
            "settings": asdict(settings), "decoder": [b[0] for b in backends], "decoding": DECODING,
        }  # fmt: skip
        wanted = {s.name: [ids[s.name], *stamp(s.path)] for s in sources}
        whole = {**request, "sources": wanted, "labels": _marks_digest(marks)}
        done = _finished(out, whole)
        if done or not (out / manifests.NAME).exists():
            keep_key(local, secret)  # else the same command would make other ids
        if done and not force:
            shutil.rmtree(local / "work", ignore_errors=True)  # of an abandoned --force
            manifest, ledger = done
            ledger = _moved(local, ledger, {ids[s.name]: str(s.path) for s in sources})
            return ShardReport(out, manifest, ledger, ignored, *_unmarked(marks), already=True)
        if (out / manifests.NAME).exists() and not force:
            if what := _differences(_read_json(local / "request.json"), whole):
                why = f"the shards there are of other videos, labels or settings ({what})"
            else:
                why = "the shards there are damaged, or of another version"
            if not (local / "request.json").exists():
                why = f"has shards, but what they were made from is not in {local}; put that back"
            raise InputError(f"{out}: {why}; --force replaces them, -o writes elsewhere")
        work = _work_folder(local, request, anew=bool(done))
        keep_key(work, secret)  # a new key, which is not yet the folder's
        job = _Job(sources, ids, marks, secret, settings, work, _resume(sources, ids, work))
        resumed = len(job.records)
        num_workers = min(jobs, len(sources))
        try:
            with worker_pool(num_workers, start_worker, (backends,), job.told) as workers:
                _decode_all(job, workers, report, several=len(backends) > 1)
                ledger = [_ledger_line(s, ids[s.name], job.records[s.name]) for s in sources]
                _write_ledger(work, ledger)
                _refuse_failure(ledger, strict, work / LEDGER)
                manifest = _write_all(job, workers)
                _swap(out, work, secret)
        finally:
            _remove_halves(work)
        with atomic_file(local / "request.json", "w") as f:
            json.dump(whole, f)
        manifest.write(out)
        shutil.rmtree(work)
    return ShardReport(
        out, manifest, ledger, ignored, *_unmarked(marks), resumed=resumed,
        seconds=time.monotonic() - start,
    )  # fmt: skip


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


@dataclass(frozen=True)
class _Mark:
    label: str | None = None
    patient: str | None = None
    held_out: bool = False  # it has a label, which stays out of the shards


def _marks(sources: list[Source], labels: Path | None, images: bool) -> dict[str, _Mark] | None:
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
            held_out = row.split == "test"
            marks[name] = _Mark(None if held_out else row.label, row.patient, held_out)
    if missing:
        left_out = missing[0].suffix.lower() in PICTURES and not images
        hint = ", or add --images" if left_out else ""
        raise InputError(
            f"labels {labels}: {len(missing)} of its videos are not among the videos given,"
            f" the first is {missing[0]}; correct the path or drop the row{hint}"
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


def _unmarked(marks: dict[str, _Mark] | None) -> tuple[int, int]:
    """How many videos have no label, and how many have one that stays out of the shards."""
    held_out = sum(m.held_out for m in (marks or {}).values())
    return sum(m.label is None for m in (marks or {}).values()) - held_out, held_out


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


def _finished(out: Path, request: dict) -> tuple[Manifest, list[dict]] | None:
    """Manifest and ledger, if `out` is complete and holds exactly what is asked for."""
    if _read_json(out / "local" / "request.json") != json.loads(json.dumps(request)):
        return None
    try:
        manifest = read_manifest(out)
        lines = (out / "local" / LEDGER).read_text().splitlines()
        ledger = [json.loads(line) for line in lines]
    except PermissionError:  # no reason for --force, which would replace them
        raise
    except (OSError, ValueError):  # ValueError: InputError, or neither UTF-8 nor JSON
        return None
    if len(ledger) != len(request["sources"]):
        return None
    for entry in manifest.shards:
        path = out / entry["name"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            return None
    return manifest, ledger


def _differences(old, new: dict) -> str:
    """In what a request differs from the one that made the shards; "" if that cannot be said."""
    try:
        was, now = old["settings"], new["settings"]
        before, after = old["sources"], new["sources"]
        found = [f"{k} was {was[k]}, now {v}" for k, v in now.items() if was[k] != v]
        if old["labels"] != new["labels"]:
            state = "none before" if old["labels"] is None else "now none"
            found.append("labels" + f": {state}" * (None in (old["labels"], new["labels"])))
        if old["decoder"] != new["decoder"]:
            found.append(f"decoder was {'+'.join(old['decoder'])}, now {'+'.join(new['decoder'])}")
        both = before.keys() & after.keys()
        changed = sum(before[name] != list(after[name]) for name in both)
        for num, word in (
            (len(after) - len(both), "added"), (len(before) - len(both), "gone"),
            (changed, "changed"),
        ):  # fmt: skip
            if num:
                found.append(f"{num} of the videos {word}")
    except (KeyError, TypeError, AttributeError):
        return ""
    return "; ".join(found)


def _moved(local: Path, ledger: list[dict], places: dict[str, str]) -> list[dict]:
    """The ledger with the current paths of the videos, by id; evaluation looks them up there."""
    now = [line | {"source": places[line["id"]]} for line in ledger]
    if now != ledger:
        _write_ledger(local, now)
    return now


def _read_json(path: Path):
    """None if the file does not exist or is damaged. Raises PermissionError."""
    try:
        return json.loads(path.read_text())
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None


def _write_ledger(folder: Path, ledger: list[dict]) -> None:
    with atomic_file(folder / LEDGER, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in ledger)


def _work_folder(local: Path, request: dict, anew: bool) -> Path:
    """The folder of the spools. Spools of another request are deleted; so are, when a finished
    folder is made `anew`, spools that do not come from an earlier attempt at that."""
    work, made_for = local / "work", local / "work" / "request.json"
    usable = [request | {"anew": a} for a in {True, anew}]
    if work.exists() and _read_json(made_for) not in usable:
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    _remove_halves(work)  # of a run that was killed
    with atomic_file(made_for, "w") as f:
        json.dump(request | {"anew": anew}, f)
    return work


def _remove_halves(work: Path) -> None:
    """Delete files that interrupted workers have left incomplete."""
    for half in work.rglob("*.tmp"):
        half.unlink()


# ---------------------------------------------------------------- decoding


def _resume(sources, ids, work) -> dict[str, dict]:
    """The records, by name, of videos that an earlier run decoded and that did not change since."""
    records = {}
    for s in sources:
        record = whole_spool(work, ids[s.name])
        if record and tuple(record["stamp"]) == stamp(s.path) and record["status"] != "refused":
            records[s.name] = without_frames(record)
    return records


def _decode_all(job: _Job, workers: Workers, report: Callable | None, several: bool) -> None:
    """Add the records of the sources that have none yet.

    A decoder on a GPU may crash its process on some file. If there are `several` decoders, the
    last one is tried on such a file, as on one that has lost frames.
    """
    records = job.records
    todo = [s for s in job.sources if s.name not in records]
    # Large files first, so that no worker is left alone with one at the end.
    todo.sort(key=lambda s: (-stamp(s.path)[0], s.name))
    frames = sum(r["decoded_frames"] for r in records.values())

    def tell() -> None:
        if report:
            report(len(records), len(job.sources), f"{frames:,} frames")

    tell()
    for by_last in (False, True) if several else (False,):
        tasks = [(s.path, job.ids[s.name], job.settings, job.work, by_last) for s in todo]
        crashed = []
        for number, result in workers.map(spool_video, tasks):
            source = todo[number]
            if isinstance(result, BrokenProcessPool):
                result = crash_record(source.path)
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


def _ledger_line(source: Source, video_id: str, record: dict) -> dict:
    hidden = ("sum", "squares", "crc32", "stamp")
    line = {k: v for k, v in record.items() if k not in hidden}
    return {"source": str(source.path), "id": video_id, **line}


# ---------------------------------------------------------------- writing


def _write_all(job: _Job, workers: Workers) -> Manifest:
    """Write the frames of all videos that have any."""
    videos = []
    for source in job.sources:
        record = job.records[source.name]
        if not record["kept_frames"]:
            continue
        mark = (job.marks or {}).get(source.name, _Mark())
        patient = keyed_hash(job.key, "patient", mark.patient) if mark.patient else None
        videos.append(Video(job.ids[source.name], mark.label, patient, record))
    return write_all(videos, job.settings, job.work, workers)


def _swap(out: Path, work: Path, key: bytes) -> None:
    """Replace the old shards, key and ledger by the new ones. Without a manifest, a folder counts
    as unfinished, and the spools still exist: a crash in here costs only the second pass."""
    (out / manifests.NAME).unlink(missing_ok=True)
    shutil.rmtree(out / "store", ignore_errors=True)  # training builds one from the new shards
    for old in [*out.glob("shard-*.tar"), *out.glob("shard-*.idx")]:
        old.unlink()
    for path in sorted((work / "new").iterdir()):
        path.rename(out / path.name)
    keep_key(out / "local", key)
    (work / LEDGER).replace(out / "local" / LEDGER)
    sync_folder(out / "local")
    sync_folder(out)
