"""What every loader takes and yields: the crop recipe of each view, and a batch of uint8 crops with their rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sslfast.ops.pixels import MAX_BLUR_SIGMA

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    """Cut the crop into ``grid`` x ``grid`` cells, take one patch at a random place of each, permute them."""

    grid: int = 3
    """Cells per side. The cell side is ``crop.size // grid``."""
    patch_size: int = 64
    """Side of a patch in pixels, at most the cell side."""
    max_offset: int | None = None
    """Largest offset of a patch inside its cell, both axes; None: as far as the cell allows (85 - 64 = 21)."""


@dataclass(kw_only=True)
class AugmentConfig:
    """Pixel augmentation, applied to every image or to every patch independently, in this order:
    flip, jitter (brightness, contrast, saturation, hue in random order), photometric, grayscale, blur, normalise."""

    flip_probability: float = 0.5
    """Horizontal flip."""
    jitter_probability: float = 1.0
    """Gate of the four jitters together."""
    brightness: float = 0.4
    """Factor uniform in [1 - b, 1 + b]; 0 switches it off; likewise contrast and saturation."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2
    """Hue shift uniform in [-hue, hue] turns."""
    photometric_probability: float = 0.0
    """Gate of posterize (4 to 8 bits), sharpness (0.1 to 1.9), solarize (threshold 0 to 256), autocontrast together."""
    grayscale_probability: float = 0.2
    blur_probability: float = 0.0
    """Gate of the Gaussian blur; 0.5 in MoCo v2 and SimCLR."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest sigma of the blur, drawn uniformly, in pixels of the picture; at most 5."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(kw_only=True)
class ViewConfig:
    """One view of a sample: crop, then optional rotation, then optional jigsaw, then augmentation."""

    crop: CropConfig = field(default_factory=CropConfig)
    rotation: bool = False
    """Rotate the crop by a random number of quarter turns; without jigsaw the flip comes before it."""
    jigsaw: JigsawConfig | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class Batch:
    """One step's samples as a loader yields them, before the view stage.

    ``sample_ids``: ``[B]`` int64, manifest rows, on the device. ``crops``: view name -> uint8 ``[B, 3, S, S]`` on the
    device. ``epoch``: the epoch that the crop boxes were drawn for; the view stage draws with the same number.
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
        _check_augment(name, config.augment)


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


def _check_augment(name: str, augment: AugmentConfig) -> None:
    for gate in ("flip", "jitter", "photometric", "grayscale", "blur"):
        field = f"{gate}_probability"
        if not 0 <= getattr(augment, field) <= 1:
            raise ValueError(f"view {name!r}: {field} must be in [0, 1], got {getattr(augment, field)}")
    for field in ("brightness", "contrast", "saturation"):
        if not 0 <= getattr(augment, field) < float("inf"):
            raise ValueError(f"view {name!r}: {field} must be at least 0, got {getattr(augment, field)}")
    if not 0 <= augment.hue <= 0.5:
        raise ValueError(f"view {name!r}: hue must be in [0, 0.5] turns, got {augment.hue}")
    low, high = augment.blur_sigma
    if not 0 < low <= high <= MAX_BLUR_SIGMA:
        raise ValueError(
            f"view {name!r}: blur_sigma must hold two sigmas, 0 < low <= high <= {MAX_BLUR_SIGMA}, got {low} and {high}"
        )
    if len(augment.mean) != 3 or len(augment.std) != 3 or min(augment.std) <= 0:
        raise ValueError(
            f"view {name!r}: mean and std must have 3 values, std above 0, got {augment.mean} and {augment.std}"
        )
