"""The ``pillow`` loader: decoding in worker processes by Pillow and, for common JPEGs, by its libjpeg-turbo directly
(:mod:`sslfast.loaders.jpeg_crops`); a whole batch at a time.

Needs only torch, numpy and Pillow, works on every device, and is the reference for what every loader yields.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sslfast.data import BadImageError, DaemonPool, SourceError, require_strict_pillow
from sslfast.loaders.base import ImageLoader
from sslfast.loaders.decode import BatchDecoder, DecodedBatch
from sslfast.loaders.jpeg_crops import why_pillow
from sslfast.loaders.limits import check_limits
from sslfast.loaders.workers import PREFETCH, PROCESS_BYTES, WorkerPool, slot_bytes
from sslfast.views import Batch, ViewConfig


class PillowLoader(ImageLoader):
    """Batches of decoded crops, a pure function of (seed, epoch, step) and of the files.

    The same pixels come with any number of workers, after a restart at any step, and, put together over the ranks,
    with any number of ranks. ``workers`` are processes, kept over epochs. CUDA: pinned memory and a copy on a side
    stream, concurrent with the running step. Arguments: see :class:`ImageLoader`.
    """

    def _open(self, views: dict[str, ViewConfig]) -> None:
        require_strict_pillow()
        local = self.plan.batch_size // self.plan.world_size
        self._decoder = BatchDecoder(
            source=self._manifest.source.packed(),
            views=views,
            seed=self.plan.seed,
            on_bad_image=self._on_bad_image,
        )
        self._pool: WorkerPool | None = None
        self._thread: DaemonPool | None = None
        if self._workers:
            shapes = {name: (local, 3, size, size) for name, size in self._sizes.items()}
            check_limits(
                memory=self._workers * (PREFETCH * slot_bytes(shapes, local) + PROCESS_BYTES),
                processes=2 * self._workers,  # each with a thread that waits for its parent
                descriptors=3 * self._workers,  # a pipe, and two of multiprocessing
                what=f"{self._workers} loader workers",
            )
            self._pool = WorkerPool(
                self._decoder,
                shapes=shapes,
                batch=local,
                workers=self._workers,
                where=self._manifest.source.where,
                patience=self.patience,
            )

    def check(self) -> None:
        """Start the workers and wait until each could begin. Raises LostBatchError."""
        if self._pool is not None:
            self._pool.check()

    def close(self) -> None:
        """Stop the workers. Safe to call twice, and in the middle of an epoch."""
        super().close()
        if self._pool is not None:
            self._pool.close()
        if self._thread is not None:
            self._thread.close()

    def _iterate(self, epoch: int, start_step: int, generation: int) -> Iterator[Batch]:
        copies, pinned = self._copy_stream(), self.device.type == "cuda"
        order, asked = self.plan.order(epoch), start_step
        for step in range(start_step, self.steps_per_epoch):
            self._check_current(generation)
            if self._pool is None:
                decoded = self._decode(epoch, self.plan.share(order, step))
                sample_ids, crops, bad = decoded.sample_ids, decoded.crops, decoded.bad
                if pinned:
                    sample_ids = sample_ids.pin_memory()
                    crops = {name: crop.pin_memory() for name, crop in crops.items()}
            else:
                if step == start_step:
                    self._pool.restart()
                while asked < self.steps_per_epoch and self._pool.room:
                    self._pool.ask(epoch, self.plan.share(order, asked))
                    asked += 1
                sample_ids, crops, bad = self._pool.next(pinned=pinned)
            for row, reason in bad:
                self._bad.setdefault(row, reason)
            yield self._to_device(Batch(sample_ids=sample_ids, crops=crops, epoch=epoch), copies)

    def _decode(self, epoch: int, sample_ids: NDArray[np.int64]) -> DecodedBatch:
        """A batch without workers: in a thread, since a file that does not answer would stop this one for good."""
        self._thread = self._thread or DaemonPool(1, "sslfast-decode")
        try:
            return self.patience.result(
                self._thread.submit(self._decoder, epoch, sample_ids), lambda: self._hang(self._decoder.reading)
            )
        except (BadImageError, SourceError) as error:
            raise ValueError(str(error)) from None


def status() -> tuple[bool, str, str]:
    """Usable, reason, remedy: see :func:`sslfast.loaders.loader_status`."""
    try:
        require_strict_pillow()
    except ValueError as error:
        return False, str(error), "set PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False"
    from PIL import __version__, features

    turbo = features.version("libjpeg_turbo")
    library = f"libjpeg-turbo {turbo}" if turbo else "libjpeg without turbo"
    why = why_pillow()
    called = f"JPEGs decoded through Pillow ({why})" if why else "which decodes JPEGs directly"
    return True, f"Pillow {__version__}, {library}, {called}", ""
