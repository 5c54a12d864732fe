"""`sslus train --gpus N`: starts torchrun, without importing PyTorch itself.

As a module that is run, this is torchrun, but one that ends without a traceback.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sslus.engine.errors import Interrupted
from sslus.engine.system import usable_cores
from sslus.ssl.signals import drop_terminal
from sslus.tools.cli import EXIT_CODE_FILE, LESS_MEMORY
from sslus.tools.screen import tell

SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # as torchrun gets them from the function below


def torchrun(num: int) -> int:
    """Run this command line in `num` processes on this machine; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="sslus-") as folder:
        code = Path(folder) / "code"
        line = [
            sys.executable, "-m", "sslus.tools.launch", "--nproc-per-node", str(num),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr",
            "127.0.0.1", "--max-restarts", "3", "--log-dir", f"{folder}/logs",
            "-m", "--", "sslus.tools", *sys.argv[1:],
        ]  # fmt: skip
        env = os.environ | {EXIT_CODE_FILE: str(code)}
        # torchrun's own default is one thread per process.
        env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num)))
        # Of its own session, so that this process alone hears of Ctrl-C: Python answers it with a
        # traceback until torchrun has been imported, which takes seconds.
        seen = []
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(s) != signal.SIG_IGN:  # as under nohup
                signal.signal(s, lambda signum, _: seen.append(signum))
        process = subprocess.Popen(line, env=env, start_new_session=True)
        told = False
        while process.poll() is None:
            time.sleep(0.2)
            if seen and not told:  # SIGTERM ends without a word what has not yet begun
                process.send_signal(signal.SIGTERM if seen[0] == signal.SIGINT else seen[0])
                told = True
            if code.exists():  # one has given up; the others might wait for it for long
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.terminate()
        if signal.SIGHUP in seen:
            drop_terminal()
        ended = int(code.read_text()) if code.exists() else process.returncode
        if ended < 0:  # by a signal, before the processes had begun
            raise Interrupted("interrupted", seen[0] if seen else -ended)
        return 128 + seen[0] if seen and ended > 128 else ended


def _hears_of_signals_later(start: Callable) -> Callable:
    """`start`, which starts the processes, to its end: torchrun forgets them, and leaves them
    running, if a signal comes while it does. Before, SIGTERM just ends it."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def stop(signum, frame):
        for s in SIGNALS:
            signal.signal(s, signal.SIG_IGN)
        logging.disable(logging.WARNING)  # which tell that it ends, and how
        raise SignalException("", signal.Signals(signum))

    def whole(*args):
        seen = []
        for s in SIGNALS:
            if signal.getsignal(s) != signal.SIG_IGN:
                signal.signal(s, lambda signum, _: seen.append(signum))
        started = start(*args)
        for s in SIGNALS:
            if signal.getsignal(s) != signal.SIG_IGN:
                signal.signal(s, stop)
        if seen:
            stop(seen[0], None)
        return started

    return whole


def _main() -> None:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are handled here
    LocalElasticAgent._start_workers = _hears_of_signals_later(LocalElasticAgent._start_workers)
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
