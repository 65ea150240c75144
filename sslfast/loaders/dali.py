"""The ``dali`` loader: JPEG decoding (nvJPEG, or libjpeg-turbo on the CPU) and resize in NVIDIA DALI.

Rows, order, the shares of the ranks, crop boxes and replacements of bad images are bit-equal to those of the ``pillow``
loader. Pixels differ by the rounding of decoder and filter (on the CPU by at most 3 of 255, on average by less than
0.3), and by more where the ``pillow`` loader decodes a large JPEG at 1/2 to 1/8, which DALI cannot.

A file that DALI cannot decode ends its pipeline, so threads read and check every file before DALI gets it:

- Every rule of :mod:`sslfast.data.images` that needs no decoded pixels is checked, a JPEG's markers included.
- DALI decodes JPEGs that are complete, Huffman-coded, 8-bit, grayscale or YCbCr. Everything else (PNG, WebP, CMYK,
  16 bits, a JPEG without an end marker, ...) is decoded and checked in these threads, as by the ``pillow`` loader.
- An image that DALI fails on nevertheless is found by decoding the batch's images one by one. From then on the threads
  decode it, too, and the run continues with a new pipeline.

Not detected is what no decoder reports: flipped bits, or blocks of zeros, in the coded data of a JPEG.

The pipeline has neither randomness nor state, so nothing of it is stored in checkpoints.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslfast.data import (
    ORIENTATION,
    BadImageError,
    DaemonPool,
    ImageHeader,
    open_image,
    require_strict_pillow,
    silence_pillow,
)
from sslfast.loaders.base import ImageLoader
from sslfast.loaders.dali_graph import DaliDecoder, EncodedImage, refused_images, short_reason
from sslfast.loaders.decode import BatchDecoder, DecodedBatch, decode_crops, stored_box
from sslfast.loaders.jpeg_crops import JpegFile, common_jpeg
from sslfast.views import Batch, ViewConfig

INSTALL = "pip install nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20"
_PREFETCH = 2  # batches inside DALI: one being handed over, one being decoded
_AHEAD = 2  # further batches being read from disk
_GROUP = 32  # files of one reading task


@dataclass
class _Items(DecodedBatch):
    """Prepared samples of a group: by slot, either JPEGs for DALI or the crops of each view, decoded already."""

    encoded: dict[int, EncodedImage] = field(default_factory=dict)
    own: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass
class _Preparer(BatchDecoder):
    """A BatchDecoder that leaves common JPEGs undecoded (:meth:`prepare`).

    Called from many threads, which is safe: the shared ``known_bad`` and ``refused`` only grow and depend on the files
    alone.
    """

    refused: set[int] = field(default_factory=set)
    """Rows that DALI failed on."""

    def prepare(self, epoch: int, sample_ids: NDArray[np.int64]) -> _Items:
        items = _Items(sample_ids=torch.from_numpy(sample_ids.copy()), crops={}, bad=[])
        self._group(epoch, list(range(len(sample_ids))), items)
        return items

    def _open(self, row: int) -> ImageHeader:
        if row in self.known_bad:
            raise BadImageError(self.known_bad[row])
        self.reading(row)
        data, decoding = self.source.read(row), self.source.decoding
        if row in self.refused:
            return open_image(data, decoding)
        # Most files need no more than this. Opening them with Pillow would take half of the time spent on a file here,
        # holding the interpreter lock.
        common = common_jpeg(data, decoding)
        return open_image(data, decoding) if common is None else common

    def _take(self, batch: DecodedBatch, slot: int, image: ImageHeader, boxes: NDArray[np.int64]) -> None:
        assert isinstance(batch, _Items)
        if isinstance(image, JpegFile):
            stored = np.array([stored_box(image, box) for box in boxes], dtype=np.int32)
            batch.encoded[slot] = EncodedImage(np.frombuffer(image.data, np.uint8), stored, image.orientation)
        else:
            batch.own[slot] = decode_crops(image, list(boxes), [view.crop.size for view in self.views.values()])


@dataclass
class _Step:
    """A batch in flight: first being read (``groups``), then prepared (``items``), then inside DALI."""

    sample_ids: NDArray[np.int64]
    """As planned, before any replacement."""
    groups: list[Future[_Items]]
    items: _Items | None = None

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`join` neither waits nor raises."""
        return all(group.done() and group.exception() is None for group in self.groups)

    def join(self, result: "Callable[[Future[_Items]], _Items]" = Future.result) -> _Items:
        """Wait for the groups by ``result``; raises the BadImageError of one of them."""
        if self.items is None:
            parts = [result(group) for group in self.groups]
            items = _Items(
                torch.cat([part.sample_ids for part in parts]), {}, [bad for part in parts for bad in part.bad]
            )
            for index, part in enumerate(parts):
                items.encoded.update({index * _GROUP + slot: image for slot, image in part.encoded.items()})
                items.own.update({index * _GROUP + slot: crops for slot, crops in part.own.items()})
            self.items, self.groups = items, []
        return self.items


class DaliLoader(ImageLoader):
    """Batches of decoded crops, a pure function of (seed, epoch, step) and of the files.

    The same pixels come with any number of threads, after a restart at any step, and, put together over the ranks,
    with any number of ranks. ``workers`` is the number of threads that read and check files, and of DALI's own threads;
    0 counts as 1. There are no worker processes. CUDA: nvJPEG decodes on the device, and the host never waits for it.
    Arguments: see :class:`ImageLoader`.

    Raises:
        ValueError: arguments out of range, or DALI is not installed.
        RuntimeError: DALI cannot run on the device.
    """

    def _open(self, views: dict[str, ViewConfig]) -> None:
        usable, reason, remedy = status()
        if not usable:
            raise ValueError(f"loader 'dali' cannot be used: {reason}; {remedy}")
        self._threads = max(1, self._workers)
        self._preparer = _Preparer(
            source=self._manifest.source,
            views=views,
            seed=self.plan.seed,
            on_bad_image=self._on_bad_image,
        )
        self._reading: deque[_Step] = deque()
        self._decoding: deque[_Step] = deque()
        # Permanently, not around each use: the state of `warnings` is per process, and files are read in threads.
        silence_pillow()
        self._decoder: DaliDecoder | None = self._new_decoder()
        self._pool: DaemonPool | None = DaemonPool(self._threads, "sslfast-read")

    def close(self) -> None:
        """End the threads and free DALI's memory. Safe to call twice, and in the middle of an epoch."""
        super().close()
        self._forget()
        if self._pool is not None:
            self._pool.close()
        self._pool = self._decoder = None

    def _iterate(self, epoch: int, start_step: int, generation: int) -> Iterator[Batch]:
        if start_step == self.steps_per_epoch:
            return
        order, submitted = self.plan.order(epoch), start_step
        for step in range(start_step, self.steps_per_epoch):
            self._check_current(generation)
            if step == start_step:
                self._forget()
                self._decoder = self._decoder or self._new_decoder()
            while submitted < min(self.steps_per_epoch, step + 1 + _PREFETCH + _AHEAD):
                self._reading.append(self._read(epoch, self.plan.share(order, submitted)))
                submitted += 1
            yield self._next(epoch)

    def _read(self, epoch: int, sample_ids: NDArray[np.int64]) -> _Step:
        assert self._pool is not None
        parts = [sample_ids[start : start + _GROUP] for start in range(0, len(sample_ids), _GROUP)]
        return _Step(sample_ids, [self._pool.submit(self._preparer.prepare, epoch, part) for part in parts])

    def _next(self, epoch: int) -> Batch:
        """The oldest step as a batch. After an exception, Ctrl-C included, the state of DALI's queue is unknown."""
        try:
            decoded = self._wait(epoch)
            items = self._decoding[0].join()
            batch = self._batch(epoch, items, decoded)
            if decoded:
                assert self._decoder is not None
                self._decoder.release()
            self._decoding.popleft()
            self._feed(wait=False)
        except BaseException:
            self._decoder = None
            raise
        for row, reason in items.bad:
            self._bad.setdefault(row, reason)
        return batch

    def _wait(self, epoch: int) -> list[Tensor]:
        """DALI's crops of the oldest step; none where the threads decoded all of it."""
        while True:
            self._feed(wait=True)
            if not self._decoding[0].join().encoded:
                return []
            assert self._decoder is not None
            try:
                return self._decoder.wait()
            except Exception as error:  # DALI's errors have no class of their own
                self._recover(epoch, error)

    def _batch(self, epoch: int, items: _Items, decoded: Sequence[Tensor]) -> Batch:
        crops = {
            name: torch.empty(len(items.sample_ids), 3, size, size, dtype=torch.uint8, device=self.device)
            for name, size in self._sizes.items()
        }
        outs = list(crops.values())
        if decoded:
            _scatter(decoded, items.encoded, outs)
        if items.own:
            slots = _to_device(torch.tensor(list(items.own)), self.device)
            for out, own in zip(outs, zip(*items.own.values(), strict=True), strict=True):
                out[slots] = _to_device(torch.stack(own), self.device)
        return Batch(sample_ids=_to_device(items.sample_ids, self.device), crops=crops, epoch=epoch)

    def _feed(self, *, wait: bool) -> None:
        """Pass prepared steps to DALI; with ``wait`` at least one, raising what is wrong with it."""
        while self._reading and len(self._decoding) < _PREFETCH:
            step = self._reading[0]
            if not step.is_ready and (self._decoding or not wait):
                return
            try:
                items = step.join(self._result)
            except BadImageError as error:
                raise ValueError(error.reason) from None
            self._reading.popleft()
            self._decoding.append(step)
            if items.encoded:
                assert self._decoder is not None
                self._decoder.start(list(items.encoded.values()))

    def _result(self, group: Future[_Items]) -> _Items:
        return self.patience.result(group, lambda: self._hang(self._preparer.reading))

    def _recover(self, epoch: int, error: Exception) -> None:
        """After DALI failed: find the images it fails on, have the threads decode them, and start a new pipeline."""
        steps, self._decoder = list(self._decoding), None
        suspects = {
            int(items.sample_ids[slot]): image
            for items in (s.join() for s in steps)
            for slot, image in items.encoded.items()
        }
        found = refused_images(list(suspects.values()), list(self._sizes.values()), device=self.device)
        if not found:
            raise RuntimeError(
                f"DALI failed on a batch, but on none of its images alone ({short_reason(error)}): usually memory ran "
                "out; use a smaller batch, or --loader.name pillow"
            ) from error
        rows = list(suspects)
        self._preparer.refused.update(rows[position] for position in found)
        self._decoder = self._new_decoder()
        # Read again what contains them; the rest only has to be decoded again.
        self._decoding.clear()
        for step in reversed(steps):
            assert step.items is not None
            if self._preparer.refused & {int(row) for row in step.items.sample_ids}:
                known = step.items.bad
                step = self._read(epoch, step.sample_ids)
                for row, reason in known:
                    self._bad.setdefault(row, reason)
            self._reading.appendleft(step)

    def _new_decoder(self) -> DaliDecoder:
        local = self.plan.batch_size // self.plan.world_size
        return DaliDecoder(
            list(self._sizes.values()),
            batch_size=local,
            threads=self._threads,
            device=self.device,
            prefetch=_PREFETCH,
        )

    def _forget(self) -> None:
        """Drop all steps in flight."""
        for step in self._reading:
            for group in step.groups:
                group.cancel()
        steps = [step for step in self._decoding if step.join().encoded]
        self._reading.clear()
        self._decoding.clear()
        # Kept only where its queue is known to be empty; else the next epoch would get the crops of this one.
        decoder, self._decoder = self._decoder, None
        try:
            for _ in steps:
                if decoder is not None:
                    decoder.wait()
                    decoder.release()
        except Exception:  # an image of a dropped batch
            return
        self._decoder = decoder


def status() -> tuple[bool, str, str]:
    """Usable, reason, remedy: see :func:`sslfast.loaders.loader_status`."""
    try:
        from nvidia.dali import __version__
    except ImportError as error:
        missing = (error.name or "").startswith("nvidia")
        return False, "NVIDIA DALI is not installed" if missing else f"NVIDIA DALI does not load: {error}", INSTALL
    try:
        require_strict_pillow()
    except ValueError as error:
        return False, str(error), "set PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False"
    return True, f"DALI {__version__}", ""


def _scatter(decoded: Sequence[Tensor], images: Mapping[int, EncodedImage], outs: Sequence[Tensor]) -> None:
    """Copy DALI's crops, in the order of ``images``, to their slots and turn them upright."""
    turned: dict[int, list[int]] = {}
    for slot, image in images.items():
        if image.orientation != 1:
            turned.setdefault(image.orientation, []).append(slot)
    device, in_order = outs[0].device, list(images) == list(range(len(outs[0])))
    slots = slice(None) if in_order else _to_device(torch.tensor(list(images)), device)
    for out, crops in zip(outs, decoded, strict=True):
        out[slots] = crops
    for orientation, which in turned.items():
        transpose, flip_vertical, flip_horizontal = ORIENTATION[orientation]
        axes = [axis for axis, flip in ((2, flip_vertical), (3, flip_horizontal)) if flip]
        selected = _to_device(torch.tensor(which), device)
        for out in outs:
            part = out[selected]
            out[selected] = (part.transpose(2, 3) if transpose else part).flip(axes)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Asynchronously: the copy from page-locked memory does not block the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
