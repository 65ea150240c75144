"""Relative position: classify where a patch lies relative to another one (Doersch, Gupta & Efros, ICCV 2015).

Objective: ``loss = -log softmax(h(f(x_centre), f(x_n)))_n``, where ``x_n`` is the patch of the n-th of the eight cells
around the centre of a 3 x 3 grid, in reading order, f the trunk and h a head on the two concatenated features. Either
one drawn neighbour of each image (the paper), or the mean over all eight from nine trunk passes (Kolesnikov, Zhai &
Beyer, CVPR 2019). Against shortcuts, as in the paper: a gap between patches and a random position of each in its cell
(the view's ``patch_size`` and ``max_offset``), and colour dropping, against chromatic aberration: one drawn channel of
each patch is kept and the others become noise. Of the authors' code (cdoersch/deepcontext, ``train.py``) there are also
``standardise`` and ``downsample_probability``, of mmselfsup (``necks/relative_loc_neck.py``) ``dropout``. A trunk that
has seen one channel at a time is evaluated on RGB like every other, on whole images or averaged patches: its BatchNorm
statistics are of neither.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, relu

from sslfast.methods.base import BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.grid import PatchGrid
from sslfast.methods.shared.patches import (
    CROP_WORDS,
    PatchConfig,
    adjacent_patches,
    augment_crop,
    gather_patches,
    jigsaw_view,
    mosaic,
    resampling_matrices,
    slots_of_cells,
)
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models import PairHead, build_trunk, seeded
from sslfast.ops.philox import Stream, random_uint32, uint32_below
from sslfast.optim import ParameterOptions
from sslfast.views import View, ViewConfig

PATCHES = "patches"
CELLS, CENTRE, NEIGHBOURS = 9, 4, 8
NOISE = 0.01
"""Standard deviation of the noise in a dropped channel, in units of that of the kept one (Doersch et al., section
3.1)."""
LEAST_SIDE = 10
"""Pixels a side of the smallest patch before it is enlarged again (``deepcontext/train.py``, prep_image)."""


@dataclass(kw_only=True)
class Draws:
    """Every random choice of a batch, a function of (seed, step, sample id)."""

    neighbour: Tensor
    """``[B]`` int64 in 0..7: the neighbour, with ``pairs="drawn"``."""
    channel: Tensor
    """``[B, 9]`` int64 in 0..2: the channel that each cell's patch keeps."""
    sample_ids: Tensor
    """``[B]`` int64, of the further draws that a configuration may need."""
    step: int | Tensor
    """Of the run."""
    noise: Tensor
    """``[B, p, p]`` fp32 normal. The same for the dropped channels of all patches of a sample, so that it carries no
    information on where a patch lies."""


def draw(sample_ids: Tensor, patch_size: int, *, seed: int, step: int | Tensor) -> Draws:
    """The draws of a step: word 0 the neighbour, words 1 to 9 the channels, then the noise (Box-Muller transform)."""
    half = (patch_size**2 + 1) // 2
    words = random_uint32(sample_ids, 1 + CELLS + 2 * half, seed=seed, stream=Stream.PRETEXT, step=step)
    uniform = (words[:, 1 + CELLS :].double() + 0.5) * 2.0**-32  # in (0, 1), fp64: the logarithm is finite
    radius, angle = (-2 * uniform[:, :half].log()).sqrt(), 2 * math.pi * uniform[:, half:]
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, : patch_size**2]
    return Draws(
        sample_ids=sample_ids,
        step=step,
        neighbour=uint32_below(words[:, 0], NEIGHBOURS),
        channel=uint32_below(words[:, 1 : 1 + CELLS], 3),
        noise=normal.float().unflatten(1, (patch_size, patch_size)),
    )


def draw_sides(sample_ids: Tensor, size: int, share: float, *, seed: int, step: int | Tensor) -> Tensor:
    """``[B, 9]`` int64: the side that each cell's patch of ``size`` px is resampled through, ``size`` for ``1 - share``
    of them, else the root of an area uniform between those of ``LEAST_SIDE`` and ``size - 1``, rounded down."""
    words = random_uint32(sample_ids, CROP_WORDS + 2 * CELLS, seed=seed, stream=Stream.CORRUPTION, step=step)
    chosen, areas = words[:, CROP_WORDS:].chunk(2, dim=1)
    least, most = min(LEAST_SIDE, size - 1) ** 2, (size - 1) ** 2
    drawn = (areas.double() * (2.0**-32 * (most - least)) + least).sqrt().long()
    return torch.where(chosen < round(share * 2**32), drawn, size)


def draw_kept(sample_ids: Tensor, rows: int, columns: int, dropout: float, *, seed: int, step: int | Tensor) -> Tensor:
    """Dropout's factors ``[B * rows, columns]`` fp32: 0 with probability ``dropout``, in steps of 1/256, and the
    inverse of the share that is left."""
    before = CROP_WORDS + 2 * CELLS
    count = -(-rows * columns // 4)
    words = random_uint32(sample_ids, before + count, seed=seed, stream=Stream.CORRUPTION, step=step)[:, before:]
    shifts = torch.arange(0, 32, 8, device=words.device)
    levels = ((words[..., None] >> shifts) & 255).flatten(1)[:, : rows * columns]
    least = round(dropout * 256)
    return (levels >= least).float().view(-1, columns) * (256 / (256 - least))


def standardise(patches: Tensor, channel: Tensor | None) -> Tensor:
    """``[B, P, 3, p, p]`` with mean 0 and root mean square 1 of every patch, at most 50 times as large.

    Args:
        patches: colours not yet dropped.
        channel: ``[B, P]`` that is kept, the other two being 0 behind this; None: all three (Kolesnikov et al. 2019).
    """
    pixels = patches.float()
    if channel is None:
        pixels = pixels - pixels.mean(dim=(-3, -2, -1), keepdim=True)
    else:
        kept = torch.arange(3, device=patches.device) == channel[..., None]
        pixels = (pixels - pixels.mean(dim=(-2, -1), keepdim=True)) * kept[..., None, None]
    scale = pixels.square().mean(dim=(-3, -2, -1), keepdim=True).sqrt().clamp_min(0.02)
    return (pixels / scale).to(patches.dtype)


def standardised(patches: Tensor) -> Tensor:
    """:func:`standardise` of patches whose colours are kept."""
    return standardise(patches, None)


def drop_colours(patches: Tensor, channel: Tensor, noise: Tensor) -> Tensor:
    """``[B, P, 3, p, p]`` with ``channel`` ``[B, P]`` of each patch kept, the others noise."""
    kept = torch.arange(3, device=patches.device) == channel[..., None]  # [B, P, 3]
    deviation = patches.float().std(dim=(-2, -1), correction=0).gather(2, channel[..., None])  # [B, P, 1]
    filled = NOISE * deviation[..., None, None] * noise[:, None, None]  # [B, P, 1, p, p]
    return torch.where(kept[..., None, None], patches, filled.to(patches.dtype))


@register_method
class RelativePosition(Method):
    """The method as a module. No state besides the weights."""

    matrices: Tensor | None

    @dataclass(kw_only=True)
    class Config(PatchConfig):
        """Eight-way classification of a neighbour's position."""

        name: ClassVar[str] = "relative-position"

        pairs: Literal["all", "drawn"] = "all"
        """all: the centre with each of its eight neighbours, nine trunk passes for eight pairs. drawn: with one,
        two passes for one pair, as published."""
        hidden_features: int = 4096
        """Columns of the head's hidden layer."""
        drop_colours: bool = True
        """Keep one drawn channel of each patch, against chromatic aberration."""
        standardise: bool = False
        """Subtract each patch's mean, where colours are dropped that of the kept channel, and divide by its root mean
        square."""
        downsample_probability: float = 0.0
        """Share of patches made at least 10 px small and enlarged again, against compression artefacts; a third in the
        authors' code."""
        dropout: float = 0.0
        """Share of the head's hidden features set to 0, in steps of 1/256; 0.5 in mmselfsup."""
        head_weight_decay: float | None = None
        """Weight decay of the head; None: that of the run."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """Whole images, for evaluations only."""
        patch_view: ViewConfig = field(default_factory=jigsaw_view)
        """The 3 x 3 patches; their order in the view does not matter."""

        def views(self) -> dict[str, ViewConfig]:
            """The views that a step needs, in the order that numbers their random streams."""
            return {PATCHES: self.patch_view}

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """Centre and drawn neighbour side by side, then the answer: the 3 x 3 grid with these two patches only."""
            space = PixelSpace(self.patch_view.augment).to(sample_ids.device)
            view = augment_crop(views[PATCHES], sample_ids, self, space, seed=seed, step=0)
            pixels = gather_patches(view.pixels, slots_of_cells(view))
            patches = space.to_rgb(pixels)
            drawn = draw(sample_ids, patches.shape[-1], seed=seed, step=0)
            if self.downsample_probability > 0:
                pixels = self.resampled(pixels, sample_ids, resampling_matrices(pixels.shape[-1]), seed=seed, step=0)
            seen = space.to_rgb(self.corrupted(pixels, drawn))
            cell = cells_of_neighbours(drawn.neighbour)
            pair = torch.stack((torch.full_like(cell, CENTRE), cell), dim=1)  # [B, 2]
            cells = torch.arange(CELLS)
            shown = (cells == CENTRE) | (cells == cell[:, None])
            answer = torch.where(shown[..., None, None, None], patches, torch.ones(()))
            return {
                "centre and which neighbour?": mosaic(gather_patches(seen, pair), 2),
                "answer": mosaic(answer, 3),
            }

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            jigsaw = self.patch_view.jigsaw
            if jigsaw is None or jigsaw.grid != 3:
                raise ValueError(
                    "method.patch_view.jigsaw.grid must be 3, a centre and eight neighbours, "
                    f"got {jigsaw and jigsaw.grid}"
                )
            if self.patch_view.rotation:
                raise ValueError(
                    "method.patch_view.rotation must be False: rotation changes the relative positions, got True"
                )
            self.check_at_least(1, "hidden_features")

        def evaluation_patches(self) -> PatchGrid | None:
            """Adjacent patches of the training's size, in colour."""
            return adjacent_patches(self.patch_view, standardised if self.standardise else None)

        def resampled(
            self, pixels: Tensor, sample_ids: Tensor, matrices: Tensor, *, seed: int, step: int | Tensor
        ) -> Tensor:
            """Patches ``[B, 9, 3, p, p]`` by cell, some of them made small and enlarged again."""
            side = pixels.shape[-1]
            chosen = draw_sides(sample_ids, side, self.downsample_probability, seed=seed, step=step)
            matrix = matrices[chosen][:, :, None]  # [B, 9, 1, p, p]
            return (matrix @ pixels.float() @ matrix.transpose(-1, -2)).to(pixels.dtype)

        def corrupted(self, pixels: Tensor, drawn: Draws) -> Tensor:
            """Patches ``[B, 9, 3, p, p]`` by cell as the trunk gets them."""
            if self.standardise:
                pixels = standardise(pixels, drawn.channel if self.drop_colours else None)
            return drop_colours(pixels, drawn.channel, drawn.noise) if self.drop_colours else pixels

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where BatchNorm in the head has too few pairs."""
            pairs = NEIGHBOURS if self.pairs == "all" else 1
            split.check_normalised("relative-position's head", per_sample=pairs, remedy=", or set method.pairs to all")

        def build(self, context: MethodContext) -> "RelativePosition":
            """The module for a run."""
            return RelativePosition(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config, self.seed = config, context.seed
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.head = PairHead(self.trunk.out_features, config.hidden_features, NEIGHBOURS)
        self.pixel_space = PixelSpace(config.patch_view.augment)
        matrices = None
        if config.downsample_probability > 0:
            assert config.patch_view.jigsaw is not None
            matrices = resampling_matrices(config.patch_view.jigsaw.patch_size)
        self.register_buffer("matrices", matrices, persistent=False)

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The head's weight decay."""
        decay = self.config.head_weight_decay
        return {} if decay is None else {"head": ParameterOptions(weight_decay=decay)}

    def logits(self, view: View, drawn: Draws) -> tuple[Tensor, Tensor]:
        """(scores ``[Q, 8]``, answers ``[Q]``): Q = 8 B pairs, or B where one neighbour is drawn."""
        pixels = gather_patches(view.pixels, slots_of_cells(view))  # [B, 9, 3, p, p] by cell
        if self.matrices is not None:
            pixels = self.config.resampled(pixels, drawn.sample_ids, self.matrices, seed=self.seed, step=drawn.step)
        pixels = self.config.corrupted(pixels, drawn)
        if self.config.pairs == "all":
            features = self.trunk(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])  # [B, 9, C]
            centre = features[:, CENTRE, None].expand(-1, NEIGHBOURS, -1).flatten(0, 1)
            neighbour = torch.cat((features[:, :CENTRE], features[:, CENTRE + 1 :]), dim=1).flatten(0, 1)
            answers = torch.arange(NEIGHBOURS, device=pixels.device).repeat(len(pixels))
        else:
            answers = drawn.neighbour
            chosen = torch.stack((torch.full_like(answers, CENTRE), cells_of_neighbours(answers)), dim=1)
            features = self.trunk(gather_patches(pixels, chosen).flatten(0, 1))  # [2 B, C]
            centre, neighbour = features[0::2], features[1::2]
        if self.config.dropout == 0:
            return self.head(centre, neighbour), answers
        hidden = relu(self.head.norm(self.head.hidden(torch.cat((centre, neighbour), dim=1))))
        rows = len(answers) // len(view.pixels)
        kept = draw_kept(drawn.sample_ids, rows, hidden.shape[1], self.config.dropout, seed=self.seed, step=drawn.step)
        return self.head.classes(hidden * kept.to(hidden.dtype) if self.training else hidden), answers

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``accuracy``, the share of correct positions (detached).

        Args:
            views: "patches".
            sample_ids: ``[B]`` int64, manifest row of each sample.
            step: number of the step: with the seed and the sample id it fixes neighbour, channels and noise.
        """
        view = augment_crop(views[PATCHES], sample_ids, self.config, self.pixel_space, seed=self.seed, step=step)
        drawn = draw(sample_ids, view.pixels.shape[-1], seed=self.seed, step=step)
        logits, answers = self.logits(view, drawn)
        accuracy = (logits.argmax(dim=1) == answers).float().mean()
        return {"loss": cross_entropy(logits.float(), answers), "accuracy": accuracy}


def cells_of_neighbours(neighbour: Tensor) -> Tensor:
    """Neighbour 0..7 to its cell 0..8, skipping the centre."""
    return neighbour + (neighbour >= CENTRE).long()
