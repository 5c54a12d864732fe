"""Several processes train as one: torchrun with gloo on this machine, as with GPUs elsewhere."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslus.ssl import checkpoints
from sslus.ssl.loop import Options
from sslus.ssl.methods import vicreg
from sslus.ssl.train import Settings, train
from sslus.ssl.world import leave

STEPS = 30
# Adam turns the rounding of a gradient near zero into a whole step: plain momentum keeps what is
# compared comparable. So do a backbone and a projector (see run_train) without ReLUs: one of them
# that rounding turns, of -2e-6 to 8e-7, moves the gradient by 1e-2 and the loss, some steps on, by
# up to 3e-4. Half the gradient, the fault looked for, moves the loss by 7e-3.
OPTIONS = [
    *"--backbone test_efficientnet --image-size 32 --batch-size 16 --projector 32-32".split(),
    *f"--max-steps {STEPS} --optimizer sgd --lr 3e-5 --log-every 1 --checkpoint-every 5".split(),
    *"--device cpu --threads 1".split(),
]


def start(shards, run, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "sslus.tools", "train", str(shards), "--run", str(run), *OPTIONS]
        + list(more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


def lines(run):
    return checkpoints.read_metrics(run / "metrics.jsonl")


def wait_for_step(process, run, step):
    deadline = time.monotonic() + 200
    while not any(m["step"] >= step for m in lines(run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def stat(pid) -> list[str]:
    """/proc/PID/stat from the third field on, the state: what comes before may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def children(pid) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(stat(folder.name)[1]) == pid:
                found.append(int(folder.name))
    return found


def cpu_seconds(pid) -> float:
    """How far a process has come, however busy the machine is; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return sum(map(int, stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")
    return 0


def workers(process) -> list[int]:
    """The processes that torchrun, a child of `process`, has started. Imports may start others."""
    found = []
    for pid in (pid for child in children(process.pid) for pid in children(child)):
        with contextlib.suppress(OSError):
            if b"sslus.tools" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_killed_and_stopped_the_run_of_two_is_the_same(shards, runs, tmp_path, monkeypatch):
    """A killed worker is started again; Ctrl-C stops both at one step, and --resume goes on."""
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start(shards, run, "--gpus", "2")
    wait_for_step(process, run, 7)
    os.kill(workers(process)[1], signal.SIGKILL)
    again = max(m["step"] for m in lines(run)) + 3  # further than one of two comes
    wait_for_step(process, run, again)
    process.send_signal(signal.SIGINT)  # which they get as SIGTERM
    _, err = finish(process, 130)
    assert err.count("everything is saved") == 1 and "Traceback" not in err
    step = checkpoints.load(run / "checkpoint.pt")["step"]
    assert again <= step < STEPS
    out, err = finish(start(shards, run, "--gpus", "2", "--resume"))
    assert f"{STEPS} steps" in out and out.count("Next: ") == 1
    assert err.count("frames: ") == 1  # one log
    assert json.loads((run / "config.json").read_text())["processes"] == 2
    x, y = (checkpoints.load(r / "checkpoint.pt") for r in (run, runs / "undisturbed"))
    assert x["step"] == y["step"] == STEPS
    assert all(torch.equal(v, y["method"][k]) for k, v in x["method"].items())
    losses = [[(m["step"], m["loss"]) for m in lines(r)] for r in (run, runs / "undisturbed")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert not [p.name for p in temporary.iterdir() if "elastic" in p.name or "sslus" in p.name]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_workers, begun_seconds", [(0, 0.3), (1, 0), (2, 0.3)])
def test_stopped_before_the_processes_have_begun(
    num_workers, begun_seconds, signum, shards, tmp_path
):
    """While torchrun is imported, while it starts them, and while they import PyTorch."""
    process = start(shards, tmp_path / "run", "--gpus", "2")

    def there() -> bool:
        found = workers(process) if num_workers else children(process.pid)
        return len(found) >= max(1, num_workers) and min(map(cpu_seconds, found)) >= begun_seconds

    while not there():
        assert process.poll() is None
        time.sleep(0.001)
    found = [*children(process.pid), *workers(process)]
    os.killpg(process.pid, signum)  # as a terminal does
    _, err = finish(process, 128 + signum)
    assert err == "Error: interrupted\n"
    assert not (tmp_path / "run").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


@pytest.mark.parametrize("end, code", [("sys.exit(70)", 70), ("os.kill(os.getpid(), 9)", 137)])
def test_what_fails_at_every_start_keeps_its_exit_code(end, code, tmp_path):
    (tmp_path / "fails.py").write_text(f"import os, sys\n{end}\n")
    line = "-m sslus.tools.launch --standalone --local-addr 127.0.0.1 --max-restarts 1"
    done = subprocess.run(
        [sys.executable, *line.split(), str(tmp_path / "fails.py")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("Error: a process was killed by signal 9") == (code == 137)


def test_an_error_of_all_is_one_line(shards, tmp_path):
    last_counts = ("--gpus", "3", "--gpus", "2")
    _, err = finish(start(shards, tmp_path / "run", *last_counts, "--batch-size", "15"), 1)
    assert err.count("Error: --batch-size 15 is not a multiple of the 2 processes") == 1
    assert "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_without_a_gpu_are_refused(shards, tmp_path):
    """Rather than that processes crowd the CPU; who wants that says so, as OPTIONS do."""
    _, err = finish(start(shards, tmp_path / "run", "--gpus", "2", "--device", "auto"), 1)
    assert err.count("Error: --gpus: there is no GPU here") == 1
    assert "--device cpu" in err and not (tmp_path / "run").exists()


def test_torchrun_itself_takes_run_and_an_error_of_all_is_one_line(shards, tmp_path):
    """As the help says it. torchrun's own report follows.

    It ends the second process, which would tell the error too, but on a busy machine not within
    OTHERS_WAIT_SECONDS.
    """
    patient = "from sslus.tools import cli\ncli.OTHERS_WAIT_SECONDS = 200\n"
    (tmp_path / "sitecustomize.py").write_text(patient)  # Python imports it when it starts
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint"
    process = subprocess.run(
        [sys.executable, *torchrun.split(), "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        + ["-m", "--", "sslus.tools", "train", str(shards), "--run", str(tmp_path / "run")]
        + [*OPTIONS, "--batch-size", "15"],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert process.returncode == 1
    errors = [x for x in process.stderr.splitlines() if x.startswith("Error: ")]
    assert len(errors) == 1 and "not a multiple of the 2 processes" in errors[0], process.stderr


# The loop itself, in two processes that are not torchrun's.

SHORT = 8  # steps; an epoch has 6


def run_train(
    shards, run, batch_norm="sync", resume=False, steps=SHORT, activation=nn.SiLU, **options
):
    """What OPTIONS say, but for the number of steps and the projector's activation."""
    settings = Settings(
        backbone="test_efficientnet", image_size=32, batch_size=16, max_steps=steps,
        optimizer="sgd", lr=3e-5, batch_norm=batch_norm,
    )  # fmt: skip
    curves = mock.patch("sslus.ssl.curves.draw")  # takes as long as the rest
    with curves, mock.patch("sslus.ssl.heads.nn.ReLU", activation):
        return train(
            shards, settings, vicreg.Config(projector="32-32"), run, device="cpu", threads=1,
            resume=resume, options=Options(log_every=1, **options),
        )  # fmt: skip


def one_of_two(rank, shards, folder):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2", "RANK": str(rank)}
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    run_train(shards, folder / "looked", online_every=1)
    run_train(shards, folder / "per-rank", batch_norm="per-rank")
    assert run_train(shards, folder / "begun by two", time_limit=0.0).stopped
    run_train(shards, folder / "begun by one", resume=True)
    run_train(shards, folder / "long", steps=20)
    run_train(shards, folder / "undisturbed", steps=STEPS, activation=nn.ReLU)
    leave()


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory, start_ranks):
    """The runs of one_of_two, and one process's."""
    folder = tmp_path_factory.mktemp("runs")
    run_train(shards, folder / "alone", online_every=1)
    assert run_train(shards, folder / "begun by one", time_limit=0.0).stopped
    start_ranks(one_of_two, (shards, folder), 2)
    return folder


def assert_same_course(a, b):
    x, y = ([m for m in lines(run) if "loss" in m] for run in (a, b))
    assert [m["step"] for m in x] == [m["step"] for m in y] == list(range(1, SHORT + 1))
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in y] == pytest.approx([m[name] for m in x], rel=1e-4), name
    # Of the features of the whole batch, however it is shared.
    for name in ("rankme", "feature_std", "alignment", "uniformity"):
        assert y[-1][name] == pytest.approx(x[-1][name], rel=1e-3), name
    p, q = (load_file(run / "backbone.safetensors") for run in (a, b))
    for key, value in p.items():
        torch.testing.assert_close(q[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_two_processes_have_the_loss_curve_of_one(shards, runs, tmp_path):
    run_train(shards, tmp_path / "one", steps=20)
    one, both = (lines(run) for run in (tmp_path / "one", runs / "long"))
    assert [m["step"] for m in one] == [m["step"] for m in both] == list(range(1, 21))
    assert [m["loss"] for m in both] == pytest.approx([m["loss"] for m in one], rel=1e-5)


def test_two_processes_see_in_a_look_what_one_does(runs):
    one, both = runs / "alone", runs / "looked"
    assert_same_course(one, both)
    looks = [[m for m in lines(run) if "knn_accuracy" in m] for run in (one, both)]
    assert [m["step"] for m in looks[0]] == [6, SHORT]
    for a, b in zip(*looks, strict=True):
        assert a == pytest.approx(b, abs=0.05)  # a frame between two classes may change sides
    for run, found in zip((one, both), looks, strict=True):
        best = json.loads((run / "checkpoints" / "best.json").read_text())
        assert best["score"] == max(m["knn_accuracy"] for m in found)


def test_a_run_goes_on_with_another_number_of_processes(shards, runs):
    """The data's order is the same, and a loss is that of the whole batch, however it is shared."""
    assert_same_course(runs / "alone", runs / "begun by one")
    run = runs / "begun by two"
    assert 1 <= checkpoints.load(run / "checkpoint.pt")["step"] < SHORT
    run_train(shards, run, resume=True)
    assert_same_course(runs / "alone", run)


def of_each_half(plain):
    """A BatchNorm that takes the halves of a batch for two; its statistics are the first's."""

    def forward(self, x):
        if not self.training:
            return plain(self, x)
        first, second = x.chunk(2)
        first = plain(self, first)
        kept = [b.clone() for b in self.buffers()]
        second = plain(self, second)
        for b, value in zip(self.buffers(), kept, strict=True):
            b.data.copy_(value)
        return torch.cat([first, second])

    return forward


def test_batch_norm_per_rank_is_that_of_each_processes_part(shards, runs, tmp_path, monkeypatch):
    for kind in (_BatchNorm, BatchNormAct2d):
        monkeypatch.setattr(kind, "forward", of_each_half(kind.forward))
    run_train(shards, tmp_path / "halves")
    assert_same_course(tmp_path / "halves", runs / "per-rank")
    with pytest.raises(AssertionError):
        assert_same_course(runs / "alone", runs / "per-rank")
