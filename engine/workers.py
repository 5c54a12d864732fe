"""Worker processes that may crash, be interrupted or be killed without taking the job along."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from sslus.engine.errors import Interrupted


class Workers:
    """`jobs` processes, each alone in its pool: if a decoder crashes, it is known on which file."""

    def __init__(self, jobs: int, start: Callable, arguments: tuple):
        self.context = multiprocessing.get_context("spawn")
        self.start, self.arguments = start, arguments
        self.pools = [self._pool() for _ in range(jobs)]
        try:  # a worker that cannot even start must not be blamed on a file
            for ready in [pool.submit(_ready) for pool in self.pools]:
                ready.result()
        except BrokenProcessPool as e:
            self.stop()
            raise RuntimeError(
                "worker processes cannot start; a script that calls this needs"
                ' `if __name__ == "__main__":` around its work'
            ) from e

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self.context, _start, (self.start, self.arguments))

    def map(self, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple[int, object]]:
        """Yield (task number, result) as they come; a crash's result is a BrokenProcessPool."""
        todo = iter(enumerate(tasks))
        running: dict[Future, tuple[int, int]] = {}

        def feed(slot: int) -> None:
            number, task = next(todo, (None, None))
            if number is not None:
                running[self.pools[slot].submit(function, *task)] = number, slot

        for slot in range(len(self.pools)):
            feed(slot)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, slot = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as e:
                    self.pools[slot].shutdown(wait=False)
                    self.pools[slot] = self._pool()
                    result = e
                feed(slot)
                yield number, result

    def stop(self) -> None:
        for pool in self.pools:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


def _ready() -> None:
    """A task that any worker can do."""


def _start(start: Callable, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    """A parent killed by SIGKILL cannot stop its workers, which would wait for tasks forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def worker_pool(jobs: int, start: Callable, arguments: tuple, kept: Callable[[], str]):
    """Workers that are gone when the block ends; SIGINT and SIGTERM become Interrupted."""

    def stop(signum, frame):
        raise Interrupted("", signum)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: the caller's handlers stay
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    workers = Workers(jobs, start, arguments)
    try:
        yield workers
    except Interrupted as e:
        raise Interrupted(f"stopped; {kept()}; the same command goes on from here", e.signum) from e
    finally:
        for s in before:
            signal.signal(s, signal.SIG_IGN)  # a second Ctrl-C must not leave workers behind
        workers.stop()
        for s, handler in before.items():
            signal.signal(s, handler)
