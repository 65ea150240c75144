"""Super-resolution: the picture from a quarter of its resolution.

Objective: ``loss = mean |x - (u + g(f(u)))|^p + w · perceptual``, ``u = up(down(x))``, over samples, channels and
pixels, where x is the clean view in normalised units, ``down`` the mean of each ``factor`` x ``factor`` block (a box
filter, so nothing is aliased), ``up`` bilinear, f the trunk up to res5, g the decoder, p = 1 or 2. The decoder adds
what the enlarged picture lacks (Kim, Lee & Lee 2016, section 3: residual learning).

The trunk sees ``u``, which has the size of the full picture, so that objects have the scale that they have when the
trunk is used.

Perceptual term (Johnson, Alahi & Fei-Fei 2016, eq. 2): mean squared distance of feature maps, averaged over layers.
Their network is a trained classifier; here it is a frozen convolutional network with random weights drawn from the
seed: it needs no labels and no weights from elsewhere, and cannot collapse while the trunk learns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from sslfast.methods.shared.reconstruction import (
    PixelSpace,
    Reconstruction,
    ReconstructionConfig,
    clean_pixels,
    distance,
)
from sslfast.models import ResNetConfig, seeded
from sslfast.views import View


class SuperResolution(Reconstruction):
    """The method as a module: ``method(views, rows, step=...)`` -> losses. It has no state but its weights."""

    @dataclass(kw_only=True)
    class Config(ReconstructionConfig):
        """Super-resolution of a picture reduced by a whole factor."""

        name: ClassVar[str] = "super-resolution"

        factor: int = 4
        """Sides are reduced by this."""
        loss: Literal["l2", "l1"] = "l1"
        """Squared or absolute error of the pixels."""
        perceptual_weight: float = 0.0
        """w, weight of the distance between features of a frozen random network; 0: left out."""

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

        def preview_panels(self, views: Mapping[str, View], rows: Tensor, *, seed: int) -> dict[str, Tensor]:
            """The reduced picture as the trunk sees it, and the full one."""
            space, clean = PixelSpace(self.image_view.augment), clean_pixels(views)
            seen = reduced(clean, self.factor)
            return {"input": space.to_rgb(seen), "target": space.to_rgb(clean)}

        def build(self, *, model: ResNetConfig, num_rows: int, seed: int) -> "SuperResolution":
            """The module; ``num_rows`` does not matter."""
            return SuperResolution(self, model=model, seed=seed)

    def __init__(self, config: Config, *, model: ResNetConfig, seed: int) -> None:
        super().__init__(config, model=model, seed=seed)
        self.config = config
        self.perceptual = RandomFeatures(seed=seed + 2) if config.perceptual_weight > 0 else None

    def forward(self, views: Mapping[str, View], rows: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch, its detached parts ``loss_pixels`` and, where there is one, ``loss_perceptual``.

        Args:
            views: "image".
            rows: ``[B]`` int64; nothing is drawn.
            step: likewise.
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
    """``up(down(pixels))``: the mean of every block, bilinearly enlarged to the old size; ``[B, 3, H, W]``."""
    return interpolate(avg_pool2d(pixels, factor), size=pixels.shape[-2:], mode="bilinear", align_corners=False)


class RandomFeatures(nn.Module):
    """Three convolutions of stride 2 with ReLU, 32, 64 and 128 channels, with random weights that never change."""

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
