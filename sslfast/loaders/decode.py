"""Batches of crops from image files: read, decode once, crop every view, and replace bad images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sslfast.data import (
    ORIENTATION,
    BadImageError,
    ImageHeader,
    ImageSource,
    OnBadImage,
    OpenImage,
    Reading,
    decode_pixels,
    open_image,
    quiet_pillow,
)
from sslfast.loaders.plan import replacement_rows
from sslfast.views import ViewConfig, crop_boxes, crop_draws

# Files held in memory at once: enough to draw boxes vectorised, few enough for large photographs.
_GROUP = 32


@dataclass
class DecodedBatch:
    """``sample_ids`` ``[B]`` int64 as decoded, ``crops`` uint8 ``[B, 3, S, S]`` by view, ``bad``: row and reason."""

    sample_ids: Tensor
    crops: dict[str, Tensor]
    bad: list[tuple[int, str]]


def decode_crops(opened: OpenImage, boxes: Sequence[NDArray[np.int64]], sizes: Sequence[int]) -> list[Tensor]:
    """Square crops of one image, decoded once: crop, then antialiased bilinear resize in 8 bits.

    The same filter as torchvision's ``RandomResizedCrop``; results differ from Pillow's resize by rounding.
    A JPEG is decoded at 1/2, 1/4 or 1/8 if every box then still has at least as many pixels as its crop, so that no
    crop is upsampled because of it; the boxes are rounded outwards to whole pixels of the smaller image.

    Args:
        opened: the image; its pixels are consumed.
        boxes: for every crop int ``left, top, right, bottom`` in pixels of the upright full-size image.
        sizes: side of each crop in pixels.

    Returns:
        One uint8 ``[3, size, size]`` tensor for each box. Raises BadImageError.
    """
    room = min(min(b[2] - b[0], b[3] - b[1]) / size for b, size in zip(boxes, sizes, strict=True))
    pixels, factor = decode_pixels(opened, factor=next((f for f in (8, 4, 2) if room >= f), 1))
    transpose, flip_vertical, flip_horizontal = ORIENTATION[opened.orientation]
    flipped = [axis for axis, flip in ((1, flip_vertical), (2, flip_horizontal)) if flip]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    crops = []
    for box, size in zip(boxes, sizes, strict=True):
        left, top, right, bottom = stored_box(opened, box)
        part = image[:, top // factor : -(-bottom // factor), left // factor : -(-right // factor)]
        if part.shape[1:] != (size, size):
            part = F.interpolate(part[None], size=(size, size), mode="bilinear", antialias=True)[0]
        if transpose:
            part = part.transpose(1, 2)
        crops.append((part.flip(flipped) if flipped else part).expand(3, size, size))
    return crops


def stored_box(opened: ImageHeader, box: NDArray[np.int64]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in the image as stored, for a box in the upright image."""
    transpose, flip_vertical, flip_horizontal = ORIENTATION[opened.orientation]
    left, top, right, bottom = (int(edge) for edge in box)
    if flip_horizontal:
        left, right = opened.width - right, opened.width - left
    if flip_vertical:
        top, bottom = opened.height - bottom, opened.height - top
    return (top, left, bottom, right) if transpose else (left, top, right, bottom)


@dataclass
class BatchDecoder:
    """``decoder(epoch, sample_ids)`` -> :class:`DecodedBatch`, a pure function of its arguments and of the files.

    A bad image raises BadImageError (``error``), or is replaced by another row drawn from (seed, epoch, bad row,
    attempt) with that row's own crop boxes (``skip``): shapes are unchanged, and ``sample_ids`` names the rows that
    were decoded. When all ``REPLACEMENTS`` candidates are bad, too, BadImageError in both modes.
    """

    source: ImageSource
    """Where the images are: a packed copy if the decoder is sent to worker processes."""
    views: Mapping[str, ViewConfig]
    seed: int
    on_bad_image: OnBadImage
    known_bad: dict[int, str] = field(default_factory=dict)
    """Bad rows so far: not decoded again, which does not change results."""
    reading: Callable[[int], None] = field(default_factory=Reading)
    """Told the row of every file that is about to be read."""

    def __call__(self, epoch: int, sample_ids: NDArray[np.int64]) -> DecodedBatch:
        sizes = [view.crop.size for view in self.views.values()]
        batch = DecodedBatch(
            sample_ids=torch.from_numpy(sample_ids.copy()),
            crops={
                name: torch.empty(len(sample_ids), 3, size, size, dtype=torch.uint8)
                for name, size in zip(self.views, sizes, strict=True)
            },
            bad=[],
        )
        with quiet_pillow():
            for start in range(0, len(sample_ids), _GROUP):
                self._group(epoch, list(range(start, min(start + _GROUP, len(sample_ids)))), batch)
        return batch

    def _group(self, epoch: int, slots: list[int], batch: DecodedBatch) -> None:
        """Fill the slots; those that fail again with replacements, until none is left."""
        candidates: dict[int, list[int]] = {}
        while slots:
            opened: dict[int, ImageHeader] = {}
            failed: list[int] = []
            for slot in slots:
                try:
                    opened[slot] = self._open(int(batch.sample_ids[slot]))
                except BadImageError as error:
                    self._bad(batch, slot, error)
                    failed.append(slot)
            boxes = self._boxes(epoch, batch.sample_ids[list(opened)], list(opened.values()))
            for position, (slot, image) in enumerate(opened.items()):
                try:
                    self._take(batch, slot, image, boxes[position])
                except BadImageError as error:
                    self._bad(batch, slot, error)
                    failed.append(slot)
            for slot in failed:
                row = int(batch.sample_ids[slot])
                if slot not in candidates:
                    candidates[slot] = replacement_rows(row, len(self.source), seed=self.seed, epoch=epoch)[::-1]
                if not candidates[slot]:
                    raise BadImageError(
                        f"no usable replacement found for {self.source.where(row)} ({self.known_bad[row]}): nearly "
                        f"every image tried is bad ({len(self.known_bad)} so far); list them with "
                        f"`sslfast data verify {self.source}` and repair them"
                    )
                batch.sample_ids[slot] = candidates[slot].pop()
            slots = failed

    def _take(self, batch: DecodedBatch, slot: int, image: ImageHeader, boxes: NDArray[np.int64]) -> None:
        """Fill a slot with the image's crops, one per view. Raises BadImageError."""
        assert isinstance(image, OpenImage)
        crops = decode_crops(image, list(boxes), [view.crop.size for view in self.views.values()])
        for out, crop in zip(batch.crops.values(), crops, strict=True):
            out[slot] = crop

    def _open(self, row: int) -> ImageHeader:
        if row in self.known_bad:
            raise BadImageError(self.known_bad[row])
        self.reading(row)
        return open_image(self.source.read(row), self.source.decoding)

    def _boxes(self, epoch: int, sample_ids: Tensor, images: list[ImageHeader]) -> NDArray[np.int64]:
        """``[len(images), views, 4]``."""
        shape = np.array([(image.width, image.height) for image in images], dtype=np.int64).reshape(-1, 2)
        boxes = [
            crop_boxes(crop_draws(sample_ids, seed=self.seed, epoch=epoch, position=position), shape, view.crop)
            for position, view in enumerate(self.views.values())
        ]
        return np.stack(boxes, axis=1)

    def _bad(self, batch: DecodedBatch, slot: int, error: BadImageError) -> None:
        row = int(batch.sample_ids[slot])
        if self.on_bad_image == "error":
            raise BadImageError(
                f"cannot train on {self.source.where(row)} (row {row}): {error.reason}; repair or remove the file and "
                "start a new run, or pass --on-bad-image skip"
            )
        if row not in self.known_bad:
            self.known_bad[row] = error.reason
            batch.bad.append((row, error.reason))
