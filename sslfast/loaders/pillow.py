"""The ``pillow`` loader: Pillow decoding in the worker processes of a torch DataLoader, a whole batch per item.

Needs only torch, numpy and Pillow, works on every device, and is the reference for what every loader yields.
"""

import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from sslfast.data import BadImageError, SourceError, exit_with_parent, require_strict_pillow, silence_pillow
from sslfast.loaders.base import ImageLoader
from sslfast.loaders.decode import BatchDecoder
from sslfast.loaders.plan import EpochPlan
from sslfast.views import Batch, ViewConfig

_PREFETCH = 2  # batches in flight per worker
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class _Task:
    """Everything a worker needs to make one batch, so that batches do not depend on the state of the workers."""

    epoch: int
    sample_ids: NDArray[np.int64]


class _Batches(Dataset[dict[str, Any]]):
    """Dataset whose index is a :class:`_Task` and whose item is a batch, or ``{"error": one line}``."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder

    def __getitem__(self, task: _Task) -> dict[str, Any]:
        try:
            batch = self.decoder(task.epoch, task.sample_ids)
        except (BadImageError, SourceError) as error:
            # An exception would reach the main process with the worker's traceback.
            return {"error": str(error)}
        return {"sample_ids": batch.sample_ids, "crops": batch.crops, "bad": batch.bad}


class _Steps(Sampler[_Task]):
    """The rest of one epoch, as tasks."""

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan
        self.epoch = 0
        self.start_step = 0

    def __iter__(self) -> Iterator[_Task]:
        epoch, order = self.epoch, self.plan.order(self.epoch)
        for step in range(self.start_step, self.plan.steps_per_epoch):
            yield _Task(epoch, self.plan.share(order, step))


class PillowLoader(ImageLoader):
    """Batches of decoded crops, a pure function of (seed, epoch, step) and of the files.

    The same pixels come with any number of workers, after a restart at any step, and, put together over the ranks,
    with any number of ranks. ``workers`` are processes, kept over epochs. CUDA: pinned memory and a copy on a side
    stream, concurrent with the running step. Arguments: see :class:`ImageLoader`.
    """

    def _open(self, views: dict[str, ViewConfig]) -> None:
        require_strict_pillow()
        self._steps = _Steps(self.plan)
        self._iterator: Any = None
        self._children: list[BaseProcess] = []
        # Also at interpreter exit, before multiprocessing waits for its children.
        self._kill = Finalize(self, _kill_workers, args=(self._children,), exitpriority=100)
        workers = self._workers
        if workers:
            _check_shared_memory(views, self.plan.batch_size // self.plan.world_size, workers)
        decoder = BatchDecoder(
            source=self._manifest.source.packed(),
            views=views,
            seed=self.plan.seed,
            on_bad_image=self._on_bad_image,
        )
        self._loader: DataLoader[dict[str, Any]] | None = DataLoader(
            _Batches(decoder),
            sampler=self._steps,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
        )

    def close(self) -> None:
        """Stop the workers. Safe to call twice, and in the middle of an epoch."""
        super().close()
        # A DataLoader stops its workers when its iterator is garbage-collected, but the traceback of an exception that
        # is being handled (Ctrl-C) keeps that alive; so this calls what its __del__ calls.
        if hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()
        self._iterator = self._loader = None
        _kill_workers(self._children)

    def _iterate(self, epoch: int, start_step: int, generation: int) -> Iterator[Batch]:
        copies = self._copy_stream()
        for step in range(start_step, self.steps_per_epoch):
            self._check_current(generation)
            if step == start_step:
                self._steps.epoch, self._steps.start_step = epoch, start_step
                self._start_iterator()
            item = self._next()
            for row, reason in item["bad"]:
                self._bad.setdefault(row, reason)
            yield self._to_device(Batch(sample_ids=item["sample_ids"], crops=item["crops"], epoch=epoch), copies)

    def _start_iterator(self) -> None:
        """Record the workers even if Ctrl-C interrupts their start."""
        assert self._loader is not None
        before = set(multiprocessing.active_children())
        try:
            self._iterator = iter(self._loader)
        finally:
            self._children.extend(set(multiprocessing.active_children()) - before)

    def _next(self) -> dict[str, Any]:
        try:
            item = self._fetch()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a loader process died ({str(error).splitlines()[0]}): usually memory ran out; use fewer workers "
                "(--loader.workers), a smaller batch, or more (shared) memory"
            ) from None
        if "error" in item:
            raise ValueError(item["error"])
        return item

    def _fetch(self) -> dict[str, Any]:
        try:
            item: dict[str, Any] = next(self._iterator)
        except (EOFError, OSError) as error:
            if self._workers == 0:
                raise
            # A worker that dies while it sends a batch breaks the connection. torch reports a dead worker from a signal
            # handler, as a RuntimeError wherever the main thread is: let that happen here, not in the caller.
            time.sleep(0.2)
            raise RuntimeError(f"DataLoader worker ended: {type(error).__name__}") from None
        return item


def status() -> tuple[bool, str, str]:
    """Usable, reason, remedy: see :func:`sslfast.loaders.loader_status`."""
    try:
        require_strict_pillow()
    except ValueError as error:
        return False, str(error), "set PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False"
    from PIL import __version__, features

    turbo = features.version("libjpeg_turbo")
    return True, f"Pillow {__version__}{f', libjpeg-turbo {turbo}' if turbo else ', libjpeg without turbo'}", ""


def _start_worker(worker: int) -> None:
    """One thread per process; signals of the terminal and of the scheduler are handled by the main process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _report
    # torch's own check sees the fork server (Python 3.14's default), which lives as long as its workers do.
    exit_with_parent()
    silence_pillow()


def _kill_workers(workers: list[BaseProcess]) -> None:
    """Kill the workers that are still running, say because Ctrl-C interrupted the shutdown. They ignore SIGTERM."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
    workers.clear()


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook of a worker: it is no error if the main process exits while a batch is being sent."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _check_shared_memory(views: Mapping[str, ViewConfig], local_batch: int, workers: int) -> None:
    """Batches are passed through shared memory, and a worker that finds it full is killed without a message."""
    if not _SHARED_MEMORY.is_dir():
        return
    needed = local_batch * sum(3 * view.crop.size**2 for view in views.values()) * (workers * _PREFETCH + 1)
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"{workers} loader workers need {needed / 2**20:.0f} MiB of shared memory, {_SHARED_MEMORY} has "
            f"{free / 2**20:.0f} MiB free: use fewer workers, a smaller batch, or a larger one (docker: --shm-size=8g)"
        )
