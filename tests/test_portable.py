"""The commands without what only Linux has: as on macOS, as far as Linux can show it."""

import os
import subprocess
import sys

import pytest

from sslus.engine import system

# Python reads this file when it starts, in worker processes, too.
WITHOUT_LINUX = """
import mmap, os, sys
for name in ("sched_getaffinity", "posix_fadvise", "posix_fallocate", "fdatasync",
             "copy_file_range", "memfd_create", "eventfd", "pidfd_open"):
    delattr(os, name)
del mmap.MADV_HUGEPAGE

class NoWheels:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "triton" or name.startswith("nvidia.dali"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def no_such_folder(event, args):
    path = str(args[0]) if event == "open" else ""
    # threadpoolctl reads the process's libraries there, but on macOS in another way.
    if path.startswith(("/proc/", "/sys/")) and not path.startswith("/proc/self"):
        raise FileNotFoundError(2, "No such file or directory", path)

sys.meta_path.insert(0, NoWheels)
sys.addaudithook(no_such_folder)
"""


@pytest.fixture(scope="module")
def sslus(tmp_path_factory):
    """sslus(*arguments): run the command to its success; its output."""
    folder = tmp_path_factory.mktemp("macos")
    (folder / "sitecustomize.py").write_text(WITHOUT_LINUX)
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(folder), *([before] if before else [])])

    def run(*arguments) -> str:
        line = [sys.executable, "-m", "sslus.tools", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            line, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def test_from_videos_to_a_probe(sslus, clips, tmp_path):
    sslus("shard", clips, "-o", tmp_path / "s", "--labels", clips / "labels.csv", "--size", 32)
    small = "--backbone", "test_resnet", "--image-size", 32, "--batch-size", 4, "--max-steps", 3
    for tier, method in (("auto", "vicreg"), ("disk", "inpainting")):
        said = sslus("train", tmp_path / "s", "--method", method, "--tier", tier, *small,
                     "--run", tmp_path / method)  # fmt: skip
        assert f"frames: {'ram' if tier == 'auto' else tier}" in said
    sslus("evaluate", tmp_path / "vicreg", "--labels", clips / "labels.csv", "--fractions", 100,
          "--protocol", "linear,knn", "-o", tmp_path / "e")  # fmt: skip
    assert (tmp_path / "e").is_dir()


def test_synth_and_doctor(sslus, tmp_path):
    sslus("synth", tmp_path / "v", "--videos", 1, "--patients", 1, "--seconds", 1, 1, "--size", 64)
    assert "What each stage does on this machine" in sslus("doctor")


def test_replacements(monkeypatch, tmp_path):
    for name in ("sched_getaffinity", "posix_fadvise", "posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name)
    assert system.usable_cores() == os.cpu_count()
    with (tmp_path / "file").open("wb") as f:
        system.allocate(f, 5000)
        system.will_need(f, 0, 5000)
        system.sync_data(f)
    assert (tmp_path / "file").read_bytes() == bytes(5000)
