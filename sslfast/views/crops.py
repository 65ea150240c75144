"""Random resized crops: boxes as a pure function of (seed, epoch, sample, view). And the centre crop of evaluations."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sslfast.ops.philox import Stream, random_uniform
from sslfast.views.types import CropConfig

ATTEMPTS = 10  # boxes tried before the central crop, as in torchvision's RandomResizedCrop


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """The resize and the crop of evaluations, in pixels of the resized image: torchvision's ``Resize(shorter)`` and
    ``CenterCrop(size)``, or with ``whole`` all of the image."""

    size: int
    """Side of the result in pixels."""
    shorter: int
    """What the shorter side is resized to; the longer one to ``int(shorter * longer side / shorter side)``."""
    whole: bool = False
    """The resized image, squeezed to a square by a second resize, in place of its centre."""

    def plan(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """Width and height to resize an upright image to, and left, top, right, bottom of what is then seen."""
        longer = int(self.shorter * max(width, height) / min(width, height))
        shape = (self.shorter, longer) if width <= height else (longer, self.shorter)
        if self.whole:
            return shape, (0, 0, *shape)
        left, top = (round((edge - self.size) / 2.0) for edge in shape)  # to even, as torchvision's
        return shape, (left, top, left + self.size, top + self.size)


def crop_draws(sample_ids: Tensor, *, seed: int, epoch: int, position: int) -> NDArray[np.float64]:
    """``[B, 2 * ATTEMPTS + 2]`` uniform in [0, 1): (area, aspect) of each attempt, then position (y, x)."""
    stream = Stream.CROP + position
    return random_uniform(sample_ids, 2 * ATTEMPTS + 2, seed=seed, stream=stream, step=epoch).double().numpy()


def crop_boxes(draws: NDArray[np.float64], sizes: NDArray[np.int64], config: CropConfig) -> NDArray[np.int64]:
    """Boxes of random resized crops, by the rule of torchvision's ``RandomResizedCrop``.

    Attempt k: area ``A = W H (s0 + u_2k (s1 - s0))``, aspect ``a = r0 (r1 / r0) ** u_(2k+1)``, box
    ``w = round(sqrt(A a))``, ``h = round(sqrt(A / a))``. The first attempt with ``w <= W`` and ``h <= H`` is placed
    uniformly at integer pixels. If none fits: the largest central box whose aspect is the image's, clipped to the
    range.

    Args:
        draws: ``[B, 2 * ATTEMPTS + 2]`` from :func:`crop_draws`.
        sizes: ``[B, 2]`` int64, width and height of the upright images.
        config: crop of the view.

    Returns:
        ``[B, 4]`` int64 left, top, right, bottom; inside the image, at least 1 x 1.
    """
    width, height = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    low, high = config.ratio
    area = width * height * (config.scale[0] + draws[:, 0 : 2 * ATTEMPTS : 2] * (config.scale[1] - config.scale[0]))
    aspect = low * np.exp(draws[:, 1 : 2 * ATTEMPTS : 2] * np.log(high / low))
    tried_w, tried_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (tried_w >= 1) & (tried_h >= 1) & (tried_w <= width) & (tried_h <= height)
    found, first = fits.any(axis=1), fits.argmax(axis=1)
    each = np.arange(len(draws))

    central_aspect = np.clip(width / height, low, high)[:, 0]
    central_w = np.clip(np.rint(height[:, 0] * central_aspect), 1, width[:, 0])
    central_h = np.clip(np.rint(width[:, 0] / central_aspect), 1, height[:, 0])
    box_w = np.where(found, tried_w[each, first], central_w)
    box_h = np.where(found, tried_h[each, first], central_h)

    free_w, free_h = width[:, 0] - box_w, height[:, 0] - box_h
    top = np.where(found, np.floor(draws[:, -2] * (free_h + 1)), np.floor(free_h / 2))
    left = np.where(found, np.floor(draws[:, -1] * (free_w + 1)), np.floor(free_w / 2))
    return np.stack((left, top, left + box_w, top + box_h), axis=1).astype(np.int64)
