"""Pixels of evaluation images, as the published protocols have them: Pillow's antialiased bilinear resize of the whole
decoded image, in 8 bits.

``centre-crop``: the shorter side to 256 (of 224), the longer to ``int(256 * longer / shorter)``, then the centre 224 x
224: torchvision's ``Resize(256)`` and ``CenterCrop(224)``, pixel for pixel, whatever the image's size.
``centre-crop-bicubic``: the same by the bicubic filter, as DINO's evaluations resize. ``whole``: the
shorter side to 256, then both to 224, so that the whole image is seen, squeezed: VISSL's VOC07 SVM benchmark.
``centre-square``: the shorter side to the network's size, then the centre square: images of that size stay as they are
(CIFAR, Tiny ImageNet).

Image files decoded by Pillow give these pixels. Of a .beton file (``ffcv``) the stored images are resized in the same
way: raw ones as stored, JPEGs with the rounding of the fast DCT. ``dali`` resizes and crops by the same plan with its
own filter, which rounds otherwise. :func:`describe` says which it was.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sslfast.data import Decoding, decode_full
from sslfast.views import CentreCrop

Preprocessing = Literal["centre-crop", "centre-crop-bicubic", "centre-square", "whole"]
PreprocessingChoice = Literal["auto", "centre-crop", "centre-crop-bicubic", "centre-square", "whole"]
VERSION = 1
"""Of the pixels: changed whenever they change, which invalidates cached features."""
SMALL = 96
"""Networks of smaller images than this see the centre square by default: published protocols crop nothing there."""
LONG = 16
"""Images of a larger aspect ratio are not resized beyond what is seen of them: that would take gigabytes."""
FILTERS = {
    "pillow": "Pillow bilinear",
    "ffcv": "Pillow bilinear of the .beton file's images, JPEGs by libjpeg-turbo's fast DCT",
    "dali": "DALI's decoder and triangular filter",
}
"""Loader -> how its pixels are decoded and resized."""


def resolve_preprocessing(chosen: PreprocessingChoice, size: int, default: Preprocessing) -> Preprocessing:
    """``chosen``; for ``auto`` the protocol's own (``default``), and below :data:`SMALL` pixels the centre square in
    place of its centre crop."""
    if chosen != "auto":
        return chosen
    return "centre-square" if default == "centre-crop" and size < SMALL else default


def resized_side(size: int, how: Preprocessing) -> int:
    """What the shorter side is resized to: 256 for ``size`` 224, in proportion for others."""
    return size if how == "centre-square" else round(size * 256 / 224)


def centre_crop(size: int, how: Preprocessing) -> CentreCrop:
    """The geometry of a preprocessing."""
    return CentreCrop(size=size, shorter=resized_side(size, how), whole=how == "whole")


def describe(how: Preprocessing, size: int, readers: Sequence[str] = ("pillow",)) -> str:
    """The preprocessing in words that identify it, for results and caches.

    ``readers``: the loader of the images, or of train and of val.
    """
    side = resized_side(size, how)
    then = f"whole image to {size} x {size}" if how == "whole" else f"centre crop {size}"
    filters = list(dict.fromkeys(FILTERS[reader] for reader in readers))
    if how == "centre-crop-bicubic":
        filters = [words.replace("bilinear", "bicubic") for words in filters]
    words = filters[0] if len(filters) == 1 else f"train: {filters[0]}, val: {filters[1]}"
    return f"{how}: shorter side to {side}, {then}; {words}, version {VERSION}"


def eval_image(data: bytes, size: int, how: Preprocessing, decoding: Decoding) -> Tensor:
    """uint8 ``[3, size, size]`` of an image file. Raises BadImageError."""
    return torch.from_numpy(preprocess(decode_full(data, decoding), size, how)).permute(2, 0, 1).contiguous()


def preprocess(pixels: NDArray[np.uint8], size: int, how: Preprocessing) -> NDArray[np.uint8]:
    """uint8 ``[size, size, 3]`` of the upright image ``[H, W, 3]``."""
    image = Image.fromarray(pixels)
    width, height = image.size
    shape, box = centre_crop(size, how).plan(width, height)
    kernel = Image.Resampling.BICUBIC if how == "centre-crop-bicubic" else Image.Resampling.BILINEAR
    is_long = max(width, height) > LONG * min(width, height)
    if how == "whole":
        if not is_long:
            image = image.resize(shape, kernel)
        return np.array(image.resize((size, size), kernel))
    if not is_long:
        if image.size != shape:
            image = image.resize(shape, kernel)
        return np.array(image.crop(box))
    across, down = width / shape[0], height / shape[1]
    part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return np.array(image.resize((size, size), kernel, box=part))
