"""Backbones: any timm model with one channel, and weights made for three."""

import json

import pytest
import safetensors.torch
import timm
import torch

from sslus.engine.errors import InputError
from sslus.ssl import backbones
from sslus.ssl.loader import Views
from sslus.ssl.methods import vicreg

GREY = (0.21, 0.17)  # mean and std of an ultrasound store, far from ImageNet's


def trained(name, size=64, **options):
    """A stand-in for ImageNet weights: no statistic of a BatchNorm is what it starts as."""
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=3, **backbones._options(name, size) | options)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def colours(g, model):
    """Grey values 0..1 as a three-channel model wants them: (B, 1, H, W) -> (B, 3, H, W)."""
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (g - mean) / std


def error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(
    "name", ["resnet18", "test_efficientnet", "convnext_atto", "test_vit", "deit_tiny_patch16_224"]
)
def test_a_three_channel_stem_is_folded_exactly(name, monkeypatch):
    theirs = trained(name)
    monkeypatch.setattr(backbones, "_pretrained", lambda *_: theirs.state_dict())
    ours, said = backbones.build(name, 64, seed=1).eval(), []
    backbones.initialise(ours, "imagenet", name, said.append, image_size=64, grey=GREY)
    num = len(ours.state_dict())
    assert said[0].startswith(f"{num} of {num} tensors loaded")
    assert "three channels of" in said[0] and "random" not in said[0]
    g = torch.rand(3, 1, 64, 64)
    y, x = (g - GREY[0]) / GREY[1], colours(g, theirs)
    stem = theirs.pretrained_cfg["first_conv"]
    conv = theirs.get_submodule(stem)
    if conv.padding != (0, 0):
        # Zeros beyond the edge are the mean grey to us, the mean colour to them: give them ours.
        a, b = (m.get_submodule(stem)(v).double() for m, v in ((ours, y), (theirs, x)))
        inner = (..., slice(2, -2), slice(2, -2))
        offset = (a - b)[inner].mean((0, 2, 3), keepdim=True)  # is in the BatchNorm
        assert error((a - offset)[inner], b[inner]) < 1e-5
        beyond = colours(torch.tensor(GREY[0]), theirs)
        forward = conv.forward
        monkeypatch.setattr(
            conv, "forward",
            lambda x: forward(x - beyond) + (conv.weight * beyond).sum((1, 2, 3))[:, None, None],
        )  # fmt: skip
    with torch.no_grad():
        assert error(ours(y), theirs(x)) < 1e-5


def test_files_with_colours_prefixes_and_heads_are_matched(tmp_path):
    whole = trained("resnet18", num_classes=10).state_dict()
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in whole.items()}
                | {"module.queue": torch.ones(2)}}, tmp_path / "moco.pt")  # fmt: skip
    safetensors.torch.save_file(whole, tmp_path / "plain.safetensors")
    states, said = [], []
    for file in ("moco.pt", "plain.safetensors"):
        ours = backbones.build("resnet18", 32, seed=1)
        backbones.initialise(ours, str(tmp_path / file), "resnet18", said.append, grey=GREY)
        states.append(ours.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert torch.equal(states[0]["layer4.1.conv2.weight"], whole["layer4.1.conv2.weight"])
    assert "`module.encoder_q.` removed from their names" in said[0]
    assert "conv1.weight folded into one" in said[0] and "module.queue" in said[0]
    assert said[1].endswith("not used: fc.bias, fc.weight")


def test_equal_weights_make_equal_files(tmp_path):
    net, facts = torch.nn.Linear(2, 3), {k: f"{k} é" for k in "bdfhgeca"} | {"step": 7}
    path = tmp_path / "backbone.safetensors"
    found = set()
    for _ in range(4):
        backbones.save(net, path, facts)
        found.add(path.read_bytes())
    assert len(found) == 1 and backbones.step_of(path) == 7
    with safetensors.safe_open(path, "pt") as f:
        assert f.metadata() == {k: json.dumps(v) for k, v in facts.items()}
        assert torch.equal(f.get_tensor("weight"), net.weight)


def test_weights_that_do_not_fit_are_named():
    ours = backbones.build("test_vit", 64, seed=0)
    other = backbones.build("test_vit", 32, seed=1).state_dict()
    other.pop("norm.weight")
    line = backbones.fill(ours, other, "file")
    assert line.startswith("76 of 78 tensors")
    assert "of another shape: pos_embed 1x5x64, here 1x17x64; kept random: norm.weight" in line
    with pytest.raises(InputError, match=r"0 of 78 tensors match .*file: a\.\.\.; backbone: cls"):
        backbones.fill(ours, {"a": torch.ones(2)}, "file")
    resnet = backbones.build("test_resnet", 32, seed=0)
    counters = {k: v for k, v in resnet.state_dict().items() if k.endswith("num_batches_tracked")}
    with pytest.raises(InputError, match="0 of 90 tensors match"):
        backbones.fill(resnet, counters | {"conv1.weight": torch.ones(2)}, "a wider net")
    with pytest.raises(ValueError, match="three channels in the file"):
        backbones.fill(ours, trained("test_vit").state_dict(), "file")
    nfnet = backbones.build("test_nfnet", 64, seed=0)  # standardises its weights: w' is not w
    with pytest.raises(InputError, match="cannot be folded"):
        backbones.fill(nfnet, trained("test_nfnet").state_dict(), "file", GREY)


def test_imagenet_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more")

    ours = backbones.build("test_resnet", 32, seed=0)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match="weights of test_resnet cannot be downloaded") as e:
        backbones.initialise(ours, "imagenet", "test_resnet", print, grey=GREY)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="timm has no weights of resnet200"):  # nobody has
        backbones.initialise(ours, "imagenet", "resnet200", print, grey=GREY)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "convnext_atto", "vit_tiny_patch16_224", "test_mambaout"]
)
def test_any_timm_model_trains(name):
    backbone = backbones.build(name, 32, seed=0)
    x = torch.randn(4, 1, 32, 32)
    assert backbone(x).shape == (4, backbone.num_features)
    method = vicreg.Method(backbone, vicreg.Config(projector="16-16"), 32)
    before = next(backbone.parameters()).detach().clone()
    views = Views(x, x + 0.1, None, torch.arange(4), torch.full((4,), -1))
    optimizer = torch.optim.AdamW(method.parameters(), 1e-3)
    loss = method(views).loss
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert not torch.equal(before, next(backbone.parameters()))
    assert all(p.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "regnety_002", "test_vit"])
def test_an_untrained_backbone_sees_the_whole_image(name):
    """timm's ResNets do not: their blocks begin as identities, and strides skip most pixels. A
    trained one would be compared with that."""
    x = torch.rand(2, 1, 64, 64, requires_grad=True)
    backbones.build(name, 64, seed=0).eval()(x).square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_efficientnet"])
def test_random_weights_are_timms(name):
    torch.manual_seed(3)
    options = backbones._options(name, 64)
    theirs = timm.create_model(name, in_chans=1, **options).state_dict()
    ours, zeroed = (backbones.build(name, 64, 3, zero).state_dict() for zero in (False, True))
    assert all(torch.equal(zeroed[k], theirs[k]) for k in theirs)  # timm's own default
    differ = {k for k in theirs if not torch.equal(ours[k], theirs[k])}
    last = {k for k in theirs if name == "resnet18" and k.endswith("bn2.weight")}
    assert differ == last and all((ours[k] == 1).all() for k in last)


def test_backbones_that_cannot_take_the_size_are_refused_when_built():
    with pytest.raises(InputError, match="test_vit' cannot be built at 50 px: .*divisible"):
        backbones.build("test_vit", 50, seed=0)
    with pytest.raises(InputError, match="at 96 px: the size does not suit it"):
        backbones.build("halonet26t", 96, seed=0)
    assert backbones.build("mobilenetv3_small_050", 32, seed=0).num_features == 1024
