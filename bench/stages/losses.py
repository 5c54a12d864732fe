"""two batches of projections -> loss and gradients; images -> masked images and masked error

Against the definition in plain PyTorch with autograd, on a GPU also under torch.compile, and
against lightly's losses if lightly is installed (`pip install sslus[bench]`). Floor: the chosen
form's matrix products alone; bench/roofline.py plots them. Memory: what a step needs beyond its
inputs. Masks: against a mask tensor and F.mse_loss.

On a GPU, one measurement is as many steps as take 0.05 s, launched without waiting and synchronised
at the end: it gives the larger of the host's launch time and the device's run time. The definition
multiplies in float32 whatever the dtype of its inputs, which matches the accuracy of the ops; TF32
has a row of its own. What does not fit into the device's memory is left out, with a message.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import Bench, Often, Work, in_a_process, status_kib

SCALARS = {
    "vicreg": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
    "barlow": {"off_diagonal": 0.005},
    "ntxent": {"temperature": 0.1},
    "infonce_queue": {"temperature": 0.2},
    "byol": {},
}
# {(N, D): the least speed-up over lightly}.
TARGETS = {
    "vicreg": {(256, 8192): 150, (1024, 8192): 20, (4096, 2048): 2},
    "barlow": {(256, 8192): 40, (1024, 8192): 7, (4096, 2048): 1},
}
LIGHTLY = {"vicreg": "VICRegLoss", "barlow": "BarlowTwinsLoss", "ntxent": "NTXentLoss"}
# On a GPU, sizes with a target come first, and the masks after the first size, in case the time
# runs out.
GPU_SIZES = (
    (256, 8192), (1024, 8192), (4096, 8192), (4096, 2048), (4096, 16384), (1024, 16384),
    (256, 2048), (256, 16384), (1024, 2048),
)  # fmt: skip
GPU_DTYPES = ("bf16", "fp32")
GPU_TARGETS = {"definition": 10, "torch.compile": 4}  # at N = 256, D = 8192
OF_MATMUL_RATE = 0.7  # where N >= 1024 and D >= 8192
COPY = 1 << 28  # bytes; too large for any cache
FLOOR = "floor: the products"


@dataclass(frozen=True)
class Case:
    """A loss on tensors of these shapes."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    threads: int = 1
    device: str = "cpu"
    dtype: str = "fp32"

    @property
    def text(self) -> str:
        """The case in words, on a GPU with the dtype; bench/roofline.py parses it."""
        n, d = self.shapes[0]
        size = f"N={n} D={d}"
        if self.name not in TARGETS:
            size = ", ".join(f"{r} x {c}" for r, c in dict.fromkeys(self.shapes))
        return f"{self.name} {size}" + (f" {self.dtype}" if self.device != "cpu" else "")


def form_flops(n: int, d: int, dtype: str | None) -> float:
    """Operations of a form's products for both views: x x^T (one triangle) and (x x^T) x.

    That is 3 N^2 D multiply-adds, or 3 N D^2 if N >= D, of two operations each. dtype: that of
    inputs on a GPU, where a product of fp32 takes three TF32 products, and one of bf16 takes three
    products of bf16 planes, or four for x x^T if N < D. None: on a CPU.
    """
    planes = {None: 1, "fp32": 3, "bf16": 10 / 3 if n < d else 3}[dtype]
    return 6 * planes * n * d * min(n, d)


def form_bytes(n: int, d: int, dtype: str | None) -> float:
    """Bytes that a form's passes move: each tensor once per pass, if no pass finds it in a cache.

    Inputs are read for the planes and for the gradient of the invariance term; gradients are
    written. Planes, four bytes per element, are written once, and read for x x^T and for the
    gradient, if N >= D for every 512 columns. The float32 N x N or D x D matrices are written and
    read.
    """
    strips = 1 if n < d else -(-d // 512)
    side = min(n, d)
    given = (2 if dtype == "bf16" else 4) * 6 * n * d
    return given + 4 * (2 * n * d * (1 + 2 * strips) + 4 * side * side)


def floor_flops(name: str, n: int, d: int, dtype: str | None) -> float:
    """Operations of `products`."""
    if dtype is not None:
        return 8 * n * d * min(n, d)
    return (6 if name == "barlow" and n >= d else 7) * n * d * min(n, d)


# ---------------------------------------------------------------- what is timed


@functools.lru_cache(maxsize=1)
def tensors(shapes, device="cpu", dtype="fp32"):
    import torch

    g = torch.Generator(device).manual_seed(0)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return [
        torch.randn(s, generator=g, device=device).to(kind).requires_grad_(i < 2)
        for i, s in enumerate(shapes)
    ]


def inputs(case: Case):
    return tensors(case.shapes, case.device, case.dtype)


def loss_of(case: Case, who: str) -> Callable:
    if who == "lightly":
        import lightly.loss

        arguments = {"temperature": 0.1} if case.name == "ntxent" else {}
        return getattr(lightly.loss, LIGHTLY[case.name])(**arguments)
    from sslus.kernels.op import load_all

    ours = "gpu" if case.device == "cuda" else "cpu"
    which = ours if who == "sslus" else "reference"
    loss = partial(load_all()[case.name].run, which, **SCALARS[case.name])
    if who == "torch.compile":
        import torch

        torch.compiler.reset()  # after eight shapes it would fall back to uncompiled code
        return torch.compile(loss, dynamic=False)
    return loss


def step(case: Case, loss: Callable) -> int:
    """One loss and its gradients, as the backward pass of a projector needs them."""
    import torch

    torch.set_num_threads(case.threads)
    given = inputs(case)
    num_gradients = 1 if case.name == "infonce_queue" else 2
    torch.autograd.grad(loss(*given), given[:num_gradients])
    return 1


def products(case: Case) -> int:
    """The chosen form's products alone, of N x N (N < D) or D x D matrices. On a CPU three quarters
    of a symmetric matrix are computed, on a GPU all of it."""
    import torch

    torch.set_num_threads(case.threads)
    with torch.no_grad():
        n, d = case.shapes[0]
        views = [z if n < d else z.T for z in inputs(case)]
        if case.device != "cpu":  # plain products, with neither planes nor symmetry, for the rate
            for x in views:
                (x @ x.T) @ x
            return 1
        if case.name == "barlow" and n >= d:  # C is not symmetric
            c = views[0] @ views[1].T
            c @ views[0], c @ views[1]
            return 1
        for x in views:
            half = len(x) // 2  # computes three quarters of a symmetric matrix
            x[:half] @ x[:half].T
            lower = x[half:] @ x.T
            lower @ x, lower @ x
    return 1


def in_tf32(run: Callable[[], object]) -> None:
    import torch

    torch.set_float32_matmul_precision("high")
    try:
        run()
    finally:
        torch.set_float32_matmul_precision("highest")


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, which takes the host a single launch."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def warmed(run: Callable[[], float], small: Callable[[], object]) -> Callable[[], float]:
    """For peers that take seconds: the first call, the warm-up, runs `small` instead."""
    first = iter([small])

    def work() -> float:
        next(first, run)()
        return 1.0

    return work


# ---------------------------------------------------------------- memory


def extra_mib(case: Case, who: str) -> float:
    """Peak memory of a step beyond its inputs; to be called in a fresh process."""
    loss = loss_of(case, who)
    step(smaller(case), loss)
    inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_kib("VmRSS")
    step(case, loss)
    return (status_kib("VmHWM") - before) / 1024


def smaller(case: Case) -> Case:
    return Case(case.name, tuple((8, 16) for _ in case.shapes), case.threads)


def extra_mib_on_gpu(run: Callable[[], object]) -> float:
    """Peak device memory during a call, beyond what is allocated before it."""
    import torch

    run()  # compiles, and allocates what it keeps
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ---------------------------------------------------------------- the stage


def measure(bench: Bench) -> None:
    threads = 1 if bench.quick else min(2, bench.cores)
    copy(bench, threads)
    if bench.device == "cuda":
        on_gpu(bench)
        for dtype in GPU_DTYPES:
            others(bench, threads, dtype)
    else:
        on_cpu(bench, threads)
        others(bench, threads, "fp32")
        masks(bench, threads, "fp32")


def has_lightly() -> bool:
    return importlib.util.find_spec("lightly") is not None


def copy(bench: Bench, threads: int) -> None:
    """The memory's bandwidth, reading and writing: the slanted roof of bench/roofline.py."""
    import torch

    torch.set_num_threads(threads)
    num_bytes = COPY >> 8 if bench.quick else COPY
    a = torch.ones(num_bytes // 4, device=bench.device)
    b = torch.zeros_like(a)
    run = Often(partial(b.copy_, a), bench.device, 2 * num_bytes / 1e9, often(bench, 0.2))
    works = {"floor: a large copy": Work(run, threads, bench.device, fresh=False)}
    bench.compare("memory bandwidth", f"{num_bytes >> 20} MiB", "GB/s", works)


def often(bench: Bench, seconds: float) -> float:
    return 0.0 if bench.quick else seconds


def on_cpu(bench: Bench, threads: int) -> None:
    peers = ["definition", *(["lightly"] if has_lightly() else [])]
    for name, targets in TARGETS.items():
        for (n, d), at_least in {(16, 64): 1}.items() if bench.quick else targets.items():
            case = Case(name, ((n, d),) * 2, threads)
            works = {}
            for who in ("sslus", *peers):
                loss = loss_of(case, who)
                run = partial(step, case, loss)
                if who == "sslus" or n >= d:  # several steps: the first finds its caches cold
                    run = Often(run, seconds=often(bench, 1.5))
                else:
                    run = warmed(run, partial(step, smaller(case), loss))
                works[who] = Work(run, threads, fresh=False)
            floor = Often(partial(products, case), seconds=often(bench, 1.5))
            works[FLOOR] = Work(floor, threads, fresh=False)
            # At N = 1024 a step of a peer takes up to 13 s.
            repeats = 2 if n == 1024 else 3
            rows = bench.compare("forward and backward", case.text, "s", works, repeats)
            for who in peers:
                least = at_least if who == "lightly" else None
                text = f"{case.text}: {who} / sslus"
                bench.ratio(text, rows[who], rows["sslus"], at_least=least)
            bench.ratio(f"{case.text}: sslus / floor", rows["sslus"], rows[FLOOR])
            if not bench.quick:
                memory(bench, case)


def memory(bench: Bench, case: Case) -> None:
    n, d = case.shapes[0]
    whos = ["sslus", *(["definition"] if n == 256 else [])]  # its D x D does not depend on N
    values = {who: in_a_process(extra_mib, case, who) for who in whos}
    values["4 (N^2 + N D) floats"] = 16 * (n * n + n * d) / 2**20
    rows = {
        who: bench.add(
            "peak extra memory", who, case.text, "MiB", [value], threads=case.threads
        )
        for who, value in values.items()
    }  # fmt: skip
    bench.ratio(f"{case.text}: extra memory / 4 (N^2 + N D) floats",
                rows["sslus"], rows["4 (N^2 + N D) floats"], at_most=1)  # fmt: skip


def on_gpu(bench: Bench) -> None:
    sizes = ((16, 64),) if bench.quick else GPU_SIZES
    for size in sizes:
        for name in TARGETS:
            for dtype in GPU_DTYPES:
                case = Case(name, (size,) * 2, 1, bench.device, dtype)
                bench.attempt(case.text, partial(measure_on_gpu, bench, case))
        if size == sizes[0]:
            for dtype in GPU_DTYPES:
                bench.attempt(f"masks {dtype}", partial(masks, bench, 1, dtype))


def measure_on_gpu(bench: Bench, case: Case) -> None:
    n, d = case.shapes[0]
    target = bench.quick or (n, d) == GPU_SIZES[0]

    def bare(who: str) -> Callable[[], object]:
        return partial(step, case, loss_of(case, who))

    makers = {
        "sslus": partial(bare, "sslus"),
        FLOOR: lambda: partial(in_tf32, partial(products, case)),
        "definition": partial(bare, "definition"),
        "definition, TF32": lambda: partial(in_tf32, bare("definition")),
        "torch.compile": partial(bare, "torch.compile"),
    }
    if has_lightly():
        makers["lightly"] = partial(bare, "lightly")
    if target:  # where launches take most of the time
        for who in ("sslus", "definition"):
            makers[f"{who}, CUDA graph"] = lambda who=who: graphed(bare(who))
    works = {}
    for who, make in makers.items():
        tried = what_fits(f"{case.text}: {who}", make)
        if tried is None:
            continue
        run, extra = tried
        run = Often(run, case.device, seconds=often(bench, 0.05))
        works[who] = Work(run, device=case.device, fresh=False)
        if who in ("sslus", "definition", "torch.compile", "lightly"):
            bench.add("peak extra memory", who, case.text, "MiB", [extra], device=case.device)
    if "sslus" not in works:
        return
    rows = bench.compare("forward and backward", case.text, "s", works)
    for who, row in rows.items():
        if who not in ("sslus", FLOOR, "sslus, CUDA graph"):
            least = GPU_TARGETS.get(who) if target else None
            mine = "sslus, CUDA graph" if who.endswith("graph") else "sslus"
            if mine in rows:
                bench.ratio(f"{case.text}: {who} / {mine}", row, rows[mine], at_least=least)
    if FLOOR in rows:
        rates = {
            who: bench.add(
                "rate of matrix products", who, case.text, "TFLOP/s",
                [flops / s / 1e12 for s in (rows[who].median, rows[who].low, rows[who].high)],
                device=case.device,
            )
            for who, flops in (
                ("sslus", form_flops(n, d, case.dtype)),
                (FLOOR, floor_flops(case.name, n, d, case.dtype)),
            )
        }  # fmt: skip
        least = OF_MATMUL_RATE if n >= 1024 and d >= 8192 else None
        bench.ratio(f"{case.text}: rate of sslus / of bare products",
                    rates["sslus"], rates[FLOOR], at_least=least)  # fmt: skip
    bench.save(bench)  # with its ratios, in case the run is aborted before the next case


def what_fits(what: str, make: Callable) -> tuple[Callable, float] | None:
    """What `make` returns, and its extra memory; None, with a message, if it cannot run."""
    import torch

    try:
        run = make()
        return run, extra_mib_on_gpu(run)
    except torch.OutOfMemoryError:
        why = "it does not fit the device's memory"
    except Exception as e:  # peers and compilers raise errors of any kind; reported below
        if what.endswith(": sslus"):
            raise
        first, _, _ = str(e).partition("\n")
        why = f"{type(e).__name__}: {first}"
    torch.cuda.empty_cache()
    print(f"left out: {what}: {why}", flush=True)
    return None


def others(bench: Bench, threads: int, dtype: str) -> None:
    """The other losses, for information: there are no targets."""
    n, d, m = (8, 16, 64) if bench.quick else (1024, 128, 65536)
    for name, shapes in {
        "ntxent": ((n, d),) * 2,
        "infonce_queue": ((n // 4, d), (n // 4, d), (m, d)),
        "byol": ((n, 2 * d),) * 4,
    }.items():
        whos = ["sslus", "definition"]
        if name in LIGHTLY and has_lightly():
            whos.append("lightly")
        case = Case(name, shapes, threads, bench.device, dtype)
        works = {
            who: Work(
                Often(partial(step, case, loss_of(case, who)), case.device,
                      seconds=often(bench, 0.05)),
                threads, case.device, fresh=False,
            )
            for who in whos
        }  # fmt: skip
        rows = bench.compare("forward and backward", case.text, "s", works)
        for who in whos[1:]:
            bench.ratio(f"{case.text}: {who} / sslus", rows[who], rows["sslus"])


# ---------------------------------------------------------------- masks


def masks(bench: Bench, threads: int, dtype: str) -> None:
    """Hide three quarters of an image's patches and compute the error there, for information.

    The peers store the mask as a tensor of patches anywhere in the image, drawn as in MAE. Making
    a `ready` mask tensor is not timed.
    """
    import torch
    import torch.nn.functional as F

    from sslus.kernels.mask import Mask, mask_fill, masked_mse, sample_ids

    torch.set_num_threads(threads)
    gpu = bench.device == "cuda"
    b, size = (2, 64) if bench.quick else (256 if gpu else 64, 224)
    image, guess = tensors(((b * size, size),) * 2, bench.device, dtype)
    image, guess = (x.detach().view(b, 1, size, size) for x in (image, guess))
    guess.requires_grad_()
    ids = sample_ids(torch.arange(b, device=bench.device), seed=0, epoch=0)
    anywhere, sector = Mask(), Mask(background=0.0)
    ready = mask_tensor(image, anywhere)
    out = torch.empty_like(image)

    def gradient(loss):
        return torch.autograd.grad(loss, guess)

    def by_tensor(hidden):
        hole = hidden.to(image.dtype)
        return (F.mse_loss(guess, image, reduction="none") * hole).sum() / hole.sum()

    def tensor_of():
        return mask_tensor(image, anywhere)

    case = f"{b} x {size} x {size}" + (f" {dtype}" if gpu else "")
    for name, runs in {
        "mask: fill": {
            "sslus": lambda: mask_fill(image, ids, anywhere),
            "sslus, in the sector": lambda: mask_fill(image, ids, sector),
            "mask tensor": lambda: torch.where(tensor_of(), 0, image),
            "ready mask tensor": lambda: torch.where(ready, 0, image),
            "floor: a copy": lambda: out.copy_(image),
        },
        "mask: error, forward and backward": {
            "sslus": lambda: gradient(masked_mse(guess, image, ids, anywhere)),
            "sslus, in the sector": lambda: gradient(masked_mse(guess, image, ids, sector)),
            "F.mse_loss, mask tensor": lambda: gradient(by_tensor(tensor_of())),
            "F.mse_loss, ready mask tensor": lambda: gradient(by_tensor(ready)),
            "floor: read two, write one": lambda: torch.add(image, guess.detach(), out=out),
        },
    }.items():
        works = {
            who: Work(Often(run, bench.device, seconds=often(bench, 0.1)), threads, bench.device,
                      fresh=False)
            for who, run in runs.items()
        }  # fmt: skip
        rows = bench.compare(name, case, "s", works)
        for who in runs:
            if "tensor" in who:
                bench.ratio(f"{name} {case}: {who} / sslus", rows[who], rows["sslus"])


def mask_tensor(image, mask):
    """(B, 1, H, W) bool: hides the cells with the smallest random numbers, as in MAE."""
    import torch

    rows, columns = (side // mask.patch for side in image.shape[2:])
    noise = torch.rand(len(image), rows * columns, device=image.device)
    hidden = noise.argsort(1).argsort(1) < round(mask.ratio * rows * columns)
    hidden = hidden.view(-1, 1, rows, columns)
    return hidden.repeat_interleave(mask.patch, 2).repeat_interleave(mask.patch, 3)
