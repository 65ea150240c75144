"""What every loader takes and yields: the crop recipe of each view, and a batch of uint8 crops with their rows."""

from dataclasses import dataclass, field

from torch import Tensor

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

    ``rows``: ``[B]`` int64, manifest rows, on the device. ``crops``: view name -> uint8 ``[B, 3, S, S]`` on the
    device. ``epoch``: the epoch that the crop boxes were drawn for; the view stage draws with the same number.
    """

    rows: Tensor
    crops: dict[str, Tensor]
    epoch: int


@dataclass
class View:
    """One rendered view. ``pixels``: ``[B, 3, S, S]``, or ``[B, P, 3, p, p]`` for jigsaw, float.
    ``permutation``: ``[B, P]`` int64, cell shown in each slot. ``quarter_turns``: ``[B]`` int64."""

    pixels: Tensor
    permutation: Tensor | None = None
    quarter_turns: Tensor | None = None
