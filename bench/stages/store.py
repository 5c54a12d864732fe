"""shards -> frame store

Against simplejpeg decoding the same bytes, ready in memory, on as many threads.
Floor: copying the frames' bytes.
"""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

from harness import Bench, Timed, Work, copy_bytes

CHUNK = 16  # frames per task, as in the store's own builder at 256 px


def build(shards: Path, folder: Path, threads: int) -> Timed:
    """Build a new store. Removing the previous one is not timed."""
    from sslus.engine.store import FrameStore

    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    store = FrameStore.open(shards, folder=folder, threads=threads)
    return Timed(len(store), time.perf_counter() - start)


@lru_cache(maxsize=1)
def jpegs(shards: Path) -> list[bytes]:
    from sslus.engine.tar import read_index

    found = []
    for path in sorted(shards.glob("*.tar")):
        content = path.read_bytes()
        for _, members in read_index(path):
            offset, size = members["jpg"]
            found.append(content[offset : offset + size])
    return found


def bare(shards: Path, threads: int) -> int:
    import simplejpeg

    images = jpegs(shards)

    def decode(start: int) -> int:
        return sum(
            simplejpeg.decode_jpeg(jpeg, "GRAY").ndim == 3 for jpeg in images[start : start + CHUNK]
        )

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(decode, range(0, len(images), CHUNK)))


def measure(bench: Bench) -> None:
    from sslus.engine.manifest import read_manifest

    shards = bench.shards
    num = len(jpegs(shards))
    pixels = num * read_manifest(shards).settings["size"] ** 2
    for threads in sorted({1, bench.cores}):
        rows = bench.compare(
            "build", f"{num:,} frames", "frames/s",
            {
                "sslus": Work(partial(build, shards, bench.scratch / "store", threads), threads),
                "simplejpeg": Work(partial(bare, shards, threads), threads),
                "floor: copy the frames": Work(partial(copy_bytes, pixels, num)),
            },
        )  # fmt: skip
        bench.ratio(
            f"threads {threads}: sslus / simplejpeg", rows["sslus"], rows["simplejpeg"],
            at_least=0.8,
        )  # fmt: skip
