"""Worker processes for data commands, and how many cores there are."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from sslfast.data.folder import progress_bar
from sslfast.data.images import quiet_pillow, silence_pillow


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_AHEAD = 4  # chunks under way for each process


Task = TypeVar("Task")


Result = TypeVar("Result")


def map_processes(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int | None,
    progress: bool,
    title: str,
    chunk: int = 16,
) -> Iterator[Result]:
    """``work(task)`` of every task, in order, with a bounded number of results waiting.

    The processes ignore Ctrl-C, which belongs to the process that started them, and end with it however it ends.

    Args:
        work: a function of a module.
        tasks: its arguments.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show a progress bar on the terminal.
        title: of the bar.
        chunk: tasks that travel together.

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
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    pool.submit(os.getpid)  # starts the processes, before the bar starts its thread
    waiting: deque[Future[list[Result]]] = deque()
    try:
        with progress_bar(progress) as bar:
            shown = bar.add_task(title, total=len(tasks))
            for start in range(0, len(tasks), chunk):
                waiting.append(pool.submit(_work_through, work, tasks[start : start + chunk]))
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


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    silence_pillow()


def _end_with_main_process() -> None:
    """A killed main process takes nothing back from its workers, which would wait for their next task for good."""
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        main_process.join()
        os._exit(1)
