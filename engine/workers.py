"""Worker processes that can crash, be interrupted or be killed without ending the job."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker

from sslus.engine.errors import InputError, Interrupted


class Workers:
    """`jobs` processes, each in a pool of its own, so that a crash can be traced to its file."""

    def __init__(self, jobs: int, start: Callable, arguments: tuple):
        self.context = multiprocessing.get_context("spawn")
        self.start, self.arguments = start, arguments
        self.pools = []
        try:  # a worker that cannot even start must not be blamed on a file
            with uninterrupted():
                self.pools = [self._pool() for _ in range(jobs)]
                started = [pool.submit(_ready) for pool in self.pools]
            for ready in started:
                ready.result()
        except (OSError, RuntimeError) as e:  # a BrokenProcessPool is one
            self.stop()
            raise InputError(
                f"worker processes cannot start ({e}): look at the free memory, at the limits that"
                " `ulimit -a` shows, and whether /dev/shm can be written to; a script that calls"
                ' this needs `if __name__ == "__main__":` around its work'
            ) from e
        except BaseException:
            self.stop()
            raise

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self.context, _start, (self.start, self.arguments))

    def _replace(self, slot: int) -> None:
        self.pools[slot].shutdown(wait=False)
        self.pools[slot] = self._pool()

    def map(self, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple[int, object]]:
        """Yield (task number, result) in order of completion.

        A task whose worker dies is tried once more on a fresh worker, since the first may have
        died before the task reached it. If that worker dies too, the result is its
        BrokenProcessPool exception.
        """
        todo = iter(enumerate(tasks))
        running: dict[Future, tuple[int, int, tuple, bool]] = {}

        def submit(slot: int, number: int, task: tuple, again: bool) -> None:
            with uninterrupted():  # the first task of a new pool starts its process
                try:
                    future = self.pools[slot].submit(function, *task)
                except BrokenProcessPool:  # killed while it had nothing to do
                    self._replace(slot)
                    future = self.pools[slot].submit(function, *task)
                running[future] = slot, number, task, again

        def feed(slot: int) -> None:
            number, task = next(todo, (None, None))
            if number is not None:
                submit(slot, number, task, again=False)

        for slot in range(len(self.pools)):
            feed(slot)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot, number, task, again = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as e:
                    self._replace(slot)
                    if not again:
                        submit(slot, number, task, again=True)
                        continue
                    result = e
                feed(slot)
                yield number, result

    def stop(self) -> None:
        for pool in self.pools:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            with contextlib.suppress(RuntimeError):  # its thread could not be started
                pool.shutdown(wait=True, cancel_futures=True)


def _ready() -> None:
    """A task that any worker can do."""


def _start(start: Callable, arguments: tuple) -> None:
    follow_parent()
    start(*arguments)


def follow_parent() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end when the parent does, since one
    killed by SIGKILL cannot stop its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _handlers() -> dict:
    """The handlers of the signals that stop a run; only the main thread can change them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For starting processes: SIGINT and SIGTERM take effect only when the block ends.

    A terminal sends Ctrl-C to the children too. They inherit a blocked SIGINT (but not SIGTERM,
    which ends them), so it cannot hit them before they ignore it. Blocking alone does not keep it
    from this process: another thread receives the signal, and Python runs the handler in this one.
    """
    resource_tracker.ensure_running()  # if started inside the block, it would unblock SIGINT
    before, mask = _handlers(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    waiting = []
    try:
        for s in before:
            signal.signal(s, lambda signum, frame: waiting.append(signum))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for s, handler in before.items():
            signal.signal(s, handler)
        for signum in waiting:
            signal.raise_signal(signum)


@contextlib.contextmanager
def worker_pool(jobs: int, start: Callable, arguments: tuple, kept: Callable[[], str]):
    """Workers that are stopped when the block ends; SIGINT and SIGTERM raise Interrupted."""

    def stop(signum, frame):
        raise Interrupted("", signum)

    before, workers = _handlers(), None
    try:
        for s in before:
            signal.signal(s, stop)
        workers = Workers(jobs, start, arguments)
        yield workers
    except Interrupted as e:
        raise Interrupted(f"stopped; {kept()}; the same command resumes from here", e.signum) from e
    finally:
        for s in before:
            signal.signal(s, signal.SIG_IGN)  # a second Ctrl-C must not leave workers behind
        if workers:
            workers.stop()
        for s, handler in before.items():
            signal.signal(s, handler)
