"""Compile Triton kernels ahead of time, without a GPU, and read the resources they use.

An op's gpu.py yields a `Build` for every kernel at every block shape that its plan can choose; a
test compiles each for sm_80, sm_90 and sm_100. This does not work if TRITON_INTERPRET=1 was set
when triton was imported: kernels are not JITFunctions then, and only `Build` itself can be used.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Build:
    """A kernel with everything that determines its machine code.

    signature: the type of each argument that is not constexpr, as "*bf16", "i32" or "fp32".
    The suffix ":16" says that the pointer or number is divisible by 16, which Triton finds out
    itself at a launch: pointers to the start of a tensor, and row lengths that allow vector loads.

    >>> Build("rows 128", rows, {"x": "*bf16:16", "n": "i32"}, {"BN": 128}, 4, 2)
    """

    label: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """The resources of one program of a kernel."""

    registers: int  # per thread
    spills: int  # bytes of local memory per thread, for registers that did not fit
    shared_bytes: int
    products: tuple[tuple[int, int], ...]  # (M, N) of each tl.dot
    ttir: str  # Triton's own code
    ptx: str


def compiled(build: Build, arch: int) -> Compiled:
    """The machine code for compute capability `arch`: 80, 90 or 100."""
    names = build.kernel.arg_names
    if set(names) != {*build.signature, *build.constants}:
        wrong = sorted(set(names) ^ {*build.signature, *build.constants})
        raise ValueError(f"{build.label}: arguments that are missing or too many: {wrong}")
    kinds = {name: build.signature.get(name, "constexpr").split(":") for name in names}
    source = ASTSource(
        build.kernel,
        {name: kind[0] for name, kind in kinds.items()},
        {(names.index(name),): value for name, value in build.constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[1:]},
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    used = _resources(kernel.asm["cubin"])
    # %d = tt.dot %a, %b, %c : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>
    dots = re.findall(r"tt\.dot .*-> tensor<(\d+)x(\d+)x", kernel.asm["ttir"])
    return Compiled(
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        products=tuple((int(m), int(n)) for m, n in dots),
        ttir=kernel.asm["ttir"],
        ptx=kernel.asm["ptx"],
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """ptxas's resource usage of a kernel: {"REG": 128, "STACK": 0, "LOCAL": 0, ...}."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    line = next(line for line in report.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
