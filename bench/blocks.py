"""Time other block sizes for the Triton kernels on this GPU: python bench/blocks.py [-o FILE]

The tables in kernels/gram_gpu.py and kernels/logits_gpu.py hold block sizes that compile without
register spills, kernels/augment/gpu.py two numbers; which are the fastest, only a GPU can tell. For
one entry at a time, others are tried in the losses that use it (loss and gradients), or in the
views, captured as a CUDA graph, so that launching them takes no time. Printed are, for every entry,
the fastest sizes and how many times as fast each case is with them. Sizes whose results differ, or
which the GPU cannot run, never win.

  -o FILE       every time measured, as JSON; rewritten after each entry
  --minutes N   after which no new entry is begun (default: none)
  --only TEXT   only entries whose names contain it
"""

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

Sizes = dict[str, int]  # with num_warps and num_stages
# (N, D) of vicreg and barlow; the targets of bench/stages/losses.py are among them.
SHAPES = ((256, 8192), (1024, 8192), (4096, 2048))
CONTRASTIVE = 512  # rows; the queue has 16 times as many
FRAMES, VIEW = 256, 224
# Relative to the largest. Sums are added in another order; bf16 also rounds other weights.
AGREE = {"fp32": 1e-4, "bf16": 1e-2}
CHOICES = {
    "columns": {"BN": (64, 128, 256), "BD": (16, 32, 64), "num_warps": (4, 8)},
    "multiply 64": {"BK": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "multiply 128": {"BK": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "gram_sum": {"BS": (32, 64), "num_warps": (4, 8)},
    "strip_sum": {"BS": (32, 64), "num_warps": (4, 8)},
    "apply": {"BN": (64, 128), "BD": (32, 64, 128), "BK": (32, 64), "num_stages": (2, 3)},
    "barlow_apply 256": {"BD": (16, 32, 64), "BK": (16, 32, 64), "num_stages": (2, 3)},
    "barlow_apply 128": {"BD": (32, 64), "BK": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "logits": {"BM": (64, 128), "BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "views": {"NUM_WARPS": (4, 8, 16), "PROGRAMS": (1, 2, 3, 4)},
}


@dataclass(frozen=True)
class Entry:
    """An entry of a table: where it is, and the losses that use it."""

    name: str  # "multiply 64, bf16"
    place: tuple  # in the table: a Kind, or a dtype and the largest D
    choices: str  # key of CHOICES
    cases: tuple[tuple[str, tuple[tuple[int, int], ...], str], ...]  # loss, shapes, dtype

    def get(self) -> Sizes:
        from sslus.kernels import gram_gpu, logits_gpu
        from sslus.kernels.augment import gpu as augment

        if self.choices == "views":
            return {name: getattr(augment, name) for name in CHOICES["views"]}
        if self.choices == "logits":
            return dict(logits_gpu.TABLES[self.place[0]][self.place[1]])
        blocks, num_warps, num_stages = gram_gpu.TABLES[self.place][self.choices]
        return blocks | {"num_warps": num_warps, "num_stages": num_stages}

    def set(self, sizes: Sizes) -> None:
        from sslus.kernels import gram_gpu, logits_gpu
        from sslus.kernels.augment import gpu as augment

        if self.choices == "views":
            for name, value in sizes.items():
                setattr(augment, name, value)
        elif self.choices == "logits":
            logits_gpu.TABLES[self.place[0]][self.place[1]] = dict(sizes)
        else:
            blocks = {k: v for k, v in sizes.items() if not k.startswith("num_")}
            value = blocks, sizes["num_warps"], sizes["num_stages"]
            gram_gpu.TABLES[self.place][self.choices] = value

    def candidates(self) -> list[Sizes]:
        """The present sizes, then all others that are worth a try."""
        now, choices = self.get(), CHOICES[self.choices]
        found = [now]
        for values in itertools.product(*choices.values()):
            sizes = now | dict(zip(choices, values, strict=True))
            if sizes not in found:
                found.append(sizes)
        return found


def entries(shapes=SHAPES, contrastive: int = CONTRASTIVE) -> list[Entry]:
    """Those used where N and D are multiples of 16. Which ones vicreg and barlow use is recorded,
    on tensors without memory."""
    import torch

    from sslus.kernels import gram_gpu, logits_gpu
    from sslus.kernels.ranks import Ranks

    users: dict[tuple, list] = {}
    launch = gram_gpu._launch
    for dtype, (n, d) in itertools.product(("bf16", "fp32"), shapes):
        for loss in ("vicreg", "barlow"):
            case = loss, ((n, d), (n, d)), dtype

            def note(kernel, name, *args, kind, case=case, **flags):
                known = users.setdefault((kind, name, case[2]), [])
                if case not in known:
                    known.append(case)

            gram_gpu._launch = note
            try:
                factors = gram_gpu.Loss(loss == "barlow", n, d, off=1.0)
                form = gram_gpu.gram if n < d else gram_gpu.tiled
                za, zb = (torch.empty(n, d, dtype=_dtype(dtype), device="meta") for _ in "ab")
                form(za, zb, None, factors, Ranks())
            finally:
                gram_gpu._launch = launch
    found = [
        Entry(f"{name}, {dtype}", kind, name, tuple(cases))
        for (kind, name, dtype), cases in users.items()
        if name in CHOICES
    ]
    for dtype in ("bf16", "fp32"):
        for most in logits_gpu.TABLES[_dtype(dtype)]:
            d = 1024 if most == math.inf else int(most)
            rows, queue = (contrastive, d), (16 * contrastive, d)
            cases = ("ntxent", (rows, rows), dtype), ("infonce_queue", (rows, rows, queue), dtype)
            name = f"logits up to D={most}, {dtype}"
            found.append(Entry(name, (_dtype(dtype), most), "logits", cases))
    cases = tuple(("views", ((FRAMES, 256),), dtype) for dtype in ("bf16", "fp32"))
    return [*found, Entry("views", (), "views", cases)]


def _dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def work(case, device: str) -> Callable:
    """A function without arguments, which returns the loss and its gradients, or the views."""
    import torch
    from stages.losses import SCALARS

    from sslus.kernels.op import load_all
    from sslus.kernels.ranks import Ranks

    loss, shapes, dtype = case
    if loss == "views":
        return views(*shapes[0], _dtype(dtype), device)
    g = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(s, generator=g, device=device).to(_dtype(dtype)) for s in shapes]
    op = load_all()[loss]
    return lambda: op.gpu(*tensors, ranks=Ranks(), **SCALARS[loss])


def views(num: int, side: int, dtype, device: str) -> Callable:
    """Two views, 224 x 224, of each of `num` frames, by the preset `simclr`."""
    import numpy as np
    import torch

    from sslus.kernels.augment.gpu import augment_gpu
    from sslus.ssl.views import draw, parse

    g = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (num, side, side), generator=g, dtype=torch.uint8).to(device)
    first = np.arange(num)
    tables = [draw(c, first, v, 0, 0, side, VIEW) for v, c in enumerate(parse("simclr"))]
    params = torch.from_numpy(np.concatenate(tables)).to(device)
    index = torch.arange(num, device=device).repeat(2)
    out = torch.empty(2 * num, 1, VIEW, VIEW, dtype=dtype, device=device)

    def run():
        augment_gpu(frames, index, params, out, mean=0.2, std=0.2)
        return (out,)

    return run


def on_gpu(run: Callable) -> float:
    """Seconds of the device, the median of many replays of a graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, return_mode="median") / 1e3


def compile_ahead(entry: Entry, sizes: Sizes) -> None:
    """In a process of its own: what it compiles is in Triton's cache for the one that measures."""
    entry.set(sizes)
    for case in entry.cases:
        try:
            work(case, "cuda")()
        except Exception:  # the measuring process will meet it again, and tell
            continue


def same(got, want, dtype: str) -> bool:
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    return all(bool(((a - b).abs().max() <= AGREE[dtype] * b.abs().max()).cpu()) for a, b in pairs)


def measure(entry: Entry, candidates: list[Sizes], timed: Callable, device: str) -> list[dict]:
    """A row for each of the candidates, the table's own first: the sizes, and either the seconds
    of each case or why there are none."""
    own, rows = entry.get(), []
    runs = {case: work(case, device) for case in entry.cases}
    wanted = {}  # the results with the first sizes that give any
    try:
        for sizes in candidates:
            row = {"entry": entry.name, "sizes": sizes}
            entry.set(sizes)
            try:
                for case, run in runs.items():
                    got = [x.clone() for x in run()]
                    if not same(got, wanted.setdefault(case, got), case[2]):
                        raise ArithmeticError(f"other results in {text(case)}")
                row["seconds"] = {text(case): timed(run) for case, run in runs.items()}
            except Exception as e:  # Triton's own, for example where shared memory is too small
                row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
            rows.append(row)
    finally:
        entry.set(own)
    return rows


def text(case) -> str:
    loss, shapes, dtype = case
    return f"{loss} {shapes[0][0]} x {shapes[0][1]} {dtype}"


def summary(rows: list[dict]) -> str:
    """The fastest sizes of one entry, and how many times as fast each case is with them."""

    def gains(row: dict) -> list[float]:
        own = rows[0]["seconds"]
        return [own[case] / seconds for case, seconds in row["seconds"].items()]

    able = [row for row in rows if "seconds" in row]
    if not able or able[0] is not rows[0]:
        return f"{rows[0]['entry']}: the table's own sizes failed: {rows[0]['failed']}"
    best = max(able, key=lambda row: math.prod(gains(row)))
    sizes = " ".join(f"{k}={v}" for k, v in best["sizes"].items())
    rates = ", ".join(
        f"{case} {seconds * 1e6:.1f} us ({gain:.2f})"
        for (case, seconds), gain in zip(best["seconds"].items(), gains(best), strict=True)
    )
    kept = "the table's own" if best is rows[0] else "better"
    return f"{best['entry']}: {sizes}, {kept} of {len(able)} of {len(rows)}: {rates}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N")
    parser.add_argument("--only", default="", metavar="TEXT")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("blocks: no GPU; their times are all that this measures", file=sys.stderr)
        return 1
    from harness import versions
    from run import write

    chosen = [entry for entry in entries() if options.only in entry.name]
    if not chosen:
        names = "; ".join(entry.name for entry in entries())
        print(f"blocks: no entry contains {options.only!r}; there are {names}", file=sys.stderr)
        return 1
    end, rows = time.monotonic() + 60 * options.minutes, []
    # Compiling takes most of the time, and as many processes as there are cores.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), context) as pool:
        for number, entry in enumerate(chosen):
            if time.monotonic() > end:
                left = "; ".join(entry.name for entry in chosen[number:])
                print(f"no time left for {left}", flush=True)
                break
            candidates = entry.candidates()
            list(pool.map(compile_ahead, itertools.repeat(entry), candidates))
            rows += (found := measure(entry, candidates, on_gpu, "cuda"))
            print(summary(found), flush=True)
            if options.out:
                facts = {"device": torch.cuda.get_device_name(), "versions": versions()}
                write(options.out, facts | {"rows": rows})
    return 0


# Worker processes import this file again.
if __name__ == "__main__":
    sys.exit(main())
