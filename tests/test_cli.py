"""The command line: the names that scripts rely on, and what a long command shows."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from unittest.mock import Mock

import click
import pytest
import torch

from sslus.engine.errors import InputError, Interrupted
from sslus.engine.manifest import Manifest
from sslus.kernels.barlow import barlow_loss
from sslus.ssl.runs import USED
from sslus.tools import cli, screen

OPTIONS = {
    "synth": "out --videos --patients --seed",
    "shard": "paths -o --out --size --stride --rate --all --quality --labels --jobs --strict"
    " --force --device",
    "merge": "shards -o --out",
    "train": "shards --method --backbone --batch-size --epochs --max-steps --max-seconds --lr"
    " --init --seed --run --resume --device --views --pairs --recipe --gpus --tier",
    "evaluate": "run --labels --protocol --fractions --seeds --steps -o --out --shards --device"
    " --threads",
    "views": "shards --preset -o",
    "features": "run -o --out --per --names --shards --device --threads",
    "doctor": "--json",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_names_that_scripts_rely_on(name):
    command = cli.sslus.get_command(None, name)
    names = {n for p in command.params for n in (*p.opts, *p.secondary_opts)}
    assert set(OPTIONS[name].split()) <= names
    assert set(OPTIONS) == set(cli.COMMANDS)


@pytest.mark.parametrize("rank, said", [("0", 1), ("1", 0)])
def test_of_torchruns_processes_the_first_tells_of_a_stop(rank, said, monkeypatch, capsys):
    def stopped(**kwargs):
        raise Interrupted("stopped at step 3", 15)

    monkeypatch.setattr(cli.sslus, "main", stopped)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert cli.main([]) == 143
    assert capsys.readouterr().err.count("Error: stopped at step 3\n") == said


@pytest.mark.parametrize("error", [InputError("no GPU here"), click.UsageError("no GPU here")])
def test_what_went_wrong_in_another_process_alone_is_told(error, monkeypatch, capsys):
    def fail(**kwargs):
        raise error

    waited = []
    monkeypatch.setattr(cli.sslus, "main", fail)
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main([]) in (1, 2) and waited
    assert capsys.readouterr().err == "Error: no GPU here\n"


@pytest.mark.parametrize(
    "stream", ["io.TextIOWrapper(io.BytesIO(), 'ascii')", "None", "nobody_reads()"]
)
def test_what_cannot_be_told_is_no_failure(stream, tmp_path):
    synth = ["synth", str(tmp_path / "vidéos"), *"--videos 1 --patients 1 --size 64".split()]
    code = (
        "import io, os, sys\n"
        "def nobody_reads():\n    r, w = os.pipe()\n    os.close(r)\n    return open(w, 'w')\n"
        f"sys.stdout = sys.stderr = {stream}\nfrom sslus.tools import cli\n"
        f"sys.exit(cli.main({synth + ['--seconds', '0.2', '0.2']}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_written_does_not_depend_on_the_locale(tmp_path):
    """Reports hold ± and the names of classes, which not every machine's encoding has."""
    code = "import sys, pathlib, sslus.engine.atomic as a\n"
    code += "with a.atomic_file(pathlib.Path(sys.argv[1]), 'w') as f: f.write('\\xb1\\u65e5')"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    page = tmp_path / "report.md"
    subprocess.run([sys.executable, "-c", code, page], env=os.environ | ascii_only, check=True)
    assert page.read_bytes() == "±日".encode()


def test_views_says_that_it_wants_a_folder(capsys):
    assert cli.main(["views", "s3://bucket/shards"]) == 1
    assert capsys.readouterr().err.startswith("Error: s3://bucket/shards: want a folder of shards")


@pytest.mark.parametrize("out", [".", "folder"])
def test_views_says_that_it_wants_a_file(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert cli.main(["views", "shards", "-o", out]) == 1
    assert capsys.readouterr().err.startswith(f"Error: -o {out}: is a folder; name a file")


def test_views_takes_the_place_of_no_device_and_no_link(shards, tmp_path, capsys):
    """As root, /dev/null would be a picture from then on."""
    pipe, link, file = (tmp_path / name for name in ("pipe", "link", "views.png"))
    os.mkfifo(pipe)
    link.symlink_to(file)
    asked = ["views", str(shards), "--frames", "1", "--image-size", "32", "-o"]
    assert cli.main([*asked, str(pipe)]) == 1
    assert capsys.readouterr().err.startswith(f"Error: -o {pipe}: is a device or a pipe")
    assert cli.main([*asked, str(link)]) == 0
    assert pipe.is_fifo() and link.is_symlink() and file.read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_told_before_pytorch_is_imported(tmp_path):
    """Which takes seconds."""
    run, shards, labels = tmp_path / "run", tmp_path / "shards", tmp_path / "labels.csv"
    for folder in (run, shards / "local"):
        folder.mkdir(parents=True)
    (run / "backbone.safetensors").touch()
    config = {part: {k: kind() for k, kind in kinds.items()} for part, kinds in USED.items()}
    config["shards"]["path"] = str(shards)
    (run / "config.json").write_text(json.dumps(config))
    Manifest({"size": 32}, 0, 0, 0.5, 0.5, [], {}, []).with_digest().write(shards)
    (shards / "local" / "ledger.jsonl").touch()
    labels.write_text("path,label,patient\na.mp4,left,1\n")
    asked = f"evaluate {run} --labels"
    wrong = {
        f"{asked} {tmp_path}/none.csv": "labels .*/none.csv: cannot be read: No such file",
        f"{asked} {labels}": "labels .*: 1 of 1 videos are not in .*/shards",
        f"{asked} {labels} --fractions 1,x": "--fractions '1,x': want percents",
        f"{asked} {labels} --fractions 0,1": "evaluate: want .* fractions above 0",
        f"{asked} {labels} --protocol svm": "--protocol 'svm': want one of linear",
        f"{asked} {labels} --steps 3": "--steps: are those of --protocol finetune",
        f"{asked} {labels} --shards {tmp_path}": ".*: no finished shards here",
        f"evaluate {run} {tmp_path} --labels {labels}": ".*: has no config.json",
        f"views {tmp_path}/none": ".*/none: no such folder",
        f"views {shards} --frames 0": "--frames and --image-size: want at least 1",
    }
    code = "import sys\nfrom sslus.tools.cli import main\n"
    code += f"for line in {list(wrong)}:\n    print(main(line.split()), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, said in zip(done.stderr.splitlines(), wrong.values(), strict=True):
        assert re.match(f"Error: {said}", line), line
    assert done.stdout.splitlines() == ["1 False"] * len(wrong)


@pytest.mark.parametrize("error", [click.UsageError("no"), Interrupted("stopped", 15)])
@pytest.mark.parametrize("several", [False, True])
def test_the_exit_code_needs_no_reader(error, several, tmp_path, monkeypatch):
    def fail(**kwargs):
        raise error

    read, write = os.pipe()
    os.close(read)
    file = tmp_path / "code"
    monkeypatch.setattr(cli.sslus, "main", fail)
    if several:
        monkeypatch.setenv(cli.EXIT_CODE_FILE, str(file))
    with open(write, "w") as stderr:  # noqa: PTH123, a file descriptor
        monkeypatch.setattr("sys.stderr", stderr)
        code = cli.main([])
    assert (int(file.read_text()) if file.exists() else code) == (
        143 if isinstance(error, Interrupted) else 2
    )


@pytest.mark.parametrize("argument", ["", "--out="])
@pytest.mark.parametrize("debug", ["0", "1"])
def test_an_empty_argument_is_not_the_current_folder(argument, debug, capsys, monkeypatch):
    monkeypatch.setenv("SSLUS_DEBUG", debug)  # there is no traceback to show
    assert cli.main(["shard", "videos", argument]) == 2
    assert capsys.readouterr().err.startswith("Error: an argument is empty")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 40 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_too_little_memory_is_no_bug(error, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli.sslus, "main", full)
    for argv, what in [
        (["train"], "give a smaller --batch-size"),
        (["shard", "videos"], "give fewer --jobs, or close other programs"),
        (["doctor"], "close other programs"),
        ([], "close other programs"),
    ]:
        assert cli.main(argv) == 1
        assert capsys.readouterr().err.startswith(f"Error: out of memory; {what}")


def test_another_process_that_was_killed_is_no_bug(capsys, monkeypatch):
    def train(**kwargs):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection reset by peer. GLHF!")

    monkeypatch.setattr(cli.sslus, "main", train)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train"]) == 70  # so that torchrun starts all processes again
    said = capsys.readouterr().err
    assert said.startswith("Error: another process of this run has ended") and "GLHF" not in said


@pytest.mark.parametrize("name", cli.LESS_MEMORY)
def test_the_advice_for_too_little_memory_names_options_of_the_command(name):
    options = {o for p in cli.sslus.get_command(None, name).params for o in p.opts}
    assert set(re.findall(r"--[a-z-]+", cli.LESS_MEMORY[name])) <= options


@pytest.mark.parametrize("which, what", [("gpuu", "got 'gpuu'"), ("gpu", "'gpu' cannot run")])
def test_a_kernel_that_was_chosen_and_cannot_run_is_no_bug(which, what, capsys, monkeypatch):
    def loss(*args, **kwargs):
        barlow_loss(*torch.randn(2, 3, 4), off_diagonal=1.0)

    monkeypatch.setattr(cli.sslus, "main", loss)
    monkeypatch.setenv("SSLUS_KERNELS", which)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which runs Triton on the CPU
    assert cli.main(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line and line.endswith("without SSLUS_KERNELS, sslus chooses one that can")


def test_an_end_of_file_is_not_taken_for_ctrl_c(capsys, monkeypatch):
    def read(*args):
        raise EOFError("no data left")

    monkeypatch.setattr(cli.sslus, "invoke", read)
    assert cli.main(["views"]) == 70
    assert "Error: EOFError: no data left (a bug in sslus" in capsys.readouterr().err


def test_a_file_name_cannot_break_a_line_or_colour_the_terminal(tmp_path, capsys):
    (tmp_path / "a\n\x1b[31mé.mp4").write_bytes(b"")
    assert cli.main(["shard", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert r"/a\n\x1b[31mé.mp4: the file is empty" in line and line.startswith("Error: none of")
    screen.summary({"labels": "a\x1b[31mb"}, warnings=["a\rb"])
    assert capsys.readouterr() == ("labels  a\\x1b[31mb\n", "Warning: a\\rb\n")


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"")
    assert cli.main(["shard", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "a.mp4")]) == 1
    place = tmp_path / "a.mp4" / "local"
    assert capsys.readouterr().err == (
        f"Error: {place}: a file is in the way of a folder; name another one\n"
    )
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main(["shard", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "loop")]) == 1
    assert "symbolic links: " in capsys.readouterr().err


def test_paths_in_the_next_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert screen.argument(tmp_path / "a b") == "'a b'"  # as short as it can be typed
    assert screen.argument("-x") == "./-x"  # not an option
    assert screen.argument(tmp_path.parent) == str(tmp_path.parent)
    assert [screen.count(n, "file") for n in (0, 1, 1000)] == ["0 files", "1 file", "1,000 files"]


def test_the_command_after_a_picture_takes_its_views(shards, tmp_path, capsys):
    """At the size of the picture: `sslus train` refuses this blur at its own."""
    views = ["--preset", "simclr,max_sigma=0.5", "--image-size", "16"]
    assert cli.main(["views", str(shards), *views, "-o", str(tmp_path / "v.png")]) == 0
    going = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Next: sslus train"))
    assert going[1:] == [
        "--method", "simclr", "--views", "simclr,max_sigma=0.5", "--image-size", "16"
    ]  # fmt: skip
    views = ["--preset", "inpainting", "--image-size", "16"]
    for pairs, method in {"same": "inpainting", "nearby": "vicreg"}.items():
        where = ["--pairs", pairs, "-o", str(tmp_path / "v.png")]
        assert cli.main(["views", str(shards), *views, *where]) == 0
        assert f"--method {method} --views inpainting" in capsys.readouterr().out


def test_a_full_disk_under_a_log_is_no_fault_of_the_files():
    class Full(io.StringIO):
        name = "<stdout>"

        def flush(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="^<stdout>: cannot be written to .No space left"):
        screen.tell("videos 3", Full())


def test_an_error_without_a_file_says_how_to_find_where(monkeypatch, capsys):
    monkeypatch.setattr(cli.sslus, "main", Mock(side_effect=OSError(5, "Input/output error")))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "Error: Input/output error; SSLUS_DEBUG=1 shows where\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_long_command_shows_rate_and_time_left(stream, monkeypatch):
    now, shown = [0.0], stream()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "120")
    with screen.progress("decode", "frames") as report:
        now[0] += 100  # setting up is no decoding
        for done in (0, 300, 600, 1000):
            report(done, 1000, "3 of 4 videos")
            now[0] += 20
        for number in (1, 2):  # what is left to do when all frames are decoded
            report(1000, 1000, f"{number} of 3 shards written")
            now[0] += 9
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    if stream is Terminal:
        assert "decode" in text and "1000/1000" in text and "frames/s" in text
        assert "2 of 3 shards written" in text
    else:
        assert "decode: 300/1,000 frames, 15/s, 47 s left, 3 of 4 videos\n" in text
        *_, decoded, written = text.splitlines()
        assert decoded.startswith("decode: 1,000/1,000 frames, ") and "videos" in decoded
        assert written == "decode: 1,000/1,000 frames, 1 of 3 shards written"
