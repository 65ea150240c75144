"""Inpainting, the context encoder (Pathak, Krähenbühl, Donahue, Darrell & Efros, CVPR 2016).

Objective (Pathak 2016 eq. 1, the reconstruction term alone): ``loss = Σ w (x - g(f(x̃)))² / Σ w`` over samples,
channels and pixels, where x is the clean view in normalised units, ``x̃`` the view with the hole M filled with the mean
colour (0), f the trunk up to res5 and g the decoder. Weights w: 1 everywhere (``loss_over="image"``, the authors'
command for random regions, ``train_random.lua`` with ``useOverlapPred=0``), or 1 in the hole, ``overlap_weight`` in the
band of ``overlap`` pixels around it, which the network sees and has to continue (section 3.2: 7 pixels, ten times as
much, for the central hole), 0 elsewhere. Division by the sum of the weights makes the loss a mean over what is
reconstructed, whatever the area of the holes.

The paper adds an adversarial term, λ_adv = 0.001 beside λ_rec = 0.999, for sharper images. It is left out: this is
λ_rec alone.

Holes are one central square, squares at random positions that may overlap (section 3.3, "random block"), or regions of
any shape ("random region"): where smooth noise, uniform values about 16.7 px apart in a picture of 128 px and bicubic
between them, is lowest. The code has one mask for a batch, cut from one large pattern with a fixed threshold until its
area is 20 to 30 %; here each sample has its own, and the threshold that gives it an area drawn between these.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from sslfast.methods.base import MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.reconstruction import PixelSpace, Reconstruction, ReconstructionConfig, clean_pixels
from sslfast.ops.philox import Stream, random_integers, random_uint32
from sslfast.views import View

REGION_CELLS = 128 * 0.06
"""Cells of the noise of random regions along a side of the image (``train_random.lua``: res, fineSize)."""


@register_method
class Inpainting(Reconstruction):
    """The method as a module: ``method(views, sample_ids, step=...)`` -> losses. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(ReconstructionConfig):
        """Context encoder without the adversarial term."""

        name: ClassVar[str] = "inpainting"

        holes: Literal["central", "random", "region"] = "random"
        """central: one square in the middle. random: ``blocks`` squares, each anywhere, drawn for every sample and
        step. region: the lowest parts of smooth noise."""
        masked_share: float = 0.25
        """Share of the image that the squares would cover without overlap: the central one does, up to whole pixels;
        random ones cover less where they overlap. Of regions: the mean, each is within a fifth of it."""
        loss_over: Literal["holes", "image"] = "holes"
        """holes: squared errors in the holes and the band around them. image: everywhere, equally."""
        blocks: int = 5
        """Number of random squares, all of one size."""
        overlap: int = 7
        """Width in pixels of the visible band around the holes that is also reconstructed."""
        overlap_weight: float = 10.0
        """Weight of the band; that of the hole is 1."""

        def block_side(self) -> int:
            """Side of a square in pixels: ``size · sqrt(masked_share / blocks)``, rounded down for random ones, which
            therefore never cover more than their share, and to the nearest even number for the central one."""
            size = self.image_view.crop.size
            if self.holes == "central":
                return 2 * round(size * math.sqrt(self.masked_share) / 2)
            return math.floor(size * math.sqrt(self.masked_share / self.blocks))

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            super().validate()
            if not 0 < self.masked_share < 1:
                raise ValueError(f"method.masked_share must be in (0, 1), got {self.masked_share}")
            self.check_at_least(1, "blocks")
            self.check_at_least(0, "overlap")
            if not 0 <= self.overlap_weight < math.inf:
                raise ValueError(f"method.overlap_weight must be at least 0, got {self.overlap_weight}")
            if self.holes == "region":
                if self.masked_share > 0.8:
                    raise ValueError(f"method.masked_share must be at most 0.8 for regions, got {self.masked_share}")
                return
            side, size = self.block_side(), self.image_view.crop.size
            if not 1 <= side < size:
                raise ValueError(
                    f"method.masked_share={self.masked_share} makes holes of {side} px in images of {size} px; "
                    "they must be at least 1 px wide and leave part of the image visible"
                )

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """The image with its holes, and the target: hole and band, the rest in light grey."""
            space, clean = PixelSpace(self.image_view.augment), clean_pixels(views)
            hole = draw_holes(sample_ids, self, seed=seed, step=0)
            reconstructed = pixel_weights(hole, self) > 0
            target = torch.where(reconstructed, space.to_rgb(clean), 0.94)
            return {"input": space.to_rgb(punched(clean, hole)), "target": target}

        def build(self, context: MethodContext) -> "Inpainting":
            """The module for a run."""
            return Inpainting(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__(config, context)
        self.config = config

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``loss_hole``, the mean squared error in the holes alone (detached).

        Args:
            views: "image".
            sample_ids: ``[B]`` int64, manifest row of each sample.
            step: number of the step: with the seed and the sample id it fixes the holes.
        """
        clean = clean_pixels(views)
        hole = draw_holes(sample_ids, self.config, seed=self.seed, step=step)
        error = (self.predict(punched(clean, hole)) - clean).square().mean(dim=1, keepdim=True)
        weights = pixel_weights(hole, self.config)
        inside = (error.detach() * hole).sum() / hole.sum()
        return {"loss": (weights * error).sum() / weights.sum(), "loss_hole": inside}


@torch.no_grad()
def draw_holes(sample_ids: Tensor, config: Inpainting.Config, *, seed: int, step: int | Tensor) -> Tensor:
    """Boolean ``[B, 1, S, S]``, true in the holes: a function of (seed, step, sample id).

    Corners of random squares are uniform over all positions where the square lies inside the image.
    """
    if config.holes == "region":
        return draw_regions(sample_ids, config, seed=seed, step=step)
    size, side = config.image_view.crop.size, config.block_side()
    if config.holes == "central":
        corners = torch.full((len(sample_ids), 1, 2), (size - side) // 2, device=sample_ids.device)
    else:
        draws = random_integers(
            sample_ids, 2 * config.blocks, size - side + 1, seed=seed, stream=Stream.CORRUPTION, step=step
        )
        corners = draws.view(len(sample_ids), config.blocks, 2)
    position = torch.arange(size, device=sample_ids.device)
    within = (position >= corners[..., None]) & (position < corners[..., None] + side)  # [B, blocks, 2, S]
    return (within[:, :, 0, :, None] & within[:, :, 1, None, :]).any(dim=1, keepdim=True)


def draw_regions(sample_ids: Tensor, config: Inpainting.Config, *, seed: int, step: int | Tensor) -> Tensor:
    """Boolean ``[B, 1, S, S]``: the lowest pixels of smooth noise, a share of each sample's own."""
    size = config.image_view.crop.size
    nodes = math.ceil(REGION_CELLS) + 4  # of the noise, along a side
    words = random_uint32(sample_ids, 3 + nodes**2, seed=seed, stream=Stream.CORRUPTION, step=step)
    uniform = (words.double() * 2.0**-32).float()
    noise = uniform[:, 3:].view(-1, nodes, nodes)
    position = torch.arange(size, device=words.device) * (REGION_CELLS / size)
    down, across = (
        cubic(position[:, None] + 1 + uniform[:, axis, None, None] - torch.arange(nodes, device=words.device))
        for axis in (0, 1)
    )  # [B, S, nodes]
    values = (down @ noise @ across.transpose(1, 2)).flatten(1)
    share = config.masked_share * (0.8 + 0.4 * uniform[:, 2])
    last = (share * size**2).round().long().clamp(1, size**2)
    threshold = values.sort(dim=1).values.gather(1, last[:, None] - 1)
    return (values <= threshold).view(-1, 1, size, size)


def cubic(distance: Tensor) -> Tensor:
    """Weights of bicubic interpolation (Keys 1981, a = -1/2) at these distances."""
    x = distance.abs()
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


@torch.no_grad()
def pixel_weights(hole: Tensor, config: Inpainting.Config) -> Tensor:
    """The weights w, float32 ``[B, 1, S, S]``, of boolean holes."""
    if config.loss_over == "image":
        return torch.ones_like(hole, dtype=torch.float32)
    inside = hole.float()
    reach = 2 * config.overlap + 1
    reconstructed = max_pool2d(inside, reach, stride=1, padding=config.overlap)
    return inside + (reconstructed - inside) * config.overlap_weight


def punched(pixels: Tensor, hole: Tensor) -> Tensor:
    """``x̃``: normalised pixels with the mean colour in the holes."""
    return pixels.masked_fill(hole, 0.0)
