"""bench/run.py: stages found by themselves, works timed in turns, rows and ratios that add up."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
FIELDS = set(
    "stage name implementation case median low high unit threads peak_mib device versions commit"
    " date".split()
)

NAPS = '''"""naps of two lengths"""
import os
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

def measure(bench):
    works = {"sslus": Work(partial(nap, "a", 0.05)), "peer": Work(partial(nap, "b", 0.2))}
    rows = bench.compare("nap", "10 naps", "naps/s", works, repeats=3)
    bench.ratio("fast / slow", rows["sslus"], rows["peer"], at_least=2)
    bench.ratio("slow / fast", rows["peer"], rows["sslus"], at_least=0.8)
    hogs = bench.compare("hog", "80 MiB", "s", {"sslus": Work(hog)}, repeats=1)
    bench.ratio("slow / fast, at most", rows["peer"], rows["sslus"], at_most=0.5)
'''
UNEQUAL = '''"""one does more than the other"""
from harness import Work

def measure(bench):
    bench.add("known", "sslus", "nothing", "s", [1.0])
    bench.compare("nap", "naps", "s", {"a": Work(lambda: 1, fresh=False), "b": Work(lambda: 2,
                  fresh=False)})
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
    assert "unequal work" in done.stderr and "failed: aunequal" in done.stderr
    content = json.loads(out.read_text())
    # Measured apart for the memory (a, b), warmed up (a, b), then in turns.
    assert turns.read_text() == "ab" * 5
    known, fast, slow, hog = content["rows"]
    assert all(set(row) == FIELDS for row in content["rows"])
    assert known["stage"] == "aunequal" and fast["stage"] == "naps"
    assert fast["low"] <= fast["median"] <= fast["high"] <= 10 / 0.05
    assert hog["unit"] == "s" and hog["peak_mib"] > fast["peak_mib"] + 70
    ratios = {r["text"]: r for r in content["ratios"]}
    assert ratios["fast / slow"]["value"] == pytest.approx(fast["median"] / slow["median"])
    assert ratios["fast / slow"]["value"] == pytest.approx(4, rel=0.4)
    verdicts = {text: r["verdict"] for text, r in ratios.items()}
    assert verdicts == {
        "fast / slow": "met",
        "slow / fast": "missed",
        "slow / fast, at most": "met",
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
             "store": "simplejpeg", "train": "ceiling: ready views", "losses": "definition",
             "augment": "torchvision v2", "loader": "the op alone"}  # fmt: skip
    for stage, rows in by_stage.items():
        names = {row["implementation"] for row in rows}
        assert any(name.startswith("sslus") for name in names)
        assert any(name.startswith(peers[stage]) for name in names)
        assert any(name.startswith("floor: ") for name in names)
        assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)
        assert all(row["threads"] >= 1 and row["versions"]["av"] for row in rows)
    sslus, bare = by_stage["decode"][:2]
    ratio = next(r for r in content["ratios"] if r["text"] == "sslus / PyAV, no conversion")
    assert ratio["value"] == pytest.approx(sslus["median"] / bare["median"])
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


def test_the_gpu_check_knows_every_stage():
    script = BENCH.parent / "tools" / "gpu_check.sh"
    done = subprocess.run(["bash", str(script), "--dry-run"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    steps = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"build", "tests", "shard", "train"} <= steps
    assert {s for s in steps if s.startswith("bench-")} == {
        f"bench-{path.stem}" for path in (BENCH / "stages").glob("*.py")
    }
