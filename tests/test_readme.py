"""Every command in the README runs, in its order, on the installed package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# What makes a command small enough for a test; everything else is run as it is written.
SMALL = {
    "sslus synth videos/": "--videos 15 --patients 3 --size 128 --seconds 0.3 0.4",
    "sslus train --method vicreg": "--max-steps 3 --batch-size 4 --image-size 32",
    "sslus evaluate runs/vicreg --labels videos/labels.csv": "",
    "python bench/run.py --quick": "--stage store",
}
ELSEWHERE = {
    "bash tools/test.sh": "it is what runs this test",
    "bash tools/demo.sh": "test_demo",
    "pip install .": "what is tested is installed",
}
ORDER = ["sslus synth", "sslus shard", "sslus views", "sslus train --method", "sslus train --run",
         "sslus evaluate", "sslus features", "python bench"]  # fmt: skip


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_every_command_and_the_snippet_run(tmp_path):
    todo = [c for c in commands() if c not in ELSEWHERE]
    assert len(todo) >= 6
    todo.sort(key=lambda c: next(i for i, start in enumerate(ORDER) if c.startswith(start)))
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    for line in todo:
        result = subprocess.run(
            [*line.split(), *SMALL.get(line, "").split()],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    # The default backbone on a CPU is the one the README loads.
    result = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_python_of_the_methods_page_runs(tmp_path):
    for line in (
        "sslus synth videos/",
        "sslus shard videos/ --labels videos/labels.csv",
        "sslus train --method vicreg",
    ):
        subprocess.run(
            [*line.split(), *SMALL.get(line, "").split()],
            cwd=tmp_path, env=environment(), capture_output=True, check=True, timeout=300,
        )  # fmt: skip
    page = (ROOT / "ssl" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(snippets) == 7  # the first is the file that test_own_method.py trains with
    small = "max_steps=3, batch_size=4, image_size=32, "
    for snippet in snippets:
        code = snippet.replace("max_steps=300, ", small).replace("batch_size=16", "batch_size=4")
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr


def test_the_python_of_the_kernels_page_runs():
    page = (ROOT / "kernels" / "README.md").read_text()
    losses, masks = re.findall(r"```python\n(.*?)```", page, re.S)
    before = (
        "import torch\n"
        "za, zb = torch.randn(2, 8, 16, requires_grad=True)\n"
        "model = torch.nn.Conv2d(1, 1, 3, padding=1)\n"
        "x, samples = torch.rand(2, 1, 32, 32), [3, 5]\n"
    )
    after = "loss.backward()\n"
    subprocess.run([sys.executable, "-c", before + losses + after + masks + after], check=True)


def test_every_mentioned_command_exists():
    """Also those in running text: `sslus NAME --option` is in NAME's help."""
    helps = {}
    for text in re.findall(r"`(sslus [^`]+)`", README) + commands():
        words = text.split()
        if words[0] != "sslus" or words[1].startswith("-"):
            continue
        name = words[1]
        if name not in helps:
            helps[name] = subprocess.run(
                [sys.executable, "-m", "sslus.tools", name, "--help"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
        for option in (w for w in words[2:] if w.startswith("--") and w != "--help"):
            assert option in helps[name], f"{text}: {name} has no {option}"


def test_demo(tmp_path):
    """The demo from any folder, twice: the second time it has nothing left to do."""
    venv = Path(sys.prefix)
    if not (venv / "sslus-stamp").exists():
        pytest.skip("not an environment made by tools/setup.sh, which the demo would change")
    env = environment() | {
        "SSLUS_VENV": str(venv), "DEMO_DIR": str(tmp_path / "demo"),
        "DEMO_VIDEOS": "20", "DEMO_SECONDS": "0.2 0.3", "DEMO_STEPS": "3",
    }  # fmt: skip
    assert shutil.which("bash")
    for _ in range(2):
        result = subprocess.run(
            ["bash", str(ROOT / "tools" / "demo.sh")],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        assert "macro" in result.stdout and "Done." in result.stdout
        assert "\033" not in result.stdout + result.stderr  # a log file, not a terminal
    demo = tmp_path / "demo"
    for path in ("run/curves.png", "run/backbone.safetensors", "shards/manifest.json", "report"):
        assert (demo / path).exists()
