"""The ``torch`` loader: Pillow decoding in the worker processes of a torch DataLoader, a whole batch per item.

Needs nothing but torch, numpy and Pillow, works on every device and is the specification of what loaders yield.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from sslfast.images import BadImageError, require_strict_pillow, silence_pillow
from sslfast.loaders.batch import Batch, ViewConfig
from sslfast.loaders.decode import BatchDecoder, OnBadImage, PackedPaths
from sslfast.loaders.sampling import EpochPlan, check_views
from sslfast.manifest import Manifest

_PREFETCH = 2  # batches in flight per worker
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class _Task:
    """What a worker needs to make one batch. Nothing else reaches it, so workers have no state that matters."""

    epoch: int
    rows: NDArray[np.int64]


class _Batches(Dataset[dict[str, Any]]):
    """Dataset whose index is a :class:`_Task` and whose item is a batch, or ``{"error": one line}``."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder

    def __getitem__(self, task: _Task) -> dict[str, Any]:
        try:
            batch = self.decoder(task.epoch, task.rows)
        except BadImageError as error:
            # An exception would reach the main process as a traceback of the worker's.
            return {"error": error.reason}
        return {"rows": batch.rows, "crops": batch.crops, "bad": batch.bad}


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


class TorchLoader:
    """Batches of decoded crops, a pure function of (seed, epoch, step) and of the files.

    The same pixels come with any number of workers, after a restart at any step, and, put together over the ranks,
    with any number of ranks. The partial batch at the end of an epoch is dropped.

    Args:
        manifest: row -> file.
        views: view name -> recipe; the position in this mapping selects the view's random stream.
        batch_size: global batch; each rank gets ``batch_size / world_size`` rows of it.
        seed: of the run.
        workers: decoding processes, kept over epochs; 0: decode in this process.
        on_bad_image: what happens at an image that only decoding shows to be bad; see :mod:`sslfast.images`.
        rank, world_size: this process among all.
        device: where batches go. CUDA: pinned memory and a copy on a side stream beside the running step.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: Mapping[str, ViewConfig],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        on_bad_image: OnBadImage = "error",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers=}")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image=}")
        require_strict_pillow()
        check_views(views)
        self.plan = EpochPlan(
            num_rows=len(manifest), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
        )
        self.device = torch.device(device)
        self._manifest = manifest
        self._bad: dict[int, str] = {}
        self._steps = _Steps(self.plan)
        self._generation = 0
        self._iterator: Any = None
        self._workers = workers
        if workers:
            _check_shared_memory(views, batch_size // world_size, workers)
        decoder = BatchDecoder(
            root=str(manifest.root),
            paths=PackedPaths(manifest.paths),
            views=dict(views),
            seed=seed,
            on_bad_image=on_bad_image,
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

    @property
    def num_rows(self) -> int:
        return self.plan.num_rows

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def bad_images(self) -> list[tuple[str, str]]:
        """Relative path and reason of every image left out so far: by the scan, then by decoding, in row order."""
        decoded = [(self._manifest.paths[row], reason) for row, reason in sorted(self._bad.items())]
        return [*self._manifest.excluded, *decoded]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Steps ``start_step ..`` of an epoch; the ones before are not decoded.

        Starting an epoch ends the iterator of the one before. ValueError: arguments out of range, or (from the
        iterator) an image that must not train.
        """
        self.plan.check_start(epoch, start_step)
        if self._loader is None:
            raise RuntimeError("the loader was closed: build a new one")
        self._generation += 1
        return self._iterate(epoch, start_step, self._generation)

    def close(self) -> None:
        """End the workers. Safe to call twice, and in the middle of an epoch."""
        self._generation += 1
        # A DataLoader ends its workers when its iterator is collected, but the traceback of an exception that is
        # being handled (Ctrl-C) would keep that alive; so this calls what its __del__ calls.
        if hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()
        self._iterator = self._loader = None

    def _iterate(self, epoch: int, start_step: int, generation: int) -> Iterator[Batch]:
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for step in range(start_step, self.steps_per_epoch):
            if generation != self._generation:
                raise RuntimeError("this epoch's iterator ended when the loader was closed or started another epoch")
            if step == start_step:
                self._steps.epoch, self._steps.start_step = epoch, start_step
                assert self._loader is not None
                self._iterator = iter(self._loader)
            item = self._next()
            for row, reason in item["bad"]:
                self._bad.setdefault(row, reason)
            yield self._to_device(Batch(rows=item["rows"], crops=item["crops"], epoch=epoch), copies)

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
            # A worker that dies while it hands a batch over breaks the connection. torch reports a dead worker from a
            # signal handler, as a RuntimeError wherever the main thread is: let that come here, not into the caller.
            time.sleep(0.2)
            raise RuntimeError(f"DataLoader worker broke off: {type(error).__name__}") from None
        return item

    def _to_device(self, batch: Batch, copies: "torch.cuda.Stream | None") -> Batch:
        if copies is None:
            return batch
        # The step before still runs on the current stream; this copy does not wait for it.
        with torch.cuda.stream(copies):
            batch.rows = batch.rows.to(self.device, non_blocking=True)
            batch.crops = {name: crop.to(self.device, non_blocking=True) for name, crop in batch.crops.items()}
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(copies)
        for tensor in (batch.rows, *batch.crops.values()):
            tensor.record_stream(current)
        return batch


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
    """One thread per process, and the signals of the terminal and of the scheduler left to the main process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _report
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    silence_pillow()


def _end_with_main_process() -> None:
    """Where a fork server starts the workers (Python 3.14's default), torch's own watch sees the server, which lives
    on for as long as its workers do: those of a killed main process would stay for good."""
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        main_process.join()
        os._exit(1)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a worker's threads: the main process going away in the middle of fetching a batch is not an error."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _check_shared_memory(views: Mapping[str, ViewConfig], local_batch: int, workers: int) -> None:
    """Batches travel through shared memory, and a worker that finds it full dies without a word."""
    if not _SHARED_MEMORY.is_dir():
        return
    needed = local_batch * sum(3 * view.crop.size**2 for view in views.values()) * (workers * _PREFETCH + 1)
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"{workers} loader workers need {needed / 2**20:.0f} MiB of shared memory, {_SHARED_MEMORY} has "
            f"{free / 2**20:.0f} MiB free: use fewer workers, a smaller batch, or a larger one (docker: --shm-size=8g)"
        )
