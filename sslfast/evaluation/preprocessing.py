"""Pixels of evaluation images, as the published protocols have them: Pillow's antialiased bilinear resize of the whole
decoded image, in 8 bits.

``centre-crop``: the shorter side to 256 (of 224), the longer to ``int(256 * longer / shorter)``, then the centre 224 x
224: torchvision's ``Resize(256)`` and ``CenterCrop(224)``, pixel for pixel, whatever the image's size. ``whole``: the
shorter side to 256, then both to 224, so that the whole image is seen, squeezed: VISSL's VOC07 SVM benchmark.
``centre-square``: the shorter side to the network's size, then the centre square: images of that size stay as they are
(CIFAR, Tiny ImageNet).
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sslfast.data import Decoding, decode_full

Preprocessing = Literal["centre-crop", "centre-square", "whole"]
PreprocessingChoice = Literal["auto", "centre-crop", "centre-square", "whole"]
VERSION = 1
"""Of the pixels: changed whenever they change, which invalidates cached features."""
SMALL = 96
"""Networks of smaller images than this see the centre square by default: published protocols crop nothing there."""
_LONG = 16
"""Images of a larger aspect ratio are not resized beyond what is seen of them: that would take gigabytes."""


def resolve_preprocessing(chosen: PreprocessingChoice, size: int, default: Preprocessing) -> Preprocessing:
    """``chosen``; for ``auto`` the protocol's own (``default``), and below :data:`SMALL` pixels the centre square in
    place of its centre crop."""
    if chosen != "auto":
        return chosen
    return "centre-square" if default == "centre-crop" and size < SMALL else default


def resized_side(size: int, how: Preprocessing) -> int:
    """What the shorter side is resized to: 256 for ``size`` 224, in proportion for others."""
    return size if how == "centre-square" else round(size * 256 / 224)


def describe(how: Preprocessing, size: int) -> str:
    """The preprocessing in words that identify it, for results and caches."""
    side = resized_side(size, how)
    then = f"whole image to {size} x {size}" if how == "whole" else f"centre crop {size}"
    return f"{how}: shorter side to {side}, {then}; Pillow bilinear, version {VERSION}"


def eval_image(data: bytes, size: int, how: Preprocessing, decoding: Decoding) -> Tensor:
    """uint8 ``[3, size, size]`` of an image file. Raises BadImageError."""
    return torch.from_numpy(preprocess(decode_full(data, decoding), size, how)).permute(2, 0, 1).contiguous()


def preprocess(pixels: NDArray[np.uint8], size: int, how: Preprocessing) -> NDArray[np.uint8]:
    """uint8 ``[size, size, 3]`` of the upright image ``[H, W, 3]``."""
    image = Image.fromarray(pixels)
    width, height = image.size
    side, shorter, longer = resized_side(size, how), min(width, height), max(width, height)
    resized = int(side * longer / shorter)
    shape = (side, resized) if width <= height else (resized, side)
    if how == "whole":
        if longer <= _LONG * shorter:
            image = image.resize(shape, Image.Resampling.BILINEAR)
        return np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    # round() to even, as torchvision's centre crop
    left, top = (round((edge - size) / 2.0) for edge in shape)
    if longer <= _LONG * shorter:
        if image.size != shape:
            image = image.resize(shape, Image.Resampling.BILINEAR)
        return np.array(image.crop((left, top, left + size, top + size)))
    across, down = width / shape[0], height / shape[1]
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
