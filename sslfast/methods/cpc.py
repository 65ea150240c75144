"""CPC: contrastive predictive coding of images (van den Oord, Li & Vinyals 2018; Hénaff et al., ICML 2020).

An image is cut into a G x G grid of overlapping patches; the trunk encodes each patch by itself into one vector
``z_ij``, layer-normalised. A context network summarises a grid row and all rows above it, ``c_ij = g(z_uv: u <= i)``,
and predicts the patch k rows further down, contrasted with all other patches of the batch (van den Oord et al. eqs. 3
and 4)::

    loss = -log( exp(f_k(z_{i+k,j}, c_ij)) / sum_z exp(f_k(z, c_ij)) ),   f_k(z, c) = (T z)·(W_k c) / sqrt(D)

the mean over i, j and k, and with ``directions="all"`` over four directions with a context network each (Hénaff et al.
section 4.1). The score is bilinear of rank D. Under several processes the negatives are the patches of all ranks.

The context network is a stack of masked convolutions over grid rows, as in both papers (not a GRU). BatchNorm would
leak the content of lower patches into the vectors above through its statistics; van den Oord et al. use no BatchNorm,
Hénaff et al. and this implementation layer normalisation: the trunk must have ``norm="layer"``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from sslfast.distributed import gather_rows_with_gradient, rank
from sslfast.methods.base import BaseConfig, BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.grid import PatchGrid
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models import ResNetConfig, RowContext, build_trunk, info_nce, seeded
from sslfast.views import AugmentConfig, CropConfig, View, ViewConfig

IMAGE = "image"


def _image_view() -> ViewConfig:
    augment = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.2)
    return ViewConfig(crop=CropConfig(size=256, scale=(0.5, 0.75)), augment=augment)


@register_method
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
        """down: contexts of the grid rows above predict rows below. all: also upwards, right and left, each with
        its own context network and predictions."""
        first_step: int = 2
        """Smallest k, grid rows ahead that are predicted. With patches that overlap by half, k = 1 is partly
        visible."""
        last_step: int = 5
        """Largest k."""
        dimensions: int = 64
        """D, dimensions in which predictions and patches are compared."""
        context_features: int = 256
        """Channels of the context network's hidden maps."""
        context_blocks: int = 5
        """Blocks of the context network: grid rows above that it sees."""
        image_view: ViewConfig = field(default_factory=_image_view)
        """The image that is cut into patches."""

        @property
        def grid(self) -> int:
            """G, patches per side."""
            return (self.image_view.crop.size - self.patch_size) // self.patch_stride + 1

        def views(self) -> dict[str, ViewConfig]:
            """The image."""
            return {IMAGE: self.image_view}

        def trunk_sizes(self) -> dict[str, int]:
            """The patches."""
            return {"patches": self.patch_size}

        def evaluation_patches(self) -> PatchGrid:
            """Those of the training, whose vectors are averaged."""
            return PatchGrid(
                patch_size=self.patch_size,
                stride=self.patch_stride,
                size=self.image_view.crop.size,
                source="van den Oord et al. 2018",
                by_default=True,
            )

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """What the contexts of the first grid rows see, and the patches that they predict."""
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

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError for one image alone, whose own patches a context tells apart by their place."""
            self.check_contrasted(split)

        def build(self, context: MethodContext) -> "CPC":
            """The module for a run."""
            return CPC(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        if isinstance(context.model, ResNetConfig) and context.model.norm != "layer":
            raise ValueError(
                f"model.norm must be layer for CPC, got {context.model.norm}: batch statistics leak the patches that "
                "a context has to predict"
            )
        self.config = config
        self.trunk = build_trunk(context.model, seed=context.seed)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.trunk.modules()):
            raise ValueError(f"CPC needs a trunk without BatchNorm, and {type(self.trunk).__name__} has it; replace it")
        features, steps = self.trunk.out_features, config.last_step - config.first_step + 1
        with seeded(context.seed + 1):
            self.target = nn.Linear(features, config.dimensions)  # T
            self.contexts = nn.ModuleList(
                RowContext(features, config.context_features, config.context_blocks) for _ in self._turns()
            )
            self.predictions = nn.ModuleList(  # W_k, stacked
                nn.Conv2d(features, steps * config.dimensions, 1) for _ in self._turns()
            )

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "image".
            sample_ids: ``[B]`` int64; not used.
            step: not used.

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
        """``[B, 3, S, S]`` to the layer-normalised vectors of all patches ``[B, G, G, C]``."""
        size, stride, grid = self.config.patch_size, self.config.patch_stride, self.config.grid
        patches = pixels.unfold(2, size, stride).unfold(3, size, stride)  # [B, 3, G, G, p, p]
        features = self.trunk(patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return layer_norm(features, features.shape[-1:]).unflatten(0, (len(pixels), grid, grid))

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions ``[P, D]`` of all contexts, and the index ``[P]`` of each one's patch among ``B * G * G``."""
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
        """Quarter turns of the grid that make the direction of prediction downwards."""
        return range(4 if self.config.directions == "all" else 1)
