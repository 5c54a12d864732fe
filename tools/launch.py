"""`sslus train --gpus N`: starts torchrun, without importing PyTorch itself."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sslus.tools.cli import EXIT_CODE_FILE


def torchrun(num: int) -> int:
    """Run this command line in `num` processes on this machine; return the exit code."""
    line = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
        "--max-restarts", "3", "-m", "--", "sslus.tools", *sys.argv[1:],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        env = os.environ | {EXIT_CODE_FILE: str(code)}
        # torchrun's own default is one thread per process.
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num)))
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
        return int(code.read_text()) if code.exists() else process.returncode
