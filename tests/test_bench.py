"""bench/: stages found by themselves, works timed in turns, rows and ratios that add up; the
roofline of a file; and the script that checks a machine with a GPU."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench"
FIELDS = set(
    "stage name implementation case median low high unit threads peak_mib device versions commit"
    " date".split()
)

NAPS = '''"""naps of two lengths"""
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from harness import Work

def nap(name, seconds):
    with Path(os.environ["TURNS"]).open("a") as f:
        f.write(name)
    time.sleep(seconds)
    return 10

def hog():
    bytearray(80 << 20)
    return 10

def parent_of_a_hog():
    subprocess.run([sys.executable, "-c", "bytearray(80 << 20)"], check=True)
    return 10

def measure(bench):
    works = {"sslus": Work(partial(nap, "a", 0.05)), "peer": Work(partial(nap, "b", 0.2))}
    rows = bench.compare("nap", "10 naps", "naps/s", works, repeats=3)
    bench.ratio("fast / slow", rows["sslus"], rows["peer"], at_least=2)
    bench.ratio("slow / fast", rows["peer"], rows["sslus"], at_least=0.8)
    hogs = bench.compare("hog", "80 MiB", "s", {"sslus": Work(hog)}, repeats=1)
    bench.compare("its parent", "", "s", {"sslus": Work(parent_of_a_hog)}, repeats=1)
    bench.ratio("slow / fast, at most", rows["peer"], rows["sslus"], at_most=0.5)
    # A minute that was slow for one turn of each work is not in the ratio.
    a, b = (bench.add("turns", "", "", "s", values) for values in ([1, 4, 100], [2, 8, 1]))
    bench.ratio("turn by turn", a, b)
    bench.ratio("not in turns", a, bench.add("turns", "", "", "s", [8.0]))
'''
UNEQUAL = '''"""one does more than the other"""
from harness import Work

def measure(bench):
    bench.attempt("a part", lambda: 1 / 0)
    bench.add("known", "sslus", "nothing", "s", [1.0])
    bench.compare("nap", "naps", "s", {"a": Work(lambda: 1, fresh=False), "b": Work(lambda: 2,
                  fresh=False)})
'''
# What a GPU's run measures, on the CPU: with the memory that lightly's place has not.
AS_ON_A_GPU = '''"""the losses, as on a GPU"""
import torch
from stages import losses

def extra_mib_on_gpu(run):
    run()
    return 1.0

def compiled(loss, **_):
    def full(za, zb):
        if za.dtype == torch.bfloat16:
            raise torch.OutOfMemoryError("full")
        return loss(za, zb)
    return full

def measure(bench):
    losses.extra_mib_on_gpu, torch.compile = extra_mib_on_gpu, compiled
    losses.on_gpu(bench)
'''

VIEWS_AS_ON_A_GPU = '''"""the views, as on a GPU"""
import numpy as np
from stages import augment

def measure(bench):
    augment.on_gpu(bench, np.zeros((2, 256, 256), np.uint8), "cpu")
'''


def run(bench: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(bench / "run.py"), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_stage_dropped_in_is_measured_and_a_broken_one_costs_only_itself(tmp_path):
    bench = tmp_path / "bench"
    shutil.copytree(BENCH, bench, ignore=shutil.ignore_patterns("__pycache__"))
    (bench / "stages/aunequal.py").write_text(UNEQUAL)
    (bench / "stages/naps.py").write_text(NAPS)
    out, turns = tmp_path / "out.json", tmp_path / "turns"

    done = run(bench, "--stage", "aunequal", "naps", "--json", str(out), TURNS=str(turns))

    assert done.returncode == 1, done.stderr
    assert "ZeroDivisionError" in done.stderr and "unequal work" in done.stderr
    assert done.stderr.splitlines()[-1] == "failed: aunequal, aunequal: a part"
    content = json.loads(out.read_text())
    # Measured apart for the memory (a, b), warmed up (a, b), then in turns.
    assert turns.read_text() == "ab" * 5
    known, fast, slow, hog, parent, *_ = content["rows"]
    assert all(set(row) == FIELDS for row in content["rows"])
    assert known["stage"] == "aunequal" and fast["stage"] == "naps"
    assert fast["low"] <= fast["median"] <= fast["high"] <= 10 / 0.05
    assert hog["unit"] == "s" and hog["peak_mib"] > fast["peak_mib"] + 70
    assert parent["peak_mib"] > fast["peak_mib"] + 70
    ratios = {r["text"]: r for r in content["ratios"]}
    assert ratios["turn by turn"]["value"] == ratios["not in turns"]["value"] == 0.5
    assert ratios["fast / slow"]["value"] == pytest.approx(4, rel=0.4)
    verdicts = {text: r["verdict"] for text, r in ratios.items()}
    assert verdicts == {
        "fast / slow": "met",
        "slow / fast": "missed",
        "slow / fast, at most": "met",
        "turn by turn": "",
        "not in turns": "",
    }
    assert "missed" in done.stdout


def test_every_stage_has_its_peer_and_its_floor(tmp_path):
    out = tmp_path / "out.json"

    done = run(BENCH, "--quick", "--json", str(out), OMP_NUM_THREADS="1")

    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    by_stage = {}
    for row in content["rows"]:
        by_stage.setdefault(row["stage"], []).append(row)
    assert set(by_stage) == {path.stem for path in (BENCH / "stages").glob("*.py")}
    peers = {"decode": "PyAV, no conversion", "shard": "PyAV decode + simplejpeg encode",
             "store": "simplejpeg", "train": "ceiling", "losses": "definition",
             "augment": "torchvision v2", "loader": "the op alone"}  # fmt: skip
    for stage, rows in by_stage.items():
        names = {row["implementation"] for row in rows}
        assert any(name.startswith("sslus") for name in names)
        assert any(name.startswith(peers[stage]) for name in names)
        assert any(name.startswith("floor: ") for name in names)
        assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)
        assert all(row["threads"] >= 1 and row["versions"]["av"] for row in rows)
    losses = {row["name"] for row in by_stage["losses"]}
    assert losses == {"memory bandwidth", "forward and backward", "mask: fill",
                      "mask: error, forward and backward"}  # fmt: skip
    sslus, bare = by_stage["decode"][:2]
    ratio = next(r for r in content["ratios"] if r["text"] == "sslus / PyAV, no conversion")
    assert ratio["value"] == pytest.approx(sslus["median"] / bare["median"], rel=1e-3)
    wanted = {r["text"]: r["want"] for r in content["ratios"] if r["want"]}
    assert (
        wanted.items()
        >= {
            "sslus / PyAV, no conversion": ">= 0.80",
            "jobs 1: sslus / bare": "<= 1.35",
            "jobs 2: sslus / bare": "<= 1.35",
            "sslus: 1 job / 2 jobs": ">= 1.80",
            "peak memory: 4n videos / n videos": "<= 1.10",
            **{
                f"threads {n}: sslus / simplejpeg": ">= 0.80"
                for n in {1, len(os.sched_getaffinity(0))}
            },
        }.items()
    )


def as_on_a_gpu(tmp_path, stage: str) -> tuple[str, dict]:
    """What a stage of this text prints, and its rows and ratios."""
    bench, out = tmp_path / "bench", tmp_path / "out.json"
    shutil.copytree(BENCH, bench, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (bench / "stages/asongpu.py").write_text(stage)
    done = run(bench, "--quick", "--stage", "asongpu", "--json", str(out), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_rows_record_the_versions_of_the_peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import harness

    project = tomllib.loads((BENCH.parent / "pyproject.toml").read_text())["project"]
    peers = {re.match(r"[\w-]+", x)[0] for x in project["optional-dependencies"]["bench"]}
    assert peers and peers <= set(harness.PACKAGES.values())


def test_what_takes_little_time_is_called_often(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import harness

    clock = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    costs = iter([30.0, *[0.25] * 100])  # the first call compiles

    def run():
        clock[0] += next(costs)

    often = harness.Often(run, seconds=2.0, amount=5.0)
    assert harness.timed(harness.Work(often)) == harness.Timed(5.0, 0.25)
    before = clock[0]
    assert harness.timed(harness.Work(often)).seconds == 0.25 and clock[0] == before + 2


def test_what_does_not_fit_a_gpu_is_left_out(tmp_path):
    shown, content = as_on_a_gpu(tmp_path, AS_ON_A_GPU)
    for name in ("vicreg", "barlow"):
        case = f"{name} N=16 D=64: torch.compile"
        assert f"left out: {case}: it does not fit the device's memory" in shown
    timed = [r for r in content["rows"] if r["name"] == "forward and backward"]
    who = [r["implementation"] for r in timed]
    assert who.count("sslus") == who.count("definition") == who.count("floor: the products") == 4
    assert who.count("torch.compile") == 2  # those of float32
    assert {r["verdict"] for r in content["ratios"] if r["want"]} == {"too small to tell"}
    wants = {r["text"]: r["want"] for r in content["ratios"]}
    assert wants["vicreg N=16 D=64: definition / sslus"] == ">= 10.00"
    assert wants["barlow N=16 D=64: torch.compile / sslus"] == ">= 4.00"
    # Rates count each one's own operations: ours by the triangle, and as often as planes ask for.
    rates = [r["median"] for r in content["rows"] if r["unit"] == "TFLOP/s"]
    ours, floor = (next(r["median"] for r in timed if r["implementation"] == i)
                   for i in ("sslus", "floor: the products"))  # fmt: skip
    assert rates[0] == pytest.approx(20 * 16**2 * 64 / ours / 1e12, rel=2e-3)
    assert rates[1] == pytest.approx(8 * 16**2 * 64 / floor / 1e12, rel=2e-3)


def test_the_views_of_a_gpu_are_held_against_a_copy(tmp_path):
    _, content = as_on_a_gpu(tmp_path, VIEWS_AS_ON_A_GPU)
    mine, copy = content["rows"][:2]
    assert (mine["implementation"], copy["implementation"]) == ("sslus, bfloat16", "floor: a copy")
    ratios = {r["text"]: r for r in content["ratios"]}
    of_the_copy = ratios["2 samples, bfloat16: bytes/s, sslus / a copy"]
    assert of_the_copy["value"] == pytest.approx(mine["median"] / copy["median"], rel=1e-3)
    assert of_the_copy["want"] == ">= 0.60"
    assert "2 samples: sslus / torchvision v2, 13 taps" in ratios


def rows_of(device: str, dtype: str = "") -> list[dict]:
    """Losses that take milliseconds, and a copy."""

    def row(name, implementation, case, median, unit):
        return {"stage": "losses", "name": name, "implementation": implementation, "case": case,
                "median": median, "unit": unit, "threads": 2, "device": device}  # fmt: skip

    rows = [row("memory bandwidth", "floor: a large copy", "256 MiB", 100.0, "GB/s")]
    for loss in ("vicreg", "barlow"):
        for n, d in [(256, 8192), (1024, 8192), (4096, 2048)]:
            case = f"{loss} N={n} D={d}{dtype}"
            for k, who in enumerate(["sslus", "floor: the products", "definition", "lightly"]):
                rows.append(row("forward and backward", who, case, (1 + k) * 1e-3, "s"))
    return rows


def roofline(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCH / "roofline.py"), *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_roofline_is_drawn(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.syspath_prepend(BENCH)
    import roofline as script

    cpu, gpu = tmp_path / "cpu.json", tmp_path / "gpu.json"
    cpu.write_text(json.dumps({"rows": rows_of("a CPU")[1:]}))  # none of bandwidth
    cut = rows_of("a GPU", " fp32")[:2]  # one of VICReg, none of Barlow Twins
    gpu.write_text(json.dumps({"rows": rows_of("a GPU", " bf16") + cut}))
    committed = sorted((BENCH / "results").glob("*/losses.json"))
    sizes = {}
    for path in [cpu, gpu, *committed]:
        png = tmp_path / f"{path.parent.name}-{path.stem}.png"
        monkeypatch.setattr(sys, "argv", ["roofline.py", str(path), "-o", str(png)])
        assert script.main() == 0
        with Image.open(png) as image:
            image.load()
            sizes[path] = image.size
            assert len(image.convert("L").getcolors()) > 20  # not blank
    assert committed and all(w > 1000 and h > 500 for w, h in sizes.values())
    assert sizes[gpu][1] > 1.5 * sizes[cpu][1]  # a row of panels for each type


def test_the_roofline_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import roofline as script

    path = tmp_path / "a.json"
    copy, loss, *_ = rows = rows_of("a CPU")
    rows += [copy | {"median": 60.0}, copy | {"stage": "store", "median": 999.0}]
    rows.append(loss | {"name": "forward", "median": 9.0})
    path.write_text(json.dumps({"rows": rows}))
    points, bandwidth = script.read(path)
    assert bandwidth == 100e9
    at = {(p.name, p.n, p.d, p.implementation): p for p in points}
    for loss in ("vicreg", "barlow"):
        for n, d, side in [(256, 8192, 256), (4096, 2048, 2048)]:
            ours, peer = (at[loss, n, d, who] for who in ("sslus", "definition"))
            assert ours.rate == pytest.approx(6 * n * d * side / 1e-3)
            assert ours.rate / peer.rate == pytest.approx(3)  # the ratio of the times
            assert ours.intensity == peer.intensity
    # Twelve passes over one view's N x D and four over N x N, all of four bytes.
    n, d = 256, 8192
    moved = 4 * (12 * n * d + 4 * n * n)
    assert at["vicreg", n, d, "sslus"].intensity == pytest.approx(6 * n * n * d / moved)


@pytest.mark.parametrize(
    "text, what",
    [
        (None, "No such file"),
        ("{", "is not what bench/run.py --json writes"),
        ('{"ratios": []}', "is not what bench/run.py --json writes"),
        ('{"rows": []}', "has no rows of vicreg or barlow"),
    ],
)
def test_a_file_without_losses_is_one_line(tmp_path, text, what):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    done = roofline(path)
    assert done.returncode == 1 and done.stderr.startswith("roofline: ") and what in done.stderr
    assert done.stderr.count("\n") == 1 and not path.with_suffix(".png").exists()


SCRIPT = BENCH.parent / "tools" / "gpu_check.sh"


def test_the_gpu_check_knows_every_stage():
    done = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run"],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    steps = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"build", "tests", "kernels", "shard", "train-eager", "train-graph", "roofline"} <= steps
    seconds = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert 520 < sum(seconds) <= 540 and min(seconds) >= 5  # all of nine minutes
    assert {s for s in steps if s.startswith("bench-")} == {
        f"bench-{path.stem}" for path in (BENCH / "stages").glob("*.py")
    }


@pytest.mark.parametrize(
    "only, wrong",
    [("kernles", "kernles"), ("kernels,bench-losse", "bench-losse"), ("a*,tests", "a*")],
)
def test_the_gpu_check_refuses_a_misspelt_step(only, wrong, tmp_path):
    """Before it builds anything, or removes what an earlier run left."""
    (tmp_path / "summary.tsv").write_text("tests\tok\t40\n")
    done = subprocess.run(
        ["bash", str(SCRIPT), "--only", only, "--out", str(tmp_path)],
        env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert f"no step matches '{wrong}'" in done.stderr
    assert "kernels" in done.stderr and "bench-losses" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["summary.tsv"]


PYTHON = """#!/bin/sh
case "$*" in
  *"bench/run.py --stage decode"*) exit 3 ;;
  *bench/run.py*) for out in "$@"; do :; done
    echo '{"rows": [{"stage": "'$3'"}], "ratios": []}' >"$out" ;;
  "-m pytest "*"-m gpu"*) echo "no such device"; exit 1 ;;
  -c* | "- "*) exec @PYTHON@ "$@" ;;
esac
"""


def test_the_gpu_check_goes_on_after_a_failure(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON.replace("@PYTHON@", sys.executable))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--device", "cpu", "--out", str(out)],
        env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    lines = [line.split("\t") for line in (out / "summary.tsv").read_text().splitlines()]
    results = {name: result for name, result, _ in lines}
    assert results.pop("tests") == "failed (1)" and results.pop("bench-decode") == "failed (3)"
    assert set(results.values()) == {"ok"} and len(results) == 17
    stages = {row["stage"] for row in json.loads((out / "bench.json").read_text())["rows"]}
    assert stages == {path.stem for path in (BENCH / "stages").glob("*.py")} - {"decode"}
    assert "no such device" in (out / "gpu_check.log").read_text()


def test_the_gpu_check_leaves_out_what_is_not_installed(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *nvidia.dali*) exit 1 ;; esac\n')
    python.chmod(0o755)

    def steps(*options: str) -> dict[str, str]:
        done = subprocess.run(
            ["bash", str(SCRIPT), "--dry-run", *options],
            env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())

    found = steps()
    assert {k for k, v in found.items() if "left out: no nvidia.dali" in v} == {
        "bench-decode", "bench-shard",
    }  # fmt: skip
    assert "--device cpu" in found["shard"] and "--device cuda" in found["train"]
    assert set(steps("--only", "blocks,roofline")) == {"build", "blocks", "roofline"}
    assert set(steps("--only", "kernels,train-*")) == {
        "build", "kernels", "train-eager", "train-graph", "train-auto",
    }  # fmt: skip


def test_a_gain_is_held_against_the_draws_and_the_seeds(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import learn

    rng = np.random.default_rng(0)
    seeds, draws = rng.normal(0, 0.05, (4000, 3, 1)), rng.normal(0, 0.08, (4000, 1, 12))
    both = rng.normal(0, 0.3, (4000, 1, 12))  # what a draw does to all backbones alike
    found = [learn.gain(g + b, b) for g, b in zip(0.1 + seeds + draws, both, strict=True)]
    means, errors = np.array(found).T
    assert means.mean() == pytest.approx(0.1, abs=0.003)
    assert np.mean(errors**2) == pytest.approx(means.var(), rel=0.1)

    def lines(seed, trained, random, method="vicreg", start="random init"):
        each = {"percent": 10.0, "seed": seed, "start": start}
        return [
            {"method": name, "macro_f1_of_draws": values, **each}
            for name, values in ((method, trained), (start, random))
        ]

    found = lines(0, [0.5, 0.7], [0.4, 0.2]) + lines(1, [0.6, 0.8], [0.3, 0.1])
    other = lines(0, [0.9, 0.9], [0.1, 0.1], "moco", "of another kind")
    rows = learn.table(found + other)
    assert "| vicreg | 0.650 | +0.400 ± 0.224 |\n| random init | 0.250 |  |\n" in rows
    assert "| moco | 0.900 | +0.800 ± 0.000 |\n| of another kind | 0.100 |  |\n" in rows
    one = learn.table(lines(0, [0.5, 0.7], [0.4, 0.2]))  # one seed, of which nothing is known
    assert "| +0.300 ± 0.200 |" in one


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """bench/learn.py's evaluations, without any training: (run, percents, draws, shared)."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.chdir(tmp_path)
    Path("labels.csv").write_text("path,label,patient\n")
    import learn

    calls = []

    def evaluate(run, labels, *, percents, num_seeds, device, shared):
        (run / "evaluation").mkdir(parents=True, exist_ok=True)
        calls.append((run.name, percents, num_seeds, shared))
        scores = {"macro_f1": 0.5, "balanced_accuracy": 0.5, "macro_f1_of_seeds": [0.5]}
        names = run.name.rpartition("-")[0], learn.RANDOM, "majority class"
        rows = [
            SimpleNamespace(backbone=name, percent=p, **scores) for name in names for p in percents
        ]
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(learn, "evaluate", evaluate)
    monkeypatch.setattr(
        learn, "train", lambda *_, **__: SimpleNamespace(metrics=[{"step": 1, "loss": 1.0}])
    )
    return calls


def test_a_finished_run_is_judged_again_if_other_lines_are_wanted(tmp_path, judged, monkeypatch):
    import learn

    for fractions, draws in [("10,100", "2"), ("100,10", "2"), ("1,10", "2"), ("1,10", "3")]:
        options = ["videos", "--labels", "labels.csv", "-o", str(tmp_path)]
        monkeypatch.setattr(
            sys, "argv", ["learn.py", *options, "--fractions", fractions, "--draws", draws]
        )
        lines = learn.one(learn.arguments(), tmp_path, "vicreg", 0, {})
        assert [x["percent"] for x in lines] == 2 * sorted(map(float, fractions.split(",")))
    assert [x[1:3] for x in judged] == [([10.0, 100.0], 2), ([1.0, 10.0], 2), ([1.0, 10.0], 3)]
    Path("labels.csv").write_text("path,label,patient\na.mp4,4CH,1\n")
    for _ in range(2):
        learn.one(learn.arguments(), tmp_path, "vicreg", 0, {})
    assert [x[1:3] for x in judged[3:]] == [([1.0, 10.0], 3)]


def test_own_methods_and_given_shards_share_the_random_backbone(tmp_path, judged, monkeypatch):
    import learn

    page = (BENCH.parent / "ssl" / "README.md").read_text()
    own = page[page.index("```python\n") :].split("```")[1].removeprefix("python\n")
    (tmp_path / "my_method.py").write_text(own)
    options = f"--labels labels.csv -o {tmp_path} --methods my_method.py vicreg --seeds 2"
    monkeypatch.setattr(sys, "argv", ["learn.py", *options.split()])
    with pytest.raises(SystemExit):  # neither videos nor shards
        learn.main()
    used = []
    train = learn.train
    monkeypatch.setattr(learn, "train", lambda shards, *a, **k: used.append(shards) or train())
    monkeypatch.setattr(sys, "argv", ["learn.py", *options.split(), "--shards", "mine"])
    assert learn.main() == 0 and used == [Path("mine")] * 4
    assert [x[0] for x in judged] == ["my_method-0", "vicreg-0", "my_method-1", "vicreg-1"]
    assert [x[3] is judged[0][3] for x in judged] == [True, True, False, False]
    table = (tmp_path / "table.md").read_text()
    assert "| my_method | 0.500 | +0.000 ± 0.000 |" in table and "| random init |" in table


def test_every_run_is_trained_as_asked(tmp_path, judged, monkeypatch):
    import learn

    options = f"videos --labels labels.csv -o {tmp_path} --methods byol --seeds 2 --steps 7"
    monkeypatch.setattr(sys, "argv", ["learn.py", *options.split(), "--zero-init-residual"])
    (tmp_path / "byol-1").mkdir()
    (tmp_path / "byol-1" / "config.json").touch()  # this one was stopped
    labels, asked = [], []
    train = learn.train

    def note(shards, settings, config, run, *, resume, **_):
        asked.append((settings.seed, settings.max_steps, settings.zero_init_residual, resume))
        return train()

    monkeypatch.setattr(learn, "train", note)
    monkeypatch.setattr(learn, "shard", lambda *_, **given: labels.append(given["labels"]))
    assert learn.main() == 0 and labels == [Path("labels.csv")]
    assert asked == [(0, 7, True, False), (1, 7, True, True)]
    assert "| random init, blocks at 0 |" in (tmp_path / "table.md").read_text()


@pytest.fixture
def blocks(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(BENCH)
    import blocks

    return blocks


SMALL = ((64, 80), (96, 64))  # (N, D) of the Gram and of the tiled form


def test_block_sizes_are_tried_one_entry_at_a_time(blocks, monkeypatch):
    """In the interpreter, some entries: other sizes give the table's own results, the fastest are
    chosen, and the table is as before."""
    monkeypatch.setattr("sslus.kernels.gram_gpu.SMALL", 48)  # rows
    monkeypatch.setattr(blocks, "FRAMES", 1)
    monkeypatch.setattr(blocks, "VIEW", 32)
    chosen = {entry.name: entry for entry in blocks.entries(SMALL, contrastive=8)}
    assert {entry.choices for entry in blocks.entries()} == set(blocks.CHOICES)
    for name in ("multiply 128, bf16", "logits up to D=128, bf16", "views"):
        entry = chosen[name]
        own = entry.get()
        candidates = entry.candidates()
        assert candidates[0] == own and len(candidates) > 4
        times = itertools.count(40, -1)  # the later, the faster
        three = [own, candidates[1], candidates[-1]]
        rows = blocks.measure(entry, three, lambda run, times=times: next(times), "cpu")
        assert entry.get() == own
        assert [row["sizes"] for row in rows] == three
        num = len(entry.cases)
        assert [x for row in rows for x in row["seconds"].values()] == list(
            range(40, 40 - 3 * num, -1)
        )
        said = blocks.summary(rows)
        assert "better of 3 of 3" in said and f"({40 / (40 - 2 * num):.2f})" in said
        assert all(f"{key}={value}" in said for key, value in three[2].items())


def test_block_sizes_with_other_results_never_win(blocks, monkeypatch):
    entry = next(e for e in blocks.entries(SMALL) if e.name == "gram_sum, fp32")
    own, other, third = entry.candidates()[:3]

    def work(case, device):
        import torch

        def run():
            if entry.get() == third:
                raise MemoryError("out of resource: shared memory\nand more")
            return torch.full((3,), 1.001 if entry.get() == other else 1.0), torch.ones(2)

        return run

    monkeypatch.setattr(blocks, "work", work)
    rows = blocks.measure(entry, [own, other, third], lambda run: 2.0, "cpu")
    assert "other results in vicreg 64 x 80 fp32" in rows[1]["failed"]
    assert rows[2]["failed"] == "MemoryError: out of resource: shared memory"
    assert "the table's own of 1 of 3" in blocks.summary(rows)
    rows = blocks.measure(entry, [third, own], lambda run: 2.0, "cpu")
    assert "own sizes failed: MemoryError" in blocks.summary(rows)
