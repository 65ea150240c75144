"""CPC: contrastive predictive coding of images (van den Oord, Li & Vinyals 2018; Hénaff et al., ICML 2020).

An image is cut into a G x G grid of overlapping patches; the trunk makes one vector ``z_ij`` of each, layer-normalised,
seeing nothing else. A context network summarises the rows above and the row itself, ``c_ij = g(z_uv: u <= i)``, and k
rows further down the patch is told from all other patches of the batch (van den Oord et al. eqs. 3 and 4)::

    loss = -log( exp(f_k(z_{i+k,j}, c_ij)) / sum_z exp(f_k(z, c_ij)) ),   f_k(z, c) = (T z)·(W_k c) / sqrt(D)

the mean over i, j and k, and over four directions with a context network each where asked for (Hénaff et al. section
4.1). The score is bilinear of rank D. Under several processes the patches of all ranks are told apart.

The context network is a column of masked convolutions over rows, as in both papers (not a GRU). BatchNorm would carry
what a patch below shows into the vectors above through its statistics; van den Oord et al. use no BatchNorm, Hénaff et
al. layer normalisation, and so does this: the trunk must have ``norm="layer"``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from sslfast.distributed import gather_rows_with_gradient, rank
from sslfast.methods.base import BaseConfig, Method
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models import ResNetConfig, RowContext, build_trunk, info_nce, seeded
from sslfast.views import AugmentConfig, CropConfig, View, ViewConfig

IMAGE = "image"


def _image_view() -> ViewConfig:
    augment = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.2)
    return ViewConfig(crop=CropConfig(size=256, scale=(0.5, 0.75)), augment=augment)


class CPC(Method):
    """The method as a module: trunk, context networks and linear maps, no further state."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        """CPC."""

        name: ClassVar[str] = "cpc"

        patch_size: int = 64
        """Side of a patch in pixels."""
        patch_stride: int = 32
        """Pixels from one patch to the next."""
        directions: Literal["down", "all"] = "down"
        """down: contexts of the rows above predict rows below. all: likewise upwards, right and left, each with a
        context network and predictions of its own."""
        first_step: int = 2
        """Smallest k, rows ahead that are predicted. With half overlapping patches k = 1 is in part in sight."""
        last_step: int = 5
        """Largest k."""
        dimensions: int = 64
        """D, columns in which predictions and patches are compared."""
        context_features: int = 256
        """Width of the context network's hidden maps."""
        context_blocks: int = 5
        """Blocks of the context network: rows above that it sees."""
        image_view: ViewConfig = field(default_factory=_image_view)
        """The image that is cut into patches."""

        @property
        def grid(self) -> int:
            """G, patches per side."""
            return (self.image_view.crop.size - self.patch_size) // self.patch_stride + 1

        def views(self) -> dict[str, ViewConfig]:
            """The image."""
            return {IMAGE: self.image_view}

        def preview_panels(self, views: Mapping[str, View], rows: Tensor, *, seed: int) -> dict[str, Tensor]:
            """What the contexts of the grid's first rows see, and the patches that these predict."""
            pixels = views[IMAGE].pixels
            pictures = PixelSpace(self.image_view.augment).to(pixels.device).to_rgb(pixels)
            row = self.grid - 1 - self.last_step
            line = torch.arange(pictures.shape[-2], device=pictures.device)[:, None]
            first = (row + self.first_step) * self.patch_stride
            last = (row + self.last_step) * self.patch_stride + self.patch_size
            return {
                "context": torch.where(line < row * self.patch_stride + self.patch_size, pictures, 0.5),
                "to predict": torch.where((line >= first) & (line < last), pictures, 0.5),
            }

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "patch_size", "patch_stride", "dimensions", "context_features", "context_blocks")
            self.check_whole_image()
            if not 1 <= self.first_step <= self.last_step:
                raise ValueError(f"method.first_step must be in [1, last_step={self.last_step}], got {self.first_step}")
            if self.last_step >= self.grid:
                raise ValueError(
                    f"method.last_step must be below {self.grid}, the rows of patches in a crop of "
                    f"{self.image_view.crop.size} pixels with patch_size={self.patch_size} and "
                    f"patch_stride={self.patch_stride}, got {self.last_step}"
                )

        def build(self, *, model: ResNetConfig, num_rows: int, seed: int) -> "CPC":
            """The module for a data set of ``num_rows`` samples."""
            return CPC(self, model=model, seed=seed)

    def __init__(self, config: Config, *, model: ResNetConfig, seed: int) -> None:
        super().__init__()
        config.validate()
        if model.norm != "layer":
            raise ValueError(
                f"model.norm must be layer for CPC, got {model.norm}: batch statistics tell a context of the patches "
                "that it has to predict"
            )
        self.config = config
        self.trunk = build_trunk(model, seed=seed)
        features, steps = self.trunk.out_features, config.last_step - config.first_step + 1
        with seeded(seed + 1):
            self.target = nn.Linear(features, config.dimensions)  # T
            self.contexts = nn.ModuleList(
                RowContext(features, config.context_features, config.context_blocks) for _ in self._turns()
            )
            self.predictions = nn.ModuleList(  # W_k, one below the other
                nn.Conv2d(features, steps * config.dimensions, 1) for _ in self._turns()
            )

    def forward(self, views: Mapping[str, View], rows: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "image".
            rows: ``[B]`` int64, manifest row of each sample; unused.
            step: of the run; unused.

        Returns:
            ``loss`` (0-d, differentiable).
        """
        features = self.embed(views[IMAGE].pixels)  # [B, G, G, C]
        targets = self.target(features).float().flatten(0, 2)  # [B * G * G, D]
        predicted, positives = self.predict(features)
        keys = gather_rows_with_gradient(targets)
        losses = info_nce(
            predicted.float(),
            keys,
            positives + rank() * len(targets),
            temperature=math.sqrt(self.config.dimensions),
        )
        return {"loss": losses.mean()}

    def embed(self, pixels: Tensor) -> Tensor:
        """``[B, 3, S, S]`` to the normalised vectors of all patches ``[B, G, G, C]``."""
        size, stride, grid = self.config.patch_size, self.config.patch_stride, self.config.grid
        patches = pixels.unfold(2, size, stride).unfold(3, size, stride)  # [B, 3, G, G, p, p]
        features = self.trunk(patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return layer_norm(features, features.shape[-1:]).unflatten(0, (len(pixels), grid, grid))

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions ``[P, D]`` of all contexts, and the number ``[P]`` of each one's patch among ``B * G * G``."""
        config = self.config
        numbers = torch.arange(features[..., 0].numel(), device=features.device).view(features.shape[:-1])
        predictions, positives = [], []
        for turns, context, predict in zip(self._turns(), self.contexts, self.predictions, strict=True):
            turned = features.rot90(turns, dims=(1, 2)).permute(0, 3, 1, 2)
            ahead = predict(context(turned)).unflatten(1, (-1, config.dimensions))  # [B, K, D, G, G]
            for k, prediction in enumerate(ahead.unbind(1), start=config.first_step):
                predictions.append(prediction[:, :, :-k].permute(0, 2, 3, 1).flatten(0, 2))
                positives.append(numbers.rot90(turns, dims=(1, 2))[:, k:].flatten())
        return torch.cat(predictions), torch.cat(positives)

    def _turns(self) -> range:
        """Quarter turns of the grid after which the direction of prediction is downwards."""
        return range(4 if self.config.directions == "all" else 1)
