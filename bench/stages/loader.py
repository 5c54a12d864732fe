"""Batches through the loader, against the op that makes views alone, on the same frames

256^2 grey -> two 224^2 float views, one thread, nothing else running; crops of .2-1, else SimCLR's
views. ram and disk are the loader's tiers over a frame store; stream decodes the shards each
time, and is compared with simplejpeg and the op. Once by the clock, once by the processor's time,
in which other programs count less. Floor: the writing of as many bytes.
"""

import functools
import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from harness import SIZE, Bench, Timed, Work

VIEW = 224
VIEWS = "simclr,min_area=0.2"


def measure(bench: Bench) -> None:
    import torch

    torch.set_num_threads(1)
    for size in (64, 256):
        num = 2 if bench.quick else 1024 // size
        for clock in ("wall", "processor"):
            cpu = clock == "processor"
            loader = partial(by_loader, bench.shards, size, num, cpu)
            alone = partial(op_alone, bench.shards, size, num, cpu)
            works = {
                "the op alone": Work(partial(alone, False), fresh=False),
                "sslus, ram": Work(partial(loader, "ram"), fresh=False),
                "sslus, disk": Work(partial(loader, "disk"), fresh=False),
                "simplejpeg + the op": Work(partial(alone, True), fresh=False),
                "sslus, stream": Work(partial(loader, "stream"), fresh=False),
                "floor: write the views": Work(partial(write, size, num, cpu), fresh=False),
            }
            case = f"batches of {size}, {bench.kind} videos"
            rows = bench.compare(f"two views, {clock} time", case, "samples/s", works, repeats=9)
            for tier, peer in (("ram", "the op alone"), ("disk", "the op alone"),
                               ("stream", "simplejpeg + the op")):  # fmt: skip
                bench.ratio(f"batches of {size}, {clock} time: {tier} / {peer}",
                            rows[f"sslus, {tier}"], rows[peer], at_least=0.95)  # fmt: skip


def by_loader(shards: Path, size: int, num: int, cpu: bool, tier: str) -> Timed:
    """`num` batches, each made after the one before is taken: the background thread is the clock.

    What is ready at the start is taken before, and what is being made at the end waited for.
    """
    loader, batches = running(shards, size, tier)
    for _ in range(loader.ahead):
        next(batches)
    wall, process = time.perf_counter(), time.process_time()
    for _ in range(num):
        next(batches)
    seconds = time.perf_counter() - wall
    loader.pool.submit(int).result()
    made = num + loader.ahead
    return Timed(num * size, (time.process_time() - process) * num / made if cpu else seconds)


@functools.cache
def running(shards: Path, size: int, tier: str):
    import torch

    from sslus.ssl.loader import Loader
    from sslus.ssl.views import parse

    store = opened(shards, tier)
    loader = Loader(
        store, endless(store, size), parse(VIEWS), size=VIEW, seed=0, device=torch.device("cpu"),
        wanted_tier=tier,
    )  # fmt: skip
    return loader, iter(loader)


@functools.cache
def opened(shards: Path, tier: str):
    from sslus.ssl.loader import open_store

    return open_store(shards, tier)


def endless(store, size: int) -> Iterator:
    """Batches of all frames; of repeated ones where there are fewer than a batch."""
    from sslus.ssl.loader import Batch

    epoch = 0
    while True:
        order = np.random.default_rng(epoch).permutation(len(store))
        order = np.resize(order, max(size, len(order) // size * size))
        for indices in order.reshape(-1, size):
            yield Batch(epoch, indices, indices)
        epoch += 1


def op_alone(shards: Path, size: int, num: int, cpu: bool, decode: bool) -> Timed:
    import simplejpeg
    import torch

    from sslus.kernels.augment import views

    store = opened(shards, "ram")
    out, batches = views_of(size), list(itertools.islice(prepared(shards, size), num))
    frames, jpegs, decoded = torch.from_numpy(whole(shards)), jpegs_of(shards), frames_of(size)
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    for chosen, table in batches:
        index = chosen
        if decode:
            index = torch.arange(size)
            for place, i in zip(decoded.numpy(), chosen.tolist(), strict=True):
                place[:] = simplejpeg.decode_jpeg(jpegs[i], "GRAY")[..., 0]
        views(
            decoded if decode else frames, index.repeat(2), table, size=VIEW, mean=store.mean,
            std=store.std, out=out, threads=1,
        )  # fmt: skip
    return Timed(num * size, clock() - start)


@functools.cache
def prepared(shards: Path, size: int) -> Iterator:
    """Indices and tables of an epoch's batches, drawn before, again and again.

    As many frames as the loader goes through: a few would stay in the processor's caches.
    """
    import torch

    from sslus.ssl.views import draw, parse

    store, found = opened(shards, "ram"), []
    for batch in itertools.islice(endless(store, size), max(1, len(store) // size)):
        table = [draw(c, batch.first, v, 0, 0, SIZE, VIEW) for v, c in enumerate(parse(VIEWS))]
        found.append((torch.from_numpy(batch.first), torch.from_numpy(np.concatenate(table))))
    return itertools.cycle(found)


@functools.cache
def whole(shards: Path) -> np.ndarray:
    """The store's frames where the loader finds them too: in the system's cache."""
    store = opened(shards, "ram")
    return np.memmap(store.frames.filename, np.uint8, "c", shape=store.frames.shape)


@functools.cache
def jpegs_of(shards: Path) -> list[bytes]:
    from sslus.engine import tar

    found = []
    for path in sorted(shards.glob("*.tar")):
        data = path.read_bytes()
        found += [data[o : o + n] for o, n in (m["jpg"] for _, m in tar.read_index(path))]
    return found


@functools.cache
def views_of(size: int):
    import torch

    return torch.zeros(2 * size, 1, VIEW, VIEW)


@functools.cache
def frames_of(size: int):
    import torch

    return torch.zeros(size, SIZE, SIZE, dtype=torch.uint8)


def write(size: int, num: int, cpu: bool) -> Timed:
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    for i in range(num):
        views_of(size).fill_(i)
    return Timed(num * size, clock() - start)
