"""Every Triton kernel's launch, and its intermediate code for what the launcher found in it.

The interpreter and the compilation ahead of time both go round Triton's launcher. Here it runs,
on tensors of the CPU, as for an H100, in a process without the interpreter (this file as a script).
A kernel becomes another one where a number is 1, or a type differs, and the interpreter takes
what the compiler refuses: a value that has two types, say.
"""

import json
import os
import subprocess
import sys

import pytest
import torch


def launched() -> dict[str, list[str]]:
    """Runs every op's GPU code; the kernels that each one launched."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    from sslus.kernels import scale_gpu
    from sslus.kernels.augment import gpu as augment
    from sslus.kernels.augment.reference import identity
    from sslus.kernels.mask import Mask
    from sslus.kernels.mask import gpu as mask
    from sslus.kernels.op import load_all
    from sslus.kernels.ranks import Ranks

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    found: dict[str, list[str]] = {}
    done = set()

    def to_ir(kernel, key, signature, device, constants, options, attributes, warmup):
        """The front end alone: the rest takes minutes, and is that of test_losses_gpu.py."""
        found[name].append(kernel.fn.__name__)
        if (kernel, str(key)) in done:
            return
        done.add((kernel, str(key)))
        _, _, target, backend, _ = kernel.device_caches[device]
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        ASTSource(kernel, signature, constants, attributes).make_ir(
            target, options, backend.get_codegen_implementation(options),
            backend.get_module_map(), context,
        )  # fmt: skip

    driver.set_active(Driver())
    JITFunction._do_compile = to_ir
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **options: run(
        self, *args, warmup=True, **options
    )
    for name, op in load_all().items():
        found[name] = []
        fp32, bf16 = torch.float32, torch.bfloat16
        for dtypes in ((fp32, fp32), (bf16, bf16), (fp32, bf16), (bf16, fp32)):
            for case in op.cases:
                tensors = [
                    torch.zeros(s, dtype=dtypes[i % 2]) for i, s in enumerate(case["tensors"])
                ]
                op.gpu(*tensors, ranks=Ranks(), **case["scalars"])
    found[name := "scale"] = []
    scale_gpu.scaled([torch.zeros(2, 8)] * 2, torch.ones(()), (torch.float32, torch.float32))
    frames, ids = torch.zeros(2, 32, 32, dtype=torch.uint8), torch.arange(2)
    found[name := "views"] = []
    out = torch.empty(2, 1, 24, 24)
    augment.augment_gpu(frames, ids, identity(2, 32), out, mean=0.2, std=0.1)
    found[name := "mask_fill"] = []
    mask.mask_fill(out, out, ids, torch.empty_like(out), **vars(Mask()), fill=0.0)
    return found


def test_every_kernel_is_launched():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"vicreg", "barlow", "scale", "views", "mask_fill"} <= set(found) and all(found.values())
    assert found["views"] == ["augment_kernel"]


if __name__ == "__main__":
    print(json.dumps(launched()))
