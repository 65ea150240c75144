"""Super-resolution: reconstruct an image from a quarter of its resolution.

Objective: ``loss = mean |x - (u + g(f(u)))|^p + w · perceptual``, ``u = up(down(x))``, over samples, channels and
pixels, where x is the clean view in normalised units, ``down`` the mean of each ``factor`` x ``factor`` block (a box
filter, against aliasing), ``up`` bilinear, f the trunk up to res5, g the decoder, p = 1 or 2. The decoder predicts
the residual of the upsampled image (Kim, Lee & Lee 2016, section 3).

The trunk sees ``u``, which has the size of the full image, so that objects have the same scale as in later use of the
trunk.

Perceptual term (Johnson, Alahi & Fei-Fei 2016, eq. 2): mean squared distance of feature maps, averaged over layers.
Theirs are of a trained classifier; here they are of a frozen convolutional network with random weights drawn from the
seed: it needs no labels and no downloaded weights, and cannot collapse while the trunk learns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from sslfast.methods.base import MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.reconstruction import (
    PixelSpace,
    Reconstruction,
    ReconstructionConfig,
    clean_pixels,
    distance,
)
from sslfast.models import seeded
from sslfast.views import View


@register_method
class SuperResolution(Reconstruction):
    """The method as a module: ``method(views, sample_ids, step=...)`` -> losses. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(ReconstructionConfig):
        """Super-resolution of an image downsampled by an integer factor."""

        name: ClassVar[str] = "super-resolution"

        factor: int = 4
        """Factor between the sides of the full and the downsampled image."""
        loss: Literal["l2", "l1"] = "l1"
        """Squared or absolute error of the pixels."""
        perceptual_weight: float = 0.0
        """w, weight of the distance between features of a frozen random network; 0: none."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            super().validate()
            size = self.image_view.crop.size
            if self.factor < 2 or size % self.factor:
                raise ValueError(
                    f"method.factor must be at least 2 and divide method.image_view.crop.size={size}, got {self.factor}"
                )
            if not 0 <= self.perceptual_weight < float("inf"):
                raise ValueError(f"method.perceptual_weight must be at least 0, got {self.perceptual_weight}")

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """The downsampled image as the trunk sees it, and the full one."""
            space, clean = PixelSpace(self.image_view.augment), clean_pixels(views)
            seen = reduced(clean, self.factor)
            return {"input": space.to_rgb(seen), "target": space.to_rgb(clean)}

        def build(self, context: MethodContext) -> "SuperResolution":
            """The module for a run."""
            return SuperResolution(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__(config, context)
        self.config = config
        self.perceptual = RandomFeatures(seed=context.seed + 2) if config.perceptual_weight > 0 else None

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch, and its detached parts ``loss_pixels`` and, with a perceptual term,
        ``loss_perceptual``.

        Args:
            views: "image".
            sample_ids: ``[B]`` int64; not used.
            step: not used.
        """
        config, clean = self.config, clean_pixels(views)
        seen = reduced(clean, config.factor)
        prediction = seen + self.predict(seen)
        loss = distance(prediction, clean, config.loss).mean()
        logs = {"loss_pixels": loss.detach()}
        if self.perceptual is not None:
            perceptual = self.perceptual.distance(prediction, clean)
            logs["loss_perceptual"] = perceptual.detach()
            loss = loss + config.perceptual_weight * perceptual
        return {"loss": loss, **logs}


@torch.no_grad()
def reduced(pixels: Tensor, factor: int) -> Tensor:
    """``up(down(pixels))``: the mean of every block, bilinearly upsampled to the original size; ``[B, 3, H, W]``."""
    return interpolate(avg_pool2d(pixels, factor), size=pixels.shape[-2:], mode="bilinear", align_corners=False)


class RandomFeatures(nn.Module):
    """Three convolutions of stride 2 with ReLU, 32, 64 and 128 channels, with random weights that are never trained."""

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.layers = nn.ModuleList(
                nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
                for before, after in ((3, 32), (32, 64), (64, 128))
            )
            for layer in self.layers:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
        self.requires_grad_(False)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance of the features, averaged over the layers; 0-d float32."""
        total = prediction.new_zeros(())
        for layer in self.layers:
            prediction, target = (torch.relu(layer(x)) for x in (prediction, target))
            total = total + (prediction.float() - target.float()).square().mean()
        return total / len(self.layers)
