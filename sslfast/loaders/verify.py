"""``sslfast data verify``: decode every image of a folder once, and write the manifest of those that can be used."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TypeVar

from sslfast.images import BadImageError, decode_full, quiet_pillow, require_strict_pillow, silence_pillow
from sslfast.listing import progress_bar
from sslfast.manifest import Manifest, available_cores, some_paths
from sslfast.shards import Place, read_place

_AHEAD = 4  # chunks under way for each process

Task = TypeVar("Task")
Result = TypeVar("Result")


def verify_images(
    root: str | os.PathLike[str], *, workers: int | None = None, progress: bool = False
) -> tuple[Manifest, list[tuple[str, str]]]:
    """Scan a folder, decode every image whole, and number those that can be used.

    Args:
        root: the folder, of images or of tar shards, or a tar file.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show progress bars on the terminal.

    Returns:
        The manifest, marked as verified, and path and reason of every file left out, sorted by path (also in its
        ``excluded``). ValueError where no image is left.
    """
    manifest = Manifest.scan(root, on_bad_image="skip", progress=progress)
    bad = check_images(manifest, workers=workers, progress=progress)
    usable = replace(manifest.without(bad), verified=True)
    if not len(usable):
        raise ValueError(f"no usable image in {manifest.root}; all {len(bad)} are bad: {some_paths(bad)}")
    return usable, bad


def check_images(manifest: Manifest, *, workers: int | None = None, progress: bool = False) -> list[tuple[str, str]]:
    """Decode every image of the manifest whole and return path and reason of each bad one, sorted by path.

    Args:
        manifest: what to check; files that its scan excluded come back too.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show a progress bar on the terminal.
    """
    require_strict_pillow()
    tasks = [(path, manifest.place(row)) for row, path in enumerate(manifest.paths)]
    bad = list(manifest.excluded)
    for found in map_processes(_decode_whole, tasks, workers=workers, progress=progress, title="decoding"):
        bad.extend(found)
    return sorted(bad)


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


def _decode_whole(task: tuple[str, Place]) -> list[tuple[str, str]]:
    path, place = task
    try:
        decode_full(read_place(place))
    except BadImageError as error:
        return [(path, error.reason)]
    return []


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
