"""Base classes of the loaders: the plan of an epoch, one iterator at a time, bad images, the copy to a GPU."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from sslfast.data import LIMIT_SECONDS, Manifest, OnBadImage, Patience, Reading
from sslfast.loaders.plan import EpochPlan
from sslfast.views import Batch, ViewConfig, check_views


class PlannedLoader:
    """A loader whose steps follow an :class:`EpochPlan`; a loader implements ``_iterate``.

    An epoch is a pure function of (seed, epoch), so it can start at any step. The partial batch at its end is dropped.
    Starting an epoch invalidates the iterator of the previous one.
    """

    def __init__(
        self,
        num_rows: int,
        views: Mapping[str, ViewConfig],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        shards: NDArray[np.int64] | None = None,
        mixed_shards: int = 1,
    ) -> None:
        check_views(views)
        self.plan = EpochPlan(
            num_rows=num_rows,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            shards=shards,
            mixed_shards=mixed_shards,
        )
        self.device = torch.device(device)
        self._sizes = {name: view.crop.size for name, view in views.items()}
        self._generation = 0
        self._is_open = True
        self.patience = Patience()
        """With every batch: its limit, and what breaks a wait off."""

    @property
    def num_rows(self) -> int:
        return self.plan.num_rows

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def bad_images(self) -> list[tuple[str, str]]:
        """Path and reason of every image left out so far."""
        return []

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Steps ``start_step ..`` of an epoch; the earlier ones cost nothing.

        ValueError: arguments out of range, or (from the iterator) an image that must not train.
        """
        self.plan.check_start(epoch, start_step)
        if not self._is_open:
            raise RuntimeError("the loader was closed: build a new one")
        self._end_epoch()
        return self._iterate(epoch, start_step, self._generation)

    def set_order(self, orders: Callable[[int], NDArray[np.int64]]) -> None:
        """Take the rows of every epoch from ``orders`` (:class:`EpochPlan`), called when an epoch's first batch is
        asked for. A row that an epoch has several times has the same crop and colours each time.

        Raises:
            ValueError: the loader mixes tar shards.
        """
        if self.plan.shards is not None:
            raise ValueError(
                "the method orders the rows of an epoch itself, and --loader.shuffle shards mixes tar shards: use "
                "--loader.shuffle full"
            )
        self.plan = replace(self.plan, orders=orders)

    def check(self) -> None:
        """Check that the loader can start, without reading an image: processes, memory. Raises LostBatchError."""

    def close(self) -> None:
        """Release everything; the loader is unusable afterwards. Safe to call twice, and in the middle of an epoch."""
        self._end_epoch()
        self._is_open = False

    def _end_epoch(self) -> None:
        """Invalidate the current iterator."""
        self._generation += 1

    def _check_current(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError("this epoch's iterator ended when the loader was closed or started another epoch")

    def _iterate(self, epoch: int, start_step: int, generation: int) -> Iterator[Batch]:
        """The batches. ``generation`` is for :meth:`_check_current`."""
        raise TypeError(f"{type(self).__name__} does not implement _iterate")


class ImageLoader(PlannedLoader):
    """A loader of the images of a manifest, in ``workers`` processes or threads.

    Args:
        manifest: row -> image.
        views: view name -> view; the position in this mapping selects the view's random stream.
        batch_size: global batch; each rank gets ``batch_size / world_size`` rows of it.
        seed: of the run.
        workers: processes or threads that decode; 0: the calling process decodes.
        on_bad_image: what to do about an image that turns out bad when it is decoded; see :mod:`sslfast.data.images`.
        rank, world_size: of this process.
        device: where batches go.
        mixed_shards: how many tar shards an epoch mixes at a time; None: it mixes all rows.
        timeout: seconds to wait for a batch; LostBatchError after them.
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
        mixed_shards: int | None = None,
        timeout: float = LIMIT_SECONDS,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers=}")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image=}")
        shards = None if mixed_shards is None else manifest.source.row_shards
        if mixed_shards is not None and shards is None:
            raise ValueError(
                f"--loader.shuffle shards is for tar shards and Parquet files, and {manifest.source} has none: use "
                "--loader.shuffle full"
            )
        super().__init__(
            len(manifest),
            views,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
            shards=shards,
            mixed_shards=1 if mixed_shards is None else mixed_shards,
        )
        self._manifest = manifest
        self._workers = workers
        self._on_bad_image = on_bad_image
        self._bad: dict[int, str] = {}
        self.patience.limit = timeout
        self._open(dict(views))

    def _open(self, views: dict[str, ViewConfig]) -> None:
        """Start workers or pipelines: called at the end of the constructor."""

    @property
    def bad_images(self) -> list[tuple[str, str]]:
        """Relative path and reason of every image left out so far: by the scan, then by decoding, in row order."""
        decoded = [(self._manifest.paths[row], reason) for row, reason in sorted(self._bad.items())]
        return [*self._manifest.excluded, *decoded]

    def _hang(self, reading: Callable[[int], None]) -> str:
        """What to say when threads of this loader do not answer."""
        row = reading.oldest() if isinstance(reading, Reading) else None
        last = "" if row is None else f" (last file {self._manifest.source.where(row)})"
        return f"a batch{last}: the storage does not answer; see that the data can be read, or raise --loader.timeout"

    def _copy_stream(self) -> "torch.cuda.Stream | None":
        """For :meth:`_to_device`; None on a CPU."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _to_device(self, batch: Batch, copies: "torch.cuda.Stream | None") -> Batch:
        """Copy pinned tensors to the device on a side stream, concurrently with the running step."""
        if copies is None:
            return batch
        with torch.cuda.stream(copies):
            batch.sample_ids = batch.sample_ids.to(self.device, non_blocking=True)
            batch.crops = {name: crop.to(self.device, non_blocking=True) for name, crop in batch.crops.items()}
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(copies)
        for tensor in (batch.sample_ids, *batch.crops.values()):
            tensor.record_stream(current)
        return batch
