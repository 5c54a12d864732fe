"""frame store -> training steps, two views a sample

Against the same step on one batch of ready views that stays on the device (what no loader can
beat), and the same step fed by torchvision transforms in a PyTorch DataLoader.
Floor: the step's multiplications at the rate of a bare matrix product.
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from harness import Bench, Timed, Work


@dataclass
class Setting:
    """One training run's settings, and what a bare step of it is made of."""

    shards: Path
    run: Path
    device: str
    steps: int
    log_every: int
    threads: int | None
    settings: object
    method_config: object

    def sslus(self) -> Timed:
        """`sslus.ssl.train`, timed by its own log. The first line holds the start, so it is left
        out; the last holds nothing but steps either, as the checkpoint follows it."""
        from sslus.ssl.train import train

        shutil.rmtree(self.run, ignore_errors=True)
        train(
            self.shards, self.settings, self.method_config, self.run, device=self.device,
            threads=self.threads, log_every=self.log_every, checkpoint_every=self.steps + 1,
        )  # fmt: skip
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").open()][1:]
        batch = self.settings.batch_size
        seconds = sum(self.log_every * batch / line["samples_per_second"] for line in lines)
        return Timed(self.amount, seconds)

    @property
    def amount(self) -> int:
        return (self.steps - self.log_every) * self.settings.batch_size

    @cached_property
    def step(self):
        """One update of a model of its own: step(va, vb)."""
        import torch

        from sslus.ssl import backbones, methods, optimizers

        s = self.settings
        backbone = backbones.build(s.backbone, s.image_size, s.seed)
        method = methods.load(s.method).Method(backbone.num_features, self.method_config)
        backbone.to(self.device, memory_format=torch.channels_last).train()
        method.to(self.device).train()
        optimizer = optimizers.make(s.optimizer, (backbone, method), s.lr, s.weight_decay)
        bf16 = s.precision == "bf16"

        def step(va, vb) -> None:
            with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                loss, _ = method(backbone(va), backbone(vb))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    @cached_property
    def ready(self):
        import torch

        s = self.settings
        generator = torch.Generator().manual_seed(0)
        views = torch.randn(2, s.batch_size, 1, s.image_size, s.image_size, generator=generator)
        return [v.to(self.device).contiguous(memory_format=torch.channels_last) for v in views]

    def ceiling(self) -> Timed:
        return self._steps(self.ready for _ in range(self.steps))

    def dataloader(self, workers: int) -> Timed:
        """The usual loop: a Dataset that transforms one frame, worker processes."""
        import torch
        from torch.utils.data import DataLoader, RandomSampler

        from sslus.engine.store import FrameStore

        s = self.settings
        frames = Frames(FrameStore.open(self.shards), s.image_size)
        sampler = RandomSampler(frames, replacement=True, num_samples=s.batch_size * self.steps)
        loader = DataLoader(
            frames, s.batch_size, sampler=sampler, num_workers=workers,
            pin_memory=self.device == "cuda",
        )  # fmt: skip
        return self._steps(
            [v.to(self.device, non_blocking=True, memory_format=torch.channels_last) for v in batch]
            for batch in loader
        )

    def _steps(self, batches) -> Timed:
        """Steps on all batches; the time of the first `log_every` is left out, as above."""
        import torch

        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        start = None
        for i, (va, vb) in enumerate(batches):
            if i == self.log_every:
                wait()
                start = time.perf_counter()
            self.step(va, vb)
        wait()
        return Timed(self.amount, time.perf_counter() - start)

    def flops_per_sample(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.step(*self.ready)
        return counter.get_total_flops() / self.settings.batch_size

    def products(self, flops_per_sample: float) -> Timed:
        """As many multiplications as the steps have, in large square matrix products."""
        import torch

        cuda, bf16 = self.device == "cuda", self.settings.precision == "bf16"
        side = 8192 if cuda else 2048
        a = torch.ones(side, side, device=self.device, dtype=torch.bfloat16 if bf16 else None)
        wait = torch.cuda.synchronize if cuda else lambda: None
        a @ a
        wait()
        start, count = time.perf_counter(), 50 if cuda else 3
        for _ in range(count):
            a @ a
        wait()
        rate = count * 2 * side**3 / (time.perf_counter() - start)
        return Timed(self.amount, self.amount * flops_per_sample / rate)


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

    from sslus.engine.store import FrameStore
    from sslus.ssl import methods
    from sslus.ssl.train import Settings

    num = len(FrameStore.open(bench.shards))
    steps, log_every = (40, 10) if bench.device == "cuda" and not bench.quick else (6, 2)
    # PyTorch's threads wait for each other by spinning: on a shared machine tiny layers crawl.
    threads = 1 if bench.quick else None
    if threads:
        torch.set_num_threads(threads)
    wanted = Settings(max_steps=steps)
    method_config = methods.load(wanted.method).Config()
    if bench.quick:
        wanted = replace(wanted, backbone="resnet10t", image_size=32, batch_size=4)
        method_config = replace(method_config, projector="64-64-64")
    settings = wanted.resolved(torch.device(bench.device), num)
    one = Setting(
        bench.shards, bench.scratch / "run", bench.device, steps, log_every, threads, settings,
        method_config,
    )  # fmt: skip
    workers = 1 if bench.quick else min(bench.cores, 16)
    flops = one.flops_per_sample()
    case = (
        f"{settings.method}, {settings.backbone}, {settings.image_size} px, batch"
        f" {settings.batch_size}, {settings.precision}"
    )
    work = partial(Work, threads=torch.get_num_threads(), device=bench.device, fresh=False)
    rows = bench.compare(
        "steps", case, "samples/s",
        {
            "sslus": work(one.sslus, peak_mib=gpu_peak_mib(one)),
            "ceiling: ready views": work(one.ceiling),
            "torchvision + DataLoader": work(partial(one.dataloader, workers)),
            "floor: bare matrix products": work(partial(one.products, flops)),
        },
        repeats=3,
    )  # fmt: skip
    bench.ratio("sslus / ceiling", rows["sslus"], rows["ceiling: ready views"])
    bench.ratio("sslus / DataLoader", rows["sslus"], rows["torchvision + DataLoader"])
    floor = rows["floor: bare matrix products"]
    bench.ratio("ceiling / floor", rows["ceiling: ready views"], floor)


def gpu_peak_mib(one: Setting) -> float | None:
    """GPU memory of the run; None on the CPU."""
    import torch

    if one.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    one.sslus()
    return torch.cuda.max_memory_allocated() / 2**20
