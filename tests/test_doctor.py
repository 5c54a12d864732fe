"""`sslus doctor`: says what is there, what is missing and why, and gives nobody away."""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sslus.tools import doctor
from sslus.tools.cli import main


def report(capsys) -> tuple[int, dict[str, dict]]:
    code = main(["doctor", "--json"])
    content = json.loads(capsys.readouterr().out)
    return code, {check["name"]: check for part in content.values() for check in part}


def test_one_screen_says_what_each_stage_will_do(capsys):
    code = main(["doctor"])
    screen = capsys.readouterr().out

    assert code == 0, screen
    assert len(screen.splitlines()) <= 24 and "\nNext: sslus shard videos/\n" in screen
    for name in ("sslus", "torch ", "cpu", "gpu", "nvdec", "h264", "libx264", "shard", "train"):
        assert name in screen
    if not torch.cuda.is_available():
        assert "PyAV on the CPU" in screen and "resnet18, 96 px" in screen
        because = next(x for x in screen.splitlines() if x.startswith("shard")).split("because")[1]
        assert len(because) > 10  # the reason, not only the fact


def test_a_report_holds_no_names_and_no_folders(capsys):
    main(["doctor", "--json"])
    text = capsys.readouterr().out

    private = {socket.gethostname(), getpass.getuser(), Path.home().name, str(Path.cwd())}
    # "root" and shorter names are words that a report may well contain.
    assert not [name for name in private - {"root"} if len(name) > 3 and name in text]
    assert "/home" not in text and "site-packages" not in text
    assert (
        doctor.private("cannot open /home/anna/clinic b/x.so: no")
        == "cannot open .../clinic b/x.so: no"
    )
    assert doctor.private(r"no C:\Users\anna\x.dll") == r"no .../x.dll"


def test_every_package_that_sslus_needs_is_looked_for():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    needed = {re.match(r"[\w-]+", x)[0] for x in project["project"]["dependencies"]}
    assert set(doctor.PACKAGES.values()) == needed - {"click"}


def test_a_missing_package_is_named_with_its_remedy(capsys, monkeypatch):
    version = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda name: None if name == "scikit-learn" else version(name)
    )

    code, checks = report(capsys)

    assert code == 1
    assert not checks["packages"]["ok"]
    assert "missing: pip install scikit-learn" in checks["packages"]["says"]
    assert checks["packages"]["data"]["torch"] and checks["decoders"]["ok"]


def test_without_dali_everything_still_works(capsys, monkeypatch):
    version = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if "dali" in name else version(name))

    code, checks = report(capsys)

    assert code == 0
    assert "no nvidia.dali" in checks["packages"]["says"]


def test_a_codec_that_ffmpeg_lacks_is_named(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "DECODERS", ("h264", "betamax"))

    code, checks = report(capsys)

    assert code == 1
    assert checks["decoders"]["says"].startswith("missing: betamax;")
    assert checks["decoders"]["ok"] is False and checks["encoder"]["ok"] is True


def test_a_check_that_breaks_is_a_line_and_the_others_run(capsys, monkeypatch):
    def broken():
        raise OSError("/home/anna/lib/libx.so: undefined symbol\nmore")

    monkeypatch.setattr(doctor, "train", broken)

    code, checks = report(capsys)

    assert code == 1
    assert checks["train"]["says"] == "failed: OSError: .../libx.so: undefined symbol"
    assert checks["evaluate"]["ok"]


def test_the_memory_is_that_of_the_container(monkeypatch):
    def of(limit):
        monkeypatch.setattr(doctor, "Path", lambda _: SimpleNamespace(read_text=lambda: limit))
        return doctor.memory()

    assert of(f"{1 << 30}\n") == "1 GiB"
    assert of("max\n") == of(f"{1 << 60}\n") != "1 GiB"


def test_the_vector_units_of_arm_are_named(monkeypatch):
    """By the kernel's names. There is no model: /proc/cpuinfo has numbers for it."""
    text = (
        "processor\t: 0\nFeatures\t: fp asimd aes atomics sve i8mm bf16 sve2\nCPU part\t: 0xd4f\n"
    )
    monkeypatch.setattr(doctor, "Path", lambda _: SimpleNamespace(read_text=lambda: text))
    monkeypatch.setattr(doctor, "usable_cores", lambda: 72)
    monkeypatch.setattr(doctor.platform, "processor", lambda: "")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    assert doctor.cpu() == "aarch64, 72 cores usable, NEON, SVE, SVE2, bf16"


def test_a_driver_that_does_not_answer_has_no_version(monkeypatch):
    def hangs(*args, **kwargs):
        raise subprocess.TimeoutExpired("nvidia-smi", 2)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert doctor.driver() == "of unknown version"


def test_a_compiled_module_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sslus.engine._luma", None)
    monkeypatch.delattr("sslus.engine._luma", raising=False)
    check = doctor.package()
    assert not check.ok and "missing: its compiled module (" in check.says


def test_ctrl_c_is_no_broken_installation():
    def imports():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as e:
            raise ImportError("numpy.core.multiarray failed to import") from e

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # others may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            doctor.checked("train", imports)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ([("dali", "cuda"), ("pyav", "cpu")], "NVDEC on the GPU, the rest PyAV on the CPU"),
        ([("pyav", "cpu")], "PyAV on the CPU"),
    ],
)
def test_the_path_is_the_one_that_sharding_chooses(monkeypatch, chosen, says):
    monkeypatch.setattr("sslus.engine.spool.choose_backends", lambda device, decoder: chosen)

    assert doctor.shard().startswith(says)


@pytest.mark.gpu
def test_a_gpu_is_named(capsys):
    if not torch.cuda.is_available():
        if os.environ.get("SSLUS_REQUIRE_GPU") == "1":
            pytest.fail(f"SSLUS_REQUIRE_GPU=1, but {doctor.why_no_cuda()}")
        pytest.skip("no CUDA device")
    code, checks = report(capsys)

    assert code == 0
    assert "driver" in checks["gpu"]["says"] and "CUDA" in checks["gpu"]["says"]
    assert checks["train"]["says"].startswith("GPU; bf16")
    assert checks["views"]["says"].startswith("Triton on the GPU")


@pytest.mark.gpu
def test_what_a_gpu_decodes_is_named(capsys):
    from sslus.engine.dali import why_not

    pytest.importorskip("nvidia.dali")
    why = why_not("cuda")
    if why and os.environ.get("SSLUS_REQUIRE_GPU") != "1":
        pytest.skip(why)
    _, checks = report(capsys)

    assert {"h264", "hevc"} <= set(checks["nvdec"]["says"].split())
    assert checks["shard"]["says"].startswith("NVDEC on the GPU")
