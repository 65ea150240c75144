"""Waits that end: with a limit, and broken off when the program is asked to stop; threads that never keep it alive."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

LIMIT_SECONDS = 600.0
"""Default limit of a wait: longer than a file server takes to come back."""
_POLL_SECONDS = 0.2
_CLOSE_SECONDS = 5.0

T = TypeVar("T")


class LostBatchError(RuntimeError):
    """A batch that will not come: its reader has died or does not answer. One line with the remedy."""

    exit_code = 4


class WaitInterruptedError(Exception):
    """A wait was broken off because the program was asked to stop."""


@dataclass
class Patience:
    """How long to wait, and what ends a wait before that."""

    limit: float = LIMIT_SECONDS
    """Seconds."""
    is_stopped: Callable[[], bool] = lambda: False
    """Asked five times a second; true: :class:`WaitInterruptedError`."""

    def wait(self, ready: Callable[[float], bool], why: Callable[[], str]) -> None:
        """Wait until ``ready(seconds)``, which itself waits for at most that long, is true.

        Time in which this process was suspended (Ctrl-Z) does not count.

        Args:
            ready: what is waited for.
            why: what is not there, which file it hangs on, and what helps; the message gets the seconds before it.

        Raises:
            LostBatchError: the limit is over.
            WaitInterruptedError: see :attr:`is_stopped`.
        """
        waited, now = 0.0, time.monotonic()
        while not ready(min(_POLL_SECONDS, self.limit)):
            if self.is_stopped():
                raise WaitInterruptedError
            before, now = now, time.monotonic()
            waited += min(now - before, 5 * _POLL_SECONDS)
            if waited >= self.limit:
                raise LostBatchError(f"waited {waited:.0f} s for {why()}")

    def result(self, future: "Future[T]", why: Callable[[], str]) -> T:
        """Result of a future, or what it raises; see :meth:`wait`."""
        if not future.done():
            self.wait(lambda seconds: bool(wait_for_futures([future], timeout=seconds).done), why)
        return future.result()


class Reading:
    """What threads are reading: the oldest is what a wait hangs on."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[float, int]] = {}

    def __call__(self, row: int) -> None:
        """The calling thread begins with ``row``."""
        self._rows[threading.get_ident()] = (time.monotonic(), row)

    def oldest(self) -> int | None:
        """The row that a thread began longest ago and has not left for another one."""
        return min(self._rows.values())[1] if self._rows else None


class DaemonPool:
    """Threads that work through submitted calls and do not keep the process from ending, as an executor's do.

    Args:
        threads: how many.
        name: of the threads.
        start: called in each thread first.
    """

    def __init__(self, threads: int, name: str, start: Callable[[], None] = lambda: None) -> None:
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks, start), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        # Also at exit: a thread that runs compiled code while the interpreter is taken down can crash the process.
        self._end = weakref.finalize(self, _end_threads, self._tasks, self._threads)
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Call ``function(*arguments)`` in a thread."""
        if not self._end.alive:
            raise RuntimeError("this pool of threads was closed: build a new one")
        future: Future[T] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def map(
        self, function: Callable[..., T], tasks: Sequence[Any], patience: Patience, why: Callable[[], str]
    ) -> list[T]:
        """``function(task)`` of every task, in order; each is waited for with ``patience``."""
        futures = [self.submit(function, task) for task in tasks]
        try:
            return [patience.result(future, why) for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """Drop what has not begun, and end the threads; one that hangs is left behind after some seconds."""
        self._end()

    def __enter__(self) -> "DaemonPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(tasks: "SimpleQueue[Any]", start: Callable[[], None]) -> None:
    start()
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)
        del task, future, function, arguments  # else an idle thread keeps them


def _end_threads(tasks: "SimpleQueue[Any]", threads: list[threading.Thread]) -> None:
    while not tasks.empty():
        task = tasks.get()
        if task is not None:
            task[0].cancel()
    for _ in threads:
        tasks.put(None)
    end = time.monotonic() + _CLOSE_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, end - time.monotonic()))
