"""What every method must do, found by itself: a new file in ssl/methods is tested at once."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from sslus.engine.errors import InputError
from sslus.kernels.vicreg import vicreg_loss, vicreg_terms
from sslus.kernels.vicreg.reference import covariance_term
from sslus.ssl import methods
from sslus.ssl.heads import widths
from sslus.tools.cli import sslus

NAMES = methods.names()
SMALL = {"projector": "32-32-32"}  # the options that make a method small, where it has them


def small(module):
    known = {f.name for f in dataclasses.fields(module.Config)}
    return module.Config(**{k: v for k, v in SMALL.items() if k in known})


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_and_reaches_every_weight(name):
    torch.manual_seed(0)
    module = methods.load(name)
    method = module.Method(features=16, config=small(module))
    ha, hb = torch.randn(2, 8, 16, requires_grad=True)
    loss, terms = method(ha, hb)
    loss.backward()
    assert loss.shape == () and loss.isfinite() and loss.dtype == torch.float32
    assert all(t.shape == () and not t.requires_grad for t in terms.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    method.after_step(1, 10)


@pytest.mark.parametrize("name", NAMES)
def test_method_learns_structure_and_does_not_collapse(name):
    """Two noisy views of 4 hidden factors: the loss falls, the features follow the factors."""
    torch.manual_seed(0)
    module = methods.load(name)
    method = module.Method(features=32, config=small(module))
    encoder = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
    )
    optimizer = torch.optim.AdamW([*encoder.parameters(), *method.parameters()], lr=2e-3)
    mixing = torch.randn(4, 64)

    def views(n):
        factors = torch.randn(n, 4)
        return factors, *(factors @ mixing + 2 * torch.randn(n, 64) for _ in range(2))

    losses = []
    for step in range(150):
        _, va, vb = views(64)
        loss, _ = method(encoder(va), encoder(vb))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step + 1, 150)
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    factors, v, _ = views(512)
    with torch.no_grad():
        h = encoder.eval()(v)
    assert h.std(dim=0).mean() > 0.05 * h.square().mean().sqrt()
    h = torch.cat([h, torch.ones(len(h), 1)], dim=1)
    rest = factors - h @ torch.linalg.lstsq(h, factors).solution
    assert rest.var() < 0.3 * factors.var()


@pytest.mark.parametrize("name", NAMES)
def test_method_is_documented_in_the_help(name):
    result = CliRunner().invoke(sslus, ["train", "--method", name, "--help"])
    text = " ".join(result.output.split())
    assert result.exit_code == 0 and "arXiv" in text
    for f in dataclasses.fields(methods.load(name).Config):
        assert f"--{f.name.replace('_', '-')}" in text and f.metadata["help"] in text


def test_unknown_names_are_one_line():
    with pytest.raises(InputError, match="no method 'vicrag'; there are: .*vicreg"):
        methods.load("vicrag")
    for text in ("", "12-", "8x8", "0-4"):
        with pytest.raises(InputError, match="want widths like"):
            widths(text)


def test_vicreg_terms_add_up_to_the_loss():
    za, zb = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    weights = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    loss = vicreg_loss(za, zb, **weights)
    terms = vicreg_terms(za, zb, loss, **weights)
    assert sum(weights[k] * v for k, v in terms.items()).item() == pytest.approx(loss.item())
    want = (covariance_term(za) + covariance_term(zb)).item()
    assert terms["covariance"].item() == pytest.approx(want, rel=1e-4)


def test_bfloat16_features_get_a_float32_loss():
    module = methods.load("vicreg")
    torch.manual_seed(0)
    method = module.Method(16, module.Config(projector="32"))
    ha, hb = torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(ha, hb)
        za, zb = method.projector(ha).float(), method.projector(hb).float()
    want = vicreg_loss(za, zb, **method.weights)
    assert loss.dtype == torch.float32 and torch.equal(loss, want)
