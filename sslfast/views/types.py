"""Configuration of the views of a recipe, the batch of uint8 crops that a loader yields, and a rendered view."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sslfast.views.augment import AugmentConfig, check_augment


@dataclass(kw_only=True)
class CropConfig:
    """Random resized crop: a box of random area and aspect ratio, resized to a square."""

    size: int = 224
    """Side of the square in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height), drawn log-uniformly."""


@dataclass(kw_only=True)
class JigsawConfig:
    """Cut the crop into ``grid`` x ``grid`` cells, take a patch at a random offset in each, permute the patches."""

    grid: int = 3
    """Cells per side. The cell side is ``crop.size // grid``."""
    patch_size: int = 64
    """Side of a patch in pixels, at most the cell side."""
    max_offset: int | None = None
    """Largest offset of a patch inside its cell, both axes; None: as large as the cell allows (85 - 64 = 21)."""


@dataclass(kw_only=True)
class ViewConfig:
    """One view of a sample: crop, then optional rotation, then optional jigsaw, then augmentation."""

    crop: CropConfig = field(default_factory=CropConfig)
    rotation: bool = False
    """Rotate the crop by a random number of quarter turns; without jigsaw the flip is applied before the rotation."""
    jigsaw: JigsawConfig | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class Batch:
    """One step's samples as a loader yields them, before the view stage.

    ``sample_ids``: ``[B]`` int64, manifest rows, on the device. ``crops``: view name -> uint8 ``[B, 3, S, S]`` on the
    device. ``epoch``: the epoch for which the crop boxes were drawn; the view stage draws its parameters for the same.
    """

    sample_ids: Tensor
    crops: dict[str, Tensor]
    epoch: int


@dataclass
class View:
    """One rendered view. ``pixels``: ``[B, 3, S, S]``, or ``[B, P, 3, p, p]`` for jigsaw, float.
    ``permutation``: ``[B, P]`` int64, cell shown in each slot. ``quarter_turns``: ``[B]`` int64."""

    pixels: Tensor
    permutation: Tensor | None = None
    quarter_turns: Tensor | None = None


MAX_VIEWS = 15
"""Views that a recipe can have: the width of the Philox stream range ``Stream.VIEW``."""


def check_views(views: Mapping[str, ViewConfig]) -> None:
    """Raise ValueError for a config that cannot be rendered, naming the view, the value and the remedy."""
    if not 1 <= len(views) <= MAX_VIEWS:
        raise ValueError(f"a recipe needs 1 to {MAX_VIEWS} views, got {len(views)}")
    for name, config in views.items():
        if config.crop.size < 1:
            raise ValueError(f"view {name!r}: crop.size must be at least 1, got {config.crop.size}")
        if not 0 < config.crop.scale[0] <= config.crop.scale[1] <= 1:
            raise ValueError(f"view {name!r}: crop.scale must be 0 < smallest <= largest <= 1, got {config.crop.scale}")
        if not 0 < config.crop.ratio[0] <= config.crop.ratio[1]:
            raise ValueError(f"view {name!r}: crop.ratio must be 0 < smallest <= largest, got {config.crop.ratio}")
        if config.jigsaw is not None:
            _check_jigsaw(name, config, config.jigsaw)
        check_augment(name, config.augment)


def _check_jigsaw(name: str, config: ViewConfig, jigsaw: JigsawConfig) -> None:
    if jigsaw.grid < 1:
        raise ValueError(f"view {name!r}: jigsaw.grid must be at least 1, got {jigsaw.grid}")
    cell = config.crop.size // jigsaw.grid
    if not 1 <= jigsaw.patch_size <= cell:
        raise ValueError(
            f"view {name!r}: jigsaw.patch_size must be in [1, {cell}], the cell side of a "
            f"{config.crop.size}-pixel crop in {jigsaw.grid} x {jigsaw.grid} cells, got {jigsaw.patch_size}"
        )
    if jigsaw.max_offset is not None and not 0 <= jigsaw.max_offset <= cell - jigsaw.patch_size:
        raise ValueError(
            f"view {name!r}: jigsaw.max_offset must be in [0, {cell - jigsaw.patch_size}], cell side less patch side, "
            f"got {jigsaw.max_offset}"
        )
