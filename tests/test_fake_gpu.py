"""A step on PyTorch's fake CUDA tensors, which have a device, a shape and a dtype but no values.

What was left on the CPU, and what asks for a value and so waits for the GPU, fails without one.
Two things are not run: the backward, whose engine wants a driver, and the fused optimisers.
"""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sslus.ssl import methods, optimizers
from sslus.ssl.loader import Views
from sslus.ssl.state import State
from sslus.ssl.step import Step
from sslus.ssl.train import Settings
from sslus.ssl.world import World

GPU = torch.device("cuda", 0)
SMALL = {"projector": "64-64-64", "predictor": 32, "queue": 40}
PLAIN, RICH = {}, {"pairs": "nearby", "dual_task": 0.5, "accumulate": 2, "clip_norm": 1.0}


class NoEvent:
    """In place of a CUDA event."""

    def __init__(self, **_): ...

    def record(self): ...

    def synchronize(self): ...


def to_fake_gpu(module: torch.nn.Module) -> None:
    """All its parameters and buffers, in their memory formats."""

    def moved(t):
        fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU)
        if isinstance(t, torch.nn.Parameter):
            return torch.nn.Parameter(fake, requires_grad=t.requires_grad)
        return fake

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({k: moved(t) for k, t in tensors.items() if t is not None})


def backward(self) -> None:
    """In place of Tensor.backward: gradients without values for what is trained."""
    assert self.requires_grad and self.shape == () and self.device == GPU
    for p in trained:
        p.grad = torch.empty_like(p)


trained: list[torch.nn.Parameter] = []


def two_steps(name: str, precision: str, **options) -> tuple[State, torch.Tensor]:
    module = methods.load(name)
    known = {f.name for f in dataclasses.fields(module.Config)}
    config = module.Config(**{k: v for k, v in SMALL.items() if k in known})
    settings = Settings(
        method=name, backbone="test_resnet", image_size=32, batch_size=16, max_steps=4,
        optimizer="lars", precision=precision, **options,
    ).resolved(GPU, 100)  # fmt: skip
    state = State.build(settings, config, World(torch.device("cpu")), num_classes=3)
    with FakeTensorMode():
        to_fake_gpu(state.method)
        trained[:] = [p for p in state.method.parameters() if p.requires_grad]
        state.world = World(GPU)
        state.optimizer = optimizers.make("lars", state.method, settings.lr, 1e-6)
        step = Step(state, settings)
        weights = torch.ones(16, device=GPU) if settings.pairs == "nearby" else None
        numbers = torch.arange(16, device=GPU)
        va, vb = torch.rand(2, 16, 1, 32, 32, device=GPU)
        views = Views(va, vb, weights, numbers, numbers)
        for _ in range(2):
            features = step([views] * settings.accumulate, 1e-3)
    return state, features


@pytest.fixture(autouse=True)
def no_driver_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(
        "torch.cuda.amp.common.amp_definitely_not_available", lambda: False
    )  # autocast would turn itself off
    monkeypatch.setattr(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("precision, options", [("bf16", PLAIN), ("fp32", RICH)])
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(name, precision, options):
    if not getattr(methods.load(name), "PAIRS", True):
        options = {k: v for k, v in options.items() if k != "pairs"}
    state, features = two_steps(name, precision, **options)
    kept = [*state.method.state_dict().values(), state.window, features]
    assert {t.device for t in kept} == {GPU}
    assert features.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert state.window_names[0] == "loss" and state.window.shape == (len(state.window_names),)


@pytest.mark.parametrize(
    "spoil, error",
    [
        (lambda loss: loss * loss.item(), DataDependentOutputException),
        (lambda loss: loss + torch.ones(1), RuntimeError),  # on the CPU
    ],
)
def test_the_stand_in_notices_both(spoil, error, monkeypatch):
    method = methods.load("vicreg").Method
    forward = method.forward

    def spoiled(self, views):
        out = forward(self, views)
        return out._replace(loss=spoil(out.loss))

    monkeypatch.setattr(method, "forward", spoiled)
    with pytest.raises(error, match="_local_scalar_dense|device"):
        two_steps("vicreg", "bf16")
