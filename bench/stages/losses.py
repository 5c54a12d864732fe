"""two batches of projections -> loss and gradients

Against the definition in plain PyTorch with autograd, and lightly's losses where lightly can be
imported (`pip install --no-deps --target FOLDER lightly`, then PYTHONPATH=FOLDER).
Floor: the chosen form's matrix products alone. Memory: what a step needs beyond its inputs.
"""

import functools
import importlib.util
import multiprocessing
import re
from functools import partial
from pathlib import Path

from harness import Bench, Work

SCALARS = {
    "vicreg": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
    "barlow": {"off_diagonal": 0.005},
    "ntxent": {"temperature": 0.1},
    "infonce_queue": {"temperature": 0.2},
    "byol": {},
}
# (N, D): how many times faster than lightly, at least.
TARGETS = {
    "vicreg": {(256, 8192): 150, (1024, 8192): 20, (4096, 2048): 2},
    "barlow": {(256, 8192): 40, (1024, 8192): 7, (4096, 2048): 1},
}
LIGHTLY = {"vicreg": "VICRegLoss", "barlow": "BarlowTwinsLoss", "ntxent": "NTXentLoss"}


@functools.lru_cache(maxsize=1)
def tensors(shapes):
    import torch

    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).requires_grad_(i < 2) for i, s in enumerate(shapes)]


@functools.cache
def loss_of(name, who):
    if who == "lightly":
        import lightly.loss

        arguments = {"temperature": 0.1} if name == "ntxent" else {}
        return getattr(lightly.loss, LIGHTLY[name])(**arguments)
    from sslus.kernels.op import load_all

    which = "reference" if who == "definition" else "cpu"
    return partial(load_all()[name].run, which, **SCALARS[name])


def step(name, who, shapes, threads) -> int:
    """One loss and its gradients, as the backward of a projector asks for them."""
    import torch

    torch.set_num_threads(threads)
    inputs = tensors(shapes)
    num_gradients = 1 if name == "infonce_queue" else 2
    torch.autograd.grad(loss_of(name, who)(*inputs), inputs[:num_gradients])
    return 1


def products(name, shapes, threads) -> int:
    """The chosen form's multiplications: Gram matrices (N < D) or D x D ones, made whole."""
    import torch

    torch.set_num_threads(threads)
    with torch.no_grad():
        n, d = shapes[0]
        views = [z if n < d else z.T for z in tensors(shapes)]
        if name == "barlow" and n >= d:  # C is not symmetric
            c = views[0] @ views[1].T
            c @ views[0], c @ views[1]
            return 1
        for x in views:
            half = len(x) // 2  # three quarters of a symmetric matrix
            x[:half] @ x[:half].T
            lower = x[half:] @ x.T
            lower @ x, lower @ x
    return 1


def extra_mib(name, who, shapes, threads) -> float:
    """Peak memory of a step beyond its inputs, in a fresh process, after a small step."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_extra, args=(theirs, name, who, shapes, threads))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _extra(pipe, name, who, shapes, threads) -> None:
    step(name, who, tuple((8, 16) for _ in shapes), threads)
    tensors(shapes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    step(name, who, shapes, threads)
    pipe.send((_status("VmHWM") - before) / 1024)
    pipe.close()


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(bench: Bench) -> None:
    threads = min(2, bench.cores)
    peer = importlib.util.find_spec("lightly") is not None
    for name, targets in TARGETS.items():
        for (n, d), at_least in {(16, 64): 1}.items() if bench.quick else targets.items():
            shapes = ((n, d), (n, d))
            case = f"{name} N={n} D={d}"
            works = {
                who: Work(partial(step, name, who, shapes, threads), threads, fresh=False)
                for who in ("sslus", "definition", *(["lightly"] if peer else []))
            }
            floor = partial(products, name, shapes, threads)
            works["floor: the products"] = Work(floor, threads, fresh=False)
            rows = bench.compare("forward and backward", case, "s", works, repeats=3)
            bench.ratio(f"{case}: definition / sslus", rows["definition"], rows["sslus"])
            bench.ratio(f"{case}: sslus / floor", rows["sslus"], rows["floor: the products"])
            if peer:
                text = f"{case}: lightly / sslus"
                bench.ratio(text, rows["lightly"], rows["sslus"], at_least=at_least)
            if not bench.quick:
                memory(bench, name, shapes, threads, case)
    others(bench, threads)


def memory(bench: Bench, name, shapes, threads, case) -> None:
    (n, d), _ = shapes
    rows = [
        bench.add("peak extra memory", who, case, "MiB", [value], threads=threads)
        for who, value in [
            ("sslus", extra_mib(name, "sslus", shapes, threads)),
            ("definition", extra_mib(name, "definition", shapes, threads)),
            ("4 (N^2 + N D) floats", 16 * (n * n + n * d) / 2**20),
        ]
    ]
    bench.ratio(f"{case}: extra memory / 4 (N^2 + N D) floats", rows[0], rows[2], at_most=1)


def others(bench: Bench, threads) -> None:
    """For information."""
    n, d, m = (8, 16, 64) if bench.quick else (1024, 128, 65536)
    for name, shapes in {
        "ntxent": ((n, d),) * 2,
        "infonce_queue": ((n // 4, d), (n // 4, d), (m, d)),
        "byol": ((n, 2 * d),) * 4,
    }.items():
        whos = ["sslus", "definition"]
        if name in LIGHTLY and importlib.util.find_spec("lightly"):
            whos.append("lightly")
        works = {
            who: Work(partial(step, name, who, shapes, threads), threads, fresh=False)
            for who in whos
        }
        case = f"{name} {', '.join(f'{r} x {c}' for r, c in dict.fromkeys(shapes))}"
        rows = bench.compare("forward and backward", case, "s", works)
        for who in whos[1:]:
            bench.ratio(f"{name}: {who} / sslus", rows[who], rows["sslus"])
