"""The `sslus` command: one file a command, imported when it is named."""

import contextlib
import errno
import importlib
import io
import os
import sys
import time
from pathlib import Path

import click

# In the order in which a newcomer meets them.
COMMANDS = ("synth", "shard", "views", "train", "evaluate", "doctor")
# Names the file in which a process that `sslus train --gpus` has started leaves its exit code.
EXIT_CODE_FILE = "SSLUS_EXIT_CODE_FILE"
OTHERS_WAIT_SECONDS = 5  # torchrun looks ten times a second who has ended, which may take a second


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
    sslus shard videos/                      videos -> shards/
    sslus train --method vicreg              shards/ -> runs/vicreg/
    sslus evaluate runs/vicreg --labels videos/labels.csv

    No videos at hand? `sslus synth videos/` makes synthetic ones.
    What can this machine do? `sslus doctor`.
    """


def _speaks(code: int) -> bool:
    """Whether this process tells what went wrong: of those of torchrun, one a machine does.

    A stop is always one of all. An error nearly always is: the first process speaks at once, and
    torchrun ends the others while they wait, or what went wrong here alone would never be told.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        if code > 128:
            return False
        time.sleep(OTHERS_WAIT_SECONDS)
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the command line; every failure is one line on stderr and a non-zero exit.

    Exit codes: 0 done, 1 cannot be done, 2 wrong usage, 3 done but some input was refused,
    130 Ctrl-C, 143 SIGTERM. `SSLUS_DEBUG=1` shows the traceback of an error.
    """
    from sslus.engine.errors import InputError, Interrupted

    def fail(message: str, code: int) -> int:
        if os.environ.get("SSLUS_DEBUG") == "1":
            raise
        # One of several processes speaks, and `sslus train --gpus`, which has started them,
        # learns the code: to torchrun any failure is a process to be started again.
        file = os.environ.get(EXIT_CODE_FILE)
        if file and (code != 70 or Path(file).exists()):  # 70 then: the others have left it alone
            with contextlib.suppress(FileExistsError), Path(file).open("x") as f:
                click.echo(f"Error: {message}", err=True)
                f.write(str(code))
            return 0
        if _speaks(code):
            click.echo(f"Error: {message}", err=True)
        return code

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # what is done cannot fail by a name
            stream.reconfigure(errors="backslashreplace")
    try:
        return sslus.main(args=argv, prog_name="sslus", standalone_mode=False) or 0
    except click.exceptions.Abort:
        return fail("interrupted", 130)
    except click.ClickException as e:
        if _speaks(e.exit_code):
            e.show()
        return e.exit_code
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Interrupted as e:
        return fail(str(e), 128 + e.signum)
    except InputError as e:
        return fail(str(e), 1)
    except BrokenPipeError:  # `sslus ... | head`: the reader left, which is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        where = f" {e.filename}" if e.filename else ""
        if e.errno == errno.ENOSPC:
            return fail(
                f"no space left on the disk of{where or ' the output'}; nothing half-written was"
                " kept. Free some space and run the same command again (train: with --resume)",
                1,
            )
        return fail(f"{e.strerror or e}{where and ':'}{where}", 1)
    except Exception as e:
        return fail(
            f"{type(e).__name__}: {e} (this should not happen: SSLUS_DEBUG=1 shows where)", 70
        )
