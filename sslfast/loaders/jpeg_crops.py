"""The decoder of common JPEGs: the libjpeg-turbo that Pillow is linked with, called without Pillow around it.

It is the library that Pillow decodes with, so a crop has the same pixels whichever of the two makes it, and a run may
be resumed where the other one does. What it saves: Pillow's own parsing of the file, its copy of the pixels with four
bytes each and the copy of that to numpy, the columns and rows that no crop needs, and an image in memory.

Used for files whose markers leave no doubt (:attr:`~sslfast.data.jpeg.JpegScan.is_common`). Where the library reports
an error or as little as a warning, Pillow decodes the file, and its outcome holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
import torch
from PIL import Image, _imaging
from torch import Tensor

from sslfast.data import ORIENTATION, Decoding, ImageHeader, check_size, scan_jpeg
from sslfast.ops import crops

Box = tuple[int, int, int, int]


@dataclass
class JpegFile(ImageHeader):
    """A JPEG that every decoder treats alike, not decoded."""

    data: bytes
    """Up to the end marker."""
    channels: int
    decoding: Decoding


def common_jpeg(data: bytes, decoding: Decoding) -> JpegFile | None:
    """The file, if it is a common JPEG; BadImageError where its size is not allowed."""
    scan = scan_jpeg(data)
    if not scan.is_common:
        return None
    check_size(scan.width, scan.height, decoding)
    shape = (scan.height, scan.width) if ORIENTATION[scan.orientation][0] else (scan.width, scan.height)
    return JpegFile(*shape, scan.orientation, data[: scan.end], len(scan.components), decoding)


@cache
def why_pillow() -> str:
    """Why Pillow decodes common JPEGs, too; empty where its library is called directly."""
    return crops.bind_libjpeg(_imaging.__file__) or ("" if _agrees() else "libjpeg with other pixels than Pillow's")


def crop_jpeg(file: JpegFile, boxes: Sequence[Box], outs: Sequence[Tensor], *, factor: int) -> bool:
    """Fill ``outs``; False where Pillow must: see :func:`sslfast.ops.crops.crop_jpeg`."""
    if why_pillow():
        return False
    turned = ORIENTATION[file.orientation][0]
    return crops.crop_jpeg(
        file.data,
        boxes,
        outs,
        size=(file.height, file.width) if turned else (file.width, file.height),
        channels=file.channels,
        factor=factor,
        orientation=file.orientation,
    )


def _agrees() -> bool:
    """Whether a box behind skipped rows and columns, with halved colours, has the pixels that Pillow decodes."""
    y, x = np.mgrid[0:160, 0:200]
    picture = Image.fromarray(np.stack([x, y, (x * y) % 251], axis=-1).astype(np.uint8))
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    left, top, side = 101, 103, 48
    out = torch.empty(3, side, side, dtype=torch.uint8)
    box = (left, top, left + side, top + side)
    is_decoded = crops.crop_jpeg(file.getvalue(), [box], [out], size=picture.size, channels=3)
    expected = np.asarray(Image.open(file).crop(box))
    return is_decoded and np.array_equal(out.permute(1, 2, 0).numpy(), expected)
