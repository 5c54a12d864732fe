"""Ctrl-C, SIGTERM and the loss of the terminal, handled between two steps."""

import os
import signal
import stat
import threading


class Signals:
    """Remembers SIGINT, SIGTERM or SIGHUP; a second signal has its usual effect.

    SIGHUP, which a closed terminal or a broken ssh connection sends, stays ignored under nohup.
    """

    def __init__(self):
        self.seen = 0

    def __enter__(self) -> "Signals":
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN:
                    self.old[s] = signal.signal(s, self._note)
        return self

    def _note(self, signum, frame) -> None:
        self.seen = signum
        if signum == signal.SIGHUP:
            drop_terminal()
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats signals from a terminal
            self._restore()

    def _restore(self) -> None:
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def __exit__(self, *exc) -> None:
        self._restore()


def drop_terminal() -> None:
    """What is still said goes nowhere: writing to a terminal that is gone would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        if stat.S_ISCHR(os.fstat(fd).st_mode):  # isatty is false once it is gone
            os.dup2(nowhere, fd)
    os.close(nowhere)
