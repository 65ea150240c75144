"""The evaluation transform of weights: from an image to what their trunk expects, as the evaluations do it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sslfast.data import Decoding, decode_full
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.encoders import TRAINED, TrunkEncoder, load_run
from sslfast.evaluation.preprocessing import Preprocessing, PreprocessingChoice, describe, preprocess
from sslfast.methods import lightness

AnyImage = Image.Image | NDArray[np.uint8] | bytes | str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class EvaluationTransform:
    """What :func:`sslfast.transform` returns: maps one image to float32 ``[3, size, size]``. Can be pickled, so loaders
    with worker processes take it."""

    size: int
    """Side of the result in pixels."""
    preprocessing: Preprocessing
    """How the image is resized and cropped (:mod:`sslfast.evaluation.preprocessing`)."""
    mean: tuple[float, ...]
    """Subtracted from red, green and blue in [0, 1]."""
    std: tuple[float, ...]
    """Divides the difference."""
    colours: Literal["rgb", "lightness"] = "rgb"
    """lightness: the trunk of colorization, which sees no colours."""
    decoding: Decoding
    """How files are decoded."""

    def __call__(self, image: AnyImage) -> Tensor:
        """``(resize_and_crop(image) / 255 - mean) / std``.

        Args:
            image: of Pillow, an array uint8 ``[H, W, 3]``, a path, or the bytes of a file. Files are turned upright as
                their EXIF orientation says; an image of Pillow is taken as it is, in RGB.

        Raises:
            BadImageError: a file that cannot be decoded.
        """
        if isinstance(image, str | os.PathLike):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            pixels = decode_full(image, self.decoding)
        elif isinstance(image, Image.Image):
            pixels = np.asarray(image.convert("RGB"))
        else:
            pixels = image
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"an image array must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        rgb = torch.from_numpy(preprocess(pixels, self.size, self.preprocessing)).permute(2, 0, 1).float() / 255
        if self.colours == "lightness":
            rgb = lightness(rgb[None])[0]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((rgb - mean) / std).contiguous()

    def __str__(self) -> str:
        return f"{describe(self.preprocessing, self.size)}; mean {self.mean}, std {self.std}, {self.colours}"


def load_transform(
    path: Path | str,
    *,
    size: int | None = None,
    preprocessing: PreprocessingChoice = "auto",
    prefix: str | None = None,
) -> EvaluationTransform:
    """The transform that belongs to weights, so that ``load(path)(transform(path)(image)[None])`` are the features that
    ``sslfast evaluate`` and ``sslfast embed`` compute (``--patches off``, where the method trains on patches).

    Args:
        path: run directory, or a file of weights, as for ``sslfast.load``.
        size: side of the images; None: that of the run.
        preprocessing: what is seen of an image; auto: centre-crop (torchvision's Resize(256) and CenterCrop(224), in
            proportion), below 96 pixels centre-square.
        prefix: which network of a file that holds several.

    Raises:
        ValueError, FileNotFoundError: the weights cannot be read.
    """
    loaded = load_run(path, prefix=prefix, patches="off")
    config = ImageConfig(size=size, preprocessing=preprocessing, prefix=prefix)
    size = loaded.size if size is None else size
    encoder = loaded.encoders[TRAINED]
    assert isinstance(encoder, TrunkEncoder)
    return EvaluationTransform(
        size=size,
        preprocessing=config.seen(size),
        mean=tuple(encoder.mean.flatten().tolist()),
        std=tuple(encoder.std.flatten().tolist()),
        colours=encoder.colours,
        decoding=config.decoding(path),
    )
