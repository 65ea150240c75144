"""What the configurations of the evaluations share: how images are read, and checks of values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sslfast.config import check_numbers
from sslfast.data import DEFAULT_DECODING, Decoding, Manifest, OnBadImage, recorded_decoding
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.limits import LIMITS
from sslfast.evaluation.preprocessing import Preprocessing, PreprocessingChoice, resolve_preprocessing
from sslfast.files import check_regular, reason_of
from sslfast.loaders import ReaderName
from sslfast.runs import RunDirectory


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """What the policy for images leaves to the user: by default, as the run read its own."""

    white_level: int | None = None
    """Sample value that is white in images of 16 bits a channel; default: as the run read them, else 65535."""
    max_pixels: int | None = None
    """Images of more pixels are unusable; default: that of the run, else 89,478,485."""
    prefix: str | None = None
    """Of a file that holds several networks, the one to evaluate: the beginning of its entries' names."""

    def __post_init__(self) -> None:
        check_numbers(self, LIMITS)
        Decoding(white_level=self.white_level, max_pixels=self.max_pixels)

    def decoding(self, run: Path | str) -> Decoding:
        """As these options say, or else as the run read its images.

        Raises:
            ValueError: the run's manifest cannot be read.
        """
        manifest = RunDirectory(run).manifest
        try:
            check_regular(manifest)
            recorded = recorded_decoding(manifest)
        except NotADirectoryError:  # a file of weights has no manifest
            recorded = DEFAULT_DECODING
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{manifest} does not say how the run read its images ({reason_of(error)}); restore it or move it away"
            ) from None
        return Decoding(
            white_level=self.white_level or recorded.white_level, max_pixels=self.max_pixels or recorded.max_pixels
        )


@dataclass(frozen=True, kw_only=True)
class ImageConfig(DecodingConfig):
    """How an evaluation reads its images, and the device that it runs on."""

    size: int | None = None
    """Side of the images in pixels; default: that of the run."""
    preprocessing: PreprocessingChoice = "auto"
    """What is seen of an image. centre-crop: Resize(256) and CenterCrop(224), for other sizes in proportion;
    centre-crop-bicubic: resized as DINO's kNN. whole: all of it, squeezed to a square. centre-square: the largest
    square. auto: centre-crop, as published but for DINO's (lowshot: whole; below 96 pixels centre-square)."""
    patches: Literal["auto", "on", "off"] = "auto"
    """Of methods that train on patches (cpc, jigsaw, relative-position). on: an image's features are the mean over
    those of its patches; off: those of the whole image. auto: as the number that the recipe quotes was measured: cpc
    on, the others off."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int = 0
    """Decoding threads; 0: decode in the main thread."""
    loader: ReaderName = "auto"
    """What decodes and resizes: pillow, dali (JPEGs; on a GPU there) or ffcv (.beton files); auto: ffcv for a .beton
    file, else pillow, whose pixels are the published ones. The result says how the others differ."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    on_bad_image: OnBadImage = "error"
    """error: stop at an image that cannot be decoded. skip: leave it out and count it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, size=self.size, batch_size=self.batch_size)
        check_at_least(0, workers=self.workers)

    def seen(self, size: int, *, default: Preprocessing = "centre-crop") -> Preprocessing:
        """The preprocessing of images of this size; ``default``: the protocol's own."""
        return resolve_preprocessing(self.preprocessing, size, default)

    def readers(self, manifests: Sequence[Manifest], size: int, seen: Preprocessing) -> list[ImageReader]:
        """Of the images of each split. With ``ffcv`` one of them is a .beton file, and image files are read by
        Pillow."""
        is_packed = any(manifest.source.loader == "ffcv" for manifest in manifests)
        loader = "auto" if self.loader == "ffcv" and is_packed else self.loader
        return [
            ImageReader(manifest, size, self.batch_size, self.workers, self.on_bad_image, seen, loader)
            for manifest in manifests
        ]


def check_at_least(minimum: int, **values: int | None) -> None:
    """ValueError, naming it, where a value is smaller; None passes."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {name}={value}")


def check_seeds(seeds: Sequence[int]) -> None:
    """ValueError unless there is a seed, all are different and none is negative."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be whole numbers from 0 on, at least one and all different, got {tuple(seeds)}")


def check_positive(name: str, values: Sequence[float]) -> None:
    """ValueError unless there is a value and all are above 0."""
    if not values or not min(values) > 0:
        raise ValueError(f"{name} must be positive numbers, at least one, got {tuple(values)}")
