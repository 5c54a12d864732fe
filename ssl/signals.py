"""Ctrl-C and SIGTERM, handled between two steps."""

import os
import signal
import threading


class Signals:
    """Remembers SIGINT or SIGTERM; a second signal has its usual effect."""

    def __init__(self):
        self.seen = 0

    def __enter__(self) -> "Signals":
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                self.old[s] = signal.signal(s, self._note)
        return self

    def _note(self, signum, frame) -> None:
        self.seen = signum
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats signals from a terminal
            self._restore()

    def _restore(self) -> None:
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def __exit__(self, *exc) -> None:
        self._restore()
