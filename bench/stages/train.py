"""frame store -> training steps of every method, two views per sample

Against a ceiling that no loader can beat: the same model, loss and optimiser on one batch of ready
views that stays on the device. Also against the usual loops: torchvision transforms in a PyTorch
DataLoader and a plain timm model, with lightly's heads and losses (if lightly can be imported) and
with this project's definitions in plain PyTorch, which are the losses of solo-learn and of the
authors' code. Floor: the step's multiplications at the rate of a bare matrix product.
"""

import importlib.util
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

from harness import Bench, Row, Timed, Work

AT_LEAST = 0.97  # of the ceiling
CPU_BATCH, TURNS = 32, 40  # seven methods take a quarter of an hour, with the usual loops
# Steps of a usual loop on a CPU, and how many of them are not timed: each worker process prefetches
# two batches, which would be most of the data of a few steps.
USUAL_STEPS, USUAL_FIRST = 16, 8
USUAL = ("vicreg", "barlowtwins", "simclr")  # only these usual loops are measured: they are slow
WIDE = ("vicreg", "barlowtwins")  # on a GPU with the projector of their papers
# Samples/s, two views each, bf16. ResNet-50: MLPerf's 7,005 images/s on an H100 are 3,500
# samples/s. ViT: others report 2,680 for forward and backward alone, and 871 with their loop.
ON_AN_H200 = {(name, "resnet50", 256): 3000 for name in USUAL} | {
    ("barlowtwins", "vit_small_patch16_224", 256): 2600
}


@dataclass
class Setting:
    """One training run's settings, and the parts of a bare step of it. Can be pickled."""

    shards: Path
    run: Path
    device: str
    steps: int
    log_every: int
    threads: int | None
    settings: object
    method_config: object

    def sslus(self) -> Timed:
        """`sslus.ssl.train`, timed by its own log. The first line includes the start-up and is left
        out; the last line, too, includes steps only, since the checkpoint follows it."""
        self.train(log_every=self.log_every)
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").open()][1:]
        batch = self.settings.batch_size
        seconds = sum(self.log_every * batch / line["samples_per_second"] for line in lines)
        return Timed(self.amount, seconds)

    def train(self, report=None, **options) -> None:
        """A run without intermediate checkpoints and without curves, whose drawing takes longer
        than the rest."""
        from sslus.ssl.train import Options, train

        shutil.rmtree(self.run, ignore_errors=True)
        with mock.patch("sslus.ssl.curves.draw"):
            train(
                self.shards, self.settings, self.method_config, self.run, device=self.device,
                threads=self.threads, report=report,
                options=Options(checkpoint_every=self.steps + 1, keep=0, **options),
            )  # fmt: skip

    @property
    def amount(self) -> int:
        return (self.steps - self.log_every) * self.settings.batch_size

    @cached_property
    def state(self):
        import torch

        from sslus.engine.store import FrameStore
        from sslus.ssl.state import State
        from sslus.ssl.world import World

        if self.threads:
            torch.set_num_threads(self.threads)
        store = FrameStore.open(self.shards)
        world = World(torch.device(self.device))
        grey = store.mean, store.std
        return State.build(self.settings, self.method_config, world, grey=grey)

    def bare(self, views) -> None:
        """One update and nothing else; on a GPU replayed from a CUDA graph, as in the loop."""
        if self.settings.step == "graph":
            self.graph([views], self.settings.lr)
        else:
            self.step(views)

    def step(self, views) -> None:
        import torch

        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
            loss = self.state.method(views).loss
        self.update(loss)

    @cached_property
    def graph(self):
        from sslus.ssl.step import Step

        return Step(self.state, self.settings, "graph")

    def update(self, loss) -> None:
        loss.backward()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.method.after_step(1, self.steps)

    @cached_property
    def ready(self):
        """Views of the first frames, as the loader makes them."""
        import numpy as np
        import torch

        from sslus.engine.store import FrameStore
        from sslus.ssl.loader import Batch, Loader
        from sslus.ssl.views import parse

        s = self.settings
        with Loader(
            FrameStore.open(self.shards), iter(()), parse(s.views), size=s.image_size,
            seed=s.seed, device=torch.device(self.device),
        ) as loader:  # fmt: skip
            frames = np.arange(s.batch_size)
            return loader.at_once(Batch(0, frames, frames))

    def in_turns(self) -> tuple[list[float], list[float]]:
        """Seconds of each of the loop's steps, and of a bare step after each of them.

        On a CPU, whole runs differ by more than the difference to be measured. The loader makes a
        batch when one is taken, so it works during the loop's steps, not during the bare ones.
        """
        loop, bare, views = [], [], self.ready

        def turn(samples: int, total: int, note: str) -> None:
            nonlocal left
            loop.append(time.perf_counter() - left)
            start = time.perf_counter()
            self.bare(views)
            left = time.perf_counter()
            bare.append(left - start)

        left = time.perf_counter()
        self.train(report=turn)
        return loop[self.log_every :], bare[self.log_every :]

    def ceiling(self) -> Timed:
        ready = self.ready
        found = self._steps((ready for _ in range(self.steps)), self.bare)
        # With 1024 frames a graph holds two thirds of a GPU's memory, which the next turn needs.
        self.__dict__.pop("graph", None)
        return found

    def usual(self, whose: str, workers: int) -> Timed:
        """The usual loop: a Dataset that transforms one frame at a time, in worker processes."""
        import torch
        from torch.utils.data import DataLoader, RandomSampler

        from sslus.engine.store import FrameStore
        from sslus.ssl.loader import Views
        from sslus.ssl.small_maps import SmallMapConv2d

        s = self.settings
        frames = Frames(FrameStore.open(self.shards), s.image_size)
        sampler = RandomSampler(frames, replacement=True, num_samples=s.batch_size * self.steps)
        loader = DataLoader(
            frames, s.batch_size, sampler=sampler, num_workers=workers,
            pin_memory=self.device == "cuda",
        )  # fmt: skip
        step = self.step if whose == "definition" else self.lightly
        for module in self.state.backbone.modules():
            if type(module) is SmallMapConv2d:
                module.__class__ = torch.nn.Conv2d  # timm's, as everybody else has it

        def views():
            for batch in loader:
                va, vb = (
                    v.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                    for v in batch
                )
                yield Views(va, vb, None, None, None)

        before = os.environ.get("SSLUS_KERNELS", "auto")
        os.environ["SSLUS_KERNELS"] = "reference" if whose == "definition" else before
        try:
            return self._steps(views(), step)
        finally:
            os.environ["SSLUS_KERNELS"] = before

    @cached_property
    def lightly_parts(self):
        """lightly's projection head, as wide as ours, and its loss."""
        from lightly import loss
        from lightly.models.modules import heads

        from sslus.ssl.heads import widths

        first, *_, last = widths(self.method_config.projector)
        num = self.state.backbone.num_features
        head, criterion = {
            "vicreg": (heads.VICRegProjectionHead, loss.VICRegLoss),
            "barlowtwins": (heads.BarlowTwinsProjectionHead, loss.BarlowTwinsLoss),
            "simclr": (partial(heads.SimCLRProjectionHead, num_layers=3), loss.NTXentLoss),
        }[self.settings.method]
        head = head(num, first, last).to(self.device).train()
        self.state.method.projector = head  # replaces ours, so that the optimiser updates it
        from sslus.ssl import optimizers

        s = self.settings
        self.state.optimizer = optimizers.make(s.optimizer, self.state.method, s.lr, s.weight_decay)
        return head, criterion()

    def lightly(self, views) -> None:
        import torch

        head, criterion = self.lightly_parts
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
            za, zb = (head(self.state.backbone(v)) for v in views[:2])
            loss = criterion(za, zb)
        self.update(loss)

    def _steps(self, batches, step) -> Timed:
        """Steps on all batches; the first `log_every` are not timed, as in `sslus`."""
        import torch

        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        start = None
        for i, views in enumerate(batches):
            if i == self.log_every:
                wait()
                start = time.perf_counter()
            step(views)
        wait()
        return Timed(self.amount, time.perf_counter() - start)

    def flops_per_sample(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.step(self.ready)
        return counter.get_total_flops() / self.settings.batch_size

    def products(self, flops_per_sample: float) -> Timed:
        """The time of as many multiplications as the steps have, in large matrix products."""
        import torch

        cuda, bf16 = self.device == "cuda", self.settings.precision == "bf16"
        side = 8192 if cuda else 2048
        # Random numbers, because products of equal numbers take less power, and clocks rise.
        a = torch.randn(side, side, device=self.device, dtype=torch.bfloat16 if bf16 else None)
        wait = torch.cuda.synchronize if cuda else lambda: None
        a @ a
        wait()
        start, count = time.perf_counter(), 50 if cuda else 3
        for _ in range(count):
            a @ a
        wait()
        rate = count * 2 * side**3 / (time.perf_counter() - start)
        return Timed(self.amount, self.amount * flops_per_sample / rate)

    def __getstate__(self):  # without the models, which another process builds anew
        return {k: v for k, v in vars(self).items() if k in self.__dataclass_fields__}


class Frames:
    """The store as a PyTorch Dataset: two views of one frame, by torchvision's transforms."""

    def __init__(self, store, image_size: int):
        import torch
        from torchvision.transforms import v2

        self.store = store
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(0.2, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4)], p=0.8),
                v2.RandomApply([v2.GaussianBlur(13, sigma=(0.1, 2.0))], p=0.5),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([store.mean], [store.std]),
            ]
        )

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int):
        import torch

        frame = torch.from_numpy(self.store.frames[index].copy())[None]
        return self.transform(frame), self.transform(frame)


def measure(bench: Bench) -> None:
    import torch

    from sslus.ssl import methods

    # As in `train`; otherwise the ceiling would be slower than the loop.
    torch.backends.cudnn.benchmark = bench.device == "cuda"
    names = sorted(methods.names(), key=lambda name: name not in USUAL)
    for name in names:
        others: list[dict] = [{}]
        if bench.device == "cuda" and name in USUAL and not bench.quick:
            others.append({"batch_size": 1024})
        if bench.device == "cuda" and name == "barlowtwins" and not bench.quick:
            others.append({"backbone": "vit_small_patch16_224"})
        for other in others:
            what = ", ".join([name, *map(str, other.values())])
            bench.attempt(what, partial(measure_method, bench, name, **other))


def measure_method(bench: Bench, name: str, **other) -> None:
    """other: settings that replace the defaults."""
    import torch

    from sslus.engine.store import FrameStore
    from sslus.ssl import methods
    from sslus.ssl.train import Settings

    num = len(FrameStore.open(bench.shards))
    cuda = bench.device == "cuda"
    steps, log_every = (40, 10) if cuda and not bench.quick else (6, 2)
    # PyTorch's threads spin while they wait: on a shared machine, tiny layers become very slow.
    threads = 1 if bench.quick else None
    if threads:
        torch.set_num_threads(threads)
    values, method_config = methods.recipe(name, "default")
    # "auto" on a GPU would try and compile the ways of running a step anew in each repeat.
    wanted = Settings(method=name, max_steps=steps, step="graph" if cuda else "auto", **values)
    if bench.quick:
        wanted = replace(wanted, backbone="resnet10t", image_size=32, batch_size=4)
        if hasattr(method_config, "projector"):
            method_config = replace(method_config, projector="64-64-64")
    elif cuda:
        if name in WIDE:
            method_config = replace(method_config, projector="8192-8192-8192")
    else:
        wanted = replace(wanted, batch_size=CPU_BATCH)
    settings = replace(wanted, **other).resolved(torch.device(bench.device), num)
    one = Setting(
        bench.shards, bench.scratch / "run", bench.device, steps, log_every, threads, settings,
        method_config,
    )  # fmt: skip
    case = (
        f"{settings.method}, {settings.backbone}, {settings.image_size} px, batch"
        f" {settings.batch_size}, {settings.precision}"
    )
    work = partial(
        Work, threads=torch.get_num_threads(), device=bench.device, fresh=not (cuda or bench.quick)
    )
    sslus = work(one.sslus, peak_mib=gpu_peak_mib(one))
    if cuda:
        works = {"sslus": sslus, "ceiling": work(one.ceiling)}
        rows = bench.compare("steps", case, "samples/s", works, repeats=3)
    else:
        rows = steps_in_turns(bench, case, replace(one, steps=TURNS if not bench.quick else 6))
    which = ", ".join([name, *map(str, other.values())])
    bench.ratio(f"{which}: sslus / ceiling", rows["sslus"], rows["ceiling"], at_least=AT_LEAST)
    if least := ON_AN_H200.get((name, settings.backbone, settings.batch_size)) if cuda else None:
        bench.ratio(f"{which}: samples/s", rows["sslus"], at_least=least)
    if name in USUAL and not other and (not bench.quick or name == USUAL[0]):
        if not cuda and not bench.quick:
            longer = replace(settings, max_steps=USUAL_STEPS)
            one = replace(one, steps=USUAL_STEPS, log_every=USUAL_FIRST, settings=longer)
            sslus = work(one.sslus)
        against_usual_loops(bench, name, case, one, sslus, work)


def steps_in_turns(bench: Bench, case: str, one: Setting) -> dict[str, Row]:
    import torch

    one = replace(one, settings=replace(one.settings, max_steps=one.steps))
    loop, bare = one.in_turns()
    rows = {
        key: bench.add(
            "steps, in turns", key, case, "samples/s",
            [one.settings.batch_size / s for s in seconds], threads=torch.get_num_threads(),
        )
        for key, seconds in (("sslus", loop), ("ceiling", bare))
    }  # fmt: skip
    bench.save(bench)
    return rows


def against_usual_loops(bench: Bench, name: str, case: str, one: Setting, sslus, work) -> None:
    workers = 1 if bench.quick else min(bench.cores, 16)
    flops = one.flops_per_sample()
    works = {
        "sslus": sslus,
        "floor: bare matrix products": replace(work(partial(one.products, flops)), fresh=False),
        "definition + DataLoader": work(partial(one.usual, "definition", workers)),
    }
    if importlib.util.find_spec("lightly"):
        other = replace(one)  # with its own model, for lightly's head
        works["lightly + DataLoader"] = work(partial(other.usual, "lightly", workers))
    rows = bench.compare("steps", case, "samples/s", works, repeats=2)
    for peer in ("definition + DataLoader", "lightly + DataLoader"):
        if peer in rows:
            bench.ratio(f"{name}: sslus / {peer}", rows["sslus"], rows[peer])
    bench.ratio(f"{name}: sslus / floor", rows["sslus"], rows["floor: bare matrix products"])


def gpu_peak_mib(one: Setting) -> float | None:
    """GPU memory of the run; None on the CPU."""
    import torch

    if one.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    one.sslus()
    return torch.cuda.max_memory_allocated() / 2**20
