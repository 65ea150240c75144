"""Worker processes and threads for data commands, their progress bar, and the number of cores."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslfast.data.images import quiet_pillow, silence_pillow

_AHEAD = 4  # chunks in flight per process
_THREADS = 8  # hides the latency of network disks; checking headers itself holds the interpreter lock
_CHUNK = 256

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(enabled: bool) -> Progress:
    """On standard error, where that is a terminal; nothing is shown unless ``enabled``."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))


def map_threads(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, progress: bool, title: str, chunk: int | None = None
) -> Iterator[tuple[Task, Result]]:
    """``(task, work(task))`` in order, by 8 threads; ``chunk`` (default: a few hundred) tasks are one job."""
    chunk = chunk or _CHUNK
    chunks = [tasks[start : start + chunk] for start in range(0, len(tasks), chunk)]
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(progress) as bar:
        shown = bar.add_task(title, total=len(tasks))
        for part, results in zip(chunks, pool.map(lambda part: _work_through(work, part), chunks), strict=True):
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

    Raises:
        RuntimeError: a process was killed.
    """
    workers = available_cores() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers=}")
    if workers <= 1:
        with progress_bar(progress) as bar:
            shown = bar.add_task(title, total=len(tasks))
            for task in tasks:
                with quiet_pillow():
                    result = work(task)
                yield result
                bar.advance(shown)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(work,))
    pool.submit(os.getpid)  # starts the processes, before the bar starts its thread
    waiting: deque[Future[list[Result]]] = deque()
    try:
        with progress_bar(progress) as bar:
            shown = bar.add_task(title, total=len(tasks))
            for start in range(0, len(tasks), chunk):
                waiting.append(pool.submit(_work_in_process, tasks[start : start + chunk]))
                if len(waiting) == workers * _AHEAD:
                    yield from (results := waiting.popleft().result())
                    bar.advance(shown, len(results))
            while waiting:
                yield from (results := waiting.popleft().result())
                bar.advance(shown, len(results))
    except BrokenProcessPool:
        raise RuntimeError(
            f"a process died while {title}: usually memory ran out; use fewer (--workers) or more memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _work_through(work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [work(task) for task in tasks]


_work: Callable[[Any], Any]
"""What this worker process does with a task."""


def _work_in_process(tasks: Sequence[Any]) -> list[Any]:
    return _work_through(_work, tasks)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    silence_pillow()


def exit_with_parent() -> None:
    """In a worker process: exit as soon as the process that started it is gone.

    A killed main process collects no results, and its workers would wait for their next task forever.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
