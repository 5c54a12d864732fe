"""Every Triton kernel's launch up to the compiler: arguments and options, as a GPU would get them.

The interpreter and the compilation ahead of time both go round Triton's launcher. Here it runs,
on tensors of the CPU, as for an H100, in a process without the interpreter (this file as a script).
"""

import json
import os
import subprocess
import sys

import pytest
import torch


def launched() -> dict[str, list[str]]:
    """Runs every op's GPU code; the kernels that each one launched."""
    from triton.backends.compiler import GPUTarget
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
    driver.set_active(Driver())
    JITFunction._do_compile = lambda self, *_: found[name].append(self.fn.__name__)
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **options: run(
        self, *args, warmup=True, **options
    )
    for name, op in load_all().items():
        found[name] = []
        for case in op.cases:
            op.gpu(*(torch.zeros(s) for s in case["tensors"]), ranks=Ranks(), **case["scalars"])
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
