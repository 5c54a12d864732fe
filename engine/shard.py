"""Videos to shards: decode, prepare, select, write.

There are two passes. First, every video is decoded into a spool of its own (engine/spool.py);
finished spools survive an interruption. Then the frames of all spools are written to shards, in an
order given by a hash (engine/shuffle.py). So memory use does not grow with the videos (except for
some 40 bytes per frame), any order of work gives the same bytes, and a bad file affects only
itself. Where shards are replaced because videos or labels were added, the spools of the other
videos are made from the old shards (engine/reuse.py).
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from sslus.engine.errors import InputError
from sslus.engine.ids import find_key, keep_key, keyed_hash, video_ids
from sslus.engine.labels import as_known, read_labels, real
from sslus.engine.manifest import Manifest
from sslus.engine.picture import EXTENSIONS as PICTURES
from sslus.engine.region import WHOLE
from sslus.engine.reuse import respool, unchanged
from sslus.engine.settings import Settings
from sslus.engine.shard_folder import ShardFolder
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
from sslus.engine.system import usable_cores
from sslus.engine.workers import Workers, worker_pool

DECODING = 9  # increased when some file would give other frames or times than before
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
    held_out: int = 0  # videos whose labels stay out of the shards: split is test or val
    resumed: int = 0  # videos already decoded by an earlier, interrupted run
    reused: int = 0  # videos whose frames were taken from the shards that were replaced
    broken: tuple[str, ...] = ()  # names of such shards from which no frame could be taken
    new_ids: bool = False  # the key of the shards that were replaced was gone
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
    Labels of test and val videos stay out, since what trains on the shards would learn what it is
    tested on. `key` is a file with 64 hex digits from which ids are made, so that videos can get
    the ids they have elsewhere; by default a random key is made and kept in `out`/local. `jobs` is
    the number of worker processes (default: one per core, at most MOST_ON_GPU if they decode on a
    GPU); `device` and `decoder` are those of choose_backends. With `strict`, no shards are written
    if any file is refused or incomplete; with `force`, shards that were made otherwise are
    replaced. `report(done, total, note)` is called after each video and each shard.

    A second call continues where the first was stopped, or returns at once if all is done. It
    retries refused files only with `force`, since their frames would change shards that may be
    in use. If videos or labels have changed, `force` takes the frames of the other videos from the
    old shards; if nothing has, it decodes everything again. Until the new shards are complete, the
    old ones, their key and their ledger stay as they are; the ledger of a run that was stopped or
    refused is in local/work. Raises InputError, OSError (a full disk) or Interrupted; videos
    decoded by then are kept.
    """
    start = time.monotonic()
    settings, folder = settings or Settings(), ShardFolder(Path(out))
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs: want at least 1, got {jobs}")
    sources, ignored = find_videos(paths, skip=real(folder.out), pictures=images)
    marks = _marks(sources, labels, images)
    backends = _backends(settings, device, decoder)
    folder.refuse_strangers()
    with folder.locked():
        merged = folder.is_merged()
        if merged and not force:
            raise InputError(
                f"{folder.out}: the shards there were merged from other folders (sslus merge);"
                " --force replaces them, -o writes elsewhere"
            )
        secret = find_key(folder.local, key, merged)
        new_ids = key is None and folder.has_shards() and not (folder.local / "key").exists()
        ids = video_ids(sources, secret)
        request = {
            "settings": asdict(settings), "decoder": [name for name, _ in backends],
            "decoding": DECODING, "labels": _marks_digest(marks),
            "sources": {s.name: [ids[s.name], *stamp(s.path)] for s in sources},
        }  # fmt: skip
        done = folder.finished(request)
        if done or not folder.has_shards():
            keep_key(folder.local, secret)  # else the same command would make other ids
        if done and not force:
            folder.give_up()  # an abandoned --force
            manifest, ledger = done
            ledger = folder.record_moves(ledger, {ids[s.name]: str(s.path) for s in sources})
            return ShardReport(
                folder.out, manifest, ledger, ignored, *_unmarked(marks), already=True
            )
        # With `done`, --force means that nothing there is to be trusted.
        lines = {} if done else unchanged(folder, request)
        if folder.has_shards() and not force:
            kept = f" ({len(lines)} of {len(sources)} videos are not decoded again)"
            raise InputError(
                f"{folder.out}: {folder.refusal(request)}; --force replaces them"
                f"{kept if lines else ''}, -o writes elsewhere"
            )
        folder.begin(request, anew=bool(done))
        keep_key(folder.work, secret)  # a new key, which is not yet the folder's
        records = _resume(sources, ids, folder.work)
        resumed = len(records)
        for name in records:
            lines.pop(ids[name], None)
        job = _Job(sources, ids, marks, secret, settings, folder.work, records, lines, report)
        try:
            with worker_pool(
                _num_workers(jobs, backends, len(sources)), start_worker, (backends,), job.told
            ) as workers:
                reused, broken = _reuse(job, folder)
                _decode_all(job, workers, several=len(backends) > 1)
                ledger = [_ledger_line(s, ids[s.name], records[s.name]) for s in sources]
                _refuse_failure(ledger, strict, folder.write_ledger(ledger))
                manifest = _write_all(job, workers)
                folder.replace(manifest, request, secret)
        finally:
            folder.remove_halves()
    return ShardReport(
        folder.out, manifest, ledger, ignored, *_unmarked(marks), resumed=resumed, reused=reused,
        broken=tuple(broken), new_ids=new_ids, seconds=time.monotonic() - start,
    )  # fmt: skip


def _backends(settings: Settings, device: str, decoder: str) -> list[tuple[str, str]]:
    if settings.region == WHOLE:
        return choose_backends(device, decoder)
    if device == "cuda" or decoder == "dali":
        raise InputError("--region works on the CPU only: leave out --device and --decoder")
    return [("pyav", "cpu")]


def _num_workers(jobs: int | None, backends: list[tuple[str, str]], num_videos: int) -> int:
    if jobs is None:
        jobs = usable_cores()
        if backends[0][1] == "cuda":
            jobs = min(jobs, MOST_ON_GPU)
    return min(jobs, num_videos)


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
            label = None if row.held_out else row.label
            marks[name] = _Mark(label, row.patient, row.held_out)
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
    old: dict[str, dict]  # by id: those that `unchanged` found and that are not yet spooled
    report: Callable[[int, int, str], None] | None

    def told(self) -> str:
        again = f", and taking {len(self.old)} from the old shards begins anew" if self.old else ""
        return f"{len(self.records)} of {len(self.sources)} videos are decoded{again}"

    def tell(self, note: str) -> None:
        if self.report:
            self.report(len(self.records), len(self.sources), note)


def _unmarked(marks: dict[str, _Mark] | None) -> tuple[int, int]:
    """How many videos have no label, and how many have one that stays out of the shards."""
    held_out = sum(m.held_out for m in (marks or {}).values())
    return sum(m.label is None for m in (marks or {}).values()) - held_out, held_out


def _marks_digest(marks: dict[str, _Mark] | None) -> str | None:
    if marks is None:
        return None
    text = json.dumps({n: [m.label, m.patient] for n, m in sorted(marks.items())})
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------- decoding


def _resume(sources, ids, work) -> dict[str, dict]:
    """The records, by name, of videos that an earlier run decoded and that did not change since."""
    records = {}
    for s in sources:
        record = whole_spool(work, ids[s.name])
        if record and record["stamp"] == [*stamp(s.path)] and record["status"] != "refused":
            records[s.name] = without_frames(record)
    return records


def _reuse(job: _Job, folder: ShardFolder) -> tuple[int, list[str]]:
    """Add the records of videos whose frames the old shards hold; returns their number, and the
    names of the shards that are broken."""
    names = {job.ids[s.name]: s.name for s in job.sources}
    before = len(job.records)

    def done(video_id: str, record: dict) -> None:
        job.records[names[video_id]] = record
        del job.old[video_id]

    broken = respool(folder, job.old.copy(), done, job.tell)
    job.old.clear()  # what is left must be decoded
    return len(job.records) - before, broken


def _decode_all(job: _Job, workers: Workers, several: bool) -> None:
    """Add the records of the sources that have none yet.

    A decoder on a GPU may crash its process on some file. If there are `several` decoders, the
    last one is tried on such a file, as on one that has lost frames.
    """
    records = job.records
    todo = [s for s in job.sources if s.name not in records]
    sizes = {s.name: stamp(s.path)[0] for s in todo}
    # Large files first, so that no worker is left alone with one at the end.
    todo.sort(key=lambda s: (-sizes[s.name], s.name))
    frames = sum(r["decoded_frames"] for r in records.values())

    job.tell(f"{frames:,} frames")
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
            # Links stay when the disk with the files goes; one that leads nowhere from the start is
            # refused.
            gone = sizes[source.name] >= 0 > stamp(source.path)[0]
            if result["status"] != "ok" and (gone or not os.path.lexists(source.path)):
                raise InputError(
                    f"{source.path}: was there at the start and is gone; if a disk was unmounted,"
                    f" bring it back; {job.told()}; the same command resumes from here"
                )
            records[source.name] = result
            frames += result["decoded_frames"]
            job.tell(f"{frames:,} frames")
        todo = crashed


def _ledger_line(source: Source, video_id: str, record: dict) -> dict:
    hidden = ("crc32", "stamp")
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
    return write_all(videos, job.settings, job.work, workers, job.tell)
