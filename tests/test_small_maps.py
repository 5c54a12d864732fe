"""Convolutions of small feature maps as matrix products: the same results, and really used."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sslus.ssl import backbones
from sslus.ssl.small_maps import SmallMapConv2d, product, use_products


@pytest.mark.parametrize(
    ("size", "side", "step"),
    [((1, 1), 3, 1), ((2, 2), 3, 1), ((3, 4), 3, 1), ((4, 3), 3, 2), ((5, 5), 3, 2), ((1, 2), 3, 2),
     ((3, 3), 1, 1), ((4, 5), 1, 2)],
)  # fmt: skip
def test_results_and_gradients_are_those_of_a_convolution(size, side, step):
    torch.manual_seed(0)
    x = torch.randn(3, 5, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, side, side, dtype=torch.float64, requires_grad=True)
    ours = product(x, weight, step)
    theirs = F.conv2d(x, weight, stride=step, padding=side // 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), upstream),
        torch.autograd.grad(theirs, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_as_exact_as_a_convolution():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32, 2, 2), torch.randn(64, 32, 3, 3)
    upstream = torch.randn(64, 64, 2, 2)
    exact, errors = None, []
    for dtype, convolve in (
        (torch.float64, lambda x, w: F.conv2d(x, w, padding=1)),
        (torch.bfloat16, lambda x, w: F.conv2d(x, w, padding=1)),
        (torch.bfloat16, lambda x, w: product(x, w, 1)),
    ):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (x, weight)]
        y = convolve(*inputs)
        grads = torch.autograd.grad(y, inputs, upstream.bfloat16().to(dtype))
        results = [t.double() for t in (y, *grads)]
        exact = exact or results
        errors.append([((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)])
    for ours, theirs in zip(errors[2], errors[1], strict=True):
        assert ours <= 1.6 * theirs  # each tap's share of the gradient of x is rounded, too


def gradients(model, x, half: bool):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = model(x)
    y.double().square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_resnet_trains_as_without(layout):
    """At 64 px, in float32 and bfloat16: no further from float64 than with convolutions."""
    ours = backbones.build("resnet18", 64, seed=0).to(memory_format=layout)
    plain = timm.create_model("resnet18", in_chans=1, num_classes=0)
    plain.load_state_dict(ours.state_dict())  # the same names
    plain.to(memory_format=layout).train()
    x = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    exact = gradients(copy.deepcopy(plain).double(), x.double(), False)
    for half in (False, True):
        a, b = ((gradients(m, x, half) - exact).norm() / exact.norm() for m in (ours, plain))
        assert a <= 1.25 * b, f"{'bf16' if half else 'fp32'}: {a:.2e}, with convolutions {b:.2e}"


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"bias": True}, {"dilation": 2}, {"padding": 0}, {"stride": 3},
     {"padding_mode": "circular"}, {"kernel_size": 5, "padding": 2}, {"stride": (1, 2)},
     {"in_channels": 8}],
)  # fmt: skip
def test_what_is_computed_otherwise_stays_a_convolution(options):
    usual = {"in_channels": 256, "kernel_size": 3, "padding": 1, "bias": False}

    class Standardised(nn.Conv2d):
        """As timm's, which transform their weights first."""

    for kind, changes, small in (
        (nn.Conv2d, {}, True), (nn.Conv2d, options, False), (Standardised, {}, False),
    ):  # fmt: skip
        conv = kind(**(usual | changes), out_channels=256)
        assert (type(use_products(conv)) is SmallMapConv2d) == small


def test_which_maps_are_small():
    """layer4 of a ResNet-18 at 64 and 96 px, all of it, and nothing at 224 px, nor its stem."""

    def used(size: int) -> set[str]:
        model, names = backbones.build("resnet18", size, seed=0), set()
        for name, module in model.named_modules():
            if type(module) is SmallMapConv2d:
                module.register_forward_hook(
                    lambda _m, _x, y, name=name: (
                        names.add(name) if y.grad_fn.name() == "_ProductBackward" else None
                    )
                )
        model(torch.zeros(2, 1, size, size))
        return names

    layer4 = {f"layer4.{block}.conv{i}" for block in (0, 1) for i in (1, 2)}
    layer4 |= {"layer4.0.downsample.0"}
    assert used(96) == layer4
    assert used(64) > layer4  # and the 4 x 4 pixels of layer3
    assert not used(224)
