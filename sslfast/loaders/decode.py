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
from sslfast.loaders.jpeg_crops import Box, JpegFile, common_jpeg, crop_jpeg, why_pillow
from sslfast.loaders.plan import replacement_rows
from sslfast.ops import is_compiled
from sslfast.ops.crops import crop_pixels
from sslfast.views import ViewConfig, crop_boxes, crop_draws

# Files held in memory at once: enough to draw boxes vectorised, few enough for large photographs.
_GROUP = 32


@dataclass
class DecodedBatch:
    """``sample_ids`` ``[B]`` int64 as decoded, ``crops`` uint8 ``[B, 3, S, S]`` by view, ``bad``: row and reason."""

    sample_ids: Tensor
    crops: dict[str, Tensor]
    bad: list[tuple[int, str]]


def decode_crops(image: ImageHeader, boxes: Sequence[NDArray[np.int64]], sizes: Sequence[int]) -> list[Tensor]:
    """One uint8 ``[3, size, size]`` tensor for each box: see :func:`fill_crops`."""
    outs = [torch.empty(3, size, size, dtype=torch.uint8) for size in sizes]
    fill_crops(image, boxes, outs)
    return outs


def fill_crops(image: ImageHeader, boxes: Sequence[NDArray[np.int64]], outs: Sequence[Tensor]) -> None:
    """Square crops of one image, decoded once: crop, then antialiased bilinear resize in 8 bits.

    The filter of torch's ``interpolate`` and torchvision's ``RandomResizedCrop``; results differ from Pillow's resize
    by rounding. A JPEG is decoded at 1/2, 1/4 or 1/8 if every box then still has at least as many pixels as its crop,
    so that no crop is upsampled because of it; the boxes are rounded outwards to whole pixels of the smaller image.

    Args:
        image: an :class:`OpenImage`, whose pixels are consumed, or a :class:`JpegFile`.
        boxes: for every crop int ``left, top, right, bottom`` in pixels of the upright full-size image.
        outs: for every box a contiguous uint8 ``[3, size, size]``, which is filled.

    Raises:
        BadImageError: the image cannot be decoded.
    """
    stored = [stored_box(image, box) for box in boxes]
    room = min(min(b[2] - b[0], b[3] - b[1]) / out.shape[-1] for b, out in zip(stored, outs, strict=True))
    factor = next((f for f in (8, 4, 2) if room >= f), 1)
    if isinstance(image, JpegFile):
        if crop_jpeg(image, [_scaled(box, factor) for box in stored], outs, factor=factor):
            return
        image = open_image(image.data, image.decoding)
    assert isinstance(image, OpenImage)
    pixels, factor = decode_pixels(image, factor=factor)
    scaled = [_scaled(box, factor) for box in stored]
    if is_compiled():
        contiguous = torch.from_numpy(np.ascontiguousarray(pixels))
        crop_pixels(contiguous, scaled, outs, orientation=image.orientation)
    else:
        _interpolate(torch.from_numpy(pixels), scaled, outs, image.orientation)


def _scaled(box: Box, factor: int) -> Box:
    left, top, right, bottom = box
    return left // factor, top // factor, -(-right // factor), -(-bottom // factor)


def _interpolate(pixels: Tensor, boxes: Sequence[Box], outs: Sequence[Tensor], orientation: int) -> None:
    """:func:`~sslfast.ops.crops.crop_pixels` in torch, equal to the last bit on x86-64."""
    transpose, flip_vertical, flip_horizontal = ORIENTATION[orientation]
    flipped = [axis for axis, flip in ((1, flip_vertical), (2, flip_horizontal)) if flip]
    for (left, top, right, bottom), out in zip(boxes, outs, strict=True):
        part, size = pixels.permute(2, 0, 1)[:, top:bottom, left:right], out.shape[-1]
        if part.shape[1:] != (size, size):
            part = F.interpolate(part[None], size=(size, size), mode="bilinear", antialias=True)[0]
        if transpose:
            part = part.transpose(1, 2)
        out.copy_((part.flip(flipped) if flipped else part).expand(3, size, size))


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

    def __call__(
        self, epoch: int, sample_ids: NDArray[np.int64], crops: dict[str, Tensor] | None = None
    ) -> DecodedBatch:
        """``crops``: where they are written, by view; new memory if not given."""
        if crops is None:
            shapes = {name: (len(sample_ids), 3, view.crop.size, view.crop.size) for name, view in self.views.items()}
            crops = {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}
        batch = DecodedBatch(sample_ids=torch.from_numpy(sample_ids.copy()), crops=crops, bad=[])
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
        fill_crops(image, list(boxes), [crops[slot] for crops in batch.crops.values()])

    def _open(self, row: int) -> ImageHeader:
        if row in self.known_bad:
            raise BadImageError(self.known_bad[row])
        self.reading(row)
        data, decoding = self.source.read(row), self.source.decoding
        common = None if why_pillow() else common_jpeg(data, decoding)
        return open_image(data, decoding) if common is None else common

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
