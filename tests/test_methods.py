"""What every method must do, found by itself: a new file in ssl/methods is tested at once.

Below that, what single methods keep from step to step, and that two ranks are one batch.
"""

import dataclasses
import math
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from click.testing import CliRunner

from sslus.engine.errors import InputError
from sslus.kernels.barlow.reference import standardised
from sslus.kernels.vicreg import vicreg_loss, vicreg_terms
from sslus.kernels.vicreg.reference import covariance_term
from sslus.ssl import backbones, batchnorm, methods
from sslus.ssl.dual import DualTask
from sslus.ssl.heads import mlp, widths
from sslus.ssl.loader import Views
from sslus.ssl.train import Settings
from sslus.tools.cli import sslus

NAMES = methods.names()
SMALL = {
    "projector": "32-32-32",
    "predictor": 32,
    "queue": 20,
}  # the options that make a method small, where it has them


def small(module):
    known = {f.name for f in dataclasses.fields(module.Config)}
    return module.Config(**{k: v for k, v in SMALL.items() if k in known})


def build(name, image_size=32, **changes):
    module = methods.load(name)
    torch.manual_seed(0)
    backbone = backbones.build("test_resnet", image_size, seed=0)
    return module.Method(backbone, dataclasses.replace(small(module), **changes), image_size)


def batch(num, image_size=32, seed=0):
    """Views that share a smooth picture a sample and differ by noise."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num, 1, 4, 4, generator=g)
    picture = torch.nn.functional.interpolate(coarse, (image_size, image_size), mode="bicubic")
    va, vb = (picture + 0.3 * torch.randn(picture.shape, generator=g) for _ in range(2))
    labels = torch.full((num,), -1)
    return Views(va, vb, None, torch.arange(num) + 1000 * seed, labels)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_and_reaches_every_trained_weight(name):
    method = build(name)
    loss, terms, features, others = method(batch(8))
    loss.backward()
    assert loss.shape == () and loss.isfinite() and loss.dtype == torch.float32
    assert features.shape == (8, method.backbone.num_features) and features.requires_grad
    assert others is None or others.shape == features.shape
    assert all(t.shape == () and not t.requires_grad for t in terms.values())
    for key, p in method.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), key
    method.after_step(1, 10)


@pytest.mark.parametrize("name", NAMES)
def test_method_is_documented_in_the_help(name):
    result = CliRunner().invoke(sslus, ["train", "--method", name, "--help"])
    text = " ".join(result.output.split())
    assert result.exit_code == 0 and "arXiv" in text
    assert f"{', '.join(NAMES)}; or all" in text
    for f in dataclasses.fields(methods.load(name).Config):
        assert f"--{f.name.replace('_', '-')}" in text and f.metadata["help"] in text


def test_only_layers_without_a_norm_behind_them_have_a_bias():
    """And the last one of a projector has none either, as in the authors' code."""
    bare = ["0.weight", "1.weight", "1.bias", "3.weight"]
    for layers, num, want in [
        (mlp(4, 5, 6), 4, bare),
        (mlp(4, 5, 6, last_norm=True), 5, bare),  # which neither scales nor shifts
        (mlp(4, 5, 6, norm=False), 3, ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ]:
        assert len(layers) == num and [name for name, _ in layers.named_parameters()] == want


def test_unknown_names_are_one_line():
    with pytest.raises(InputError, match="no method 'vicrag'; there are: .*vicreg"):
        methods.load("vicrag")
    for text in ("", "12-", "8x8", "0-4"):
        with pytest.raises(InputError, match="want widths like"):
            widths(text)


@pytest.mark.parametrize("pairs", [(), (torch.linspace(0, 2, 40),)], ids=["plain", "weighted"])
def test_vicreg_terms_add_up_to_the_loss(pairs):
    za, zb = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    weights = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    loss = vicreg_loss(za, zb, *pairs, **weights)
    terms = vicreg_terms(za, zb, loss, *pairs, **weights)
    assert sum(weights[k] * v for k, v in terms.items()).item() == pytest.approx(loss.item())
    distances = (za - zb).square().mean(1)
    want = (distances * pairs[0] if pairs else distances).mean().item()
    assert terms["invariance"].item() == pytest.approx(want)
    want = (covariance_term(za) + covariance_term(zb)).item()
    assert terms["covariance"].item() == pytest.approx(want, rel=1e-4)
    weights["covariance"] = 0.0  # then the loss does not tell the term, which must not end the run
    loss = vicreg_loss(za, zb, *pairs, **weights)
    assert vicreg_terms(za, zb, loss, *pairs, **weights)["covariance"] == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_barlowtwins_terms_are_those_of_the_definition(weighted):
    views = batch(40)._replace(weights=torch.ones(40) if weighted else None)
    method = build("barlowtwins", projector="24")
    loss, terms, ha, hb = method(views)
    a, b = (standardised(method.projector(h)) for h in (ha, hb))
    c = a.T @ b / 40
    want = (c.diagonal() - 1).square().sum().item()
    assert terms["invariance"].item() == pytest.approx(want, rel=1e-4)
    want = c.square().sum().item() - c.diagonal().square().sum().item()
    assert terms["redundancy"].item() == pytest.approx(want, rel=1e-3)
    terms = build("barlowtwins", projector="24", off_diagonal=0.0)(views).terms
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_features_get_a_float32_loss(name):
    with torch.autocast("cpu", torch.bfloat16):
        loss = build(name)(batch(8)).loss
    assert loss.dtype == torch.float32
    want = build(name)(batch(8)).loss.item()
    assert loss.item() == pytest.approx(want, rel=0.05)


# From the papers, and from the study's public scripts (their file's name: METHOD-train.py).
LARGE = {"backbone": "resnet50", "image_size": 224, "optimizer": "lars"}
STUDY = {"backbone": "resnet50", "image_size": 256, "zero_init_residual": False}
VALUES = {
    ("simclr", "paper"): LARGE | {
        "lr": 6.4, "weight_decay": 1e-4, "batch_size": 4096, "epochs": 800, "final_lr": 0,
        "temperature": 0.1, "projector": "2048-2048-128", "zero_init_residual": True,
    },
    ("simclr", "study"): STUDY | {
        "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-4, "batch_size": 160, "epochs": 10,
        "warmup_steps": 0, "temperature": 0.5, "projector": "512-128",
    },
    ("moco", "paper"): LARGE | {
        "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_size": 256, "epochs": 800,
        "warmup_steps": 0, "temperature": 0.2, "queue": 65536, "momentum": 0.999,
        "zero_init_residual": False,
    },
    ("moco", "study"): STUDY | {
        "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_size": 288, "epochs": 20,
        "warmup_steps": 0, "temperature": 0.5, "queue": 4096, "momentum": 0.996,
        "init": "imagenet",
    },
    ("byol", "paper"): LARGE | {
        "lr": 3.2, "weight_decay": 1.5e-6, "batch_size": 4096, "epochs": 1000,
        "momentum": 0.996, "projector": "4096-256", "predictor": 4096, "zero_init_residual": True,
    },
    ("byol", "study"): STUDY | {
        "optimizer": "lars", "lr": 0.2, "weight_decay": 1.5e-6, "batch_size": 160, "epochs": 10,
        "warmup_steps": 0, "momentum": 0.996, "projector": "1024-256",
    },
    ("vicreg", "paper"): LARGE | {
        "lr": 1.6, "weight_decay": 1e-6, "batch_size": 2048, "epochs": 1000,
        "projector": "8192-8192-8192", "invariance": 25, "variance": 25, "covariance": 1,
        "zero_init_residual": True,
    },
    ("vicreg", "study"): STUDY | {
        "optimizer": "lars", "lr": 1.6, "weight_decay": 1e-6, "batch_size": 2048, "epochs": 1000,
        "projector": "8192-8192-8192", "invariance": 25, "variance": 25, "covariance": 1,
    },
    ("barlowtwins", "paper"): LARGE | {
        "lr": 1.6, "weight_decay": 1.5e-6, "batch_size": 2048, "epochs": 1000,
        "projector": "8192-8192-8192", "off_diagonal": 0.0051, "zero_init_residual": True,
    },
    ("barlowtwins", "study"): STUDY | {
        "optimizer": "lars", "lr": 1.6, "weight_decay": 1e-6, "batch_size": 2048, "epochs": 1000,
        "projector": "8192-8192-8192", "off_diagonal": 0.0051, "scale": 0.0048 / 0.2,
    },
    ("autoencoder", "study"): STUDY | {
        "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-6, "batch_size": 2048,
        "epochs": 1000, "init": "imagenet",
    },
    ("inpainting", "study"): STUDY | {
        "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-6, "batch_size": 2048,
        "epochs": 1000, "init": "imagenet", "rectangles": 1, "rest": 1.0,
    },
    ("moco", "default"): {
        "queue": 1024, "temperature": 0.2, "momentum": 0.99, "zero_init_residual": True,
    },
    ("byol", "default"): {"momentum": 0.99, "zero_init_residual": False},
    ("inpainting", "default"): {"zero_init_residual": False},
}  # fmt: skip


@pytest.mark.parametrize("name, which", VALUES)
def test_recipes_have_the_values_of_their_source(name, which):
    values, config = methods.recipe(name, which)
    settings = Settings(method=name, **values).resolved(torch.device("cpu"), num_frames=100_000)
    found = dataclasses.asdict(config) | dataclasses.asdict(settings)
    for key, value in VALUES[name, which].items():
        assert found[key] == (value if isinstance(value, str) else pytest.approx(value)), key


TEACHERS = [name for name in NAMES if hasattr(build(name), "teacher")]


def step(method, views):
    """Forward, backward, a plain update and `after_step`."""
    method(views).loss.backward()
    with torch.no_grad():
        for p in method.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
                p.grad = None
    method.after_step(1, 10)


def gradients(method, views):
    loss = method(views).loss
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in method.named_parameters() if p.requires_grad}


def assert_close(got, want, tolerance):
    """Each tensor within `tolerance` of the largest gradient: some are zero but for rounding."""
    scale = max(w.abs().max() for w in want.values())
    assert got.keys() == want.keys()
    for key, w in want.items():
        assert (got[key] - w).abs().max() <= tolerance * scale, key


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_pairs_count_or_are_refused(name):
    views = batch(8)
    ones, some = torch.ones(8), torch.linspace(0.1, 1, 8)
    try:
        loss, grads = gradients(build(name), views._replace(weights=ones))
    except InputError as e:
        assert "weights" in str(e)  # never ignored in silence
        return
    want, want_grads = gradients(build(name), views)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert_close(grads, want_grads, 1e-4)
    loss, grads = gradients(build(name), views._replace(weights=some))
    assert loss.item() != pytest.approx(want.item(), rel=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        half = build(name)(views._replace(weights=some)).loss
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    """What changes inside a forward pass must be a tensor, or it would be compiled in."""
    torch.compiler.reset()
    plain, compiled = build(name), build(name)
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    for i in range(2):
        views = batch(8, seed=i)
        want, got = plain(views).loss, fast(views).loss
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
    buffers = dict(plain.named_buffers())
    for key, value in compiled.named_buffers():
        torch.testing.assert_close(value, buffers[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_no_value(name, reads):
    method = build(name)
    views = batch(8)
    with reads as seen:
        method(views)
        method.after_step(1, 10)
    assert seen.num_reads == 0 and seen.num_calls > 100


# Teachers


def pairs_of_weights(method):
    student = [*method.backbone.parameters(), *method.projector.parameters()]
    return list(zip(method.teacher.parameters(), student, strict=True))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_follows_after_each_step_and_only_then(name):
    method = build(name, momentum=0.9)
    assert all(torch.equal(t, s) for t, s in pairs_of_weights(method))
    assert not any(p.requires_grad for p in method.teacher.parameters())
    with torch.no_grad():
        for p in (*method.backbone.parameters(), *method.projector.parameters()):
            p += torch.randn_like(p)
    before = [t.clone() for t in method.teacher.parameters()]
    method(batch(8)).loss.backward()
    for old, (t, _) in zip(before, pairs_of_weights(method), strict=True):
        assert torch.equal(t, old) and t.grad is None
    method.after_step(1, 10)
    for old, (t, s) in zip(before, pairs_of_weights(method), strict=True):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s, rtol=1e-6, atol=1e-6)


def test_byol_momentum_rises_and_never_reaches_one():
    method = build("byol", momentum=0.996)
    kept = [1 - method.rate(k, 1000) for k in range(1000)]
    assert kept[0] == pytest.approx(0.996, abs=1e-12) and kept[500] == pytest.approx(0.998)
    assert all(a < b for a, b in zip(kept, kept[1:], strict=False)) and kept[-1] < 1
    want = 1 - 0.004 * (math.cos(math.pi * 0.25) + 1) / 2  # section 3.2 of the paper
    assert kept[250] == pytest.approx(want)
    # The last step of the run still moves the teacher.
    with torch.no_grad():
        method.projector[0].weight += 1e6
    before = method.teacher[1][0].weight.clone()
    method.after_step(1000, 1000)
    assert not torch.equal(method.teacher[1][0].weight, before)


# MoCo's queue


def test_the_queue_holds_the_last_keys_in_their_order():
    method = build("moco", queue=20)  # not a multiple of the batch
    method.teacher.eval()  # a key then depends on its frame alone
    first = method.queue.clone()
    assert torch.allclose(first.norm(dim=1), torch.ones(20))
    keys = []
    for i in range(4):
        views = batch(8, seed=i)
        with torch.no_grad():
            keys.append(F.normalize(method.teacher(views.vb), dim=1))
        method(views)
        n = min(8 * (i + 1), 20)
        newest = torch.cat(keys)[-n:]
        by_age = method.queue.roll(-int(method.oldest), 0)
        torch.testing.assert_close(by_age[-n:], newest)
        if n < 20:
            assert torch.equal(method.queue[n:], first[n:])
    small = build("moco", queue=5)  # smaller than the batch
    small.teacher.eval()
    small(batch(8))
    with torch.no_grad():
        want = F.normalize(small.teacher(batch(8).vb), dim=1)[-5:]
    torch.testing.assert_close(small.queue.roll(-int(small.oldest), 0), want)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weights", [None, torch.linspace(0.2, 1, 8)])
def test_moco_compares_with_the_keys_of_earlier_batches(symmetric, weights):
    method = build("moco", symmetric=symmetric)
    step(method, batch(8, seed=1))
    views = batch(8)._replace(weights=weights)
    old = method.queue.clone()
    with torch.no_grad():
        losses = []
        for a, b in [(views.va, views.vb), (views.vb, views.va)][: 1 + symmetric]:
            q, k = method.projector(method.backbone(a)), method.teacher(b)
            q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ old.T], 1) / method.temperature
            each = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64), reduction="none")
            losses.append((each if weights is None else weights * each).mean())
    assert method(views).loss.item() == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)
    assert not torch.equal(method.queue, old)


# Two ranks


def whole(views, rank):
    return type(views)(*(None if t is None else t[8 * rank : 8 * rank + 8] for t in views))


def joint_batches(name):
    """16 rows, without and with weights where the method takes them."""
    views = batch(16)
    yield views
    weighted = views._replace(weights=torch.linspace(0.1, 1, 16))
    try:
        build(name)(weighted)
    except InputError:
        return
    yield weighted


def one_step(method, views, synchronised):
    """Loss and gradients; synchronised: of this rank's part of the batch, the gradients joined."""
    if synchronised:
        batchnorm.synchronise(method, torch.device("cpu"))
    loss, grads = gradients(method, views)
    if synchronised:
        for g in grads.values():
            dist.all_reduce(g)
    return loss, grads


def two_steps(name, views, synchronised):
    """Loss and gradients of a step, then loss and buffers of the next, with another batch."""
    method = build(name)
    loss, grads = one_step(method, views, synchronised)
    with torch.no_grad():
        for key, p in method.named_parameters():
            if key in grads:
                p -= 0.05 * grads[key]
    method.after_step(1, 10)
    again = method(views._replace(va=views.vb, vb=views.va)).loss.detach()
    return loss, grads, again, dict(method.named_buffers())


def dual_step(views, synchronised):
    """Loss and gradients with a cross-entropy beside VICReg's loss."""
    torch.manual_seed(1)
    return one_step(DualTask(build("vicreg"), 3, 0.7), views, synchronised)


def some_labelled():
    """Seven of the first rank's frames are, three of the second's."""
    labels = torch.tensor([0, 1, -1, 1, 0, 2, 1, 2, -1, -1, -1, 1, -1, -1, 2, 0])
    return batch(16)._replace(labels=labels)


def check_dual_task(rank, alone):
    loss, grads = dual_step(whole(some_labelled(), rank), True)
    assert abs(loss - alone[0]) <= 1e-5 * abs(alone[0]), (loss, alone[0])
    assert_close(grads, alone[1], 1e-5)


def check_ranks(rank, alone):
    for name in NAMES:
        for views, want in zip(joint_batches(name), alone[name], strict=True):
            loss, grads, again, buffers = two_steps(name, whole(views, rank), True)
            assert abs(loss - want[0]) <= 1e-5 * abs(want[0]), (name, loss, want[0])
            assert_close(grads, want[1], 1e-5)
            assert abs(again - want[2]) <= 1e-4 * abs(want[2]), (name, again, want[2])
            for key, b in buffers.items():
                torch.testing.assert_close(b, want[3][key], rtol=1e-3, atol=1e-4, msg=key)


def check_shuffled_keys(rank):
    """With BatchNorm of each rank, its keys stand among every second frame, not its own."""
    method, images = build("moco"), batch(16).vb
    own, joined = method.keys(images[8 * rank : 8 * rank + 8])
    for r in range(2):
        want = F.normalize(method.teacher(images[r::2]), dim=1)
        torch.testing.assert_close(joined[r::2], want)
    assert torch.equal(own, joined[8 * rank : 8 * rank + 8])


def check_batch_norm(rank):
    """Half precision is added up in float32; without a momentum, running values are means."""
    generator = torch.Generator().manual_seed(0)
    joint, plain = (torch.nn.BatchNorm2d(3, momentum=None) for _ in range(2))
    batchnorm.synchronise(joint, torch.device("cpu"))
    for _ in range(3):
        x = (torch.randn(32, 3, 8, 8, generator=generator) / 4 + 20).bfloat16()
        got, want = joint(x.chunk(2)[rank]), plain(x.float()).chunk(2)[rank]
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-3)
        for key, b in joint.named_buffers():
            torch.testing.assert_close(b, plain.get_buffer(key), rtol=1e-5, atol=0)


def work(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        alone = {
            name: [two_steps(name, views, False) for views in joint_batches(name)] for name in NAMES
        }
        alone_dual = dual_step(some_labelled(), False)
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        check_ranks(rank, alone)
        check_dual_task(rank, alone_dual)
        check_shuffled_keys(rank)
        check_batch_norm(rank)
        dist.barrier()
        dist.destroy_process_group()
        (folder / f"checked-{rank}").touch()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the other would wait for this one


def test_two_ranks_are_one_batch(tmp_path, start_ranks):
    try:
        start_ranks(work, (tmp_path,), 2)
    except mp.ProcessExitedException:
        pytest.fail("\n".join(p.read_text() for p in sorted(tmp_path.glob("error-*"))))
    assert all((tmp_path / f"checked-{rank}").exists() for rank in range(2))
