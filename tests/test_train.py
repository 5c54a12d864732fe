"""The plan, the schedule, and a run that survives whatever stops it."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sslus.engine.errors import InputError, Interrupted
from sslus.engine.plan import Plan
from sslus.engine.store import FrameStore
from sslus.engine.stream import Reader
from sslus.ssl import backbones, checkpoints, cores, health
from sslus.ssl.loop import Options
from sslus.ssl.methods import vicreg
from sslus.ssl.optimizers import LARS, learning_rate
from sslus.ssl.settings import settings_from
from sslus.ssl.train import Settings, open_run, train
from sslus.ssl.world import World, enter, pick_device
from sslus.tools.cli import main, sslus

STEPS = 10
SMALL = Settings(backbone="test_resnet", image_size=32, batch_size=16, max_steps=STEPS)
HEAD = vicreg.Config(projector="32-32")
TIMINGS = ("samples_per_second", "data_wait")
OPTIONS = {f.name for f in dataclasses.fields(Options)}
pytestmark = pytest.mark.usefixtures("no_curves")  # but for the run that nothing disturbs


@pytest.fixture(scope="module")
def store(shards):
    return FrameStore.open(shards)


def run_train(shards, run, settings=SMALL, **options):
    told = {k: options.pop(k) for k in list(options) if k in OPTIONS}
    told = Options(**({"log_every": 2, "checkpoint_every": 3} | told))
    options = {"device": "cpu", "threads": 1} | options
    return train(shards, settings, HEAD, run, options=told, **options)


@pytest.fixture(scope="module")
def whole_run(shards, tmp_path_factory):
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run_train(shards, run)


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = [v for _, v in sorted(value.items(), key=str)]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, list | tuple) else []


def assert_same_run(a: Path, b: Path):
    one, two = (checkpoints.load(r / "checkpoint.pt") for r in (a, b))
    assert one["step"] == two["step"]
    pairs = list(zip(tensors_of(one), tensors_of(two), strict=True))
    assert len(pairs) > 50 and all(torch.equal(x, y) for x, y in pairs)
    lines = [
        [
            {k: v for k, v in m.items() if k not in TIMINGS}
            for m in checkpoints.read_metrics(r / "metrics.jsonl")
        ]
        for r in (a, b)
    ]
    assert lines[0] == lines[1]


# The plan


def test_plan_is_pure_and_shows_every_frame_once():
    plan = Plan(103, 10, seed=3)
    epoch = np.concatenate(list(plan.epoch(5)))
    assert plan.steps_per_epoch == 10 and len(np.unique(epoch)) == len(epoch) == 100
    assert epoch.min() >= 0 and epoch.max() < 103
    assert np.array_equal(epoch, np.concatenate(list(Plan(103, 10, seed=3).epoch(5))))
    assert np.array_equal(epoch[40:], np.concatenate(list(plan.epoch(5, start=4))))
    for other in (plan.epoch(6), Plan(103, 10, seed=4).epoch(5)):
        assert (np.concatenate(list(other)) != epoch).mean() > 0.9
    # Frozen numbers: an update of numpy must not change what a resumed run sees.
    assert Plan(8, 8, seed=0).order(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("world", [2, 4])
def test_plan_does_not_depend_on_the_number_of_processes(world):
    ranks = [list(Plan(50, 8, 0, rank, world).epoch(1)) for rank in range(world)]
    for whole, *parts in zip(Plan(50, 8, 0).epoch(1), *ranks, strict=True):
        assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_plan_says_which_seeds_there_are(seed):
    with pytest.raises(InputError, match=f"seed {seed}: want a whole number from 0 to"):
        Plan(10, 2, seed)


def test_plan_says_which_batch_would_fit():
    with pytest.raises(InputError, match="30 frames .* batch of 64: give --batch-size 30 or less"):
        Plan(30, 64, 0)
    with pytest.raises(InputError, match="at least 2"):
        Plan(30, 1, 0)


# The cores


def test_cores_that_other_programs_use_are_counted(tmp_path, monkeypatch):
    """Four cores for ten seconds; this process, whose work is not counted, uses one of them."""
    ticks, used = os.sysconf("SC_CLK_TCK"), [0.0]

    def tell(user, nice, system, idle):
        fields = user, nice, system / 2, idle / 2, 1, 0, system / 2, idle / 2, 0, 0
        line = " ".join(str(int(x * ticks)) for x in fields)  # softirq, and stolen: not busy
        (tmp_path / "stat").write_text(f"cpu  {line}\ncpu0 {line}\n")

    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "times", lambda: os.times_result((*[used[0] / 4] * 4, 0.0)))
    tell(100, 10, 20, 1000)
    counted = cores.Cores()
    used[0] = 10.0
    tell(110, 10, 20, 1030)
    assert counted.advice(4) is None
    tell(110, 11, 20, 1029)  # 0.1 cores are used by others: too little to count
    assert counted.advice(4) is None
    tell(110, 20, 25, 1015)  # 1.5 cores are used by others
    assert "keep 1.5 of the 4 cores busy" in counted.advice(4) and counted.advice(2) is None
    assert "--threads 2 " in counted.advice(3)
    tell(140, 20, 20, 1000)
    assert "--threads 1 " in counted.advice(4) and counted.advice(1) is None
    (tmp_path / "stat").unlink()
    assert counted.advice(4) is None and cores.Cores().advice(4) is None


# The schedule and LARS


def test_an_epoch_of_micro_batches_is_counted_exactly():
    settings = Settings(batch_size=2, accumulate=3, epochs=15)
    assert settings.resolved(torch.device("cpu"), 2 * 49).max_steps == 15 * 49 / 3


def test_schedule_reaches_its_ends_step_by_step():
    rates = [learning_rate(s, 100, 10, 0.4, 0.001) for s in range(100)]
    assert rates[0] == pytest.approx(0.04) and rates[9] == 0.4
    assert rates[-1] == pytest.approx(0.001, rel=1e-9)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(a > b for a, b in zip(rates[9:-1], rates[10:], strict=True))
    assert learning_rate(0, 1, 0, 0.4, 0.0) == 0.0  # one step only: the end
    assert learning_rate(0, 5, 0, 0.4, 0.0) == 0.4


def test_lars_by_hand():
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # norm 5
    b = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS(
        [
            {"params": [w], "weight_decay": 0.1},
            {"params": [b], "adapt": False, "weight_decay": 0.0},
        ],
        lr=2.0,
        trust=0.01,
    )
    g = torch.tensor([[0.6, 0.8]])  # norm 1
    rate = 0.01 * 5 / (1 + 0.1 * 5)
    v = 2 * rate * (g + 0.1 * w.detach())
    w1 = w.detach() - v
    w.grad, b.grad = g.clone(), torch.tensor([0.5])
    optimizer.step()
    torch.testing.assert_close(w.detach(), w1)
    assert b.item() == 1 - 2 * 0.5  # no adaptation, no decay
    w.grad, b.grad = g.clone(), torch.tensor([0.0])
    optimizer.step()
    norm = w1.norm()
    v = 0.9 * v + 2 * 0.01 * norm / (1 + 0.1 * norm) * (g + 0.1 * w1)
    torch.testing.assert_close(w.detach(), w1 - v)
    assert b.item() == pytest.approx(0 - 0.9)  # momentum goes on
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], lr=1.0).step()
    assert (zero != 0).all()  # a weight at zero can leave it


# A run


def test_a_run_leaves_what_it_promises(whole_run, store):
    run = whole_run.run
    names = {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt", "backbone.safetensors"}
    assert {p.name for p in run.iterdir()} - {"tensorboard"} == names | {"checkpoints"}
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert kept == {"step-00000009.pt", "step-00000010.pt", "best.pt", "best.json"}
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert checkpoints.load(run / "checkpoints" / "best.pt")["step"] == best["step"]
    config = json.loads((run / "config.json").read_text())
    settings, head = settings_from(config)
    assert head == HEAD and settings.batch_size == 16 and settings.lr == pytest.approx(2.5e-4)
    assert config["shards"]["digest"] == store.digest
    lines = checkpoints.read_metrics(run / "metrics.jsonl")
    assert [m["step"] for m in lines] == [2, 4, 6, 8, 10]
    for m in lines:
        weighted = 25 * m["invariance"] + 25 * m["variance"] + m["covariance"]
        assert m["loss"] == pytest.approx(weighted, rel=1e-4)
        assert m["samples_per_second"] > 0 and 0 <= m["data_wait"] <= 1 and m["grad_norm"] > 0
        assert m["epoch"] == pytest.approx(m["step"] / (len(store) // 16), abs=1e-4)
    assert lines[-1]["lr"] == pytest.approx(settings.lr * settings.final_lr)
    groups = checkpoints.load(run / "checkpoint.pt")["optimizer"]["param_groups"]
    assert all(g["lr"] == pytest.approx(lines[-1]["lr"]) for g in groups)  # it was also used
    assert lines[-1]["alignment"] > 0 > lines[-1]["uniformity"]
    assert 1 < lines[-1]["rankme"] <= 16 and lines[-1]["feature_std"] > 0
    with safe_open(run / "backbone.safetensors", "pt") as f:
        about = {k: json.loads(v) for k, v in f.metadata().items()}
    assert about["timm"] == "test_resnet" and about["in_chans"] == 1
    assert about["image_size"] == 32 and about["mean"] == store.mean
    fresh = backbones.build("test_resnet", 32, seed=0)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    trained = load_file(run / "backbone.safetensors")
    fresh.load_state_dict(trained)
    assert all(not torch.equal(before[k], v) for k, v in trained.items() if k.endswith("weight"))


def test_the_seed_decides_everything(shards, whole_run, tmp_path):
    run_train(shards, tmp_path / "same")
    assert_same_run(whole_run.run, tmp_path / "same")
    other = run_train(shards, tmp_path / "other", dataclasses.replace(SMALL, seed=1))
    assert other.metrics[0]["loss"] != whole_run.metrics[0]["loss"]
    first, second = (
        backbones.build("test_resnet", 32, seed=s).state_dict()["conv1.0.weight"] for s in (0, 1)
    )
    assert not torch.equal(first, second)


def test_a_resumed_run_draws_the_numbers_that_would_have_come(shards, tmp_path, monkeypatch):
    plain = vicreg.Method.forward

    def noisy(self, views):
        return plain(self, views._replace(va=views.va + torch.rand_like(views.va)))

    monkeypatch.setattr(vicreg.Method, "forward", noisy)
    short = dataclasses.replace(SMALL, max_steps=4)
    run_train(shards, tmp_path / "whole", short)

    def stop(done, total, note):
        if done == 2 * SMALL.batch_size:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_train(shards, tmp_path / "run", short, report=stop)
    run_train(shards, tmp_path / "run", short, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("at", [3, 5])  # on a checkpoint, and in the middle of a log line
def test_sigterm_saves_and_the_resumed_run_is_the_same(shards, whole_run, tmp_path, at):
    def stop(done, total, note):
        if done == at * SMALL.batch_size:
            signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"step {at} of 10; everything is saved") as e:
        run_train(shards, run, report=stop, checkpoint_every=100)
    assert e.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.load(run / "checkpoint.pt")["step"] == at
    assert backbones.step_of(run / "backbone.safetensors") == at  # the curves would take seconds
    torch.manual_seed(99)
    run_train(shards, run, resume=True)
    assert_same_run(whole_run.run, run)


def test_a_finished_run_writes_its_backbone_anew_if_it_is_damaged(shards, whole_run, tmp_path):
    run = tmp_path / "run"
    for size in (0, 100, -1000):  # cut off: before the header, in it, in the weights
        shutil.copytree(whole_run.run, run, dirs_exist_ok=True)
        whole = (run / "backbone.safetensors").read_bytes()
        (run / "backbone.safetensors").write_bytes(whole[:size])
        assert run_train(shards, run, resume=True).was_finished
        assert (run / "backbone.safetensors").read_bytes() == whole


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_a_run_of_micro_batches_resumes_where_its_epoch_was(shards, tmp_path, optimizer):
    settings = dataclasses.replace(SMALL, accumulate=3, max_steps=5, optimizer=optimizer)
    whole = run_train(shards, tmp_path / "whole", settings)
    assert whole.epoch % 1 > 0.1  # batches of a later epoch, not from its start
    stopped = run_train(shards, tmp_path / "run", settings, time_limit=0.0)
    assert stopped.stopped and stopped.step == 1
    run_train(shards, tmp_path / "run", settings, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_frames_that_cannot_be_read_cost_no_step(shards, tmp_path, monkeypatch):
    whole = run_train(shards, tmp_path / "whole", tier="stream")
    read, calls, fatal = Reader.read, [], 7

    def fail(self, indices):
        calls.append(indices)
        if len(calls) == fatal:
            raise InputError("https://there/shard-7.tar: cannot be read; check the network")
        return read(self, indices)

    monkeypatch.setattr(Reader, "read", fail)
    run, never = tmp_path / "run", {"checkpoint_every": 100, "tier": "stream"}
    with pytest.raises(InputError, match=r"network\. Step (\d+) of 10 is saved, .*resume") as e:
        run_train(shards, run, **never)
    step = int(re.search(r"Step (\d+)", str(e.value))[1])
    assert 0 < step < 7 and checkpoints.load(run / "checkpoint.pt")["step"] == step
    run_train(shards, run, resume=True, tier="stream")
    assert_same_run(whole.run, run)
    # Between two micro-batches there is no state from which the run would be the same.
    calls, fatal = [], 9
    with pytest.raises(InputError, match="check the network$"):
        run_train(shards, tmp_path / "two", dataclasses.replace(SMALL, accumulate=5), **never)
    assert not (tmp_path / "two" / "checkpoint.pt").exists()


def test_two_processes_do_not_train_in_one_folder(shards, tmp_path):
    run = tmp_path / "run"
    tried = []

    def meanwhile(done, total, note):
        if not tried:
            tried.append(done)
            with pytest.raises(InputError, match="another process is training there"):
                run_train(shards, run, resume=True)

    result = run_train(shards, run, report=meanwhile)
    assert tried and result.step == STEPS
    assert [m["step"] for m in result.metrics] == list(range(2, STEPS + 1, 2))


def test_sigkill_loses_only_what_follows_the_checkpoint(shards, whole_run, tmp_path):
    run = tmp_path / "run"
    code = f"""
import os, signal
from pathlib import Path
from sslus.ssl.train import Settings, train
from sslus.ssl.loop import Options
from sslus.ssl.methods import vicreg
def kill(done, total, note):
    if done == 8 * {SMALL.batch_size}:
        os.kill(os.getpid(), signal.SIGKILL)
train(Path({str(shards)!r}), Settings(backbone="test_resnet", image_size=32, batch_size=16,
      max_steps={STEPS}), vicreg.Config(projector="32-32"), Path({str(run)!r}), device="cpu",
      threads=1, options=Options(log_every=2, checkpoint_every=3), report=kill)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert checkpoints.load(run / "checkpoint.pt")["step"] == 6
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # what a kill in the middle of a write leaves
    result = run_train(shards, run, resume=True)
    assert_same_run(whole_run.run, run)
    assert result.step == STEPS and not result.was_finished


def test_a_run_stopped_before_its_first_checkpoint_resumes_from_the_start(
    shards, whole_run, tmp_path
):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):

        def fail(done, total, note):
            raise RuntimeError("power cut")

        run_train(shards, run, report=fail)
    assert not (run / "checkpoint.pt").exists()
    run_train(shards, run, resume=True)
    assert_same_run(whole_run.run, run)


def test_a_run_that_ended_before_its_first_number_can_be_started_again(
    shards, whole_run, tmp_path, monkeypatch
):
    """With other settings: those that it began with may be why it ended."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("sslus.ssl.step.Step.update", lambda *_: [0] * 10**15)
        with pytest.raises(MemoryError):
            run_train(shards, run, dataclasses.replace(SMALL, batch_size=8))
    assert json.loads((run / "config.json").read_text())["settings"]["batch_size"] == 8
    run_train(shards, run)
    assert_same_run(whole_run.run, run)
    for left in ("metrics.jsonl", "checkpoint.pt"):
        other = tmp_path / left
        other.mkdir()
        for name in ("config.json", left):
            shutil.copy(run / name, other)
        with pytest.raises(InputError, match="already exists; --resume continues it"):
            run_train(shards, other)


def test_full_disk_leaves_the_last_checkpoint(shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = os.fsync
    full = []

    def fsync(fd):
        if full and "checkpoint" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        run_train(shards, run, report=lambda done, *_: full.append(1) if done >= 64 else None)
    assert checkpoints.load(run / "checkpoint.pt")["step"] == 3
    assert not list(run.glob("*.tmp"))


def test_no_checkpoint_is_on_a_disk_without_the_lines_before_it(shards, tmp_path, monkeypatch):
    """After a power cut, the run would resume there, and its log would lack them for ever."""
    run, real, synced = tmp_path / "run", os.fsync, []

    def fsync(fd):
        real(fd)
        path = Path(f"/proc/self/fd/{fd}").resolve()
        synced.append((path.name, path.stat().st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    run_train(shards, run)
    names = [name for name, _ in synced]
    checkpoint_times = [i for i, name in enumerate(names) if name == "checkpoint.pt.tmp"]
    assert len(checkpoint_times) == 4
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for i, last_step in zip(checkpoint_times, (2, 6, 8, 10), strict=True):
        ends = [size for name, size in synced[:i] if name == "metrics.jsonl"]
        before = b"".join(x for x in lines if json.loads(x)["step"] <= last_step)
        assert ends[-1:] == [len(before)]


def test_not_a_number_stops_the_run_in_one_line(shards, tmp_path, monkeypatch):
    real = vicreg.Method.forward

    def forward(self, views):
        self.calls = getattr(self, "calls", 0) + 1
        out = real(self, views)
        return out._replace(loss=out.loss * math.nan) if self.calls == 5 else out

    monkeypatch.setattr(vicreg.Method, "forward", forward)
    run = tmp_path / "run"
    with pytest.raises(InputError, match="loss is no longer finite .*lower --lr.*last good") as e:
        run_train(shards, run)
    state = checkpoints.load(run / "checkpoint.pt")
    assert state["step"] == 3
    assert all(t.isfinite().all() for t in tensors_of(state["method"]))
    monkeypatch.undo()
    (init,) = re.search(r"--init (\S+) --run DIR", str(e.value)).groups()  # as it advises
    told = []
    settings = dataclasses.replace(SMALL, init=init, lr=1e-9, max_steps=1, weight_decay=0.0)
    other = run_train(shards, tmp_path / "other", settings, say=told.append)
    for name, value in load_file(other.run / "backbone.safetensors").items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, state["method"][f"backbone.{name}"])
    assert any(re.match(r"(\d+) of \1 tensors loaded", line) for line in told)


def test_collapse_is_named(shards, tmp_path, monkeypatch):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert 20 < health.rankme(x) <= 32
    one = torch.ones(64, 1) @ x[:1]
    assert health.rankme(one) == pytest.approx(1, abs=0.01)
    assert health.rankme(torch.eye(8)) == pytest.approx(8)
    assert health.rankme(torch.zeros(8, 8)) < 2
    assert health.collapse(health.rankme(x), health.feature_std(x)[1], 64) is None
    assert "lower --lr" in health.collapse(health.rankme(one), health.feature_std(one)[1], 64)
    assert health.look(x[None, :2])[1] is None  # two frames fill two directions at most
    assert "collapsed" in health.look(one[None, :2])[1]
    assert health.uniformity(x) < -3
    for same in (one, torch.zeros(64, 32)):
        found, warning = health.look(torch.stack([same, same]))
        assert "collapsed" in warning and found["uniformity"] == pytest.approx(0, abs=1e-5)
    # A dead last layer, as the loop meets it.
    real = torch.nn.Module.__call__
    monkeypatch.setattr(
        torch.nn.Module,
        "__call__",
        lambda self, x, *a: (
            real(self, x, *a) * 0 + 1 if hasattr(self, "num_features") and x.ndim == 4
            and hasattr(self, "forward_head") else real(self, x, *a)
        ),
    )  # fmt: skip
    said = []
    result = run_train(shards, tmp_path / "run", say=said.append)
    assert len(result.warnings) == 1 and "collapsed" in result.warnings[0]
    assert "Warning: step 10" in said[-1]


def test_existing_finished_and_changed_runs(shards, whole_run, tmp_path):
    run = whole_run.run
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir() if p.name != "metrics.jsonl"}
    with pytest.raises(InputError, match="--resume continues it, --run DIR starts another"):
        run_train(shards, run)
    again = run_train(shards, run, resume=True)
    assert again.was_finished and again.step == STEPS
    epochs = dataclasses.replace(SMALL, max_steps=None, epochs=1)  # resolved only by the run
    first = run_train(shards, tmp_path / "epochs", epochs)
    assert run_train(shards, tmp_path / "epochs", epochs, resume=True).step == first.step
    with pytest.raises(InputError, match="lr was 0.00025, now 0.1; projector was '32-32', now '8'"):
        train(
            shards, dataclasses.replace(SMALL, lr=0.1), vicreg.Config(projector="8"), run,
            resume=True, device="cpu",
        )  # fmt: skip
    with pytest.raises(InputError, match=f"warmup_steps was 1, now {STEPS + 1}"):
        run_train(shards, run, dataclasses.replace(SMALL, warmup_steps=STEPS + 1), resume=True)
    begun = tmp_path / "begun"  # and killed while its first file was written
    begun.mkdir()
    (begun / "config.json.tmp").touch()
    with pytest.raises(InputError, match="holds no run; leave out --resume"):
        run_train(shards, begun, resume=True)
    run_train(shards, begun, dataclasses.replace(SMALL, max_steps=1))
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    (lost / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="has lost its checkpoint.pt"):
        run_train(shards, lost, resume=True)
    assert len((lost / "metrics.jsonl").read_text().splitlines()) == len(whole_run.metrics)
    assert before == {
        p.name: p.stat().st_mtime_ns for p in run.iterdir() if p.name != "metrics.jsonl"
    }
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((run / "config.json").read_bytes())
    (damaged / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="checkpoint .*cannot be read.*delete the run's folder"):
        run_train(shards, damaged, resume=True)
    torch.save({"format": checkpoints.FORMAT, "code": Path("/")}, tmp_path / "code.pt")
    with pytest.raises(InputError, match="cannot be read .UnpicklingError"):  # nor is it run
        checkpoints.load(tmp_path / "code.pt")
    shutil.copytree(run / "checkpoints", damaged / "checkpoints")
    shutil.copy(run / "metrics.jsonl", damaged)
    newest, before = sorted((damaged / "checkpoints").glob("step-*.pt"), reverse=True)
    newest.unlink()
    os.link(damaged / "checkpoint.pt", newest)  # as they are in a run, so it is damaged too
    with pytest.raises(InputError, match=f"cannot be read.*copy {before} over it and resume"):
        run_train(shards, damaged, resume=True)
    shutil.copyfile(before, damaged / "checkpoint.pt")
    assert run_train(shards, damaged, resume=True).step == STEPS
    assert_same_run(run, damaged)


def test_a_restarted_process_goes_on_only_with_what_its_torchrun_began(
    whole_run, tmp_path, monkeypatch
):
    """Another run that was there before is refused, as at the first start."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    world = World(torch.device("cpu"))
    config = open_run(whole_run.run, False, world)  # of the same parent process
    (tmp_path / "config.json").write_text(json.dumps(config | {"launcher": os.getppid() + 1}))
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(InputError, match="already exists; --resume continues it"):
        open_run(tmp_path, False, world)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_run_that_goes_back_keeps_the_checkpoints_of_its_new_course(
    has_links, tmp_path, monkeypatch
):
    def refuse(*_) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:  # as on exFAT
        monkeypatch.setattr(os, "link", refuse)
    for step in (200, 400, 600, 400, 500):
        checkpoints.save(tmp_path / "checkpoint.pt", {"step": step})
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / "best.json.tmp").touch()  # of a process that was killed
        for _ in range(2):  # again, as a resumed run does
            checkpoints.keep(tmp_path / "checkpoint.pt", step, 2, None)
            assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    kept = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [checkpoints.load(p)["step"] for p in kept] == [400, 500]
    assert [p.name for p in kept] == ["step-00000400.pt", "step-00000500.pt"]


def test_a_run_that_goes_back_exports_the_end_of_its_new_course(shards, whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run.run, run)
    shutil.copyfile(run / "checkpoints" / "step-00000009.pt", run / "checkpoint.pt")
    other = backbones.build("test_resnet", 32, seed=1)
    backbones.save(other, run / "backbone.safetensors", {"step": STEPS})
    assert run_train(shards, run, resume=True).step == STEPS
    one, two = ((r / "backbone.safetensors").read_bytes() for r in (whole_run.run, run))
    assert one == two


def test_initial_weights_are_checked(shards, whole_run, tmp_path):
    trained = load_file(whole_run.run / "backbone.safetensors")
    said = []

    def start_from(path):
        backbone = backbones.build("test_resnet", 32, seed=5)
        backbones.initialise(backbone, str(path), "test_resnet", said.append)
        return backbone.state_dict()

    full = start_from(whole_run.run / "backbone.safetensors")
    assert all(torch.equal(full[k], v) for k, v in trained.items())
    assert said[-1].startswith(f"{len(trained)} of {len(trained)} tensors loaded")
    torch.save({"state_dict": {**trained, "head.weight": torch.ones(3)}}, tmp_path / "part.pt")
    start_from(tmp_path / "part.pt")
    assert "not used: head.weight" in said[-1]
    save_file({f"other_{k}": v for k, v in trained.items()}, tmp_path / "none.safetensors")
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"0 of \d+ tensors match"):
        run_train(shards, run, dataclasses.replace(SMALL, init=str(tmp_path / "none.safetensors")))
    assert not run.exists()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty.pt").touch()
    torch.save(Path("/"), tmp_path / "code.pt")
    for path, why in (
        (tmp_path / "junk.pt", "cannot be read"),
        (tmp_path / "empty.pt", "cannot be read as weights: EOFError"),
        (tmp_path / "code.pt", r"more than tensors; save the state_dict\(\)"),
        (tmp_path / "gone", "no such file"),
    ):
        with pytest.raises(InputError, match=why):
            start_from(path)
    with pytest.raises(InputError, match="timm has no such model; did you mean .*resnet18"):
        backbones.build("resnet_18", 32, 0)


def test_other_backbones_and_lars_take_a_step(shards, tmp_path):
    settings = dataclasses.replace(
        SMALL, backbone="test_vit", max_steps=2, optimizer="lars", batch_size=8
    )
    result = run_train(shards, tmp_path / "vit", settings)
    assert result.step == 2 and math.isfinite(result.metrics[-1]["loss"])


@pytest.mark.parametrize(
    "tells, has",
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False),
     (None, False)],
)  # fmt: skip
def test_mixed_precision_where_the_processor_has_it(tells, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: tells, raising=False)
    if tells is None:  # an older PyTorch
        monkeypatch.delattr(torch.cpu, "get_capabilities")

    def chosen(**given):
        return Settings(**given).resolved(torch.device("cpu"), 1000).precision

    for smallest in (None, 32):
        assert chosen(backbone="resnet18", image_size=smallest) == ("bf16" if has else "fp32")
    assert chosen(backbone="vit_tiny_patch16_224", image_size=224) == "fp32"
    assert chosen(backbone="resnet18", precision="fp32") == "fp32"
    assert chosen(precision="bf16") == "bf16"
    assert chosen(backbone="resnet18", image_size=31) == "fp32"  # oneDNN forgets a gradient there
    with pytest.raises(InputError, match="precision bf16: images of 31 px are too small"):
        chosen(precision="bf16", image_size=31)
    assert chosen(precision="bf16", image_size=32) == "bf16"


def test_weights_that_the_last_step_broke_stop_the_run_in_one_line(shards, tmp_path):
    broken = dataclasses.replace(SMALL, max_steps=1, optimizer="sgd", lr=1e38)
    with pytest.raises(InputError, match=r"norm of the weights is no longer finite \(by step 1\)"):
        run_train(shards, tmp_path / "run", broken)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


def test_bad_settings_are_one_line(shards, tmp_path):
    for change, why in [
        ({"optimizer": "adam"}, "optimizer 'adam': want one of adamw, lars, sgd"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"warmup_steps": 11}, "more than the run's 10 steps"),
        ({"seed": -1}, "seed -1: want a whole number from 0"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),  # it would not clip at all
        ({"lr": math.inf}, "lr inf: want a number from 0 to 3e\\+38"),
        ({"dual_task": 1e300}, "dual_task 1e\\+300: want a number from 0 to 3e\\+38"),
        ({"accumulate": 10**20}, "accumulate 1(0+): want a whole number from 0, below"),
        ({"accumulate": 10**12}, "accumulate 1(0+): an epoch has only [1-9] full batches"),
        ({"weight_decay": math.nan}, "weight_decay nan: want a number from 0"),
        ({"warmup_epochs": math.nan}, "warmup_epochs nan"),
        ({"warmup_steps": -1}, "warmup_steps -1: want a whole number from 0"),
        ({"image_size": 0}, "image_size must be above 0, got 0"),
        ({"views": "simclr,max_sigma=0.6"}, "max_sigma of at most 0.5 for views of 32 px"),
        ({"batch_size": 0}, "batch size 0: .* give at least 2"),
        ({"batch_size": 10_000}, "give --batch-size"),
    ]:
        with pytest.raises(InputError, match=why):
            run_train(shards, tmp_path / "run", dataclasses.replace(SMALL, **change))
    for value in (-1.0, math.nan, 1e300):
        with pytest.raises(InputError, match=r"covariance \S+: want a number from 0, below"):
            train(shards, SMALL, vicreg.Config(covariance=value), tmp_path / "run", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device cuda: not available here"):
            run_train(shards, tmp_path / "run", device="cuda")
        with pytest.raises(InputError, match="--tier gpu"):
            run_train(shards, tmp_path / "run", device="cpu", tier="gpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("capability, triton, right", [
    ((9, 0), "3.6.0", True), ((10, 0), "3.6.0", False), ((10, 0), "3.7.9", False),
    ((10, 0), "3.8.1", True), ((10, 0), "3.10.0", True),
])  # fmt: skip
def test_a_gpu_that_triton_compiles_wrong_code_for_is_refused(
    capability, triton, right, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("importlib.metadata.version", lambda name: triton)
    with (
        contextlib.nullcontext() if right else pytest.raises(InputError, match=f"{triton}.*sm_100")
    ):
        assert pick_device("auto").type == "cuda"


def test_an_impossible_tier_is_not_recorded(shards, tmp_path):
    run = tmp_path / "run"
    assert run_train(shards, run, time_limit=0.0).stopped
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError, match="--tier gpu: "):
        run_train(shards, run, resume=True, tier="gpu")
    assert (run / "config.json").read_bytes() == before  # or the next --resume would take it again


def test_a_world_that_torchrun_did_not_make_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but without RANK, MASTER_ADDR, MASTER"):
        enter.__wrapped__("cpu")  # another test has entered


def test_the_command_trains_stops_and_resumes(shards, tmp_path, capsys):
    run = tmp_path / "run"
    small = "--backbone test_resnet --image-size 32 --batch-size 16 --max-steps 4 --projector 16"
    base = ["train", str(shards), "--run", str(run), "--device", "cpu", "--threads", "1"]
    assert main([*base, *small.split()]) == 0
    out = capsys.readouterr().out
    assert "4 steps" in out and f"Next: sslus evaluate {run} --labels" in out
    assert main([*base, *small.split()]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["train", "--resume", "--run", str(run)]) == 0  # settings and shards are the run's
    assert "already finished" in capsys.readouterr().out
    assert main(["train", "--resume", "--run", str(run), "--max-steps", "5"]) == 1
    assert "max_steps was 4, now 5" in capsys.readouterr().err
    assert main([*base, "--resume", "--projector", "32"]) == 1
    assert "projector was '16', now '32'" in capsys.readouterr().err
    base[3] = str(tmp_path / "epoch")
    epoch = [*base, *small.replace("--max-steps 4", "--epochs 1").split()]
    assert main(epoch) == main([*epoch, "--resume", "--max-steps", "999"]) == 0
    assert "--max-steps: the run keeps its length, " in capsys.readouterr().err
    assert main([*base[:2], "--run", str(tmp_path / "x"), "--method", "nothing"]) == 1
    assert re.search("there are: .*vicreg", capsys.readouterr().err)
    assert CliRunner().invoke(sslus, ["train", "--epochs", "0"]).exit_code == 2


def small_run(shards, run, *more) -> int:
    """`sslus train`, of which the first call stops after a step."""
    small = "--backbone test_resnet --image-size 32 --batch-size 16 --max-steps 2 --projector 16"
    line = ["train", str(shards), "--run", str(run), *small.split(), "--device", "cpu", *more]
    return main([*line, "--threads", "1", "--time-limit", "0"])


def test_the_password_of_a_url_is_not_recorded_and_resuming_wants_it_again(
    shards, tmp_path, capsys
):
    memory, run = fsspec.filesystem("memory"), tmp_path / "run"
    for path in [*shards.glob("*.tar"), shards / "manifest.json"]:
        memory.pipe(f"/me:secret@of-the-test/{path.name}", path.read_bytes())
    assert small_run("memory://me:secret@of-the-test", run) == 0
    stopped = capsys.readouterr()
    going = f"sslus train 'memory://***@of-the-test' --resume --run {run}  # *** hides a part"
    assert f"Next: {going} of the URL: name it whole\n" in stopped.out
    assert main(["train", "--resume", "--run", str(run)]) == 1
    said = capsys.readouterr()
    assert re.search(
        r"shards are at memory://\*\*\*@of-the-test, whose password or query is not recorded; name"
        f" the whole URL as SHARDS: sslus train SHARDS --resume --run {run}\n",
        said.err,
    )
    assert main(["train", "memory://me:secret@of-the-test", "--resume", "--run", str(run)]) == 0
    files = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"secret" not in files and "secret" not in "".join((*stopped, *said))


def test_a_run_whose_shards_were_moved_says_how_to_name_their_new_place(shards, tmp_path, capsys):
    before, after, run = tmp_path / "before", tmp_path / "after", tmp_path / "run"
    shutil.copytree(shards, before)
    assert small_run(before, run) == 0
    before.rename(after)
    capsys.readouterr()
    assert main(["train", "--resume", "--run", str(run)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"shards were in {before}, which is gone; if they were" in err
    going = err.split("as SHARDS: sslus ")[1].replace("SHARDS", str(after)).split()
    assert main(going) == 0
    assert json.loads((run / "config.json").read_text())["shards"]["path"] == str(after)
    assert main(["train", "--resume", "--run", str(run)]) == 0


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "[" * 10**5, '{"settings": {"method": "vicreg", "x": 1}}']
)
def test_a_damaged_config_is_one_line(shards, tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert main(["train", str(shards), "--resume", "--run", str(tmp_path), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.json" in err


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("settings", "seed", "x"), ("settings", "lr", "0.1"), ("settings", "image_size", 32.5),
        ("settings", "views", ["a"]), ("settings", "epochs", True), ("settings", None, []),
        ("method_config", "projector", 32), ("method_config", None, "x"), ("shards", "path", 5),
        ("shards", None, 5), ("how", "device", ["cpu"]), ("how", "log_every", "x"),
        ("how", "log_every", 0), ("how", "checkpoint_every", -200), ("how", "keep", -1),
        ("how", "health_every", 0), ("how", "online_every", -1), ("how", "threads", "two"),
        ("how", "threads", 0), ("how", "threads", -1), ("how", "threads", 10**20),
        ("method_file", None, "my_method.py"),
    ],
)  # fmt: skip
def test_a_config_edited_by_hand_is_one_line(part, name, value, whole_run, tmp_path, capsys):
    config = json.loads((whole_run.run / "config.json").read_text())
    (config if name is None else config[part])[name or part] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["train", "--resume", "--run", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.match(f"Error: .*config.json.*{name or ''}.*start an", err)


@pytest.mark.parametrize("line", [b'{"st', b"\xff", b"5", b"[1]", b'{"loss": 1}', b"\0\0"])
def test_a_damaged_line_of_metrics_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match="metrics.jsonl, line 2: damaged"):
        checkpoints.read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "text", ["", "5", "null", '{"of": "-loss"}', '{"of": "-loss", "score": ""}']
)
def test_a_damaged_score_of_the_best_is_named(text, tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    checkpoints.keep(tmp_path / "checkpoint.pt", 1, 2, ("-loss", -1.0))
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    with pytest.raises(InputError, match="best.json: damaged .*; delete it"):
        checkpoints.keep(tmp_path / "checkpoint.pt", 2, 2, ("-loss", -2.0))


def endless(shards, run, **how) -> subprocess.Popen:
    """`sslus train` as a process; returns once it has begun to train."""
    options = "--backbone test_resnet --image-size 32 --batch-size 16 --epochs 9999 --log-every 1"
    process = subprocess.Popen(
        [sys.executable, "-m", "sslus.tools", "train", str(shards), "--run", str(run)]
        + options.split() + ["--projector", "16", "--device", "cpu", "--threads", "1"],
        **how,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not checkpoints.read_metrics(run / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process


def test_ctrl_c_of_the_command(shards, tmp_path):
    """The real thing: a process, a signal, an exit code, one line."""
    run = tmp_path / "run"
    process = endless(shards, run, stderr=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"everything is saved. Continue with: sslus train --resume --run {run}" in err
    assert len(err.splitlines()[-1]) > 60 and "Traceback" not in err
    assert checkpoints.load(run / "checkpoint.pt")["step"] >= 1


def test_a_lost_terminal_saves(shards, tmp_path):
    """The system sends SIGHUP, and whatever is written to the terminal then fails."""
    run, (terminal, end) = tmp_path / "run", os.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = endless(shards, run, stdin=end, stdout=end, stderr=end, preexec_fn=own_terminal)
    os.close(end)
    os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert checkpoints.load(run / "checkpoint.pt")["step"] >= 1


def test_nearby_pairs_with_weights_train(shards, tmp_path):
    plain = run_train(shards, tmp_path / "plain")
    settings = dataclasses.replace(SMALL, pairs="nearby", max_seconds=0.5)
    nearby = run_train(shards, tmp_path / "nearby", settings)
    weighted = run_train(
        shards, tmp_path / "weighted", dataclasses.replace(settings, pair_weights=True)
    )
    losses = [[m["loss"] for m in r.metrics] for r in (plain, nearby, weighted)]
    assert losses[0] != losses[1] != losses[2]
    # Weights are at most 1, so the first batch's distance can only shrink.
    assert weighted.metrics[0]["invariance"] < nearby.metrics[0]["invariance"]


def test_nearby_pairs_that_are_out_of_reach_are_told(shards, store, tmp_path, monkeypatch):
    """Else --pairs nearby would do nothing, without a word."""
    settings = dataclasses.replace(SMALL, pairs="nearby", max_seconds=0.05)
    with pytest.raises(InputError, match="within --max-seconds 0.05; they are 0.08 seconds apart"):
        run_train(shards, tmp_path / "none", settings)
    assert not (tmp_path / "none").exists()

    said, settings = [], dataclasses.replace(settings, max_seconds=0.1, max_steps=1)
    run_train(shards, tmp_path / "all", settings, say=said.append)
    assert not any("--pairs" in line for line in said)
    monkeypatch.setattr("sslus.ssl.loop.have_nearby", lambda video, *_: video > 0)
    run_train(shards, tmp_path / "some", settings, say=said.append)
    alone = f"--pairs nearby: {np.sum(store.video == 0)} of {len(store)} frames have no other one"
    assert any(alone in line for line in said)
