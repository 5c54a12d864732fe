"""What the loop offers beside the plain run: micro-batches, a dual task, a look on the way."""

import contextlib
import dataclasses
import json
import math
import re
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sslus.engine.errors import InputError, Interrupted
from sslus.engine.shard import Settings as ShardSettings
from sslus.engine.shard import shard
from sslus.engine.store import FrameStore
from sslus.ssl import backbones, checkpoints, curves, health, loop, methods, online
from sslus.ssl.dual import DualTask
from sslus.ssl.loader import Loader, Views
from sslus.ssl.loop import Options
from sslus.ssl.methods import vicreg
from sslus.ssl.metrics_log import MetricsLog
from sslus.ssl.online import Online
from sslus.ssl.optimizers import OPTIMIZERS, default_lr, make
from sslus.ssl.state import State, Window
from sslus.ssl.step import Snapshot, Step, choose, total_norm
from sslus.ssl.train import Settings, train
from sslus.ssl.world import World
from sslus.tools import training
from sslus.tools.cli import main
from sslus.tools.training import _evaluate

SMALL = Settings(  # starts as `sslus train` does
    backbone="test_resnet", image_size=32, batch_size=16, max_steps=6, zero_init_residual=True
)
HEAD = vicreg.Config(projector="32-32")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_curves")


def run_train(shards, run, settings=SMALL, resume=False, **options):
    return train(
        shards, settings, HEAD, run, device="cpu", threads=1, resume=resume,
        options=Options(**({"log_every": 1} | options)),
    )  # fmt: skip


def state_of(settings):
    return State.build(settings.resolved(CPU, 100), HEAD, World(CPU), 2)


def views_of(num, seed=0):
    va, vb = torch.randn(2, num, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Views(va, vb, None, torch.arange(num), torch.arange(num) % 3 - 1)


def weights_of(state):
    return torch.cat([p.detach().flatten() for p in state.method.parameters()])


def test_micro_batches_average_their_gradients():
    settings = dataclasses.replace(SMALL, accumulate=2, optimizer="sgd", lr=0.1, weight_decay=0.0)
    one, two, both = (state_of(settings) for _ in range(3))
    start = weights_of(both)
    a, b = views_of(16, 0), views_of(16, 1)
    alone = dataclasses.replace(settings, accumulate=1)
    Step(one, alone)([a], 0.1)
    Step(two, alone)([b], 0.1)
    Step(both, settings)([a, b], 0.1)
    want = (weights_of(one) + weights_of(two)) / 2 - start
    torch.testing.assert_close(weights_of(both) - start, want, rtol=1e-3, atol=1e-6)
    loss = both.window[0].item()
    assert loss == pytest.approx((one.window[0] + two.window[0]).item() / 2, rel=1e-6)


def test_a_run_of_micro_batches_counts_steps_and_frames(shards, tmp_path):
    settings = dataclasses.replace(SMALL, accumulate=2, max_steps=None, epochs=2)
    result = run_train(shards, tmp_path / "run", settings)
    num = len(FrameStore.open(shards))
    assert result.step == 2 * (num // 16) // 2 and result.epoch == pytest.approx(2, abs=0.4)


def test_the_time_without_views_is_told(shards, tmp_path, monkeypatch):
    real = Loader._make

    def slow(*args):
        time.sleep(1)
        return real(*args)

    waits = {}
    for name in ("ready", "late"):
        if name == "late":
            monkeypatch.setattr(Loader, "_make", slow)
        result = run_train(shards, tmp_path / name, dataclasses.replace(SMALL, max_steps=4))
        waits[name] = [m["data_wait"] for m in result.metrics[2:]]
    assert max(waits["ready"]) < min(waits["late"]) <= 1 and min(waits["late"]) > 0.5


def test_the_time_in_which_a_gpu_had_no_views_is_told(shards, tmp_path, monkeypatch):
    class Event:
        def elapsed_time(self, after):  # milliseconds
            return 1e9

    monkeypatch.setattr(Loader, "gpu_waits", lambda self: [(Event(), Event())])
    result = run_train(shards, tmp_path / "run", dataclasses.replace(SMALL, max_steps=2))
    assert [m["data_wait"] for m in result.metrics] == [1, 1]


@pytest.mark.parametrize("with_norm", [True, False])
def test_gradients_are_clipped_and_the_norm_before_is_logged(with_norm):
    """Clipped by their own norm at steps of which nothing is logged, too."""
    settings = dataclasses.replace(SMALL, optimizer="sgd", weight_decay=0.0, clip_norm=0.01)
    state = state_of(settings)
    start = weights_of(state)
    step = Step(state, settings)
    step([views_of(16)], 1.0, with_norm)
    assert (weights_of(state) - start).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert step.grad_norm > 0.1


def test_a_line_has_the_gradient_norm_of_its_step(shards, tmp_path):
    settings = dataclasses.replace(SMALL, max_steps=4)
    each, some = (
        {m["step"]: m["grad_norm"] for m in run.metrics}
        for run in (
            run_train(shards, tmp_path / str(every), settings, log_every=every) for every in (1, 3)
        )
    )
    assert len(set(each.values())) == 4 and some == {step: each[step] for step in (3, 4)}


def test_a_view_that_the_method_does_not_use_is_not_made(shards, tmp_path, monkeypatch):
    num, weights = [], []

    class Counting(Loader):
        def __init__(self, store, batches, presets, **options):
            num.append(len(presets))
            super().__init__(store, batches, presets, **options)

    monkeypatch.setattr("sslus.ssl.loop.Loader", Counting)
    values, config = methods.recipe("inpainting", "default")
    settings = dataclasses.replace(SMALL, method="inpainting", max_steps=2, **values)
    for one in (True, False):
        monkeypatch.setattr(methods.load("inpainting"), "ONE_VIEW", one)
        run = train(shards, settings, config, tmp_path / str(one), device="cpu", threads=1).run
        weights.append(load_file(run / "backbone.safetensors"))
    run_train(shards, tmp_path / "vicreg", dataclasses.replace(SMALL, max_steps=1))
    assert num == [1, 2, 2]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_the_norm_of_all_gradients():
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(8, 4, 3, 3, generator=g)
    parts = [
        wide, wide.to(memory_format=torch.channels_last), torch.randn(5, generator=g),
        torch.randn(6, 7, generator=g)[:, ::2], torch.randn(3, 4, generator=g).T,
        torch.tensor(2.0),
    ]  # fmt: skip
    want = torch.cat([p.reshape(-1) for p in parts]).double().norm()
    assert total_norm(parts).item() == pytest.approx(want.item(), rel=1e-6)
    assert not total_norm([*parts, torch.tensor([math.inf])]).isfinite()


def test_of_micro_batches_the_last_one_alone_is_exchanged(monkeypatch):
    """Then the sums of all of them are: earlier, the ranks would drift apart."""
    quiet, exchanged = [], []

    class Parallel(nn.Module):
        def __init__(self, method, **_):
            super().__init__()
            self.method = method

        def forward(self, views):
            exchanged.append(not quiet)
            return self.method(views)

        @contextlib.contextmanager
        def no_sync(self):
            quiet.append(True)
            yield
            quiet.clear()

    monkeypatch.setattr("sslus.ssl.step.DistributedDataParallel", Parallel)
    settings = dataclasses.replace(SMALL, accumulate=3)
    state = dataclasses.replace(state_of(settings), world=World(CPU, size=2))
    Step(state, settings)([views_of(8, seed) for seed in range(3)], 1e-3)
    assert exchanged == [False, False, True]


@pytest.mark.parametrize("size", [1, 2])
def test_a_weight_without_a_gradient_is_refused_where_ranks_would_wait_for_it(size, monkeypatch):
    """PyTorch's own error comes a step later, and does not name it."""
    monkeypatch.setattr("sslus.ssl.step.DistributedDataParallel", lambda method, **_: method)
    state = dataclasses.replace(state_of(SMALL), world=World(CPU, size=size))
    state.method.fixed = nn.Parameter(torch.zeros(3), requires_grad=False)
    Step(state, SMALL)([views_of(8)], 1e-3)
    state.method.unused = nn.Parameter(torch.zeros(3))
    refused = pytest.raises(InputError, match="the loss does not depend on unused, for whose")
    with refused if size > 1 else contextlib.nullcontext():
        Step(state, SMALL)([views_of(8)], 1e-3)


def test_ranks_begin_alike_and_draw_different_numbers():
    seeds, weights = set(), []
    for rank in range(2):
        settings = SMALL.resolved(CPU, 100)
        state = State.build(settings, HEAD, World(CPU, rank, 2))
        seeds.add(torch.initial_seed())
        weights.append(weights_of(state))
    assert torch.equal(*weights) and len(seeds) == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_trial_leaves_no_trace(optimizer, steps_before):
    settings = dataclasses.replace(SMALL, optimizer=optimizer)
    plain, tried = state_of(settings), state_of(settings)
    for state in (plain, tried):
        step = Step(state, settings)
        for i in range(steps_before):
            step([views_of(8, i)], 0.01)
        if state is tried:
            before = Snapshot(state)
            for i in range(3):
                step([views_of(8, 10 + i)], 0.1)
            step.model(views_of(8)).loss.backward()  # what a trial leaves that fails now
            before.restore()
        for i in range(2):
            step([views_of(8, 20 + i)], 0.01)
    assert torch.equal(weights_of(plain), weights_of(tried))
    for a, b in zip(plain.method.buffers(), tried.method.buffers(), strict=True):
        assert torch.equal(a, b)
    assert plain.step == tried.step and torch.equal(plain.window, tried.window)


def test_the_compiled_step_is_the_eager_one(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: real(m, backend="aot_eager"))
    settings = dataclasses.replace(SMALL, optimizer="sgd", lr=1e-3)
    eager, compiled = state_of(settings), state_of(settings)
    Step(eager, settings)([views_of(16)], 1e-3)
    Step(compiled, settings, "compile")([views_of(16)], 1e-3)
    torch.testing.assert_close(eager.window, compiled.window, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights_of(eager), weights_of(compiled), rtol=1e-3, atol=1e-5)


def test_the_dual_task_is_the_loss_plus_the_cross_entropy_of_labelled_frames():
    settings = dataclasses.replace(SMALL, dual_task=0.5)
    state = state_of(settings)
    assert isinstance(state.method, DualTask)
    views = views_of(9)  # labels -1, 0, 1, three of each
    total, terms, features, _ = state.method(views)
    plain = state.method.method(views).loss
    known = views.labels >= 0
    logits = state.method.classifier(features)
    want = nn.functional.cross_entropy(logits[known], views.labels[known])
    assert terms["cross_entropy"].item() == pytest.approx(want.item(), rel=1e-5)
    assert total.item() == pytest.approx((plain + 0.5 * want).item(), rel=1e-4)
    nothing = state.method(views._replace(labels=torch.full((9,), -1)))
    assert nothing.terms["cross_entropy"].item() == 0


def test_the_dual_task_learns_the_labels_and_wants_some(shards, clips, tmp_path):
    settings = dataclasses.replace(SMALL, dual_task=20.0, max_steps=80, lr=1e-2)
    lines = run_train(shards, tmp_path / "run", settings).metrics
    first, last = (np.mean([m["cross_entropy"] for m in part]) for part in (lines[:4], lines[-4:]))
    assert last < 0.8 * first
    bare = tmp_path / "bare"
    shard([clips], bare, ShardSettings(size=32, stride=4), device="cpu", jobs=1)
    with pytest.raises(InputError, match="want at least two labels in the shards, got 0"):
        run_train(bare, tmp_path / "none", settings)


def test_a_look_on_the_way_at_labelled_frames(shards, tmp_path):
    settings = dataclasses.replace(SMALL, max_steps=9)
    plain = run_train(shards, tmp_path / "plain", settings)
    looked = run_train(shards, tmp_path / "looked", settings, online_every=1)
    found = [m for m in looked.metrics if "knn_accuracy" in m]
    assert len(found) == 2 and found[0]["step"] < 8  # and steps follow the first
    assert all(0 <= m[k] <= 1 for m in found for k in ("knn_macro_f1", "probe_macro_f1"))
    losses = [[m["loss"] for m in r.metrics if "loss" in m] for r in (plain, looked)]
    assert losses[0] == losses[1]  # a look changes nothing
    best = json.loads((tmp_path / "looked" / "checkpoints" / "best.json").read_text())
    scores = {m["step"]: m["knn_accuracy"] for m in found}
    assert best["score"] == max(scores.values()) == scores[best["step"]]
    assert checkpoints.load(tmp_path / "looked" / "checkpoints" / "best.pt")["step"] == best["step"]
    assert not list((tmp_path / "looked" / "checkpoints").glob("*.tmp"))


def test_a_signal_is_followed_before_a_look_which_the_resumed_run_makes(
    shards, tmp_path, monkeypatch
):
    settings = dataclasses.replace(SMALL, max_steps=9)
    whole = run_train(shards, tmp_path / "whole", settings, online_every=1)
    at = next(m["step"] for m in whole.metrics if "knn_accuracy" in m)
    assert at < whole.step

    def stop(done, total, note):
        if done == at * SMALL.batch_size:
            signal.raise_signal(signal.SIGTERM)

    run, options = tmp_path / "run", Options(log_every=1, online_every=1)
    look = Online.__call__
    monkeypatch.setattr(Online, "__call__", lambda *_: pytest.fail("the signal has to wait"))
    with pytest.raises(Interrupted, match=f"step {at} of"):
        train(shards, settings, HEAD, run, device="cpu", threads=1, options=options, report=stop)
    monkeypatch.setattr(Online, "__call__", look)
    resumed = run_train(shards, run, settings, resume=True, online_every=1)
    seen = [[(m["step"], m.get("knn_accuracy")) for m in r.metrics] for r in (whole, resumed)]
    assert seen[0] == seen[1]
    best = [json.loads((r.run / "checkpoints" / "best.json").read_text()) for r in (whole, resumed)]
    assert best[0] == best[1]


def test_a_signal_ends_the_last_look_which_the_resumed_run_repeats(shards, tmp_path, monkeypatch):
    """All is saved before it, but until it is made the run does not count as finished."""
    whole = run_train(shards, tmp_path / "whole", online_every=100)
    pictures, met = online.whole, []

    def stop(*arguments):
        met.append(signal.raise_signal(signal.SIGTERM))
        return pictures(*arguments)

    monkeypatch.setattr(online, "whole", stop)
    monkeypatch.setattr(online, "BATCH", 1)
    with pytest.raises(Interrupted, match="step 6 of 6"):
        run_train(shards, tmp_path / "run", online_every=100)
    assert len(met) == 1 and checkpoints.load(tmp_path / "run" / "checkpoint.pt")["step"] == 6
    monkeypatch.undo()
    resumed, again = (
        run_train(shards, tmp_path / "run", resume=True, online_every=100) for _ in range(2)
    )
    assert (resumed.was_finished, again.was_finished) == (False, True)
    for result in (resumed, again):
        found = [(m["step"], m.get("knn_accuracy"), m.get("loss")) for m in result.metrics]
        assert found == [(m["step"], m.get("knn_accuracy"), m.get("loss")) for m in whole.metrics]
        best = (result.run / "checkpoints" / "best.json").read_text()
        assert best == (whole.run / "checkpoints" / "best.json").read_text()


def test_a_kill_between_a_checkpoint_and_its_names_costs_neither(shards, tmp_path, monkeypatch):
    whole = run_train(shards, tmp_path / "whole", checkpoint_every=2, keep=5)
    keep, best = checkpoints.keep, json.loads((whole.run / "checkpoints" / "best.json").read_text())

    def killed(path, step, *rest):
        if step == best["step"]:
            raise KeyboardInterrupt
        keep(path, step, *rest)

    monkeypatch.setattr(checkpoints, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, tmp_path / "run", checkpoint_every=2, keep=5)
    monkeypatch.undo()
    run_train(shards, tmp_path / "run", resume=True, checkpoint_every=2, keep=5)
    folders = [run / "checkpoints" for run in (whole.run, tmp_path / "run")]
    names, best = ([f(folder) for folder in folders] for f in (
        lambda folder: {p.name for p in folder.iterdir()},
        lambda folder: (folder / "best.json").read_text(),
    ))  # fmt: skip
    assert names[0] == names[1] >= {"step-00000004.pt"} and best[0] == best[1]


def test_the_time_limit_saves_and_resume_ends_the_run(shards, tmp_path, capsys):
    run = tmp_path / "run"
    base = ["train", str(shards), "--run", str(run), "--device", "cpu", "--threads", "1"]
    small = "--backbone test_resnet --image-size 32 --batch-size 16 --max-steps 6 --projector 32-32"
    assert main([*base, *small.split(), "--time-limit", "0"]) == 0  # before the first line
    out = capsys.readouterr().out
    assert (
        "time limit reached at step 1" in out and f"Next: sslus train --resume --run {run}" in out
    )
    assert main([*base, "--resume", "--log-every", "1"]) == 0
    whole = run_train(shards, tmp_path / "whole")
    a, b = (checkpoints.load(r / "checkpoint.pt") for r in (run, whole.run))
    assert all(torch.equal(v, b["method"][k]) for k, v in a["method"].items())


def test_the_last_checkpoints_and_the_best_stay(shards, tmp_path):
    result = run_train(shards, tmp_path / "run", checkpoint_every=1, keep=2)
    folder = result.run / "checkpoints"
    assert {p.name for p in folder.glob("step-*")} == {"step-00000005.pt", "step-00000006.pt"}
    losses = {m["step"]: m["loss"] for m in result.metrics}
    assert checkpoints.load(folder / "best.pt")["step"] == min(losses, key=losses.get)
    assert not list(folder.glob("*.tmp"))


def test_the_loss_of_moco_does_not_choose_the_best(shards, tmp_path):
    """It rises while keys replace the random directions in the queue: the first would be best."""
    settings = dataclasses.replace(SMALL, method="moco")
    _, head = methods.recipe("moco", "default")
    head = dataclasses.replace(head, projector="32-32", queue=48)
    for name, online_every in (("plain", 0), ("looked", 1)):
        options = Options(log_every=1, checkpoint_every=1, online_every=online_every)
        run = tmp_path / name
        result = train(shards, settings, head, run, device="cpu", threads=1, options=options)
        best = run / "checkpoints" / "best.json"
        losses = [m["loss"] for m in result.metrics if "loss" in m]
        assert losses[0] < losses[-1] and best.exists() == bool(online_every)
    assert json.loads(best.read_text())["of"] == "knn_accuracy"


def test_alignment_and_uniformity_by_hand():
    ha = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    hb = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert health.alignment(ha, hb) == pytest.approx((2 + 0) / 2)
    assert health.uniformity(ha) == pytest.approx(-4)  # one pair at squared distance 2
    assert health.uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-5)


def test_all_methods_one_after_the_other(shards, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "all"
    base = ["train", str(shards), "--method", "all", "--run", str(folder), "--device", "cpu"]
    small = "--threads 1 --backbone test_resnet --image-size 32 --batch-size 8 --max-steps 2"
    # What could not begin is not in the way of the next one.
    assert main([*base[:1], str(tmp_path / "nowhere"), *base[2:]]) == 1
    assert main([*base, *small.split(), "--time-limit", "0"]) == 0
    going = capsys.readouterr().out.rpartition("Next: ")[2].split()
    assert going == f"sslus train --method all --resume --run {folder}".split()
    assert not (folder / methods.names()[1]).exists()
    monkeypatch.chdir(tmp_path)  # the shards are those of the start
    going[-1] = folder.name  # as short as it can be typed from here
    assert main(going[1:]) == 0
    out = capsys.readouterr().out
    configs = {n: json.loads((folder / n / "config.json").read_text()) for n in methods.names()}
    assert all(f"{n} " in out for n in configs)
    same = ("max_steps", "batch_size", "backbone", "image_size")
    budgets = {tuple(c["settings"][k] for k in same) for c in configs.values()}
    assert budgets == {(2, 8, "test_resnet", 32)}
    times = {p: p.stat().st_mtime_ns for p in folder.glob("*/backbone.safetensors")}
    last = methods.names()[-1]
    for p in sorted((folder / last).rglob("*"), reverse=True):
        p.rmdir() if p.is_dir() else p.unlink()
    assert main(going[1:]) == 0
    again = {p: p.stat().st_mtime_ns for p in folder.glob("*/backbone.safetensors")}
    assert {p.parent.name for p in times if times[p] != again[p]} == {last}

    stopped_at = "stopped at step 1 of 2; everything is saved"

    def stopped(*args):
        raise Interrupted(stopped_at, 15)

    monkeypatch.setattr("sslus.tools.training._train", stopped)
    assert main(going[1:]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"Error: autoencoder: {stopped_at}. Continue with: {' '.join(going)}"
    assert main([*base, *small.split()]) == 1  # not over what is there
    assert f"continue it with: {' '.join(going)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", methods.names())
def test_every_recipe_trains(name, shards, tmp_path):
    small = "--device cpu --init random --backbone test_resnet --image-size 32 --batch-size 8"
    if "projector" in {f.name for f in dataclasses.fields(methods.load(name).Config)}:
        small += " --projector 32-32"
    for recipe in ("paper", "study"):
        run = ["--method", name, "--recipe", recipe, "--run", str(tmp_path / recipe)]
        assert main(["train", str(shards), *run, *small.split(), "--max-steps", "1"]) == 0


def test_pairs_are_for_the_methods_that_have_them(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "names", lambda: ["autoencoder", "moco"])
    folder = tmp_path / "all"
    base = ["train", str(shards), "--method", "all", "--run", str(folder), "--device", "cpu"]
    small = "--threads 1 --backbone test_resnet --image-size 32 --batch-size 8 --max-steps 1"
    paired = "--pairs nearby --max-seconds 9 --pair-weights --views simclr"
    # A mistake in them is told at once, though the first method does not use them.
    assert main([*base, *small.split(), "--pair-weights"]) == 1 and not folder.exists()
    assert main([*base, *small.split(), *paired.split()]) == 0
    said = capsys.readouterr()
    assert "single frames, so without --pair-weights --pairs --views" in said.out + said.err
    assert main([*base[:1], *base[2:], "--resume"]) == 0  # which knows the options of both
    settings = [
        json.loads((folder / name / "config.json").read_text())["settings"]
        for name in methods.names()
    ]
    assert [(s["pairs"], s["pair_weights"], s["views"]) for s in settings] == [
        ("same", False, "autoencoder"), ("nearby", True, "simclr"),
    ]  # fmt: skip


def test_a_method_that_fails_does_not_keep_the_others_from_training(
    shards, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(methods, "names", lambda: ["simclr", "vicreg"])
    real = methods.load("simclr").Method.forward

    def forward(self, views):
        out = real(self, views)
        return out._replace(loss=out.loss * math.nan)

    monkeypatch.setattr(methods.load("simclr").Method, "forward", forward)
    small = "--device cpu --backbone test_resnet --image-size 32 --batch-size 8 --max-steps 1"
    folder = tmp_path / "all"
    base = ["train", str(shards), "--method", "all", "--run", str(folder)]
    assert main([*base, *small.split()]) == 1
    said = capsys.readouterr()
    assert "Error: simclr: the loss is no longer finite" in said.err
    assert said.err.splitlines()[-1].startswith("Error: simclr: failed")
    assert "vicreg" in said.out and (folder / "vicreg" / "backbone.safetensors").exists()


def test_a_signal_in_a_methods_last_step_stops_all_methods(shards, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "all"
    base = ["train", str(shards), "--method", "all", "--run", str(folder), "--device", "cpu"]
    small = "--threads 1 --backbone test_resnet --image-size 32 --batch-size 8 --max-steps 2"
    real, first = State.save, methods.names()[0]

    def save(self, path):
        real(self, path)
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(State, "save", save)
    assert main([*base, *small.split()]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"Error: {first} is finished. Continue with: sslus train --method all")
    assert (folder / first / "backbone.safetensors").exists()
    assert not (folder / methods.names()[1]).exists()


def test_all_methods_keep_what_the_first_machine_chose(shards, tmp_path, monkeypatch):
    folder = tmp_path / "all"
    base = ["train", str(shards), "--method", "all", "--run", str(folder)]
    small = "--device cpu --threads 1 --backbone test_resnet --image-size 32 --max-steps 1"
    given = []

    def stopped(*args):
        given.append(args)
        raise Interrupted("stopped", 15)

    monkeypatch.setattr("sslus.tools.training._train", stopped)
    assert main([*base, *small.split()]) == 143
    options = json.loads((folder / "all.json").read_text())["options"]
    assert options["batch_size"] == 64 and options["precision"] == "fp32"
    assert options["threads"] == 1 and options["device"] == "cpu" and options["image_size"] == 32
    again = [*base[:1], "--method", "all", "--resume", "--run", str(folder)]
    assert main([*again, "--log-every", "3"]) == 143
    assert given[-1][1] | options == given[-1][1]
    assert main(again) == 143 and given[-1][1]["log_every"] == 3  # as it was told last


@pytest.mark.parametrize(
    "text, why",
    [
        ("[" * 100_000, "maximum recursion depth"),
        ({"shards": None}, "shards is None, not str"),
        ({"options": {"batch_size": "8"}}, "batch_size is '8', not int"),
        ({"options": {"device": ["cpu"]}}, "device is \\['cpu'\\], not str"),
        ({"options": {"log_every": None}}, "log_every is None, not int"),
        ({"options": {"time_limit": "1 h"}}, "'time_limit': no such option"),
        ({"options": {"lerning_rate": 1}}, "'lerning_rate': no such option"),
    ],
)
def test_an_edited_record_of_all_methods_is_one_line(
    text, why, shards, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sslus.tools.training._train", None)
    record = tmp_path / "all.json"
    if isinstance(text, dict):
        text = json.dumps({"format": 2, "shards": str(shards), "options": {}} | text)
    record.write_text(text)
    assert main(["train", "--method", "all", "--resume", "--run", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(f"all.json: cannot be used .*{why}", err)
    assert record.read_text() == text


def test_the_printed_command_goes_on_as_before(shards, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    small = "--backbone test_resnet --image-size 32 --batch-size 16 --max-steps 4 --projector 32-32"
    how = "--device cpu --threads 1 --tier stream --log-every 1 --checkpoint-every 3 --keep 1"
    base = ["train", str(shards), *small.split(), *how.split()]
    assert main([*base, "--run", str(whole)]) == 0
    assert main([*base, "--run", str(run), "--time-limit", "0"]) == 0
    going = capsys.readouterr().out.rpartition("Next: ")[2].split()
    torch.set_num_threads(2)
    assert main(going[1:]) == 0
    assert torch.get_num_threads() == 1
    lines = [
        [(m["step"], m["loss"]) for m in checkpoints.read_metrics(r / "metrics.jsonl")]
        for r in (whole, run)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4
    kept = [sorted(p.name for p in (r / "checkpoints").glob("step*")) for r in (whole, run)]
    assert kept[0] == kept[1]
    assert main([*going[1:], "--keep", "7"]) == 0  # and the next one as this one
    assert json.loads((run / "config.json").read_text())["how"]["keep"] == 7
    assert main([*going[1:], "--tier", "ram"]) == 1  # but another order is another run
    assert "frames were streamed or not" in capsys.readouterr().err


def test_one_process_tells_of_its_run_whatever_its_rank(shards, tmp_path, capsys, monkeypatch):
    """A scheduler may have left a RANK in the environment."""
    monkeypatch.setenv("RANK", "3")
    small = "--backbone test_resnet --image-size 32 --batch-size 16 --max-steps 1 --device cpu"
    assert main(["train", str(shards), *small.split(), "--run", str(tmp_path / "run")]) == 0
    assert "Next: sslus evaluate" in capsys.readouterr().out


def test_of_all_methods_the_first_builds_the_store_and_all_share_the_time(
    shards, tmp_path, monkeypatch
):
    asked, clock = [], iter(range(0, 1000, 10))

    def trained(run, mine, going):
        asked.append(mine)
        return SimpleNamespace(run=run, signum=0, stopped=False, warnings=[], metrics=[], step=1)

    monkeypatch.setattr(training, "_train", trained)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    line = ["train", str(shards), "--method", "all", "--run", str(tmp_path / "all")]
    assert main([*line, "--device", "cpu", "--rebuild-store", "--time-limit", "35"]) == 0
    assert [mine.get("rebuild_store", False) for mine in asked] == [True] + 6 * [False]
    assert [mine["time_limit"] for mine in asked] == [25, 15, 5, 0, 0, 0, 0]


def test_the_next_command_can_be_pasted():
    assert _evaluate("my runs/a", "x") == "sslus evaluate 'my runs/a' --labels labels.csv"
    assert " --shards shards/ " in _evaluate("a", "s3://x/shards")  # a URL has no local/
    assert _evaluate(["a", "b c"], "x").startswith("sslus evaluate a 'b c' --labels")


def test_the_next_command_names_the_labels_beside_the_videos(tmp_path):
    (tmp_path / "local").mkdir()
    video = tmp_path / "my videos" / "a" / "1.mp4"
    line = json.dumps({"source": str(video)})
    (tmp_path / "local" / "ledger.jsonl").write_text(line + "\n")
    assert _evaluate("a", str(tmp_path)).endswith("--labels labels.csv")  # there is none
    video.parent.mkdir(parents=True)
    (tmp_path / "my videos" / "labels.csv").touch()
    assert f"--labels '{tmp_path}/my videos/labels.csv'" in _evaluate("a", str(tmp_path))


@pytest.mark.parametrize(
    "options, said",
    [
        ("--lr 1e-3 --base-lr 0.1", "--lr and --base-lr set the same value"),
        (
            "--warmup-steps 1 --warmup-epochs 2",
            "--warmup-steps and --warmup-epochs set the same value",
        ),
        ("--time-limit nan", "--time-limit nan: want 0 seconds or more"),
        ("--time-limit -1", "--time-limit -1: want 0 seconds or more"),
        (
            "--method vicreg --method moco --variance 7",
            "--variance is an option of --method vicreg, not of moco",
        ),
    ],
)
def test_options_that_contradict_are_refused(options, said, shards, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(shards), "--run", str(run), *options.split()]) != 0
    assert said in capsys.readouterr().err and not run.exists()


def test_the_pairs_distance_is_not_taken_for_a_time_limit(shards, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", str(shards), "--max-seconds", "60", "--run", run]) == 1
    assert "use --time-limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "losses, at",
    [
        ([84, 615, 900, 90], 1),  # a rate far too high
        ([50, 5, 1, 30, 40], 3),  # it was learnt, and is lost
        ([3.3, 6, 8.3, 8.3], None),  # MoCo while its queue fills
        ([2, 0.05, 0.3, 0.4], None),  # BYOL
        ([math.nan], None),  # another error tells of it
    ],
)
def test_a_loss_that_runs_away_is_named_once(losses, at):
    watch = health.Divergence([])
    said = [watch(x) for x in losses]
    assert [i for i, x in enumerate(said) if x] == ([] if at is None else [at])
    assert at is None or "Try a lower --lr" in said[at]
    if at == 1:  # a resumed run has not forgotten its beginning
        assert health.Divergence(losses[:1])(losses[1])


def test_a_log_goes_on_where_it_was(tmp_path):
    """It knows the losses before, and features are looked at at the same steps."""

    def looks(begin: int, *steps: int, draw=torch.randn, **options) -> list[int]:
        settings = dataclasses.replace(SMALL, max_steps=1000).resolved(CPU, 100)
        log = MetricsLog(tmp_path, settings, Options(**options), begin, World(CPU), str)
        with log:
            for step in steps:
                window = Window(("loss",), torch.tensor([4.0]), 1)
                log.add_line(step, 0.0, 0.0, window, torch.tensor(1.0), draw(2, 8, 4))
        said.extend(log.warnings)
        return [m["step"] for m in checkpoints.read_metrics(file) if "rankme" in m]

    said, file = [], tmp_path / "metrics.jsonl"
    assert looks(0, 30, 60, 90, 120, log_every=30) == [60, 120] and not said
    file.write_text('{"step": 60, "loss": 1.0}\n')
    assert looks(60, 70, 100) == [100]
    assert len(said) == 1 and "the loss diverges: 4, after 1 at the start" in said[0]
    assert looks(100, 150, 200, draw=torch.zeros) == [100, 150, 200]
    assert len([line for line in said if "have collapsed" in line]) == 1  # not at every look


def test_what_a_user_sees_of_a_run(shards, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(health.Divergence, "__call__", lambda self, loss: "the loss runs away")
    result = train(
        shards, SMALL, HEAD, tmp_path / "run", device="cpu", threads=1,
        options=Options(log_every=6), say=told.append,
    )  # fmt: skip
    assert result.warnings == ["the loss runs away"]
    assert told[-1] == "Warning: step 6: the loss runs away"
    (line,) = (x for x in told if x.startswith("step 6: "))
    for name in ("loss", "invariance", "covariance", "lr", "gradient norm", "RankMe", "feature std",
                 "dead", "alignment", "uniformity", "samples/s", "data wait"):  # fmt: skip
        assert re.search(rf"\b{name} -?[0-9.e-]+", line), name
    assert told[0] == "vicreg: test_resnet at 32 px, batches of 16, 6 steps, fp32 on the CPU"
    assert any(x.startswith("step: eager (") for x in told)


def test_tensorboard_gets_every_number(shards, tmp_path, monkeypatch):
    got = []
    writer = SimpleNamespace(
        add_scalar=lambda name, value, step: got.append((name, value, step)),
        close=lambda: got.append("closed"),
    )
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    result = run_train(shards, tmp_path / "run", dataclasses.replace(SMALL, max_steps=2))
    assert got.pop() == "closed"
    want = [(k, v, m["step"]) for m in result.metrics for k, v in m.items()]
    assert got == [x for x in want if x[0] not in ("step", "epoch")] and len(got) > 20


def test_the_curves_are_drawn_now_and_then(shards, tmp_path, monkeypatch):
    """After a checkpoint, if the last were drawn long ago; and at the end."""
    run, drawn = tmp_path / "run", []

    def clock():  # a step takes 10 s
        return 10.0 * len(checkpoints.read_metrics(run / "metrics.jsonl"))

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(loop, "CURVES_EVERY_SECONDS", 30)
    monkeypatch.setattr(curves, "draw", lambda metrics, path: drawn.append(len(metrics)))
    run_train(shards, run, checkpoint_every=2)
    assert drawn == [4, 6]


def test_the_curves_show_everything_that_is_logged():
    keys = (*curves.KNOWN, "variance", "covariance", *curves.ONLINE)
    values = {k: n + 0.5 for n, k in enumerate(keys)} | {"uniformity": -2.0}
    every = [{k: v + i / 10 for k, v in values.items()} | {"step": 10 * i} for i in (1, 2)]
    looks = [{k: m[k] for k in ("step", *curves.ONLINE)} for m in every]  # lines of their own
    metrics = [{k: v for k, v in m.items() if k not in curves.ONLINE} for m in every]
    figure = curves.plot([*metrics, *looks])
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels)[1:] == [
        "Optimisation", "Health", "Dead features", "Views", "Speed", "GPU",
        "Labelled frames, by patient",
    ]  # fmt: skip
    drawn = {
        line.get_label() if axes.get_legend() else axes.get_ylabel(): line
        for axes in figure.axes
        for line in axes.get_lines()
    }
    names = {
        "lr": "learning rate", "grad_norm": "gradient norm", "rankme": "RankMe",
        "feature_std": "mean std of a feature", "dead_features": "share of the features",
        "samples_per_second": "samples/s", "data_wait": "share waiting for data",
        "gpu_memory_gib": "memory, GiB", **{k: k.replace("_", " ") for k in curves.ONLINE},
    }  # fmt: skip
    for key in set(keys) - {"step", "epoch"}:
        line = drawn.pop(names.get(key, key))
        assert line.get_xdata().tolist() == [10, 20], key
        assert line.get_ydata().tolist() == [m[key] for m in every], key
    assert not drawn
    most = metrics[1]["samples_per_second"]
    sides = {axes.get_ylabel(): axes for axes in figure.axes}
    assert panels["Speed"].get_ylim() == pytest.approx((0, most * 1.05), rel=1e-3)
    assert sides["share waiting for data"].get_ylim() == (0, 1)
    assert sides["uniformity"].get_ylim()[0] < sides["uniformity"].get_ylim()[1] == 0
    assert len(curves.plot([{"step": 1, "loss": 2.0, "lr": 0.1}]).axes) == 2


@pytest.mark.parametrize("last, scale", [(5.0, "linear"), (0.05, "log")])
def test_the_loss_has_a_log_scale_only_if_it_falls_far(last, scale):
    metrics = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": last}]
    assert curves.plot(metrics).axes[0].get_yscale() == scale


def test_the_fastest_way_that_works_is_taken(monkeypatch):
    state = state_of(SMALL)
    settings = SMALL.resolved(CPU, 100)
    before, told = weights_of(state), []
    seconds = {"eager": 3e-3, "compile": 2e-3}

    def timed(step, batch):
        with torch.no_grad():
            next(step.state.method.parameters()).add_(1)  # as steps do
        if step.way not in seconds:
            raise RuntimeError("no graph today")
        return seconds[step.way]

    monkeypatch.setattr("sslus.ssl.step._timed", timed)
    monkeypatch.setattr("sslus.ssl.step.possible", lambda *args: None)
    state.world = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0), size=1)
    monkeypatch.setattr("sslus.ssl.step.Snapshot", lambda s: Snapshot(on_the_cpu(s)))
    step = choose(state, settings, lambda: views_of(16), told.append)
    assert step.way == "compile" and torch.equal(weights_of(state), before)
    assert told[0] == "step: graph does not work here (RuntimeError: no graph today)"
    assert told[1].startswith("step: compile (eager 3.0 ms, compile 2.0 ms")


def test_an_invalid_capture_is_closed(monkeypatch):
    """What torch leaves open, with torch.cuda played by stand-ins."""
    done = []

    class Stream:
        device_index = 0

        def wait_stream(self, other):
            pass

    class Generator:
        def clone_state(self):
            return "a copy"

        def graphsafe_set_state(self, state):
            done.append(state)

    @contextlib.contextmanager
    def graph(*args, **options):
        yield
        raise RuntimeError("invalid capture")

    current = Stream()
    for name, value in {
        "Stream": Stream, "stream": contextlib.nullcontext, "current_stream": lambda: current,
        "CUDAGraph": object, "graph_pool_handle": lambda: (0, 1), "graph": graph,
        "set_stream": done.append, "default_generators": (Generator(),),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    end = lambda device, pool: done.append((device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    release = lambda device, pool: done.append(("released", pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    step = Step(state_of(SMALL), SMALL.resolved(CPU, 100), "graph")
    with pytest.raises(RuntimeError, match="invalid capture"):
        step([views_of(16)], 0.1)
    assert done == [current, (0, (0, 1)), ("released", (0, 1)), "a copy"] and step.graph is None


def on_the_cpu(state):
    """A snapshot takes the GPU's random numbers along where there is one."""
    copy = SimpleNamespace(**vars(state))
    copy.world = World(CPU)
    return copy


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_reads_no_value(name, reads, monkeypatch):
    monkeypatch.setenv("SSLUS_KERNELS", "reference")  # on a CPU the kernels may read what they like
    settings = dataclasses.replace(SMALL, optimizer=name, lr=0.1, clip_norm=1.0)
    step = Step(state_of(settings), settings.resolved(CPU, 100))
    step([views_of(16)], 0.1)  # makes the momenta
    with reads as seen:
        step([views_of(16)], 0.1)
    assert seen.num_reads == 0 and seen.num_calls > 300


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_neither_decay_nor_adapt(name):
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
    first, second = make(name, module, 0.1, 0.02).param_groups
    assert {p.ndim for p in first["params"]} == {2, 4} and first["weight_decay"] == 0.02
    assert {p.ndim for p in second["params"]} == {1} and second["weight_decay"] == 0
    assert len(second["params"]) == 4  # two biases, and the norm's weight and bias
    if name == "lars":
        assert first["adapt"] and not second["adapt"]
    else:
        assert first["fused"] and second["fused"]
    vit = backbones.build("test_vit", 32, seed=0)
    first, second = make(name, nn.ModuleDict({"backbone": vit}), 0.1, 0.02).param_groups
    for p in (vit.cls_token, vit.pos_embed):
        assert any(p is q for q in second["params"]) and not any(p is q for q in first["params"])


def test_a_teacher_starts_from_the_initial_weights(shards, tmp_path):
    first = run_train(shards, tmp_path / "first").run / "backbone.safetensors"
    settings = dataclasses.replace(SMALL, method="byol", init=str(first), max_steps=1, lr=1e-9)
    config = methods.recipe("byol", "default")[1]
    run = train(shards, settings, config, tmp_path / "byol", device="cpu", threads=1).run
    state = checkpoints.load(run / "checkpoint.pt")["method"]
    teacher = {k: v for k, v in state.items() if k.startswith("teacher") and k.endswith("weight")}
    for name, value in load_file(first).items():
        if name.endswith("weight"):
            ours = [v for k, v in teacher.items() if k.endswith(name) and v.shape == value.shape]
            assert any(torch.allclose(v, value, atol=1e-5) for v in ours), name


def test_recipes_reach_the_run_and_options_win(shards, tmp_path):
    base = ["train", str(shards), "--device", "cpu", "--threads", "1", "--max-steps", "1"]
    small = "--backbone test_resnet --image-size 32 --batch-size 8 --recipe study --projector 16-16"
    assert main([*base, *small.split(), "--run", str(tmp_path / "run"), "--log-every", "1"]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["settings"]["optimizer"] == "lars" and settings["settings"]["image_size"] == 32
    assert settings["settings"]["lr"] == pytest.approx(0.2 * 8 / 256)
    assert settings["settings"]["views"] == "barlowtwins"
    assert settings["method_config"]["projector"] == "16-16"
    other = "--method barlowtwins --optimizer sgd --recipe study --views simclr"
    run = tmp_path / "other"
    assert main([*base, *small.split(), *other.split(), "--run", str(run)]) == 0
    settings = json.loads((run / "config.json").read_text())
    assert settings["settings"]["lr"] == default_lr("sgd", 8)
    assert settings["settings"]["views"] == "simclr" and settings["method_config"]["scale"] == 1
