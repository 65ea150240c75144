"""Input pipelines from the documentation of torchvision, DALI and FFCV, without sslfast.

Three kinds of batches, all float32, normalised, on the device: ``crop`` (one random 224-pixel crop, mirrored or not),
``pirl`` (that crop, and of a second crop of 255 pixels nine 64-pixel patches in random order) and ``rotation`` (the
crop turned by a random number of quarter turns). No colour jitter: FFCV has none.

Sources: torchvision's transforms v2 "getting started"; DALI's "ImageNet training" and "augmentation gallery"; FFCV's
"quickstart" and ImageNet example. None has sample ids, handling of bad files or a resumable order.
"""

import os
from collections.abc import Callable, Generator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("crop", "pirl", "rotation")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRID, CELL, PATCH = 3, 85, 64

Batches = Generator[list[Tensor], None, None]
"""Endless. The pipeline is built with the first batch; ``close()`` stops its workers."""


def patch_corners(_sample: object = None) -> np.ndarray:
    """``[9, 2]`` int32: top and left of a patch at a random position in each cell, cells in random order."""
    cells = np.random.permutation(GRID * GRID)
    offsets = np.random.randint(CELL - PATCH + 1, size=(GRID * GRID, 2))
    return (CELL * np.stack([cells // GRID, cells % GRID], axis=1) + offsets).astype(np.int32)


def shuffled_patches(squares: Tensor) -> Tensor:
    """``[B, 3, 255, 255]`` -> ``[B, 9, 3, 64, 64]``."""
    patches = [square[:, y : y + PATCH, x : x + PATCH] for square in squares for y, x in patch_corners().tolist()]
    return torch.stack(patches).unflatten(0, (len(squares), GRID * GRID))


def quarter_turns(squares: Tensor) -> Tensor:
    """Every square turned by its own random number of quarter turns."""
    turns = torch.randint(4, (len(squares),)).tolist()
    return torch.stack([torch.rot90(square, k, (1, 2)) for square, k in zip(squares, turns, strict=True)])


def torchvision(data: Path, kind: str, *, batch_size: int, workers: int, device: torch.device) -> Batches:
    """``ImageFolder`` of PIL images in a ``DataLoader``, all transforms in its workers."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *normalise])
    square = v2.Compose([v2.RandomResizedCrop(255, scale=(0.6, 1.0)), *normalise])
    transforms: dict[str, Callable[[Any], Any]] = {
        "crop": crop,
        "pirl": lambda image: (crop(image), shuffled_patches(square(image)[None])[0]),
        "rotation": lambda image: quarter_turns(crop(image)[None])[0],
    }
    loader = DataLoader(
        ImageFolder(data, transforms[kind]),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    for epoch in repeat(loader):
        for views, _label in epoch:
            yield [view.to(device, non_blocking=True) for view in (views if kind == "pirl" else [views])]


def dali(data: Path, kind: str, *, batch_size: int, workers: int, device: torch.device) -> Batches:
    """``readers.file``, DALI's random operators, ``DALIGenericIterator``."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    decode = "mixed" if device.type == "cuda" else "cpu"

    def normalised(images: Any) -> Any:
        mean, std = [255 * value for value in MEAN], [255 * value for value in STD]
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, mirror=fn.random.coin_flip()
        )

    @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=0 if device.type == "cuda" else None, seed=0)
    def graph() -> Any:
        encoded, _label = fn.readers.file(file_root=str(data), random_shuffle=True, name="reader")
        if kind == "pirl":
            image = fn.decoders.image(encoded, device=decode, output_type=types.RGB)
            square = fn.random_resized_crop(image, size=[255, 255], random_area=[0.6, 1.0])
            corners = fn.external_source(source=patch_corners, batch=False)
            patches = [
                normalised(fn.slice(square, start=corners[k], shape=[PATCH, PATCH], axes=[0, 1]))
                for k in range(GRID * GRID)
            ]
            return normalised(fn.random_resized_crop(image, size=[224, 224])), fn.stack(*patches)
        crop = fn.decoders.image_random_crop(encoded, device=decode, output_type=types.RGB)
        crop = fn.resize(crop, size=[224, 224])
        if kind == "rotation":
            angle = 90.0 * fn.cast(fn.random.choice(4), dtype=types.FLOAT)
            crop = fn.rotate(crop, angle=angle, keep_size=True, interp_type=types.INTERP_NN)
        return normalised(crop)

    names = ["image", "patches"] if kind == "pirl" else ["image"]
    loader = DALIGenericIterator(
        graph(), names, reader_name="reader", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )

    for epoch in repeat(loader):
        for (views,) in epoch:
            yield list(views.values())


def ffcv(data: Path, kind: str, *, batch_size: int, workers: int, device: torch.device) -> Batches:
    """FFCV's ``Loader`` on a .beton file with the field ``image``, one decode for each crop."""
    # Read when numba is imported. With TBB, which OpenCV brings in, the process can hang at exit.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)

    def view(size: int, scale: tuple[float, float], *flips: object) -> list[object]:
        crop = RandomResizedCropRGBImageDecoder((size, size), scale=scale, ratio=(3 / 4, 4 / 3))
        normalise = NormalizeImage(mean, std, np.float32)
        on_device = [ToTensor(), ToDevice(device, non_blocking=True), ToTorchImage(convert_back_int16=False), normalise]
        return [crop, *flips, *on_device] if device.type == "cuda" else [crop, *flips, normalise, ToTensor()]

    pipelines = {"image": view(224, (0.08, 1.0), RandomHorizontalFlip()), "label": None, "row": None}
    if kind == "pirl":
        pipelines["square"] = PipelineSpec("image", transforms=view(255, (0.6, 1.0)))  # type: ignore[assignment]
    loader = Loader(
        str(data),
        batch_size=batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines=pipelines,
    )

    for epoch in repeat(loader):
        for views in epoch:
            images = [images if device.type == "cuda" else images.permute(0, 3, 1, 2) for images in views]
            if kind == "pirl":
                yield [images[0], shuffled_patches(images[1])]
            else:
                yield [quarter_turns(images[0]) if kind == "rotation" else images[0]]


PIPELINES = {"torchvision": torchvision, "dali": dali, "ffcv": ffcv}
