"""The Triton losses: what they compile to on machines that are not here, and how they are run.

test_kernels.py holds their results against float64, in the interpreter or on a GPU. Compiling
needs no GPU, but a process in which the interpreter is off: this file, run as a script.
"""

import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

import sslus.kernels
from sslus.kernels import op as ops

LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory of a program


def op_modules():
    """The gpu.py of each op that says what it compiles."""
    for info in pkgutil.iter_modules(sslus.kernels.__path__):
        name = f"sslus.kernels.{info.name}.gpu"
        if info.ispkg and importlib.util.find_spec(name):
            module = importlib.import_module(name)
            if hasattr(module, "builds"):
                yield info.name, module


OPS = dict(op_modules())


@pytest.fixture(scope="module")
def compilations():
    """{(op, label, arch): resources}; one process for all, since importing torch takes longest."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {tuple(key): found for key, found in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op, arch, compilations):
    found = {label: x for (name, label, a), x in compilations.items() if (name, a) == (op, arch)}
    assert len(found) == len(list(OPS[op].builds())), "two builds with one label"
    for label, x in found.items():
        assert x["spills"] == 0, (label, x)
        assert x["shared_bytes"] <= LIMITS[arch], (label, x)
        # Each product is one of tensor cores; Hopper's own has 64 rows at least.
        if x["products"]:
            assert x["tensor_cores"], (label, x)
        if arch == 90 and any(m >= 64 and n > 32 for m, n in x["products"]):
            assert x["wgmma"], (label, x)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def leaves_of(op, shapes, dtype=torch.bfloat16):
    tensors = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    return tensors, [t.requires_grad_() for t in tensors[: op.num_gradients]]


@on_a_gpu
@pytest.mark.parametrize("name", OPS)
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


@on_a_gpu
@pytest.mark.parametrize("name", OPS)
def test_compiled_without_a_break(name):
    op = ops.load_all()[name]
    case = op.cases[-1]
    tensors, leaves = leaves_of(op, case["tensors"], torch.float32)

    def model(*tensors):
        return 3 * op.run("gpu", *tensors, **case["scalars"])

    want = torch.autograd.grad(model(*tensors), leaves)
    got = torch.autograd.grad(torch.compile(model, fullgraph=True)(*tensors), leaves)
    torch.testing.assert_close(got, want)


def main():
    from sslus.kernels.aot import compiled

    done, rows = {}, []
    for op, module in OPS.items():
        for build in module.builds():
            for arch in LIMITS:
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
                        "tensor_cores": sum(
                            x.ptx.count(name)
                            for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
                        ),
                    }  # fmt: skip
                rows.append([[op, build.label, arch], done[key]])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
