"""The Triton losses: what they compile to on machines that are not here, and how they are run.

test_kernels.py holds their results against float64, in the interpreter or on a GPU. Compiling
needs no GPU, but a process in which the interpreter is off: this file, run as a script.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import sslus.kernels
from sslus.kernels import gram_gpu
from sslus.kernels import op as ops
from sslus.kernels.mask import Mask
from sslus.kernels.ranks import Ranks

LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory of a program
MULTIPROCESSORS = 132  # of an H200


def op_modules():
    """What says what it compiles: the gpu.py of each op, and what scales their gradients."""
    for info in pkgutil.iter_modules(sslus.kernels.__path__):
        name = f"sslus.kernels.{info.name}.gpu"
        if info.ispkg and importlib.util.find_spec(name):
            module = importlib.import_module(name)
            if hasattr(module, "builds"):
                yield info.name, module
    yield "scale", importlib.import_module("sslus.kernels.scale_gpu")


MODULES = dict(op_modules())


def chosen(module, arch):
    """What is compiled for `arch`. All of it takes over five minutes of a core, so without
    SSLUS_AOT_ALL=1, which CI sets, only half precision for Hopper is."""
    builds = list(module.builds())
    if os.environ.get("SSLUS_AOT_ALL") == "1":
        return builds
    return [build for build in builds if "fp32" not in build.label] if arch == 90 else []


@pytest.fixture(scope="module")
def compilations():
    """{(op, label, arch): resources}; one process for all, since importing torch takes longest."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {tuple(key): found for key, found in json.loads(done.stdout.splitlines()[-1])}


def most_spilled(label, arch):
    """Bytes per thread: none but for the exceptions of kernels/README.md."""
    if re.fullmatch(r"finish \w+ i32", label):  # D is not a multiple of 16
        return {80: 80, 90: 16, 100: 0}[arch]
    # Triton 3.6 spills 8 bytes in half precision's product for sm_100, 3.8 and 3.9 nothing.
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    return 8 if old and label.startswith("multiply 64 bf16") else 0


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("op", MODULES)
def test_compiles_without_spills(op, arch, compilations):
    if not chosen(MODULES[op], arch):
        pytest.skip("compiled with SSLUS_AOT_ALL=1")
    found = {label: x for (name, label, a), x in compilations.items() if (name, a) == (op, arch)}
    assert len(found) == len(chosen(MODULES[op], arch)) > 0, "two builds with one label"
    for label, x in found.items():
        assert x["spills"] <= most_spilled(label, arch), (label, x)
        assert x["shared_bytes"] <= LIMITS[arch], (label, x)
        assert x["atomics"] == 0, (label, x)  # sums would have the order in which programs end
        # Each product is one of tensor cores; Hopper's own has 64 rows at least.
        if x["products"]:
            assert x["tensor_cores"], (label, x)
        if label.startswith("multiply"):  # each block's sum is added to those before outside
            m, n = x["products"][0]
            assert x["additions"] >= m * n, (label, x)
        if arch == 90 and any(m >= 64 and n >= 32 for m, n in x["products"]):
            assert x["wgmma"], (label, x)


WAITING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero}


class Device(TorchDispatchMode):
    """Counts what torch would launch on a device, and the most bytes held but for the inputs.

    Raises where the host would wait for the device.
    """

    def __init__(self, inputs):
        super().__init__()
        self.num_launches, self.peak_bytes = 0, 0
        self.held = WeakIdKeyDictionary({t.untyped_storage(): 0 for t in inputs})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITING:
            raise AssertionError(f"{function} waits for the device")
        out = function(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        free = function.is_view or "empty" in function.name() or function.namespace != "aten"
        self.num_launches += bool(made) and not free
        for x in made:
            self.held.setdefault(x.untyped_storage(), x.untyped_storage().nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))
        return out


@dataclass
class Step:
    """Forward and backward: kernels with their programs, all launches, peak bytes of both."""

    programs: list[tuple[str, int]]
    num_launches: int
    forward_bytes: int
    backward_bytes: int


def step(monkeypatch, op, tensors, scalars):
    """What a step with these tensors takes, on a CPU; nothing computes."""
    from sslus.kernels.scale_gpu import scale_kernel

    launched = []

    def run(kernel, *_, grid, **__):
        launched.append((kernel.fn.__name__, math.prod(grid)))

    monkeypatch.setattr(type(scale_kernel), "run", run)
    monkeypatch.setattr(ops.Op, "why_not", lambda *_: None)  # CPU tensors would be refused
    leaves = [t.requires_grad_() for t in tensors[: op.num_gradients]]
    with Device(tensors) as forward:
        op.gpu(*(t.detach() for t in tensors), ranks=Ranks(), **scalars)
    once = len(launched)
    loss = op.run("gpu", *tensors, **scalars)  # as an op, into which the mode does not see
    saved = loss.grad_fn.saved_tensors
    with Device([*tensors, *saved]) as backward:
        grads = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    assert all(g.dtype == tensors[0].dtype for g in grads)
    launched = launched[once:]
    return Step(
        launched, len(launched) + forward.num_launches + backward.num_launches,
        forward.peak_bytes, backward.peak_bytes + sum(t.nbytes for t in saved),
    )  # fmt: skip


LOSSES = [name for name, op in ops.load_all().items() if op.gpu]
LAUNCHES = {"vicreg": 6, "barlow": 6, "ntxent": 6, "infonce_queue": 4, "byol": 3}


@pytest.mark.parametrize("dtype", ops.DTYPES["gpu"], ids=str)
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_step(name, dtype, monkeypatch):
    op = ops.load_all()[name]
    tensors = [torch.empty(256, 8192, dtype=dtype) for _ in op.cases[0]["tensors"]]
    found = step(monkeypatch, op, tensors, op.cases[0]["scalars"])
    assert found.num_launches == LAUNCHES[name]
    fill = ("columns", "multiply", "apply", "barlow_apply")
    programs = {kernel: num for kernel, num in found.programs if kernel in fill}
    assert len(programs) == (3 if name in ("vicreg", "barlow") else 0)
    assert all(num >= MULTIPROCESSORS for num in programs.values()), programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "n, d", [(256, 8192), (1024, 2048), (512, 512), (1030, 1029), (4096, 2048)], ids=str
)
@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_memory_of_a_step(name, n, d, dtype, monkeypatch):
    op = ops.load_all()[name]
    tensors = [torch.empty(n, d, dtype=dtype) for _ in "ab"]
    found = step(monkeypatch, op, tensors, op.cases[0]["scalars"])
    # Beside the matrices there are a few numbers for each column and each tile.
    most = 4 * 4 * (n * n + n * d) + 100 * (n + d)
    assert 0 < found.forward_bytes <= most and 0 < found.backward_bytes <= most


@pytest.mark.parametrize("kind", ["patches", "rectangles"])
def test_a_mask_is_never_a_tensor(kind, monkeypatch):
    images = [torch.empty(64, 1, 224, 224) for _ in "ab"]
    scalars = vars(Mask(kind, background=0.0)) | {"hole": 1.0, "rest": 0.5}
    ids = torch.arange(64)
    found = step(monkeypatch, ops.load_all()["masked_mse"], [*images, ids], scalars)
    assert found.num_launches == 4  # the cells, the error, its sum, backward
    gradient = images[0].nbytes
    spare = images[0].numel() // 16  # bytes: half a bit of each pixel
    assert gradient < found.forward_bytes <= gradient + spare
    assert 2 * gradient <= found.backward_bytes <= 2 * gradient + spare


@pytest.mark.parametrize("num, rows, ragged", [(2, 16, False), (3, 16, True), (2, 17, True)])
@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_blocks_are_for_the_columns_of_a_rank(name, num, rows, ragged, monkeypatch):
    """Of D = 8192 three ranks have 2731 each, whose numbers are loaded one by one; K's, too, where
    the rows of all ranks are no multiple of 16."""

    class OneOf(Ranks):
        """Its rows and columns, in numbers: nothing computes."""

        world, rank = num, 0

        def to_columns(self, x):
            return x.new_empty(num * len(x), self._widths(x.shape[1])[0])

        def to_rows(self, x, d):
            return x.new_empty(len(x) // num, d)

        def join(self, x):
            return x.new_empty(num * len(x))

        def sum_(self, x):
            return x.zero_()

    kinds = {}
    # What nothing computes is looked at all the same: another form would be taken by chance.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    monkeypatch.setattr(
        gram_gpu, "_launch", lambda _, name, *__, kind, **___: kinds.setdefault(name, kind)
    )
    op = ops.load_all()[name]
    tensors = [torch.zeros(rows, 8192, dtype=torch.bfloat16) for _ in "ab"]
    op.gpu(*tensors, ranks=OneOf(), **op.cases[0]["scalars"])
    assert "multiply 64" in kinds and all(kind.ragged == ragged for kind in kinds.values()), kinds


def test_launches_are_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the tensors'."""
    from sslus.kernels.scale_gpu import scale_kernel

    depth, seen = [0], []

    @contextlib.contextmanager
    def device_of(x):
        depth[0] += 1
        yield
        depth[0] -= 1

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(type(scale_kernel), "run", lambda *_, **__: seen.append(depth[0]))
    monkeypatch.setattr(ops.Op, "why_not", lambda *_: None)
    z = torch.empty(8, 16, requires_grad=True)
    loss = ops.load_all()["byol"].run("gpu", z, z, z.detach(), z.detach())
    torch.autograd.grad(loss, z)
    assert seen == [1, 1, 1]


def test_refuses_what_a_grid_cannot_count(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # or it is refused for being on a CPU
    z = torch.empty(ops.LONGEST + 1, 1)
    with pytest.raises(ValueError, match=r"at most 4194240 rows and columns, not \(4194241, 1\)"):
        ops.load_all()["barlow"].run("gpu", z, z, off_diagonal=1.0)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
that_computes = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no CUDA device and TRITON_INTERPRET is not 1",
)


def sibling(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def assert_parity(name, shape, dtype):
    parity = sibling("test_kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = parity.inputs({"tensors": [shape] * 2}, dtype, device)
    op = ops.load_all()[name]
    parity.assert_parity(op, "gpu", tensors, scalars=op.cases[0]["scalars"])


@that_computes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name, shape, limits",
    [
        # A column in several tiles; in bfloat16 tiles of 128 for x x^T.
        ("barlow", (140, 150), {"WHOLE": 64, "SMALL": 64}),
        *((name, (80, 70), {"WIDTH": 32}) for name in ("vicreg", "barlow")),  # three strips
    ],
    ids=str,
)
def test_parity_of_what_large_inputs_take(name, shape, limits, dtype, monkeypatch):
    for limit, value in limits.items():
        assert getattr(gram_gpu, limit) > value
        monkeypatch.setattr(gram_gpu, limit, value)
    assert_parity(name, shape, dtype)


@triton.jit
def triangle_kernel(out, first, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    i, j = gram_gpu._triangle(first + at)
    tl.store(out + at, i)
    tl.store(out + BLOCK + at, j)


@that_computes
@pytest.mark.parametrize("row", [0, 4000])  # of tiles: 128,000 of K
@pytest.mark.parametrize("digits", [-1, 0, 1])
def test_tiles_of_a_triangle_are_counted_whatever_the_last_digit_of_a_root(
    digits, row, monkeypatch
):
    """Which on a GPU may be wrong, up or down."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def sqrt(builder, x):
            root = np.sqrt(x.data)
            return TensorHandle((root * (1 + digits * 2**-23)).astype(root.dtype), x.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_sqrt", sqrt)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.empty(2, 8192, dtype=torch.int32, device=device)
    triangle_kernel[(1,)](out, row * (row + 1) // 2, BLOCK=8192)
    pairs = [(i, j) for i in range(row, row + 128) for j in range(i + 1)][:8192]
    assert torch.equal(out.cpu(), torch.tensor(pairs, dtype=torch.int32).T)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 8192), (1024, 2048), (600, 530), (4096, 2048)], ids=str)
@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_parity_of_large_inputs(name, shape, dtype):
    assert_parity(name, shape, dtype)


def leaves_of(op, shapes, dtype=torch.bfloat16):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    return tensors, [t.requires_grad_() for t in tensors[: op.num_gradients]]


@on_a_gpu
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_holds_the_step(name):
    """Nothing waits for the device: a replay with other inputs is a run with them."""
    op = ops.load_all()[name]
    case = max(op.cases, key=lambda case: case["tensors"][0][0])
    tensors, leaves = leaves_of(op, case["tensors"])

    def step():
        loss = op.run("gpu", *tensors, **case["scalars"])
        return loss, *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in tensors:
            t.normal_()
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)  # to the bit: sums have one order


@that_computes
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_without_a_break(name):
    op = ops.load_all()[name]
    case = op.cases[1]
    tensors, leaves = leaves_of(op, case["tensors"])
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"

    def model(*tensors):
        return 3 * op.run("gpu", *tensors, **case["scalars"])

    want = torch.autograd.grad(model(*tensors), leaves)
    got = torch.autograd.grad(
        torch.compile(model, fullgraph=True, backend=backend)(*tensors), leaves
    )
    torch.testing.assert_close(got, want)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@two_gpus
@pytest.mark.parametrize("name", LOSSES)
def test_runs_on_another_device_than_the_current_one(name):
    op = ops.load_all()[name]
    case = op.cases[1]
    results = []
    tensors, _ = leaves_of(op, case["tensors"])
    for device in ("cuda:0", "cuda:1"):
        moved = [t.detach().to(device) for t in tensors]
        leaves = [t.requires_grad_() for t in moved[: op.num_gradients]]
        loss = op.run("gpu", *moved, **case["scalars"])
        results.append([loss.cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def one_of_two(rank, folder, backend, device):
    ranks = sibling("test_losses_ranks")
    ops.load_all()
    try:
        batches = [(case[0], ranks.joined(*case, 2)) for case in ranks.CASES]
        alone = [ranks.gradients(name, "reference", [x for x, _ in b]) for name, b in batches]
        if device == "cuda":
            torch.cuda.set_device(rank)
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group(backend, store=store, rank=rank, world_size=2)
        for (name, batch), (want, want_grads) in zip(batches, alone, strict=True):
            num = len(batch[0][0]) // 2
            rows = slice(rank * num, (rank + 1) * num)
            own = [(x[rows] if batched else x).to(device) for x, batched in batch]
            loss, grads = ranks.gradients(name, "gpu", own)
            for got, w in [(loss, want), *zip(grads, (w[rows] for w in want_grads), strict=True)]:
                # Exact to float32 is for others: here a share of a gradient could be missing.
                assert (got.cpu() - w).abs().max() <= 1e-4 * w.abs().max(), name
        dist.destroy_process_group()
        (folder / f"equal-{rank}").touch()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the other would wait for this one


@two_gpus
def test_two_gpus_are_one_batch(tmp_path):
    """Over NCCL, which is what trains; test_losses_ranks.py is over gloo."""
    with contextlib.suppress(mp.ProcessExitedException):
        mp.spawn(one_of_two, (tmp_path, "nccl", "cuda"), nprocs=2)
    errors = "\n".join(p.read_text() for p in sorted(tmp_path.glob("error-*")))
    assert {p.name for p in tmp_path.glob("equal-*")} == {"equal-0", "equal-1"}, errors


def main():
    from sslus.kernels.aot import compiled

    done, rows = {}, []
    for op, module in MODULES.items():
        for arch in LIMITS:
            for build in chosen(module, arch):
                key = (
                    build.kernel.fn.__name__, tuple(build.signature.items()),
                    tuple(build.constants.items()), build.num_warps, build.num_stages, arch,
                )  # fmt: skip
                if key not in done:  # ops share kernels
                    x = compiled(build, arch)
                    done[key] = {
                        "registers": x.registers, "spills": x.spills,
                        "shared_bytes": x.shared_bytes, "products": x.products,
                        "wgmma": x.ptx.count("wgmma.mma_async"),
                        "atomics": len(re.findall(r"(?<![\w.%])(?:atom|red)\.", x.ptx)),
                        # By all threads, of float32; sm_100 has one for two numbers.
                        "additions": 32 * build.num_warps * sum(
                            int(two or 1)
                            for two in re.findall(r"\badd(?:\.rn)?\.f32(?:x(2))?\b", x.ptx)
                        ),
                        "tensor_cores": sum(
                            x.ptx.count(name)
                            for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
                        ),
                    }  # fmt: skip
                rows.append([[op, build.label, arch], done[key]])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
