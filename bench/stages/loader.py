"""Batches through the loader, against the views op alone, on the same frames

256^2 grey -> two 224^2 float views, one thread, nothing else running; SimCLR's views with crops of
.2-1. ram and disk are the loader's tiers over a frame store; stream decodes the shards each time
and is compared with the decoder plus the op. In one turn, every work processes as many frames
as the loader draws views for at once; after its last batch, the loader's thread stops, so
that it takes nothing from the others. The order is another in every turn, since a work is slower
by up to 4 % after some than after others. Floor: writing as many bytes.
"""

import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import SIZE, Bench
from stages.store import jpegs

VIEW = 224
VIEWS = "simclr,min_area=0.2"
TURNS = 31
PEERS = {
    "sslus, ram": "the op alone",
    "sslus, disk": "the op alone",
    "sslus, stream": "the decoder + the op",
}


def measure(bench: Bench) -> None:
    import torch

    from sslus.ssl.loader import DRAWN

    torch.set_num_threads(1)
    for size in (64, 256):
        num = DRAWN // size
        works = {
            "sslus, ram": ByLoader(bench.shards, size, "ram"),
            "sslus, disk": ByLoader(bench.shards, size, "disk"),
            "the op alone": OpAlone(bench.shards, size, decode=False),
            "sslus, stream": ByLoader(bench.shards, size, "stream"),
            "the decoder + the op": OpAlone(bench.shards, size, decode=True),
            "floor: write the views": functools.partial(write, size),
        }
        seconds: dict[str, list[float]] = {key: [] for key in works}
        rng = np.random.default_rng(0)
        for turn in range(1 + (2 if bench.quick else TURNS)):
            for key in rng.permutation(list(works)):
                work, start = works[key], time.perf_counter()
                for _ in range(num):
                    work()
                getattr(work, "settle", int)()
                if turn:  # the first warms up
                    seconds[key].append(time.perf_counter() - start)
        case = f"batches of {size}, {bench.kind} videos"
        rows = {
            key: bench.add(
                "two views, in turns", key, case, "samples/s", [num * size / s for s in found]
            )
            for key, found in seconds.items()
        }
        bench.save(bench)
        for key, peer in PEERS.items():
            bench.ratio(f"batches of {size}: {key} / {peer}", rows[key], rows[peer], at_least=0.95)


class ByLoader:
    """Takes batches as fast as the loader's background thread makes them."""

    def __init__(self, shards: Path, size: int, tier: str):
        import torch

        from sslus.ssl.loader import Loader, open_store
        from sslus.ssl.views import parse

        store = open_store(shards, tier)
        self.loader = Loader(
            store, endless(store, size), parse(VIEWS), size=VIEW, seed=0,
            device=torch.device("cpu"), wanted_tier=tier,
        )  # fmt: skip
        self.batches = iter(self.loader)

    def __call__(self) -> None:
        next(self.batches)

    def settle(self) -> None:
        """Waits for the batches made ahead, so that a turn makes as many batches as it takes."""
        self.loader.pool.submit(int).result()


class OpAlone:
    """The op on its own. The indices and tables of an epoch's batches are drawn beforehand and
    reused. It covers as many frames as the loader: a few would stay in the processor's caches.
    """

    def __init__(self, shards: Path, size: int, decode: bool):
        import torch

        from sslus.ssl.loader import open_store
        from sslus.ssl.views import draw, parse

        self.store = store = open_store(shards, "ram")
        self.out, found = views_of(size), []
        for batch in itertools.islice(endless(store, size), max(1, len(store) // size)):
            table = [draw(c, batch.first, v, 0, 0, SIZE, VIEW) for v, c in enumerate(parse(VIEWS))]
            found.append((torch.from_numpy(batch.first), torch.from_numpy(np.concatenate(table))))
        self.batches = itertools.cycle(found)
        # The frames come from where the loader finds them too: the system's page cache.
        mapped = np.memmap(store.frames.filename, np.uint8, "c", shape=store.frames.shape)
        self.frames = torch.from_numpy(mapped)
        self.jpegs = jpegs(shards) if decode else None
        self.decoded = torch.zeros(size, SIZE, SIZE, dtype=torch.uint8)

    def __call__(self) -> None:
        import torch

        from sslus.engine.jpeg import decode
        from sslus.kernels.augment import views

        (index, table), frames = next(self.batches), self.frames
        if self.jpegs:
            frames, chosen = self.decoded, index.tolist()
            index = torch.arange(len(chosen))
            decode([self.jpegs[i] for i in chosen], frames.numpy())
        views(
            frames, index.repeat(2), table, size=VIEW, mean=self.store.mean, std=self.store.std,
            out=self.out, threads=1,
        )  # fmt: skip


def endless(store, size: int) -> Iterator:
    """Batches of all frames; if they are fewer than a batch, they are repeated."""
    from sslus.ssl.loader import Batch

    epoch = 0
    while True:
        order = np.random.default_rng(epoch).permutation(len(store))
        order = np.resize(order, max(size, len(order) // size * size))
        for indices in order.reshape(-1, size):
            yield Batch(epoch, indices, indices)
        epoch += 1


@functools.cache
def views_of(size: int):
    """Output memory like the loader's."""
    import torch

    from sslus.ssl.memory import large_pages

    return torch.from_numpy(large_pages(2 * size * VIEW**2)).view(2 * size, 1, VIEW, VIEW)


def write(size: int) -> None:
    views_of(size).fill_(0.5)
