"""folder of videos -> shards on the disk

Against bare PyAV decoding plus bare JPEG encoding of as many ready frames, in as many processes.
Floor: reading the videos' bytes, and writing and syncing the shards' bytes.
"""

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from harness import QUALITY, SIZE, STRIDE, Bench, Work, peak_mib, read_files
from stages.decode import bare_pyav, nvdec_videos

TURNS = 7
COPIES = 3  # of each video: in a job of a few seconds, starting the workers would weigh too much


def sslus_shard(videos: list[Path], out: Path, jobs: int, device: str = "cpu") -> int:
    from sslus.engine.shard import Settings, shard

    shutil.rmtree(out, ignore_errors=True)
    settings = Settings(SIZE, STRIDE, quality=QUALITY)
    return shard(videos, out, settings, jobs=jobs, device=device).manifest.num_frames


def bare(videos: list[Path], frames: Path, jobs: int) -> int:
    """Decode and drop; encode ready frames; in a pool of processes, largest files first."""
    tasks = sorted(videos, key=lambda p: -p.stat().st_size)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return sum(pool.map(_bare_video, tasks, [frames] * len(tasks)))


def _bare_video(path: Path, frames: Path) -> int:
    import simplejpeg

    ready = np.memmap(frames, np.uint8, "r").reshape(-1, SIZE, SIZE, 1)
    kept = 0
    for index, _ in enumerate(bare_pyav(path)):
        if index % STRIDE == 0:
            simplejpeg.encode_jpeg(ready[kept % len(ready)], QUALITY, "GRAY", "Gray")
            kept += 1
    return kept


def write_synced(videos: list[Path], num_bytes: int, out: Path, amount: int) -> int:
    read_files(videos, amount)
    block = os.urandom(1 << 20)
    with out.open("wb") as f:
        for start in range(0, num_bytes, len(block)):
            f.write(block[: num_bytes - start])
        f.flush()
        os.fsync(f.fileno())
    return amount


def start_workers(jobs: int) -> int:
    """Start and stop the worker processes of one run. Returns 1, the amount of work."""
    from sslus.engine.workers import Workers

    Workers(jobs, _nothing, ()).stop()
    return 1


def _nothing() -> None:
    import sslus.engine.shard  # noqa: F401, imported by every worker


def measure(bench: Bench) -> None:
    from sslus.engine.manifest import read_manifest
    from sslus.engine.store import FrameStore

    if bench.device == "cuda":  # first, in case the time runs out
        on_gpu(bench)
    out = bench.scratch / "shard-out"
    copies = 1 if bench.quick else COPIES
    videos = copied(bench.videos, copies, bench.scratch / "copied")
    manifest = read_manifest(bench.shards)
    # The bare encoder gets the frames of the shards: noise would take it longer.
    FrameStore.open(bench.shards, folder=bench.scratch / "ready")
    ready = bench.scratch / "ready" / "frames.u8"
    num_bytes = copies * sum(s["bytes"] for s in manifest.shards)
    num_frames = copies * manifest.num_frames
    case = f"{len(videos)} videos ({bench.kind}, {copies} x each), {num_frames:,} frames kept"
    works = {}
    for jobs in (1, 2):
        works[f"sslus|{jobs}"] = Work(partial(sslus_shard, videos, out, jobs), jobs)
        works[f"PyAV decode + simplejpeg encode|{jobs}"] = Work(
            partial(bare, videos, ready, jobs), jobs
        )
    works["floor: read the videos, write the shards"] = Work(
        partial(write_synced, videos, num_bytes, bench.scratch / "floor", num_frames)
    )
    rows = bench.compare("wall time", case, "s", works, repeats=TURNS)
    for jobs in (1, 2):
        peer = rows[f"PyAV decode + simplejpeg encode|{jobs}"]
        bench.ratio(f"jobs {jobs}: sslus / bare", rows[f"sslus|{jobs}"], peer, at_most=1.35)
    # Two processes on one core are no faster than one, so there is no target then.
    bound = 1.8 if bench.cores >= 2 else None
    bench.ratio("sslus: 1 job / 2 jobs", rows["sslus|1"], rows["sslus|2"], at_least=bound)
    bench.ratio(
        "bare: 1 job / 2 jobs",
        *(rows[f"PyAV decode + simplejpeg encode|{jobs}"] for jobs in (1, 2)),
    )
    # For information: this is part of the times above.
    bench.compare(
        "start-up", "worker processes, started once a run", "s",
        {"sslus": Work(partial(start_workers, 2), 2, fresh=False)}, repeats=3,
    )  # fmt: skip
    memory(bench, bench.videos, out)


def copied(videos: list[Path], copies: int, folder: Path) -> list[Path]:
    """`copies` copies of each video, as separate files."""
    folder.mkdir()
    names = [f"{n}-{i}-{path.name}" for n, path in enumerate(videos) for i in range(copies)]
    paths = [folder / name for name in names]
    for i, path in enumerate(paths):
        shutil.copyfile(videos[i // copies], path)
    return paths


def memory(bench: Bench, videos: list[Path], out: Path) -> None:
    """Peak memory for n videos, and for four copies of each, so that the largest is the same."""
    few = videos[:: 4 if len(videos) >= 16 else 1]
    folders = [copied(few, copies, bench.scratch / f"copies{copies}") for copies in (1, 4)]
    rows = []
    for paths in folders:
        peak = peak_mib(Work(partial(sslus_shard, paths, out, 2), 2))
        rows.append(
            bench.add("peak memory", "sslus", f"{len(paths)} videos", "MiB", [peak], threads=2,
                      peak=peak)
        )  # fmt: skip
    bench.ratio("peak memory: 4n videos / n videos", rows[1], rows[0], at_most=1.1)


def on_gpu(bench: Bench) -> None:
    """Wall time with and without a GPU, which decodes, resizes and encodes the frames."""
    clips = nvdec_videos(bench)
    out = bench.scratch / "shard-out"
    jobs = {"cpu": min(bench.cores, 16), "cuda": 2 if bench.quick else 7}
    works = {
        f"sslus --device {device}": Work(
            partial(sslus_shard, clips, out, jobs[device], device), jobs[device], device,
            fresh=False,
        )
        for device in ("cpu", "cuda")
    }  # fmt: skip
    rows = bench.compare(
        "wall time", f"{len(clips)} {bench.kind} videos, on a GPU or not", "s", works, repeats=3
    )
    bench.ratio("wall time: CPU / GPU", *rows.values())
