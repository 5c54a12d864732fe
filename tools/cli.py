"""The `sslus` command: one file a command, imported when it is named."""

import contextlib
import errno
import importlib
import io
import os
import re
import sys
import time
import traceback
from pathlib import Path

import click

from sslus.engine.errors import InputError, Interrupted
from sslus.engine.urls import shown, without_users
from sslus.tools.screen import one_line, tell

# In the order in which a newcomer meets them.
COMMANDS = ("synth", "shard", "merge", "views", "train", "evaluate", "features", "doctor")
# What takes less memory, by command.
LESS_MEMORY = {
    "synth": "give fewer --jobs",
    "shard": "give fewer --jobs",
    "views": "give fewer --frames or a smaller --image-size",
    "train": "give a smaller --batch-size, --image-size, backbone or projector",
    "evaluate": "use --device cpu if it is the GPU's",
    "features": "use --device cpu if it is the GPU's",
}
# Names the file in which a process that `sslus train --gpus` has started leaves its exit code.
EXIT_CODE_FILE = "SSLUS_EXIT_CODE_FILE"
OTHERS_WAIT_SECONDS = 5  # torchrun polls its processes ten times a second; one may take a second


class Commands(click.Group):
    """`sslus NAME` is the click command called `command` in tools/NAME.py."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"sslus.tools.{name}").command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sslus")
def sslus():
    """Pretrain an ultrasound backbone from a folder of videos, without labels.

    \b
    sslus shard videos/              decode videos into shards/
    sslus train --method vicreg      pretrain on shards/, write runs/vicreg/
    sslus evaluate runs/vicreg --labels videos/labels.csv

    No videos at hand? `sslus synth videos/` makes synthetic ones. `sslus doctor` shows what this
    machine can do.

    Exit codes: 0 done; 1 error; 2 wrong usage; 3 done, but some input was refused; 70 internal
    error (SSLUS_DEBUG=1 shows the traceback); 130 stopped by Ctrl-C; 143 by SIGTERM; 129
    by the loss of the terminal.
    """


def _speaks(code: int) -> bool:
    """Whether this process reports what went wrong: under torchrun, one process per machine does.

    A stop always concerns all processes, an error nearly always. So the first process reports at
    once, and the others wait: torchrun ends them meanwhile, unless the error is theirs alone.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        if code > 128:
            return False
        time.sleep(OTHERS_WAIT_SECONDS)
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the command line; every failure is one line on stderr and a non-zero exit.

    Exit codes: see the help of `sslus`. `SSLUS_DEBUG=1` shows the traceback of an error.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # an odd file name must not end a command
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    try:
        for arg in argv:  # -o "" would be the current folder
            if not arg or (arg.startswith("--") and arg.endswith("=")):
                raise click.UsageError(
                    f"an argument is empty ({arg or repr('')}): a variable that is not set?"
                )
        return sslus.main(args=argv, prog_name="sslus", standalone_mode=False) or 0
    except click.ClickException as e:
        if _speaks(e.exit_code):
            e.show(text := io.StringIO())
            tell(shown(text.getvalue().rstrip("\n")))
        return e.exit_code
    except (Exception, KeyboardInterrupt, Interrupted) as e:
        if os.environ.get("SSLUS_DEBUG") == "1":
            raise
        message, code = _explained(e, argv)
        return _fail(f"Error: {without_users(one_line(message))}", code)


def _fail(message: str, code: int) -> int:
    """Print the message, unless another process does; returns the exit code of this one.

    One of several processes reports, and passes the code to `sslus train --gpus`, which started
    them: torchrun would restart a process that fails, whatever its exit code.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file and (code != 70 or Path(file).exists()):  # 70 then: the other processes have left
        with contextlib.suppress(FileExistsError):
            with Path(file).open("x") as f:
                f.write(str(code))
            tell(message)
        return 0
    if _speaks(code):
        tell(message)
    return code


def _explained(e: BaseException, argv: list[str]) -> tuple[str, int]:
    """What to say of what a command has raised, and the exit code."""
    if isinstance(e, click.exceptions.Abort) and isinstance(e.__cause__, EOFError):
        e = e.__cause__  # to click that is Ctrl-D, at a prompt; we have none
    if isinstance(e, click.exceptions.Abort | KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(e, Interrupted):
        return str(e), 128 + e.signum
    if isinstance(e, InputError):
        return str(e), 1
    if isinstance(e, OSError):
        return _explained_by_system(e), 1
    # PyTorch's allocators on the CPU and on a GPU have no common type, and under `ulimit -v` its
    # libraries may not even load.
    little = "allocate memory|out of memory|failed to map segment"
    if isinstance(e, MemoryError) or re.search(little, str(e)):
        less = LESS_MEMORY.get(argv[0], "") if argv else ""
        return f"out of memory; {less}{less and ', or '}close other programs", 1
    # The kernels know no InputError.
    if "SSLUS_KERNELS" in os.environ and re.search("SSLUS_KERNELS|cannot run", str(e)):
        return f"{e}; without SSLUS_KERNELS, sslus chooses one that can", 1
    # Who was killed, for lack of memory perhaps, cannot tell; gloo and NCCL notice. With 70,
    # torchrun starts all processes again.
    if "WORLD_SIZE" in os.environ and re.search("gloo|NCCL", str(e)):
        why = str(e).partition(". ")[0]
        return f"another process of this run has ended or cannot be reached ({why})", 70
    # In train --method FILE.py, the deepest frame in that file is where to look.
    named = (arg.removeprefix("--method=") for arg in argv if arg.endswith(".py"))
    own = [str(Path(arg).resolve()) for arg in named]
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename in own]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    whose = "sslus or in the method's file" if own else "sslus"
    return (
        f"{where}{type(e).__name__}: {e} (a bug in {whose}: set SSLUS_DEBUG=1 for the traceback)",
        70,
    )


def _explained_by_system(e: OSError) -> str:
    where = f" {e.filename}" if e.filename else ""
    if e.errno == errno.ENOSPC:
        return (
            f"no space left on the disk of{where or ' the output'}; no partial files were kept."
            " Free some space and run the same command again (train: with --resume)"
        )
    if where and e.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{e.filename}: a file is in the way of a folder; name another one"
    # A read that fails, as of a dying disk, does not say of which file.
    return f"{e.strerror or e}{f':{where}' if where else '; SSLUS_DEBUG=1 shows where'}"
