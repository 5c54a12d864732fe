"""Defects of the public code of the study this project rebuilds (arXiv:2407.21738) and its kin.

Each has a test that fails on it: here, or where the thing is tested anyway.

- a cosine of steps that is moved once an epoch, so that the rate hardly falls:
  test_train.py::test_schedule_reaches_its_ends_step_by_step, ::test_a_run_leaves_what_it_promises
- an EMA momentum that reaches 1: test_methods.py::test_byol_momentum_rises_and_never_reaches_one
- a teacher that moves while validating: test_looking_at_the_features_changes_no_bit
- a loss divided by the configured batch size: test_identical_views_correlate_fully
- a seed that changes neither head nor shuffle: test_the_seed_changes_head_shuffle_and_views
- a frozen probe whose BatchNorm drifts: test_evaluate.py::test_features_are_frozen
- `--freeze False` that parses as True (there is no such flag; a method's options have bools):
  test_false_means_false
- weights of which nothing matches: test_train.py::test_initial_weights_are_checked
- resume that repeats an epoch and drops schedule and RNG: test_train.py::test_sigterm_...,
  ::test_sigkill_..., ::test_a_resumed_run_draws_...; with a teacher or a queue:
  test_resume_is_exact
- a decoder for one size of the input, and an inpainting loss over the whole image:
  test_reconstruction.py
- frames of mixed sizes that do not fit into a batch: test_mixed_sizes_become_one
- labels subsampled by image: test_evaluate.py::test_a_share_keeps_whole_videos_of_every_class,
  ::test_patients_never_leak_and_every_frame_is_tested_once
- class weights from labels that are not used:
  test_evaluate.py::test_probe_standardises_on_the_training_part_and_weighs_classes,
  ::test_what_the_probe_learns_from_are_the_labels_that_are_kept
- changes of colour on grey frames: test_every_change_of_a_view_changes_grey_frames
- NT-Xent by broadcasting 2N x 2N x D: test_ntxent_needs_no_more_than_its_logits
- neighbours in time as negatives only: test_views.py::test_nearby_...,
  test_train.py::test_nearby_pairs_with_weights_train
"""

import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sslus.engine.errors import InputError
from sslus.engine.plan import Plan
from sslus.engine.shard import Settings as ShardSettings
from sslus.engine.shard import shard
from sslus.engine.store import FrameStore
from sslus.kernels.augment import views as make_views
from sslus.kernels.ntxent import ntxent_loss
from sslus.ssl import checkpoints, methods
from sslus.ssl.loader import Views
from sslus.ssl.loop import Options
from sslus.ssl.methods import barlowtwins, simclr
from sslus.ssl.state import State
from sslus.ssl.step import Step
from sslus.ssl.train import Settings, train
from sslus.ssl.views import PRESETS, ViewConfig, draw, parse
from sslus.ssl.world import World
from sslus.tools.train import command

SMALL = Settings(backbone="test_resnet", image_size=32, batch_size=8, max_steps=6)
HEADS = {"projector": "32-32", "predictor": 32, "queue": 20}


def small(name):
    """A method's Config, small where it has sizes."""
    config = methods.load(name).Config()
    known = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in HEADS.items() if k in known})


def tensors(state: dict) -> dict:
    return {k: v.clone() for k, v in state["method"].items()}


def test_looking_at_the_features_changes_no_bit(clips, no_curves, tmp_path):
    name = "moco"  # it has a teacher and a queue
    shards = tmp_path / "shards"
    shard(
        [clips], shards, ShardSettings(size=32, stride=2), labels=clips / "labels.csv",
        device="cpu", jobs=1,
    )  # fmt: skip
    ends = []
    for every in (0, 1):
        run = tmp_path / f"every-{every}"
        settings = dataclasses.replace(SMALL, method=name, max_steps=12)
        options = Options(log_every=4, online_every=every)
        train(shards, settings, small(name), run, device="cpu", threads=1, options=options)
        lines = checkpoints.read_metrics(run / "metrics.jsonl")
        assert any("probe_macro_f1" in line for line in lines) == bool(every)
        ends.append(tensors(checkpoints.load(run / "checkpoint.pt")))
    assert all(torch.equal(ends[0][k], v) for k, v in ends[1].items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", methods.names())
def test_resume_is_exact(name, precision, tmp_path):
    """With all that a method keeps: a teacher, a queue, and what it draws."""
    g = torch.Generator().manual_seed(0)
    batches = [
        Views(*torch.randn(2, 8, 1, 32, 32, generator=g), None, torch.arange(8), torch.zeros(8))
        for _ in range(6)
    ]
    settings = dataclasses.replace(SMALL, method=name, precision=precision)
    settings = settings.resolved(torch.device("cpu"), 100)

    def fresh():
        state = State.build(settings, small(name), World(torch.device("cpu")), 0)
        return state, Step(state, settings)

    (straight, step), (first, half) = fresh(), fresh()
    for views in batches:
        step([views], 1e-3)
    for views in batches[:3]:
        half([views], 1e-3)
    first.save(tmp_path / "checkpoint.pt")
    resumed, rest = fresh()
    resumed.load(tmp_path / "checkpoint.pt")
    for views in batches[3:]:
        rest([views], 1e-3)
    want = straight.method.state_dict()
    for key, value in resumed.method.state_dict().items():
        assert torch.equal(value, want[key]), key
    assert torch.equal(resumed.window, straight.window)  # the losses of all six steps, summed
    assert any("teacher" in key for key in want) == (name in ("byol", "moco"))


@pytest.mark.parametrize("num", [2, 5, 64])  # whatever was configured, this is the batch
@pytest.mark.parametrize("weighted", [False, True])
def test_identical_views_correlate_fully(num, weighted):
    z = 10 * torch.randn(num, 16, generator=torch.Generator().manual_seed(0))
    if weighted:
        loss, _ = barlowtwins.weighted_barlow(z, z, torch.linspace(0.5, 1, num), 0.0)
    else:
        loss = barlowtwins.barlow_loss(z, z, off_diagonal=0.0)
    assert loss.item() < 1e-3  # a diagonal of 0.25 would give 16 * 0.75^2 = 9


@pytest.mark.parametrize("name", methods.names())
def test_the_seed_changes_head_shuffle_and_views(name):
    config = methods.recipe(name, "default")[1]
    known = {f.name for f in dataclasses.fields(config)}
    if "projector" in known:
        config = dataclasses.replace(config, projector="32-32")
    one, same, other = (
        State.build(
            dataclasses.replace(SMALL, method=name, seed=seed).resolved(torch.device("cpu"), 100),
            config, World(torch.device("cpu")), 0,
        ).method.state_dict()
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert all(torch.equal(v, same[k]) for k, v in one.items())
    drawn = [k for k, v in one.items() if v.ndim > 1]
    heads = [k for k in drawn if not k.startswith("backbone.")]
    assert heads and not any(torch.equal(one[k], other[k]) for k in drawn)
    orders = [Plan(100, 8, seed).order(0) for seed in (0, 1)]
    assert not np.array_equal(*orders)
    tables = [draw(PRESETS["simclr"][0], np.arange(9), 0, 0, s, 64, 32) for s in (0, 1)]
    assert not np.array_equal(*tables)


@pytest.mark.parametrize("text, want", [("False", False), ("0", False), ("True", True)])
def test_false_means_false(text, want):
    """The value, not the presence of a word, decides."""
    context = command.make_context("train", ["shards", "--method", "moco", "--symmetric", text])
    assert context.params["symmetric"] is want
    result = CliRunner().invoke(command, ["--method", "moco", "--symmetric", "perhaps"])
    assert result.exit_code == 2


def test_mixed_sizes_become_one(clip, pattern, tmp_path):
    (tmp_path / "videos").mkdir()
    for i, (height, width) in enumerate([(48, 64), (90, 50), (33, 33), (128, 96)]):
        clip(tmp_path / "videos" / f"{i}.avi", _even(pattern(4, height, width, seed=i)))
    shard([tmp_path / "videos"], tmp_path / "s", ShardSettings(size=32, stride=1), device="cpu",
          jobs=1)  # fmt: skip
    store = FrameStore.open(tmp_path / "s")
    assert store.frames.shape == (16, 32, 32) and len(np.unique(store.video)) == 4


def _even(luma: np.ndarray) -> np.ndarray:
    return luma[:, : luma.shape[1] // 2 * 2, : luma.shape[2] // 2 * 2]


# For each kind of change a value at which it must show.
CHANGES = [
    {"p_flip": 1},
    {"p_jitter": 1, "brightness": 1, "contrast": 0},
    {"p_jitter": 1, "brightness": 0, "contrast": 1},
    {"p_jitter": 1, "brightness": 0, "contrast": 0, "gamma": 1},
    {"p_blur": 1, "max_sigma": 0.1},
    {"p_solarize": 1},
    {"p_gain": 1, "gain": 1},
    {"p_speckle": 1, "speckle": 1},
    {"min_area": 0.1, "max_area": 0.2},
    {"min_area": 0.5, "max_area": 0.5, "max_aspect": 2},
]


def test_every_change_of_a_view_changes_grey_frames():
    """No hue, saturation or grayscale: on grey frames they cost time and do nothing."""
    fields = {f.name for f in dataclasses.fields(ViewConfig)}
    assert {key for change in CHANGES for key in change} | {"solarize"} == fields
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 32, 32), np.uint8))
    index = np.arange(6)

    def seen(**change):
        config = dataclasses.replace(PRESETS["autoencoder"][0], **change)
        table = torch.from_numpy(draw(config, index, 0, 0, 0, 32, 32))
        return make_views(frames, torch.from_numpy(index), table, size=32)

    plain = seen()
    for change in CHANGES:
        different = (seen(**change) - plain).abs().flatten(1).amax(1)
        assert (different > 0.01).float().mean() > 0.5, change
    for colour in ("hue", "saturation", "grayscale"):
        with pytest.raises(InputError, match="no field"):
            parse(f"simclr,{colour}=0.1")


@pytest.mark.parametrize("which", ["kernel", "reference", "weighted"])
def test_ntxent_needs_no_more_than_its_logits(which, largest):
    n, d = 40, 50
    za, zb = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    with largest:
        if which == "weighted":
            loss = simclr.weighted_ntxent(za, zb, torch.ones(n), 0.5)
        else:
            which = "cpu" if which == "kernel" else which
            loss = ntxent_loss.run(which, za, zb, temperature=0.5)
        loss.backward()
    assert 0 < largest.numel <= (2 * n) ** 2  # broadcast, it would be 50 times that
