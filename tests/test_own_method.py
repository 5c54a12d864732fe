"""`--method FILE.py`: a file of the user's trains like ours, and runs only where it is named."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sslus.engine.errors import InputError
from sslus.ssl import checkpoints, methods
from sslus.ssl.evaluate import evaluate
from sslus.ssl.train import Options, Settings, train
from sslus.tools.cli import main, sslus

PAGE = (Path(__file__).parent.parent / "ssl" / "README.md").read_text()
EXAMPLE = next(x for x in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "class Method" in x)
COSINE = '''"""The cosine between random projections of two views: L = -mean cos(W ha, W hb)."""

from dataclasses import dataclass

import torch
from torch import nn

from sslus.ssl.methods import Output


@dataclass(frozen=True)
class Config:
    width: int = 8
    noise: float = 0.1


RECIPES = {"default": {"noise": 0.2, "optimizer": "sgd", "lr": 0.1}}


class Method(nn.Module):
    def __init__(self, backbone, config, image_size):
        super().__init__()
        self.backbone, self.noise = backbone, config.noise
        self.projector = nn.Linear(backbone.num_features, config.width)
        self.register_buffer("num_steps", torch.zeros(()))

    def forward(self, views):
        ha, hb = self.backbone(views.va), self.backbone(views.vb)
        ha = ha + self.noise * torch.randn_like(ha)
        za, zb = (nn.functional.normalize(self.projector(h).float(), dim=1) for h in (ha, hb))
        loss = -(za * zb).sum(1).mean() + 0.01 * self.num_steps
        return Output(loss, {"similarity": (za * zb).sum(1).mean().detach()}, ha, hb)

    def after_step(self, step, num_steps):
        self.num_steps += 1
'''
SMALL = "--backbone test_resnet --image-size 32 --batch-size 16 --device cpu --threads 1".split()
pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """my_cosine.py in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("my_cosine.py").write_text(COSINE)
    return Path("my_cosine.py")


def begin(shards, *more):
    """A run of 4 steps that stops after the first; returns the exit code."""
    options = ["--max-steps", "4", "--time-limit", "0", "--log-every", "1", *more]
    return main(["train", str(shards), "--method", "my_cosine.py", *SMALL, *options])


RESUME = ["train", "--resume", "--run", "runs/my_cosine"]


def test_the_page_that_shows_a_method_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.py").touch()
    assert main(["train", "--method", "a.py"]) == 1
    page = Path(re.search(r"\(see Your own method in (.*)\)", capsys.readouterr().err)[1])
    assert EXAMPLE in page.read_text()
    result = CliRunner().invoke(sslus, ["train", "--help"])
    assert str(page) in "".join(result.output.split())


def test_a_file_trains_resumes_bit_for_bit_and_is_not_needed_afterwards(
    file, shards, clips, capsys
):
    assert begin(shards, "--time-limit", "99", "--run", "whole", "--width", "4") == 0
    assert begin(shards, "--width", "4") == 0
    going = capsys.readouterr().out.rpartition("Next: ")[2].split()
    assert going == "sslus train --method my_cosine.py --resume --run runs/my_cosine".split()
    torch.manual_seed(99)
    assert main(going[1:]) == 0
    runs = [Path("whole"), Path("runs/my_cosine")]
    one, two = (checkpoints.load(run / "checkpoint.pt") for run in runs)
    assert one["step"] == two["step"] == one["method"]["num_steps"] == 4
    assert one["method"].keys() == two["method"].keys()
    assert all(torch.equal(value, two["method"][name]) for name, value in one["method"].items())
    terms = [
        [(m["step"], m["loss"], m["similarity"])
         for m in checkpoints.read_metrics(run / "metrics.jsonl")] for run in runs
    ]  # fmt: skip
    assert terms[0] == terms[1] and len(terms[0]) == 4
    config = json.loads(Path("runs/my_cosine/config.json").read_text())
    assert config["settings"]["method"] == "my_cosine" and config["settings"]["lr"] == 0.1
    assert config["method_config"] == {"width": 4, "noise": 0.2}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert config["method_file"] == {"path": str(file.resolve()), "sha256": digest}
    file.unlink()
    for how in ({"protocol": "knn"}, {"protocol": "finetune", "steps": 1}):
        judged = evaluate(
            runs[1], clips / "labels.csv", percents=[100], num_seeds=1, device="cpu", **how
        )
        assert "my_cosine" in {row.backbone for row in judged.rows}


def test_a_file_may_be_edited_while_it_trains(file, shards):
    """The run goes on with what it has read; the best checkpoint is still kept."""
    method_config = methods.load(file).Config()
    settings = Settings(
        method="my_cosine.py", backbone="test_resnet", image_size=32, batch_size=16, max_steps=3
    )

    def report(done, total, note):
        file.write_text("raise SystemExit('executed')")

    options = Options(log_every=1, checkpoint_every=1)
    result = train(
        shards, settings, method_config, Path("run"), device="cpu", threads=1, options=options,
        report=report,
    )  # fmt: skip
    assert result.step == 3 and "SystemExit" in file.read_text()
    assert Path("run/checkpoints/best.pt").exists()


def test_a_run_executes_no_file_because_it_names_it(file, shards, capsys):
    assert begin(shards) == 0
    capsys.readouterr()
    file.write_text(COSINE + "\nraise SystemExit('executed')\n")
    recorded = json.loads(Path("runs/my_cosine/config.json").read_text())
    about = methods.about_file(file)  # the digest is right
    named = {"settings": recorded["settings"] | {"method": about["path"]}, "method_file": about}
    for config in (recorded, recorded | named):
        Path("runs/my_cosine/config.json").write_text(json.dumps(config))
        assert main(RESUME) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "only if you name it: --method FILE" in line and about["path"] in line
    assert main([*RESUME, "--method", "vicreg"]) == 1
    assert "only if you name it" in capsys.readouterr().err


def test_a_file_that_has_changed_is_refused(file, shards, capsys):
    assert begin(shards) == 0
    capsys.readouterr()
    before = Path("runs/my_cosine/checkpoint.pt").read_bytes()
    for old, new in (("0.01", "0.02"), ("noise", "spread")):  # a constant; a field of Config
        file.write_text(COSINE.replace(old, new))
        assert main([*RESUME, "--method", "my_cosine.py"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"file {file.resolve()} is not the one that the run began with (sha256 " in line
    config = methods.recipe("my_cosine.py", "default")[1]
    settings = Settings("my_cosine.py", "test_resnet", image_size=32, batch_size=16, max_steps=4)
    with pytest.raises(InputError, match="is not the one that the run began with"):
        train(shards, settings, config, Path("runs/my_cosine"), resume=True, device="cpu")
    assert Path("runs/my_cosine/checkpoint.pt").read_bytes() == before
    Path("elsewhere").mkdir()
    Path("elsewhere/my_cosine.py").write_text(COSINE)  # the same file in another place
    assert main([*RESUME, "--method", "elsewhere/my_cosine.py"]) == 0


def test_no_recorded_digest_matches_no_file(file, shards, capsys):
    assert begin(shards) == 0
    path = Path("runs/my_cosine/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method_file": None}))
    assert main([*RESUME, "--method", "my_cosine.py"]) == 1
    assert "is not the one that the run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("none.py", None, "none.py: cannot be read (No such file or directory)"),
        ("vicreg.py", COSINE, "'vicreg' is already a method of sslus; rename the file"),
        ("all.py", COSINE, "'all' is already a method"),
        ("random init.py", COSINE, "want a file name of letters, digits, _ and - only"),
        ("a.py", "x = 1\n1 / 0\n", "a.py, line 2: ZeroDivisionError: division by zero"),
        ("a.py", "def f(:\n", "SyntaxError: invalid syntax (a.py, line 1)"),
        ("a.py", "raise SystemExit(0)", "a.py, line 1: SystemExit: 0"),
        ("a.py", "", "lacks a dataclass Config; a dict RECIPES with \"default\"; a class Method("),
        ("a.py", COSINE.replace("default", "usual"), "lacks a dict RECIPES with"),
        ("a.py", COSINE.replace("after_step", "after"), "lacks a class Method(nn.Module) with a"),
        ("a.py", COSINE.replace(": int = 8", ": int"), "lacks fields of Config of type int, float"),
        ("a.py", COSINE.replace(": int = 8", ": list = 8"), "lacks fields of Config of type int"),
        ("a.py", "from __future__ import annotations\n" + COSINE.replace("int", "Number"),
         "a.py: NameError: name 'Number' is not defined"),
        ("a.py", COSINE.replace("noise", "lr"), "Config has lr, which sslus train has already"),
        ("a.py", COSINE.replace('"noise"', '"nose"'), "recipe 'default' sets nose: no such option"),
    ],
)  # fmt: skip
def test_what_is_no_method_is_one_line(name, text, said, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    assert main(["train", str(shards), "--method", name, *SMALL]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and said in line
    assert not Path("runs").exists()


def test_options_and_recipes_of_a_file(file, shards, capsys):
    file.write_text(COSINE.replace("\n\n", "\n\nfrom __future__ import annotations\n", 1))
    result = CliRunner().invoke(sslus, ["train", "--method", str(file), "--help"])
    text = " ".join(result.output.split())
    assert "--width INTEGER (method option) [default: 8]" in text
    assert "--noise FLOAT (method option) [default: 0.2]" in text
    assert "L = -mean cos(W ha, W hb)" in text
    assert methods.load("my_cosine.py") is methods.load(file.resolve())  # it ran once
    assert begin(shards, "--recipe", "paper") == 1
    assert "my_cosine.py: has no recipe 'paper', only default" in capsys.readouterr().err
    assert begin(shards, "--variance", "1") == 2
    assert "--variance is an option of --method vicreg" in capsys.readouterr().err


def test_the_dual_task_refuses_a_term_that_is_named_like_its_own(file, shards, capsys):
    file.write_text(COSINE.replace('{"similarity"', '{"cross_entropy"'))
    assert begin(shards) == 0
    assert begin(shards, "--dual-task", "1", "--run", "dual") == 1
    assert "forward: a term named 'cross_entropy' would hide" in capsys.readouterr().err


@pytest.mark.parametrize(
    "old, new, at, said",
    [
        ("num_features, config", "num_features + 1, config", "za, zb = ", "RuntimeError: mat1 and"),
        ("super().__init__()", "super().__init__(1)", "super()", "TypeError: "),
        ("+= 1", "+= None", "self.num_steps +=", "TypeError: unsupported operand"),
        ("return Output", "", "def forward", "forward: want an Output of sslus.ssl.methods, got N"),
        ("Output(loss,", "Output(loss.detach(),", "def forward", "forward: the loss has no grad"),
        ("sum(1).mean() + 0.01", "sum(1) + 0.01", "def forward", "forward: want a loss of shape"),
        (".mean().detach()", ".mean().item()", "def forward", "forward: want terms that are tens"),
        ("detach()}, ha", "detach()}, loss", "def forward", "forward: want the backbone's feature"),
        ("}, ha, hb)", "}, ha, zb)", "def forward", "forward: want features of both views, got a"),
        ('{"similarity"', '{"loss"', "def forward", "forward: a term named 'loss' would hide"),
        ('{"similarity"', '{"rankme"', "def forward", "forward: a term named 'rankme' would"),
        ('{"similarity"', '{"knn_accuracy"', "def forward", "forward: a term named 'knn_accuracy'"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(old, new, at, said, file, shards, capsys):
    text = COSINE.replace(old, new)
    file.write_text(text)
    (line,) = [i for i, x in enumerate(text.splitlines(), start=1) if x.strip().startswith(at)]
    for dual in ("0", "1"):
        code = begin(shards, "--dual-task", dual)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"Error: {file.resolve()}, line {line}: {said}")
        assert code == (1 if at == "def forward" else 70)
        assert (code == 70) == ("a bug in sslus or in the method's file" in error)


@pytest.mark.parametrize("name", ["encoder", "deeper.backbone"])
def test_a_method_without_its_backbone_is_told_before_it_trains(name, file, shards, capsys):
    """Else the run would end with nothing to write as backbone.safetensors."""
    start = "super().__init__()\n"
    text = COSINE.replace(start, start + "        self.deeper = nn.Module()\n")
    file.write_text(text.replace("self.backbone", f"self.{name}"))
    assert begin(shards) == 1
    assert "my_cosine.py: Method must keep the backbone" in capsys.readouterr().err
    assert not Path("runs/my_cosine").exists()


@pytest.mark.parametrize(
    "line, more",
    [
        ("super().__init__()\n", "backbone.requires_grad_(False)"),
        ("self.backbone(views.vb)\n", "ha, hb = ha.detach(), hb.detach()"),
        ("torch.zeros(()))\n", "self.requires_grad_(False)"),  # nothing is left to train
    ],
)
def test_a_backbone_that_cannot_learn_is_told_in_the_first_step(line, more, file, shards, capsys):
    file.write_text(COSINE.replace(line, f"{line}        {more}\n"))
    assert begin(shards) == 1
    said = "my_cosine.py: no gradient of the loss reaches the backbone, which would stay as it is"
    assert said in capsys.readouterr().err
    assert not Path("runs/my_cosine/checkpoint.pt").exists()


def test_the_file_of_the_methods_page_trains_in_one_process_and_in_two(shards, tmp_path):
    """With one loss curve: its loss is that of the joint batch."""
    (tmp_path / "my_method.py").write_text(EXAMPLE)
    options = "--max-steps 4 --log-every 1 --width 32 --optimizer sgd --lr 1e-4".split()
    losses = []
    for run, more in (("one", []), ("two", ["--gpus", "2"])):
        done = subprocess.run(
            [sys.executable, "-m", "sslus.tools", "train", str(shards), *SMALL, *options]
            + ["--method", "my_method.py", "--run", run, *more],
            cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = checkpoints.read_metrics(tmp_path / run / "metrics.jsonl")
        losses.append([m["loss"] for m in lines])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["processes"] == 2 and config["settings"]["method"] == "my_method"
    fields = {f.name for f in dataclasses.fields(methods.load(tmp_path / "my_method.py").Config)}
    assert config["method_config"].keys() == fields == {"width"}
