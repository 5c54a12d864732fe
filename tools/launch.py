"""`sslus train --gpus N`: starts torchrun, without importing PyTorch itself.

As a module that is run, this is torchrun, but one that ends without a traceback.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sslus.engine.errors import Interrupted
from sslus.engine.system import usable_cores
from sslus.tools.cli import EXIT_CODE_FILE, LESS_MEMORY
from sslus.tools.screen import tell


def torchrun(num: int) -> int:
    """Run this command line in `num` processes on this machine; return the exit code."""
    line = [
        sys.executable, "-m", "sslus.tools.launch", "--nproc-per-node", str(num),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
        "--max-restarts", "3", "-m", "--", "sslus.tools", *sys.argv[1:],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        env = os.environ | {EXIT_CODE_FILE: str(code)}
        # torchrun's own default is one thread per process.
        env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num)))
        process = subprocess.Popen(line, env=env)
        # Ctrl-C in a terminal reaches the processes directly; they save while this one waits.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        while process.poll() is None:
            time.sleep(0.2)
            if code.exists():  # one has given up; the others might wait for it for long
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.terminate()
        if code.exists():
            return int(code.read_text())
        if process.returncode < 0:  # by a signal, before the processes had begun
            raise Interrupted("interrupted", -process.returncode)
        return process.returncode


def _main() -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main()
    except SignalException as e:  # the processes have told what they kept
        signal.signal(e.sigval, signal.SIG_DFL)
        signal.raise_signal(e.sigval)
    except ChildFailedError as e:  # after all restarts
        _, failure = e.get_first_failure()
        if failure.exitcode >= 0:  # it has told why
            sys.exit(failure.exitcode)
        tell(
            f"Error: a process was killed by signal {-failure.exitcode} again and again, perhaps"
            f" for lack of memory; {LESS_MEMORY['train']}"
        )
        sys.exit(128 - failure.exitcode)


if __name__ == "__main__":
    _main()
