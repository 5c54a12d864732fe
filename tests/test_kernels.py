"""Every implementation of every op against float64, by one rule.

A kernel may be at most twice as far from the float64 answer as the plain PyTorch reference run
in the kernel's own dtype (the rule of flash-attention's tests), for the loss and each gradient.
The reference itself is held against an oracle written from the paper, without autograd.
"""

import os

import numpy as np
import pytest
import torch

from sslus.kernels.op import CHOICES, OPS, Op, load_all

load_all()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CASES = [
    pytest.param(op, case, id=f"{op.name}-{k}")
    for op in OPS.values()
    for k, case in enumerate(op.cases)
]


def vicreg_oracle(za, zb, invariance, variance, covariance):
    """Equations 1 to 6 of arXiv:2105.04906 in float64, with numpy's own covariance."""
    n, d = za.shape
    loss = invariance * np.linalg.norm(za - zb) ** 2 / (n * d)
    for z in (za, zb):
        cov = np.cov(z, rowvar=False).reshape(d, d)
        for i in range(d):
            loss += variance * max(0.0, 1 - np.sqrt(cov[i, i] + 1e-4)) / d / 2
            loss += covariance * sum(cov[i, j] ** 2 for j in range(d) if j != i) / d
    return loss


ORACLES = {"vicreg": vicreg_oracle}


def inputs(case, dtype, device="cpu"):
    """Rows of unequal scale about an offset: dead and alive dimensions, and no zero mean."""
    g = torch.Generator().manual_seed(0)
    out = []
    for n, d in case["tensors"]:
        scale = torch.linspace(0.1, 2, d)
        out.append((torch.randn(n, d, generator=g) * scale + 0.3).to(device, dtype))
    return out


def value_and_grads(op, which, tensors, scalars):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = op.run(which, *leaves, **scalars)
    (3 * loss).backward()  # 3: a backward that ignores its incoming gradient must fail
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("op, case", CASES)
def test_reference_is_the_paper(op, case):
    exact = inputs(case, torch.float64)
    want = ORACLES[op.name](*(t.numpy() for t in exact), **case["scalars"])
    assert op.run("reference", *exact, **case["scalars"]).item() == pytest.approx(want, rel=1e-12)
    # float32 may lose its last digits, no more.
    plain = op.run("reference", *(t.float() for t in exact), **case["scalars"])
    assert plain.dtype == torch.float32 and plain.item() == pytest.approx(want, rel=2e-6)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values()])
def test_reference_gradient(op):
    case = max(op.cases, key=lambda c: np.prod(c["tensors"][0]) * (np.prod(c["tensors"][0]) < 50))
    leaves = [t.requires_grad_() for t in inputs(case, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *tensors: op.run("reference", *tensors, **case["scalars"]), leaves
    )


def kernels():
    for op in OPS.values():
        for k, case in enumerate(op.cases):
            for which in ("cpu", "gpu"):
                if getattr(op, which) is None:
                    continue
                missing = which == "gpu" and not (torch.cuda.is_available() or INTERPRET)
                if missing and os.environ.get("SSLUS_REQUIRE_GPU") == "1":
                    raise RuntimeError("SSLUS_REQUIRE_GPU=1, but there is no CUDA device")
                skip = pytest.mark.skipif(
                    missing, reason="no CUDA device and TRITON_INTERPRET is not 1"
                )
                yield pytest.param(op, case, which, id=f"{op.name}-{which}-{k}", marks=skip)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("op, case, which", list(kernels()))
def test_kernel_parity(op, case, which, strided):
    device = "cuda" if which == "gpu" and torch.cuda.is_available() else "cpu"
    tensors = inputs(case, torch.float32, device)
    if strided:
        tensors = [t.mT.contiguous().mT for t in tensors]
    truth = value_and_grads(op, "reference", [t.double() for t in tensors], case["scalars"])
    plain = value_and_grads(op, "reference", tensors, case["scalars"])
    kernel = value_and_grads(op, which, tensors, case["scalars"])
    for t, p, k in zip(truth, plain, kernel, strict=True):
        assert k.dtype == p.dtype and k.shape == p.shape
        # Where the reference happens to be exact, a kernel may still round.
        allowed = 2 * (p - t).abs().max() + 1e-6 * t.abs().max()
        assert (k - t).abs().max() <= allowed


@pytest.fixture
def toy_op():
    def kernel(x):
        return (x**2).sum(), 2 * x

    op = Op("toy", reference=lambda x: (x**2).sum(), cpu=kernel)
    yield op
    del OPS["toy"]


def test_dispatch_uses_the_kernel_and_scales_its_gradient(toy_op, monkeypatch):
    x = torch.randn(3, 4)
    assert toy_op.choose(x) == "cpu" and toy_op.choose(x.double()) == "reference"
    for choice in ("auto", "cpu", "reference"):
        monkeypatch.setenv("SSLUS_KERNELS", choice)
        leaf = x.clone().requires_grad_()
        (3 * toy_op(leaf)).backward()
        torch.testing.assert_close(leaf.grad, 6 * x)


def test_a_named_choice_that_cannot_run_raises(toy_op, monkeypatch):
    x = torch.randn(3, 4)
    for choice, tensor, why in [
        ("gpu", x, "not written"),
        ("cpu", x.double(), "float64"),
        ("cuda", x, "want one of " + ", ".join(CHOICES)),
    ]:
        monkeypatch.setenv("SSLUS_KERNELS", choice)
        with pytest.raises(ValueError, match=why):
            toy_op(tensor)
    with pytest.raises(ValueError, match="already registered"):
        Op("toy", reference=lambda x: x)


def test_vicreg_refuses_what_it_cannot_compare():
    op = OPS["vicreg"]
    weights = op.cases[0]["scalars"]
    for za, zb in [((1, 4), (1, 4)), ((4, 4), (4, 5)), ((4,), (4,))]:
        with pytest.raises(ValueError, match=r"want two \(N, D\) tensors"):
            op(torch.zeros(za), torch.zeros(zb), **weights)
