"""The two methods that paint: a decoder for any backbone, a loss where it belongs."""

import dataclasses

import pytest
import torch

from sslus.engine.errors import InputError
from sslus.kernels.mask import draw_mask, mask_fill, sample_ids
from sslus.ssl import backbones, methods
from sslus.ssl.decoder import Decoder, encode, to_map
from sslus.ssl.loader import Views
from sslus.ssl.methods import autoencoder, inpainting
from sslus.ssl.views import parse

BOTH = (autoencoder, inpainting)


def build(module, name="test_resnet", size=32, **options):
    torch.manual_seed(0)
    backbone = backbones.build(name, size, seed=0)
    return module.Method(backbone, module.Config(**options), size)


def batch(num=4, size=32, border=0):
    """Smooth pictures and noisy ones; as pixels 0..1, with a black border on all sides."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(num, 1, 4, 4, generator=g)
    picture = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") + 0.2
    noisy = picture + 0.1 * torch.randn(picture.shape, generator=g)
    if border:
        edge = torch.ones(size, size, dtype=torch.bool)
        edge[border:-border, border:-border] = False
        picture, noisy = picture.masked_fill(edge, 0.0), noisy.masked_fill(edge, 0.0)
    return Views(picture, noisy, None, torch.arange(num), torch.full((num,), -1))


def painted(method, x):
    """What the method makes of an input; in eval mode it is the same every time."""
    seen, features = encode(method.backbone, x)
    return method.decoder(seen, features, x.shape[-2:])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 32), ("test_resnet", 50), ("test_resnet", 96),
        ("resnet18", 50), ("resnet50", 96),
        ("convnext_atto", 50),  # its stem drops pixels: 50 -> 12, 6, 3, 1
        ("test_convnext", 96),
        ("test_vit", 32), ("test_vit", 96), ("vit_tiny_patch16_224", 50),  # a class token
        ("deit_tiny_distilled_patch16_224", 64),  # two tokens before the grid
        ("test_mambaout", 64),  # (B, h, w, C), and features wider than the map
    ],
)  # fmt: skip
def test_decoder_fits_any_backbone_and_size(name, size):
    backbone = backbones.build(name, size, seed=0)
    decoder = Decoder(backbone, size)
    assert backbone.training  # measuring the map has left no trace
    x = torch.randn(2, 1, size, size)
    seen, features = encode(backbone, x)
    features.retain_grad()
    picture = decoder(seen, features, x.shape[-2:])
    assert picture.shape == x.shape
    picture.square().mean().backward()
    assert all(p.grad is not None for part in (backbone, decoder) for p in part.parameters())
    assert all(p.grad.any() for p in decoder.parameters()) and features.grad.any()
    backbone.eval()
    assert torch.equal(encode(backbone, x)[1], backbone(x))


def test_pictures_need_not_be_square():
    backbone = backbones.build("test_resnet", 64, seed=0)
    x = torch.randn(2, 1, 48, 85)
    seen, features = encode(backbone, x)
    assert seen.shape[2:] == (2, 3)
    assert Decoder(backbone, 64)(seen, features, (48, 85)).shape == x.shape


def test_tokens_become_the_grid_they_came_from():
    backbone = backbones.build("test_vit", 32, seed=0)
    tokens = torch.arange(1 + 2 * 5).view(1, -1, 1).repeat(1, 1, 3)
    assert to_map(backbone, tokens, (32, 80))[0, 0].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    with pytest.raises(InputError, match="10 tokens .* no grid for 64 x 64"):
        to_map(backbone, tokens, (64, 64))
    with pytest.raises(InputError, match="has 2 feature maps, not one; use another backbone"):
        to_map(backbone, [tokens, tokens], (32, 80))  # as of CrossViT
    swin = torch.nn.Identity()
    swin.output_fmt = "NHWC"
    assert to_map(swin, torch.zeros(2, 3, 4, 7), (96, 128)).shape == (2, 7, 3, 4)


def test_autoencoder_compares_the_whole_clean_picture():
    method, views = build(autoencoder).eval(), batch()
    out = method(views)
    want = (painted(method, views.vb) - views.va).square().mean()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(out.features, method.backbone(views.vb)) and out.others is None


def test_autoencoder_can_leave_out_what_is_no_ultrasound():
    views = batch(border=8)
    mean, std = 0.4, 0.25
    views = views._replace(va=(views.va - mean) / std, vb=(views.vb - mean) / std)
    method = build(autoencoder, outside=0.0).eval()
    method.normalised_by(mean, std)
    error = (painted(method, views.vb) - views.va).square()
    assert method(views).loss.item() == pytest.approx(
        error[..., 8:-8, 8:-8].mean().item(), rel=1e-5
    )
    method = build(autoencoder, outside=0.5).eval()
    method.normalised_by(mean, std)
    weight = torch.full((32, 32), 0.5)
    weight[8:-8, 8:-8] = 1
    want = (weight * error).sum() / weight.sum() / len(error)
    assert method(views).loss.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["rectangles", "patches"])
def test_inpainting_counts_the_hole_alone_and_never_shows_it(kind):
    method, views = build(inpainting, kind=kind, patch=4).eval(), batch()
    x, ids = views.va, views.ids
    hidden = draw_mask(x, ids, method.mask)[:, None]
    assert 0.05 < hidden.float().mean() < 0.8
    out = method(views)
    shown = mask_fill(x, ids, method.mask)
    error = (painted(method, shown) - x).square()
    assert out.loss.item() == pytest.approx(error[hidden].mean().item(), rel=1e-5)
    assert torch.equal(out.features, method.backbone(shown))
    # Nothing of the hole reaches the network, and the second view is not looked at.
    other = views._replace(va=torch.where(hidden, 9.0, x), vb=torch.randn_like(x))
    assert torch.equal(method(other).features, out.features)
    both = build(inpainting, kind=kind, patch=4, hole=1.0, rest=0.25).eval()
    weight = torch.where(hidden, 1.0, 0.25)
    want = (weight * error).sum() / weight.sum()
    assert both(views).loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_masks_stay_in_the_sector_and_follow_the_sample():
    method = build(inpainting, patch=4, rectangles=3, max_side=0.3)
    mean, std = 0.4, 0.25
    method.normalised_by(mean, std)
    x = (batch(8, border=8).va - mean) / std
    frames = torch.arange(8)
    first, later, reseeded = (
        sample_ids(frames, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    masks = draw_mask(x, first, method.mask)
    assert masks.any((1, 2)).all() and masks[:, 8:-8, 8:-8].sum() == masks.sum()
    assert all((masks[i] != masks[j]).any() for i in range(8) for j in range(i))
    for ids in (later, reseeded):
        assert (draw_mask(x, ids, method.mask) != masks).any((1, 2)).all()
    assert torch.equal(draw_mask(x[3:5], first[3:5], method.mask), masks[3:5])
    # Grey level 8 is background, 9 is not.
    faint = torch.full((1, 1, 32, 32), 8 / 255)
    faint[..., 8:-8, 8:-8] = 9 / 255
    whole = build(inpainting, kind="patches", patch=4, ratio=1.0)
    whole.normalised_by(mean, std)
    mask = draw_mask((faint - mean) / std, first[:1], whole.mask)
    assert mask.sum() == mask[:, 8:-8, 8:-8].sum() == 16 * 16
    anywhere = build(inpainting, patch=4, rectangles=3, max_side=0.3, background=-1)
    anywhere.normalised_by(mean, std)
    assert (draw_mask(x, first, anywhere.mask) & ~masks).any()


@pytest.mark.parametrize("module", BOTH)
def test_painting_is_learnt(module):
    method, views = build(module), batch(8)
    mean, std = views.va.mean(), views.va.std()
    views = views._replace(va=(views.va - mean) / std, vb=(views.vb - mean) / std)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    losses = []
    for step in range(30):
        loss = method(views._replace(ids=views.ids + (step << 40))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.6  # 1 is the error of the mean of all pixels


@pytest.mark.parametrize("module", BOTH)
def test_reconstruction_refuses_pairs_and_senseless_options(module):
    assert not module.PAIRS
    with pytest.raises(InputError, match="no pair weights"):
        build(module)(batch()._replace(weights=torch.ones(4)))
    if module is autoencoder:
        return
    for options in (
        {"kind": "circles"}, {"hole": 0.0}, {"ratio": 1.5}, {"rectangles": 0},
    ):  # fmt: skip
        with pytest.raises(InputError, match="want"):
            build(module, **options)
    with pytest.raises(InputError, match="want --patch 2 or more"):
        build(module, size=64, patch=1)


def test_autoencoder_refuses_views_that_do_not_match_pixel_by_pixel():
    for which in methods.RECIPES:
        values, _ = methods.recipe("autoencoder", which)
        autoencoder.check_views(*parse(values["views"]))
    clean, corrupted = parse("autoencoder")
    for text in ("ultrasound", "simclr", "autoencoder,p_flip=0.5", "autoencoder,min_area=0.5"):
        with pytest.raises(InputError, match="pixel by pixel"):
            autoencoder.check_views(*parse(text))
    with pytest.raises(InputError, match="p_speckle=1 would corrupt it too"):
        autoencoder.check_views(dataclasses.replace(clean, p_speckle=1.0), corrupted)
