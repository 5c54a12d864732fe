"""The job scripts of ssl/README.md, with stand-ins for the programs of Slurm."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sslus.ssl import checkpoints

PAGE = (Path(__file__).parent.parent / "ssl" / "README.md").read_text()
STEPS = 100
SMALL = (
    "--backbone test_efficientnet --image-size 32 --batch-size 4 --projector 8-8 --device cpu"
    " --threads 1 --log-every 1 --max-steps"
)
STANDS_IN = {
    "srun": 'echo $$ > srun.pid; exec "$@"',
    "scontrol": 'echo "$@" >> scontrol.txt; echo 127.0.0.1',
    "sslus": f'exec {sys.executable} -m sslus.tools "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def submit(shards, tmp_path):
    """submit(number, steps) starts a job script of the page, as small as a test."""
    for name, body in STANDS_IN.items():
        (program := tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip

    def submit(number, steps=STEPS):
        script = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.S)[number]
        assert "/data/shards --method vicreg" in script
        script = script.replace("/data/shards", f"{shards} {SMALL} {steps}").replace(
            " --gpus 4", ""
        )
        (tmp_path / "job.sh").write_text(script)
        return subprocess.Popen(
            ["bash", "job.sh"], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    return submit


def steps(folder):
    return [m["step"] for m in checkpoints.read_metrics(folder / "runs/vicreg/metrics.jsonl")]


def test_a_job_that_is_stopped_is_queued_again_and_finishes(submit, tmp_path):
    job = submit(0)
    deadline = time.monotonic() + 400
    while not steps(tmp_path):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)  # not the script
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 143, said
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    assert 0 < steps(tmp_path)[-1] < STEPS
    again = submit(0)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    assert len((tmp_path / "scontrol.txt").read_text().splitlines()) == 1
    assert "\033" not in said


def test_a_job_of_several_nodes_runs_and_the_rest_of_its_chain_does_nothing(submit, tmp_path):
    for _ in range(2):
        job = submit(1, steps=5)
        said, _ = job.communicate(timeout=400)
        assert job.returncode == 0, said
        assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert "already finished" in said
