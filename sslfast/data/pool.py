"""Worker processes and threads for data commands, their progress bar, and the number of cores."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, TypeVar

from sslfast.data.images import quiet_pillow, silence_pillow
from sslfast.data.processes import (
    STOP_SIGNALS,
    cannot_start,
    exit_with_parent,
    ignore_signals,
    refuse_in_bootstrap,
    signals_held,
    why_ended,
)
from sslfast.data.waiting import DaemonPool, LostBatchError, Patience

if TYPE_CHECKING:
    from rich.progress import Progress

_AHEAD = 4  # chunks in flight per process
_THREADS = 8  # hides the latency of network disks; checking headers itself holds the interpreter lock
_CHUNK = 256
_REAP_SECONDS = 2.0
_STORAGE = "{what}: the storage does not answer; see that it is mounted and readable, then run the command again"
_FEWER = "use fewer processes (--workers) or more memory"

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(enabled: bool) -> "Progress":
    """On standard error, where that is a terminal; nothing is shown unless ``enabled``."""
    from rich.console import Console  # takes a third of a second, which errors before any bar need not wait for
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))


def map_threads(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, progress: bool, title: str, chunk: int | None = None
) -> Iterator[tuple[Task, Result]]:
    """``(task, work(task))`` in order, by 8 threads; ``chunk`` (default: a few hundred) tasks are one job.

    Raises:
        LostBatchError: a job takes longer than :class:`Patience` lasts.
    """
    chunk = chunk or _CHUNK
    chunks = [tasks[start : start + chunk] for start in range(0, len(tasks), chunk)]
    patience = Patience()
    with DaemonPool(_THREADS, "sslfast-scan") as pool, progress_bar(progress) as bar:
        shown = bar.add_task(title, total=len(tasks))
        jobs = deque(pool.submit(_work_through, work, part) for part in chunks)
        for part in chunks:
            results = patience.result(jobs.popleft(), lambda: _STORAGE.format(what=title or "reading"))
            yield from zip(part, results, strict=True)
            bar.advance(shown, len(part))


def map_processes(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int | None,
    progress: bool,
    title: str,
    chunk: int = 16,
    patience: Patience | None = None,
) -> Iterator[Result]:
    """``work(task)`` of every task, in order, with a bounded number of results in memory.

    The processes ignore Ctrl-C, which the process that started them handles, and exit when that process exits.

    Args:
        work: picklable; handed to each process once, so it may hold large data (``functools.partial``).
        tasks: its arguments.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show a progress bar on the terminal.
        title: of the bar.
        chunk: tasks sent to a process at once.
        patience: with each of them.

    Raises:
        LostBatchError: a process was killed, or does not answer.
    """
    refuse_in_bootstrap()
    patience = patience or Patience()
    workers = available_cores() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers=}")
    if workers <= 1:

        def quietly(task: Task) -> Result:
            with quiet_pillow():
                return work(task)

        with DaemonPool(1, "sslfast-work") as thread, progress_bar(progress) as bar:
            shown = bar.add_task(title, total=len(tasks))
            for task in tasks:
                yield patience.result(thread.submit(quietly, task), lambda: _STORAGE.format(what=title))
                bar.advance(shown)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(work,))
    waiting: deque[Future[list[Result]]] = deque()
    processes: Mapping[int, BaseProcess] = pool._processes
    is_done = False

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            return pool.submit(function, *arguments)  # starts processes, as many as are needed
        except (EOFError, OSError) as error:
            raise cannot_start(error, "a process", _FEWER) from None

    def next_results() -> list[Result]:
        return patience.result(waiting.popleft(), lambda: _STORAGE.format(what=title))

    try:
        with signals_held():
            submit(os.getpid)  # before the bar starts its thread
        with progress_bar(progress) as bar:
            shown = bar.add_task(title, total=len(tasks))
            for start in range(0, len(tasks), chunk):
                waiting.append(submit(_work_in_process, tasks[start : start + chunk]))
                if len(waiting) == workers * _AHEAD:
                    yield from (results := next_results())
                    bar.advance(shown, len(results))
            while waiting:
                yield from (results := next_results())
                bar.advance(shown, len(results))
        is_done = True
    except BrokenProcessPool:
        raise LostBatchError(f"a process died while {title}: {why_ended(_first_death(processes), _FEWER)}") from None
    finally:
        if not is_done:  # one that hangs would be waited for
            for process in list(processes.values()):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _first_death(processes: Mapping[int, BaseProcess]) -> int:
    """Exit code of the process that broke the pool, which ends the others by SIGTERM."""
    end = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < end:
        for process in list(processes.values()):
            code = process.exitcode
            if code not in (None, 0, -SIGTERM):
                return code
        time.sleep(0.01)  # a thread of the pool may just be asking for the codes
    return -SIGTERM


def _work_through(work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [work(task) for task in tasks]


_work: Callable[[Any], Any]
"""What this worker process does with a task."""


def _work_in_process(tasks: Sequence[Any]) -> list[Any]:
    return _work_through(_work, tasks)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    ignore_signals(number for number in STOP_SIGNALS if number != SIGTERM)  # by which a broken pool ends the others
    exit_with_parent()
    silence_pillow()
