"""Images with boxes from Pascal VOC and COCO-format folders, and the batches that a detector trains on.

Boxes are left, top, right, bottom: edges in pixels from the upper left corner of the upright image, so that a VOC box
``xmin, ymin, xmax, ymax`` (pixels counted from 1, the last one inside) is ``xmin - 1, ymin - 1, xmax, ymax``.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from sslfast.data import (
    DEFAULT_DECODING,
    HASHED_BYTES,
    BadImageError,
    DaemonPool,
    Decoding,
    Patience,
    content_hash,
    decode_full,
    quiet_pillow,
    read_bytes,
)
from sslfast.distributed import rank, world_size
from sslfast.evaluation.voc import annotation_path, read_annotation, split_ids, voc_root
from sslfast.files import open_regular, reason_of
from sslfast.ops.philox import Stream, random_uint32, random_uniform

ORDER, VIEW = Stream.DETECTION, Stream.DETECTION + 1
IGNORED = -1
"""Label of a box that counts neither as an object nor as background."""

_MAX_COORDINATE = 1e9
"""Of a box, in pixels."""

Difficult = Literal["train", "ignore"]


@dataclass(frozen=True, kw_only=True)
class BoxedImage:
    """An image and its boxes."""

    path: Path
    names: tuple[str, ...]
    """Class of each box."""
    boxes: NDArray[np.float32]
    """``[n, 4]`` left, top, right, bottom."""
    difficult: NDArray[np.bool_]
    """``[n]``: ignored in scoring: neither a missed object nor a false positive."""
    crowd: NDArray[np.bool_]
    """``[n]``: a region of many objects (COCO); ignored in scoring and never trained on."""


@dataclass(kw_only=True)
class BoxedImages:
    """A split."""

    name: str
    images: list[BoxedImage]

    def digest(self) -> str:
        """SHA-256 over name, size, first 16 KiB and boxes of every image."""
        sha = hashlib.sha256()
        for image in self.images:
            try:
                with open_regular(image.path) as file:
                    content = content_hash(file.read(HASHED_BYTES))
                    size = os.fstat(file.fileno()).st_size
            except OSError as error:
                raise ValueError(f"{image.path} cannot be read ({reason_of(error)}); restore the images") from None
            objects = [image.names, image.boxes.tolist(), image.difficult.tolist(), image.crowd.tolist()]
            sha.update(f"{image.path.name}\t{size}\t{content}\t{json.dumps(objects)}\n".encode())
        return sha.hexdigest()

    def classes(self) -> list[str]:
        """Sorted."""
        return sorted({name for image in self.images for name in image.names})


def load_splits(
    folders: Sequence[Path], *, train_split: str | None = None, test_split: str | None = None
) -> tuple[BoxedImages, BoxedImages]:
    """The training images of all folders, and the test images of the first folder that has such a split.

    Args:
        folders: VOC folders, or COCO-format ones: ``annotations/instances_<split>.json`` with the images in
            ``<split>/``, ``images/<split>/`` or ``images/``.
        train_split: default ``trainval`` in VOC folders, and in COCO's the one that begins with ``train``.
        test_split: default ``test``, in COCO's the one that begins with ``val``.

    Raises:
        ValueError: a folder or a part of it is missing, or a class of the test images is in no training image.
    """
    if not folders:
        raise ValueError("no data was named; give VOC folders (VOC2007 VOC2012) or COCO-format ones")
    formats = [(_CocoFolder if _is_coco(Path(folder)) else _VocFolder)(Path(folder)) for folder in folders]
    train = [image for folder in formats for image in folder.read(train_split or folder.train())]
    tested = next((folder for folder in formats if folder.has(test_split or folder.test())), formats[0])
    found = tested.read(test_split or tested.test())
    splits = BoxedImages(name="train", images=train), BoxedImages(name="test", images=found)
    for split in splits:
        if not any(image.names for image in split.images):
            raise ValueError(f"{split.name}: {len(split.images)} images and no box in {folders[0]}; name another")
    odd = set(splits[1].classes()) - set(splits[0].classes())
    if odd:
        raise ValueError(
            f"test images show {', '.join(sorted(odd)[:5])}, which no training image shows; name other splits"
        )
    return splits


class _VocFolder:
    def __init__(self, folder: Path) -> None:
        self.root = voc_root(folder)

    def train(self) -> str:
        return "trainval"

    def test(self) -> str:
        return "test"

    def has(self, split: str) -> bool:
        return (self.root / "ImageSets" / "Main" / f"{split}.txt").is_file()

    def read(self, split: str) -> list[BoxedImage]:
        return [self._image(name) for name in split_ids(self.root, split)]

    def _image(self, name: str) -> BoxedImage:
        objects = read_annotation(annotation_path(self.root, name))
        boxes = [(one.box[0] - 1, one.box[1] - 1, one.box[2], one.box[3]) for one in objects]
        return BoxedImage(
            path=self.root / "JPEGImages" / f"{name}.jpg",
            names=tuple(one.name for one in objects),
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            difficult=np.array([one.difficult for one in objects], dtype=bool),
            crowd=np.zeros(len(objects), dtype=bool),
        )


class _CocoFolder:
    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.splits = sorted(p.stem.removeprefix("instances_") for p in _coco_files(folder))

    def train(self) -> str:
        return self._only("train")

    def test(self) -> str:
        return self._only("val")

    def _only(self, start: str) -> str:
        found = [split for split in self.splits if split.startswith(start)]
        if len(found) > 1:
            raise ValueError(f"{self.root}/annotations has several {start} splits ({', '.join(found)}); name one")
        return found[0] if found else start

    def has(self, split: str) -> bool:
        return split in self.splits

    def read(self, split: str) -> list[BoxedImage]:
        if split not in self.splits:
            raise ValueError(
                f"{self.root}/annotations has no instances_{split}.json; there are {', '.join(self.splits)}"
            )
        path = self.root / "annotations" / f"instances_{split}.json"
        candidates = (self.root / split, self.root / "images" / split, self.root / "images")
        folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if folder is None:
            raise ValueError(f"no folder with the images of {split}: create one of {', '.join(map(str, candidates))}")
        try:
            with open_regular(path) as file:
                content = json.loads(file.read().decode("utf-8-sig"))
            names = {category["id"]: category["name"] for category in content["categories"]}
            found: dict[Any, list[tuple[str, list[float], bool, bool]]] = {one["id"]: [] for one in content["images"]}
            for one in content["annotations"]:
                left, top, width, height = map(_number, one["bbox"])
                if width > 0 and height > 0:  # published files hold a few boxes without an area
                    box = [left, top, left + width, top + height]
                    crowd, difficult = bool(one.get("iscrowd", 0)), bool(one.get("ignore", 0))
                    found[one["image_id"]].append((names[one["category_id"]], box, difficult, crowd))
            files = {one["id"]: one["file_name"] for one in content["images"]}
            for text in (*names.values(), *files.values()):
                if not isinstance(text, str) or not text or "\0" in text:
                    raise ValueError(f"a name is {text!r:.60}")
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({reason_of(error)}); restore it") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no file of COCO's format ({type(error).__name__}: {error!s:.200}); restore it"
            ) from None
        return [
            BoxedImage(
                path=folder / files[image],
                names=tuple(name for name, _, _, _ in objects),
                boxes=np.array([box for _, box, _, _ in objects], dtype=np.float32).reshape(-1, 4),
                difficult=np.array([difficult for _, _, difficult, _ in objects], dtype=bool),
                crowd=np.array([crowd for _, _, _, crowd in objects], dtype=bool),
            )
            for image, objects in found.items()
        ]


def _number(value: Any) -> float:
    """A coordinate of a box, in pixels."""
    if type(value) not in (int, float) or not abs(value) < _MAX_COORDINATE:
        raise ValueError(f"a box holds {value!r:.60}")
    return float(value)


def _is_coco(folder: Path) -> bool:
    return bool(_coco_files(folder))


def _coco_files(folder: Path) -> list[Path]:
    return sorted((folder / "annotations").glob("instances_*.json"))


def scaled_size(height: int, width: int, *, side: int, longest: int) -> tuple[int, int]:
    """Height and width whose shorter is ``side``, or whose longer is ``longest`` where it would exceed that."""
    scale = min(side / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def load_image(
    path: Path, *, side: int, longest: int, decoding: Decoding = DEFAULT_DECODING
) -> tuple[Tensor, tuple[int, int]]:
    """uint8 ``[3, h, w]`` of :func:`scaled_size`, antialiased bilinear, and height and width before.

    Raises:
        ValueError: the image cannot be used.
    """
    try:
        with quiet_pillow():
            pixels = torch.from_numpy(decode_full(read_bytes(path), decoding)).permute(2, 0, 1)
    except BadImageError as error:
        raise ValueError(f"{path} cannot be used ({error.reason}); repair it") from None
    height, width = pixels.shape[1:]
    size = scaled_size(height, width, side=side, longest=longest)
    return interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0], (height, width)


@dataclass(kw_only=True)
class Sample:
    """An augmented training image."""

    image: Tensor
    """uint8 ``[3, h, w]``"""
    boxes: Tensor
    """``[n, 4]`` float32 in its pixels."""
    labels: Tensor
    """``[n]`` int64 from 1 on, or :data:`IGNORED`."""


class TrainingBatches:
    """Training images by iteration: order, size and flip are functions of (seed, iteration, sample id).

    The order is a new permutation for every pass over the images. Sample ids are positions among the images that show
    an object to learn. With several processes each gets its part of every batch.

    Args:
        split: the images.
        classes: names in label order; the first has label 1.
        batch_size: images over all processes.
        seed: of order, sizes and flips.
        sides: the shorter side, in pixels, is one of these.
        longest: maximum of the longer side, in pixels.
        difficult: ``train``: difficult objects are like any other. ``ignore``: neither object nor background.
        workers: decoding threads; 0: decode in the caller's thread.
        decoding: what the policy for images leaves to the user.
    """

    def __init__(
        self,
        split: BoxedImages,
        classes: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        sides: Sequence[int],
        longest: int,
        difficult: Difficult,
        workers: int,
        decoding: Decoding = DEFAULT_DECODING,
    ) -> None:
        if batch_size % world_size():
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {world_size()} processes")
        self.difficult = difficult
        self.images = [image for image in split.images if self._learned(image).any()]
        self.left_out = len(split.images) - len(self.images)
        if not self.images:
            raise ValueError(f"every object of {split.name} is marked difficult: train on them with --difficult train")
        self.labels = {name: label for label, name in enumerate(classes, 1)}
        self.batch_size, self.seed = batch_size, seed
        self.sides, self.longest, self.workers, self.decoding = list(sides), longest, workers, decoding
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _learned(self, image: BoxedImage) -> NDArray[np.bool_]:
        return ~image.crowd if self.difficult == "train" else ~(image.crowd | image.difficult)

    def _permutation(self, number: int) -> list[int]:
        ids = torch.arange(len(self.images))
        draws = random_uint32(ids, 1, seed=self.seed, stream=ORDER, step=number)[:, 0]
        order: list[int] = draws.argsort(stable=True).tolist()
        return order

    def sample_ids(self, iteration: int) -> list[int]:
        """This rank's sample ids of an iteration."""
        share = self.batch_size // world_size()
        start = iteration * self.batch_size + rank() * share
        pairs = (divmod(position, len(self.images)) for position in range(start, start + share))
        return [self._order(number)[position] for number, position in pairs]

    def sample(self, iteration: int, sample_id: int) -> Sample:
        """The augmented image of a sample id in an iteration."""
        known = self.images[sample_id]
        u = random_uniform(torch.tensor([sample_id]), 2, seed=self.seed, stream=VIEW, step=iteration)[0].tolist()
        side, flipped = self.sides[int(u[0] * len(self.sides))], u[1] < 0.5
        image, (height, width) = load_image(known.path, side=side, longest=self.longest, decoding=self.decoding)
        new_height, new_width = image.shape[1:]
        boxes = torch.from_numpy(known.boxes) * torch.tensor([new_width / width, new_height / height] * 2)
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, new_width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, new_height)
        if flipped:
            image = image.flip(2)
            boxes = torch.stack((new_width - boxes[:, 2], boxes[:, 1], new_width - boxes[:, 0], boxes[:, 3]), 1)
        labels = torch.tensor([self.labels[name] for name in known.names], dtype=torch.int64)
        labels[torch.from_numpy(~self._learned(known))] = IGNORED
        kept = ((boxes[:, 2:] > boxes[:, :2]).all(1)) & torch.from_numpy(~known.crowd)
        return Sample(image=image, boxes=boxes[kept].float(), labels=labels[kept])

    def __call__(self, start: int, stop: int) -> Iterator[tuple[int, list[int], list[Sample]]]:
        """``(iteration, sample_ids, samples)``; up to two iterations are decoded ahead."""
        patience = Patience()
        with DaemonPool(max(1, self.workers), "sslfast-images") as pool:
            ahead: deque[tuple[int, list[int], list[Future[Sample]]]] = deque()
            for iteration in range(start, stop):
                ids = self.sample_ids(iteration)
                ahead.append((iteration, ids, [pool.submit(self.sample, iteration, one) for one in ids]))
                if len(ahead) > (2 if self.workers else 0):
                    yield self._finish(*ahead.popleft(), patience)
            while ahead:
                yield self._finish(*ahead.popleft(), patience)

    def _finish(
        self, iteration: int, ids: list[int], samples: list[Future[Sample]], patience: Patience
    ) -> tuple[int, list[int], list[Sample]]:
        whys = [partial(storage_hangs, self.images[one].path) for one in ids]
        return iteration, ids, [patience.result(sample, why) for sample, why in zip(samples, whys, strict=True)]


def storage_hangs(path: Path) -> str:
    """What is said when images do not come."""
    return f"images ({path} or one after it): the storage does not answer; see that the data can be read, and try again"
