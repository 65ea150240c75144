"""Small pictures for tests: smooth enough to compare after JPEG, different for every key."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(width: int, height: int, key: int = 0) -> NDArray[np.uint8]:
    """``[height, width, 3]`` colour waves."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [127.5 + 60 * np.sin(x / (7 + key % 5 + c)) + 60 * np.cos(y / (9 + key % 7 - c) + key) for c in range(3)]
    return np.stack(channels, axis=-1).round().clip(0, 255).astype(np.uint8)


def picture(width: int = 48, height: int = 40, key: int = 0) -> Image.Image:
    return Image.fromarray(pixels(width, height, key))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 95} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def write_folder(root: Path, names: list[str], *, width: int = 48, height: int = 40) -> Path:
    """One different JPEG per name."""
    for key, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(width + key % 3, height + key % 4, key)))
    return root
