"""Denoising autoencoder, convolutional (Vincent, Larochelle, Bengio & Manzagol, ICML 2008).

Objective (Vincent 2008 eq. 5, squared error in place of cross-entropy): ``loss = mean (x - g(f(x̃)))²`` over samples,
channels and pixels, where x is the clean view in the network's normalised units, ``x̃`` its corrupted copy, f the trunk
up to res5 followed by a 1x1 convolution to a narrow code, and g the decoder. The whole image is reconstructed, not only
what was destroyed. With ``corruption=none``, ``x̃ = x``: a plain autoencoder.

The 1x1 convolution is the bottleneck: res5 of a 64 px image has more numbers than the image itself, which could be
copied without it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sslfast.methods.base import MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.reconstruction import (
    PixelSpace,
    Reconstruction,
    ReconstructionConfig,
    clean_pixels,
    distance,
)
from sslfast.ops.philox import Stream, random_uint32
from sslfast.views import View


@register_method
class Autoencoder(Reconstruction):
    """The method as a module: ``method(views, sample_ids, step=...)`` -> losses. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(ReconstructionConfig):
        """Autoencoder and denoising autoencoder."""

        name: ClassVar[str] = "autoencoder"

        corruption: Literal["none", "masking", "gaussian"] = "masking"
        """masking: pixels are destroyed (all channels set to the mean colour), each with probability
        masked_share, as in Vincent 2008. gaussian: normal noise is added. none: a plain autoencoder."""
        masked_share: float = 0.25
        """Probability that a pixel is destroyed, to the nearest 1/256; for corruption masking."""
        noise_std: float = 0.5
        """Standard deviation of the normal noise in units of the normalised pixels; for corruption gaussian."""
        loss: Literal["l2", "l1"] = "l2"
        """Squared or absolute error."""
        code_channels: int = 64
        """Channels of the code at res5's resolution."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            super().validate()
            if self.corruption == "masking" and not 1 <= round(256 * self.masked_share) <= 255:
                raise ValueError(
                    f"method.masked_share must be from 1/256 to 255/256, to the nearest 1/256, got {self.masked_share}"
                )
            if self.corruption == "gaussian":
                self.check_positive("noise_std")
            self.check_at_least(1, "code_channels")

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """The corrupted image and the clean one."""
            space, clean = PixelSpace(self.image_view.augment), clean_pixels(views)
            seen = corrupt(clean, sample_ids, self, seed=seed, step=0)
            return {"input": space.to_rgb(seen), "target": space.to_rgb(clean)}

        def build(self, context: MethodContext) -> "Autoencoder":
            """The module for a run."""
            return Autoencoder(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__(config, context, code_channels=config.code_channels)
        self.config = config

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch.

        Args:
            views: "image".
            sample_ids: ``[B]`` int64, manifest row of each sample.
            step: number of the step: with the seed and the sample id it fixes the corruption.
        """
        clean = clean_pixels(views)
        prediction = self.predict(corrupt(clean, sample_ids, self.config, seed=self.seed, step=step))
        return {"loss": distance(prediction, clean, self.config.loss).mean()}


@torch.no_grad()
def corrupt(pixels: Tensor, sample_ids: Tensor, config: Autoencoder.Config, *, seed: int, step: int | Tensor) -> Tensor:
    """The corrupted copy ``x̃`` of normalised pixels ``[B, 3, H, W]``: a function of (seed, step, sample id)."""
    if config.corruption == "none":
        return pixels
    height, width = pixels.shape[-2:]
    if config.corruption == "masking":
        count = height * width
        words = random_uint32(sample_ids, -(-count // 4), seed=seed, stream=Stream.CORRUPTION, step=step)
        shifts = torch.arange(0, 32, 8, device=sample_ids.device)
        parts = (words[:, :, None] >> shifts) & 0xFF  # one byte per pixel
        kept = parts.flatten(1)[:, :count].view(-1, 1, height, width) >= round(config.masked_share * 256)
        return pixels * kept
    count = 3 * height * width
    words = random_uint32(sample_ids, -(-count // 2), seed=seed, stream=Stream.CORRUPTION, step=step)
    # Box-Muller transform: two normal numbers from the halves of a word; 16 bits reach 4.8 deviations.
    radius = (((words >> 16).float() + 0.5) / 65536).log().mul(-2.0).sqrt()
    angle = (words & 0xFFFF).float() * (2 * math.pi / 65536)
    normal = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :count]
    return pixels + config.noise_std * normal.view(-1, 3, height, width)
