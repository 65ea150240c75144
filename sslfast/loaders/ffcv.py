"""The ``ffcv`` loader: a .beton file, decoded by FFCV's compiled decoder in threads.

Used of FFCV: the file format (any FFCV program reads these files) and the decoder, libjpeg-turbo with the fast DCT.
Not used: FFCV's ``Loader``. Its random crops come from numba's generator, which cannot be seeded; it ignores the return
code of the decoder, so that damaged JPEGs train as garbage; it compiles for seconds in every process and again for the
last batch; and numba next to OpenCV's TBB can hang at exit. Neither ``ffcv`` nor numba is imported here, so
``NUMBA_THREADING_LAYER`` has no effect. Reads are ``pread`` and not a memory map: a file that is truncated while it is
in use is an error in one line, not SIGBUS.

Reading, decoding and resizing release the interpreter lock. A JPEG is decoded at 1/2, 1/4 or 1/8 by the rule of the
``pillow`` loader, and the resize is the same antialiased filter. Crops of raw images are therefore bit-equal to that
loader's where it decodes at full size, and crops of JPEGs differ by the rounding of the fast DCT: by 1.1 grey levels on
average over photographs (ImageNet's), by at most 1.7 for 99 of 100 of them, single pixels by up to 17.
"""

import os
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sslfast.data import JPG, BadImageError, Beton, BetonSource, DaemonPool, ImageSource, Reading, ffcv_library
from sslfast.loaders.base import ImageLoader
from sslfast.loaders.plan import replacement_rows
from sslfast.views import Batch, ViewConfig, crop_boxes, crop_draws

T = TypeVar("T")

_CHUNK = 8  # images per task of a thread
_AHEAD = 2  # minimum number of steps in flight besides the one being waited for


class FFCVLoader(ImageLoader):
    """Batches of decoded crops from a .beton file, a pure function of (seed, epoch, step) and of the file.

    The same pixels come with any number of threads, after a restart at any step, and, put together over the ranks, with
    any number of ranks. Crop boxes are in pixels of the stored image. ``workers`` are decoding threads. CUDA: pinned
    memory and a copy on a side stream, concurrent with the running step. Arguments: see :class:`ImageLoader`; the
    manifest is that of a .beton file.

    A row's checksum is verified when the row is first read; a JPEG that the decoder reports an error for is bad, too.
    """

    def _open(self, views: dict[str, ViewConfig]) -> None:
        self._decoder = _Decoder(self._manifest.source, views, self.plan.seed)
        weakref.finalize(self, self._decoder.beton.close)
        self._pool = _thread_pool(max(1, self._workers))
        self._steps: deque[_Step] = deque()

    def close(self) -> None:
        """End the threads and close the file. Safe to call twice, and in the middle of an epoch."""
        super().close()
        self._pool.close()
        self._decoder.beton.close()

    def _end_epoch(self) -> None:
        super()._end_epoch()
        while self._steps:
            self._steps.popleft().cancelled = True

    def _iterate(self, epoch: int, start_step: int, generation: int) -> Iterator[Batch]:
        copies = self._copy_stream()
        order = self.plan.order(epoch) if start_step < self.steps_per_epoch else None
        local = self.plan.batch_size // self.plan.world_size
        ahead = max(_AHEAD, -(-2 * self._workers * _CHUNK // local)) if self._workers else 0
        next_step = start_step
        try:
            for _ in range(start_step, self.steps_per_epoch):
                self._check_current(generation)
                while next_step < self.steps_per_epoch and len(self._steps) <= ahead:
                    assert order is not None
                    self._steps.append(self._begin(epoch, self.plan.share(order, next_step)))
                    next_step += 1
                yield self._to_device(self._finish(self._steps[0]), copies)
        finally:
            if generation == self._generation:
                self._end_epoch()

    def _begin(self, epoch: int, rows: NDArray[np.int64]) -> "_Step":
        step = _Step(epoch, rows.copy())
        step.planned = self._pool.submit(self._decoder.plan, step, self._pool, self.device.type == "cuda")
        return step

    def _result(self, future: "Future[T]") -> T:
        return self.patience.result(future, lambda: self._hang(self._decoder.reading))

    def _finish(self, step: "_Step") -> Batch:
        """Wait for a step, and replace its bad rows."""
        assert step.planned is not None
        for part in self._result(step.planned):
            self._result(part)
        self._steps.popleft()
        candidates: dict[int, list[int]] = {}
        while step.bad:
            failed, step.bad = sorted(step.bad), []
            for slot, reason in failed:
                row = int(step.sample_ids[slot])
                if self._on_bad_image == "error":
                    raise ValueError(
                        f"cannot train on row {row} of {self._manifest.source} ({self._manifest.paths[row]}): "
                        f"{reason}; make the file again with `sslfast data prepare`, or pass --on-bad-image skip"
                    )
                self._bad.setdefault(row, reason)
                if slot not in candidates:
                    candidates[slot] = replacement_rows(row, self.num_rows, seed=self.plan.seed, epoch=step.epoch)[::-1]
                if not candidates[slot]:
                    raise ValueError(
                        f"no usable replacement found for row {row} of {self._manifest.source} ({reason}): nearly "
                        f"every image tried is bad ({len(self._bad)} so far); make the file again with "
                        "`sslfast data prepare`"
                    )
                step.sample_ids[slot] = candidates[slot].pop()
            slots = [slot for slot, _ in failed]
            step.boxes[slots] = self._decoder.boxes(step.epoch, step.sample_ids[slots])
            self._result(self._pool.submit(self._decoder.fill, step, slots))
        sample_ids = torch.from_numpy(step.sample_ids)
        sample_ids = sample_ids.pin_memory() if self.device.type == "cuda" else sample_ids
        return Batch(sample_ids=sample_ids, crops=step.crops, epoch=step.epoch)


@dataclass
class _Step:
    """A batch in flight. Threads write to different slots of ``crops``; ``bad`` collects (slot, reason)."""

    epoch: int
    sample_ids: NDArray[np.int64]
    planned: "Future[list[Future[None]]] | None" = None
    cancelled: bool = False
    boxes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    crops: dict[str, Tensor] = field(default_factory=dict)
    bad: list[tuple[int, str]] = field(default_factory=list)


class BetonImages:
    """Whole images of a .beton file. Shared by all threads; each has its own buffers, which only grow.

    Raises:
        ValueError: the source is no .beton file, or its file is another one now.
    """

    def __init__(self, source: ImageSource) -> None:
        if not isinstance(source, BetonSource) or source.archive is None:
            raise ValueError(f"the ffcv loader reads .beton files: make one with `sslfast data prepare {source}`")
        self.source, self.beton = source, Beton(source.archive)
        if self.beton.manifest.source.identity() != source.identity():
            self.beton.close()
            raise ValueError(f"{source} is no longer the file that was opened before: start again")
        self.decode = ffcv_library.load_decoder()
        self._is_checked = np.zeros(len(self.beton.sizes), dtype=bool)
        self._own = threading.local()
        self.reading = Reading()

    def pixels(self, row: int, factor: int) -> tuple[NDArray[np.uint8], int]:
        """The image ``[H, W, 3]`` at 1 / factor, valid until the thread's next call, and the factor that was applied (1
        for raw pixels). Raises BadImageError."""
        self.reading(row)
        sample = int(self.source.sample(np.array([row]))[0])
        width, height = (int(side) for side in self.beton.shapes[sample])
        size = int(self.beton.sizes[sample])
        is_jpg = self.beton.modes[sample] == JPG
        data = self._buffer("data", size)
        if not is_jpg and size != height * width * 3:
            raise BadImageError(f"damaged: {size} bytes for {width} x {height} pixels")
        try:
            got = os.preadv(self.beton.descriptor, [data.data[:size]], int(self.beton.offsets[sample]))
        except OSError as error:
            raise BadImageError(f"unreadable: {error.strerror or error}") from None
        if got != size:
            raise BadImageError("the file was cut short while it was in use")
        if not self._is_checked[sample]:
            if zlib.crc32(data.data[:size]) != self.beton.sums[sample]:
                raise BadImageError("damaged: wrong checksum")
            self._is_checked[sample] = True
        if not is_jpg:
            return data[:size].reshape(height, width, 3), 1
        small_height, small_width = -(-height // factor), -(-width // factor)
        pixels = self._buffer("pixels", small_height * small_width * 3)
        if self.decode(_address(data), size, height, width, _address(pixels), factor):
            raise BadImageError("damaged: the JPEG decoder complains")
        return pixels[: small_height * small_width * 3].reshape(small_height, small_width, 3), factor

    def _buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        buffer: NDArray[np.uint8] | None = getattr(self._own, name, None)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(max(size, 1 << 20), dtype=np.uint8)
            setattr(self._own, name, buffer)
        return buffer


class _Decoder(BetonImages):
    """Fills the crops of a step."""

    def __init__(self, source: ImageSource, views: Mapping[str, ViewConfig], seed: int) -> None:
        super().__init__(source)
        self.views = dict(views)
        self.seed = seed

    def plan(self, step: _Step, pool: DaemonPool, pinned: bool) -> "list[Future[None]]":
        """Draw the boxes, allocate the buffers, and submit the slots to the pool."""
        if step.cancelled:
            return []
        step.boxes = self.boxes(step.epoch, step.sample_ids)
        for name, view in self.views.items():
            size = view.crop.size
            step.crops[name] = torch.empty(len(step.sample_ids), 3, size, size, dtype=torch.uint8, pin_memory=pinned)
        count = len(step.sample_ids)
        return [
            pool.submit(self.fill, step, range(start, min(start + _CHUNK, count))) for start in range(0, count, _CHUNK)
        ]

    def boxes(self, epoch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[B, views, 4]``."""
        shapes = self.beton.shapes[self.source.sample(sample_ids)]
        drawn = torch.from_numpy(np.ascontiguousarray(sample_ids))
        boxes = [
            crop_boxes(crop_draws(drawn, seed=self.seed, epoch=epoch, position=position), shapes, view.crop)
            for position, view in enumerate(self.views.values())
        ]
        return np.stack(boxes, axis=1)

    def fill(self, step: _Step, slots: Sequence[int]) -> None:
        """Decode the rows of some slots into all views."""
        for slot in slots:
            if step.cancelled:
                return
            try:
                self._fill(step, slot)
            except BadImageError as error:
                step.bad.append((slot, error.reason))

    def _fill(self, step: _Step, slot: int) -> None:
        boxes = step.boxes[slot].tolist()
        sizes = [view.crop.size for view in self.views.values()]
        room = min(min(b[2] - b[0], b[3] - b[1]) / size for b, size in zip(boxes, sizes, strict=True))
        pixels, factor = self.pixels(int(step.sample_ids[slot]), next((f for f in (8, 4, 2) if room >= f), 1))
        for out, (left, top, right, bottom), size in zip(step.crops.values(), boxes, sizes, strict=True):
            part = pixels[top // factor : -(-bottom // factor), left // factor : -(-right // factor)]
            if part.shape[:2] != (size, size):
                # torch resizes contiguous pixels twice as fast as strided ones, with bit-equal results.
                packed = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)[None]
                resized = F.interpolate(packed, size=(size, size), mode="bilinear", antialias=True)
                part = resized[0].permute(1, 2, 0).numpy()
            np.copyto(out[slot].numpy(), part.transpose(2, 0, 1))


def _address(buffer: NDArray[np.uint8]) -> int:
    return int(buffer.ctypes.data)


def _thread_pool(workers: int) -> DaemonPool:
    """Threads whose torch operations are single-threaded; the setting of all other threads is unchanged."""
    others = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # else the thread's first operation would set the default number of threads
        torch.set_num_threads(1)
        started.wait()

    pool = DaemonPool(workers, "sslfast-ffcv", start)
    started.wait()
    # New threads inherit the last number that was set; the setting itself is per thread.
    torch.set_num_threads(others)
    return pool


def status() -> tuple[bool, str, str]:
    """Usable, reason, remedy: see :func:`sslfast.loaders.loader_status`."""
    return ffcv_library.status()
