"""The demo data set: crops of photographs that ship with scikit-image and scikit-learn.

Each photograph is a class: are crops of one photograph more similar to one another than to crops of others? Training
crops come from the left half of each photograph and validation crops from the right half, so no pixel is in both.
Nothing is downloaded: the files are in the installed packages.

A crop is a square with random side and position in its half, resized to ``crop_size``; side and position are Philox
draws of the crop's number, so the set is the same on every machine.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from sslfast.ops.philox import Stream, random_uniform

PHOTOGRAPHS: dict[str, tuple[str, str]] = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "text": ("skimage", "data/text.png"),
    "tissue": ("skimage", "data/ihc.png"),
}
"""Class name -> package and file inside it. Left out: drawings, images with an almost empty half (``cell``,
``clock_motion``) and the second view of a scene (``motorcycle_right``)."""

HALVES = {"train": "left", "val": "right"}
LARGEST_REGION = 2.0
"""Largest crop, in multiples of ``crop_size``; limited by the size of the half."""
MARKER = "demo.json"
_VERSION = 1
_SEED = 0


@dataclass(frozen=True)
class DemoCrop:
    """Where an image of the set comes from."""

    split: str
    """train or val."""
    photograph: str
    """Class name."""
    number: int
    """Number of the crop in its split and class."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the photograph."""

    @property
    def path(self) -> str:
        """Relative to the root of the set."""
        return f"{self.split}/{self.photograph}/{self.number:04d}.png"


def photograph_path(name: str) -> Path:
    """The file of a photograph inside its installed package, which is not imported.

    Raises:
        ValueError: the package is not installed, or its version does not hold the file.
    """
    package, file = PHOTOGRAPHS[name]
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the demo's photographs ship inside {distribution}: pip install {distribution}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ValueError(f"{distribution} as installed does not hold {path}: pip install --upgrade {distribution}")
    return path


def demo_crops(*, train_per_photo: int, val_per_photo: int, crop_size: int = 96) -> list[DemoCrop]:
    """Every crop of the set, training first, then by class and number."""
    for name, count in (("train_per_photo", train_per_photo), ("val_per_photo", val_per_photo)):
        if not 1 <= count <= 9999:
            raise ValueError(f"{name} must be in [1, 9999], got {count}")
    if crop_size < 8:
        raise ValueError(f"crop_size must be at least 8 pixels, got {crop_size}")
    crops = []
    for split, count in (("train", train_per_photo), ("val", val_per_photo)):
        step = list(HALVES).index(split)
        for position, photograph in enumerate(PHOTOGRAPHS):
            with Image.open(photograph_path(photograph)) as image:
                width, height = image.size
            left, right = (0, width // 2) if HALVES[split] == "left" else (width // 2, width)
            largest = min(right - left, height, round(LARGEST_REGION * crop_size))
            if largest < crop_size:
                raise ValueError(
                    f"crop_size={crop_size} does not fit into half of {photograph} ({right - left} x {height} pixels); "
                    f"choose at most {largest}"
                )
            # Rows of the draw: a crop's row does not depend on the number of crops.
            rows = torch.arange(count) + 10_000 * position
            draws = random_uniform(rows, 3, seed=_SEED, stream=Stream.DEMO_CROPS, step=step).double()
            sides = crop_size + (draws[:, 0] * (largest - crop_size + 1)).long()
            lefts = left + (draws[:, 1] * (right - left - sides + 1)).long()
            tops = (draws[:, 2] * (height - sides + 1)).long()
            for number, (x, y, side) in enumerate(zip(lefts.tolist(), tops.tolist(), sides.tolist(), strict=True)):
                crops.append(DemoCrop(split, photograph, number, (x, y, x + side, y + side)))
    return crops


def make_demo_data(root: Path, *, train_per_photo: int, val_per_photo: int, crop_size: int = 96) -> Path:
    """Write the set as ``root/train/<photograph>/0000.png`` and ``root/val/...``; returns ``root``.

    Atomically: the set is built next to ``root`` and renamed. A second call with the same arguments does nothing; other
    arguments, another version of the photographs or missing files rebuild the set.

    Args:
        root: folder of the set; one that exists must be empty or hold a demo set.
        train_per_photo: training crops of each photograph, from its left half.
        val_per_photo: validation crops of each photograph, from its right half.
        crop_size: side of the written images in pixels.

    Raises:
        ValueError: a package is missing, an argument is out of range, or ``root`` holds something else.
    """
    root = Path(root)
    crops = demo_crops(train_per_photo=train_per_photo, val_per_photo=val_per_photo, crop_size=crop_size)
    sources = {name: hashlib.sha1(photograph_path(name).read_bytes()).hexdigest()[:16] for name in PHOTOGRAPHS}
    facts = {"version": _VERSION, "crop_size": crop_size, "photographs": sources, "crops": [asdict(c) for c in crops]}
    marker = json.dumps(facts) + "\n"
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; name a folder for the demo data")
    if root.is_dir() and any(root.iterdir()):
        if not (root / MARKER).is_file():
            raise ValueError(f"{root} holds something other than a demo set (no {MARKER}); choose another folder")
        unchanged = (root / MARKER).read_text(encoding="utf-8") == marker
        if unchanged and all((root / crop.path).is_file() for crop in crops):
            return root
    root.parent.mkdir(parents=True, exist_ok=True)
    # Same parent, so that the renames stay on one file system.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as temporary:
        made, old = Path(temporary) / "new", Path(temporary) / "old"
        _write(made, crops, crop_size)
        (made / MARKER).write_text(marker, encoding="utf-8")
        if root.exists():
            os.rename(root, old)
        os.rename(made, root)
    return root


def _write(root: Path, crops: list[DemoCrop], crop_size: int) -> None:
    images: dict[str, Image.Image] = {}
    for crop in crops:
        if crop.photograph not in images:
            with Image.open(photograph_path(crop.photograph)) as image:
                images[crop.photograph] = image.convert("RGB")
        path = root / crop.path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Cropped before the resize: its filter must not reach into the other half.
        cropped = images[crop.photograph].crop(crop.box)
        cropped.resize((crop_size, crop_size), Image.Resampling.LANCZOS).save(path, compress_level=1)
