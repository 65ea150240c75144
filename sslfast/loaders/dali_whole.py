"""Whole images decoded, resized and cropped by DALI in the order that is asked for: the evaluations' use of it.

As in the ``dali`` loader, threads read and check every file, and decode what DALI does not: other formats than common
JPEGs, very long images, images that DALI fails on. An image that cannot be used is its reason in place of pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sslfast.data import (
    ORIENTATION,
    BadImageError,
    DaemonPool,
    ImageHeader,
    ImageSource,
    check_size,
    quiet_pillow,
    scan_jpeg,
)
from sslfast.loaders.dali_graph import WholeDecoder, WholeImage, refused_images, short_reason
from sslfast.loaders.decode import stored_box
from sslfast.views import CentreCrop

_PREFETCH = 2  # batches inside DALI
_AHEAD = 2  # further batches being read

Item = WholeImage | Tensor | str
"""An image for DALI, its pixels, or why it cannot be used."""


class DaliImages:
    """Batches of whole images: lists of uint8 ``[3, S, S]`` on the device, or reasons, in the order of the rows.

    Args:
        source: of the image files.
        crop: what is seen of an image.
        decode: bytes of a file -> its pixels ``[3, S, S]``, for those that DALI does not decode; raises BadImageError.
        longest: largest aspect ratio of an image that DALI resizes.
        batch_size: images of a batch.
        threads: that read files, and of DALI.
        device: of the pixels.
        result: waits for a future.
        reading: told the row of a file that is about to be read.
    """

    def __init__(
        self,
        source: ImageSource,
        crop: CentreCrop,
        *,
        decode: Callable[[bytes], Tensor],
        longest: float,
        batch_size: int,
        threads: int,
        device: torch.device,
        result: "Callable[[Future[Item]], Item]",
        reading: Callable[[int], None],
    ) -> None:
        self.source, self.crop, self.longest, self.device = source, crop, longest, device
        self._decode, self._result, self._reading = decode, result, reading
        self._batch_size, self._threads = batch_size, threads
        self._decoder = self._new_decoder()

    def __call__(self, rows: Sequence[int]) -> Iterator[tuple[list[int], list[Tensor | str]]]:
        remaining = iter(rows)
        with quiet_pillow(), DaemonPool(self._threads, "sslfast-images") as pool:
            read: deque[tuple[list[int], list[Future[Item]]]] = deque()
            started: deque[tuple[list[int], list[Item]]] = deque()
            while True:
                while len(read) < _AHEAD and (some := list(islice(remaining, self._batch_size))):
                    read.append((some, [pool.submit(self._prepare, row) for row in some]))
                if read and len(started) < _PREFETCH:
                    some, futures = read.popleft()
                    started.append((some, [self._result(future) for future in futures]))
                    self._start(started[-1][1])
                    continue
                if not started:
                    return
                crops = self._wait(started)
                some, items = started.popleft()
                yield (
                    some,
                    [
                        item
                        if isinstance(item, str)
                        else item.to(self.device)
                        if isinstance(item, Tensor)
                        else next(crops)
                        for item in items
                    ],
                )

    def _prepare(self, row: int) -> Item:
        """Read and check a file; its pixels where DALI does not decode it."""
        self._reading(row)
        try:
            data = self.source.read(row)
            scan = scan_jpeg(data)
            if not scan.is_common or max(scan.width, scan.height) > self.longest * min(scan.width, scan.height):
                return self._decode(data)
            check_size(scan.width, scan.height, self.source.decoding)
            turned = ORIENTATION[scan.orientation][0]
            shape, box = self.crop.plan(*((scan.height, scan.width) if turned else (scan.width, scan.height)))
            stored = np.array([stored_box(ImageHeader(*shape, scan.orientation), np.array(box))], dtype=np.int32)
            encoded = np.frombuffer(data[: scan.end], np.uint8)
            return WholeImage(encoded, stored, scan.orientation, shape[::-1] if turned else shape)
        except BadImageError as error:
            return error.reason

    def _start(self, items: Sequence[Item]) -> None:
        images = [item for item in items if isinstance(item, WholeImage)]
        if images:
            self._decoder.start(images)

    def _wait(self, started: deque[tuple[list[int], list[Item]]]) -> Iterator[Tensor]:
        """The crops of the oldest batch, upright; images that DALI fails on are decoded here, in place."""
        while True:
            images = [item for item in started[0][1] if isinstance(item, WholeImage)]
            if not images:
                return iter(())
            try:
                (crops,) = self._decoder.wait()
                found = [_upright(crop, image.orientation) for crop, image in zip(crops, images, strict=True)]
                self._decoder.release()
            except Exception as error:  # DALI's errors have no class of their own
                self._recover(started, error)
            else:
                return iter(found)

    def _recover(self, started: deque[tuple[list[int], list[Item]]], error: Exception) -> None:
        """Replace the images that DALI fails on by what Pillow makes of them, and start all batches again."""
        places = [(items, i) for _, items in started for i, item in enumerate(items) if isinstance(item, WholeImage)]
        images = [items[i] for items, i in places]
        refused = refused_images(
            [image for image in images if isinstance(image, WholeImage)],
            [self.crop.size],
            device=self.device,
            decoder=WholeDecoder,
        )
        if not refused:
            raise RuntimeError(
                f"DALI failed on a batch, but on none of its images alone ({short_reason(error)}): usually memory ran "
                "out; use a smaller --batch-size, or --loader pillow"
            ) from error
        for position in refused:
            items, i = places[position]
            image = items[i]
            assert isinstance(image, WholeImage)
            try:
                items[i] = self._decode(image.data.tobytes())
            except BadImageError as problem:
                items[i] = problem.reason
        self._decoder = self._new_decoder()
        for _, items in started:
            self._start(items)

    def _new_decoder(self) -> WholeDecoder:
        return WholeDecoder(
            [self.crop.size],
            batch_size=self._batch_size,
            threads=self._threads,
            device=self.device,
            prefetch=_PREFETCH,
        )


def _upright(crop: Tensor, orientation: int) -> Tensor:
    """A copy of ``[3, S, S]``, turned as :func:`stored_box` expects."""
    transpose, flip_vertical, flip_horizontal = ORIENTATION[orientation]
    turned = crop.transpose(1, 2) if transpose else crop
    return turned.flip([axis for axis, flip in ((1, flip_vertical), (2, flip_horizontal)) if flip])  # a copy
