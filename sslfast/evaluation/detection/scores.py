"""Average precision of detections, in two ways: COCO's by pycocotools, and VOC 2007's, which published numbers use.

COCO's: 101-point interpolation, at most 100 boxes per image, mean over the IoU thresholds 0.5, 0.55 ... 0.95. VOC
2007's: 11-point interpolation, over the same thresholds, as detectron2 evaluates ``voc_2007_test``. In both, difficult
objects and the boxes matched to them are ignored.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslfast.evaluation.detection.data import BoxedImage

OVERLAPS = np.linspace(0.5, 0.95, 10)
DIFFICULT_RULE = "a box whose match is a difficult object is left out, and the object is not asked for"


@dataclass(kw_only=True)
class Detections:
    """Detections on one image."""

    boxes: NDArray[np.float32]
    """``[n, 4]`` left, top, right, bottom in pixels of the image."""
    scores: NDArray[np.float32]
    """``[n]``"""
    labels: NDArray[np.int64]
    """``[n]``, from 1 on."""


def require_pycocotools() -> None:
    """ImportError in one line where it is missing."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise ImportError("detection scores need pycocotools: pip install pycocotools") from None


def coco_scores(
    found: Sequence[Detections], images: Sequence[BoxedImage], classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """``ap``, ``ap50``, ``ap75`` over classes, and AP50 by class; without classes that have no object."""
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Evaluation(COCOeval):
        """Difficult objects are ignored as crowds are, but matched by ordinary IoU."""

        def computeIoU(self, imgId: int, catId: int) -> Any:
            truth, boxes = self._gts[imgId, catId], self._dts[imgId, catId]
            order = np.argsort([-box["score"] for box in boxes], kind="mergesort")[: self.params.maxDets[-1]]
            crowd = [one["is_crowd_region"] for one in truth]
            if not truth and not boxes:
                return []
            return mask.iou([boxes[i]["bbox"] for i in order], [one["bbox"] for one in truth], crowd)

    categories = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    labels = {name: label for label, name in enumerate(classes, 1)}
    truth: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, (image, some) in enumerate(zip(images, found, strict=True), 1):
        for name, box, difficult, crowd in zip(image.names, image.boxes, image.difficult, image.crowd, strict=True):
            left_out = {"iscrowd": int(difficult or crowd), "is_crowd_region": int(crowd)}
            truth.append({**_entry(box, number, labels[name], len(truth) + 1), **left_out})
        for box, score, label in zip(some.boxes, some.scores, some.labels, strict=True):
            boxes.append({**_entry(box, number, int(label), len(boxes) + 1), "iscrowd": 0, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for annotations in (truth, boxes):
            side = COCO()
            numbers = [{"id": number} for number in range(1, len(images) + 1)]
            side.dataset = {"images": numbers, "categories": categories, "annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluation = Evaluation(*sides, iouType="bbox")
        evaluation.params.iouThrs = OVERLAPS
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [overlaps, recalls, classes]; -1 without an object
    known = [position for position in range(len(classes)) if precision[0, 0, position] > -1]
    means = precision[:, :, known].mean((1, 2)) if known else np.zeros(len(OVERLAPS))
    by_class = {classes[position]: float(precision[0, :, position].mean()) for position in known}
    return _summary(means), by_class


def voc07_scores(found: Sequence[Detections], images: Sequence[BoxedImage], classes: Sequence[str]) -> dict[str, float]:
    """``ap``, ``ap50``, ``ap75`` over classes by the rules of VOC 2007's devkit."""
    rows = [
        precision
        for label, name in enumerate(classes, 1)
        if (precision := _voc07_class(found, images, label, name)) is not None
    ]
    return _summary(np.mean(rows, axis=0) if rows else np.zeros(len(OVERLAPS)))


def _voc07_class(
    found: Sequence[Detections], images: Sequence[BoxedImage], label: int, name: str
) -> NDArray[np.float64] | None:
    """11-point AP of a class at every IoU threshold; None where no object counts."""
    scores, overlaps, objects, difficult = [], [], [], []
    wanted = first = 0
    for image, some in zip(images, found, strict=True):
        own = np.array([one == name for one in image.names], dtype=bool)
        hard = (image.difficult | image.crowd)[own]
        wanted += int((~hard).sum())
        boxes = some.boxes[some.labels == label].astype(np.float64)
        if len(boxes):
            shared = box_overlaps(boxes, image.boxes[own].astype(np.float64))
            best = shared.argmax(1) if len(hard) else np.zeros(len(boxes), dtype=np.int64)
            scores.append(some.scores[some.labels == label])
            overlaps.append(shared[np.arange(len(boxes)), best] if len(hard) else np.zeros(len(boxes)))
            objects.append(first + best)
            difficult.append(hard[best] if len(hard) else np.zeros(len(boxes), dtype=bool))
        first += len(hard)
    if not wanted:
        return None
    if not scores:
        return np.zeros(len(OVERLAPS))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    overlap, matched, hard = (np.concatenate(parts)[order] for parts in (overlaps, objects, difficult))
    return np.array([_eleven_points(overlap > at, matched, hard, wanted) for at in OVERLAPS])


def _eleven_points(meets: NDArray[np.bool_], matched: NDArray[np.int64], hard: NDArray[np.bool_], wanted: int) -> float:
    """Mean over recalls 0, 0.1 ... 1 of the interpolated precision; boxes in decreasing order of score."""
    counted = ~(meets & hard)
    right = np.zeros(len(meets), dtype=bool)
    candidates = np.flatnonzero(meets & ~hard)
    right[candidates[np.unique(matched[candidates], return_index=True)[1]]] = True
    hits = np.cumsum(right[counted])
    precision = hits / np.arange(1, len(hits) + 1)
    recall = hits / wanted
    # 1e-12: shares such as 3 / 10 are not exact in binary.
    best = [precision[recall >= level - 1e-12].max(initial=0.0) for level in np.arange(11) / 10]
    return float(np.mean(best))


def box_overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union ``[n, m]`` of boxes ``[n, 4]`` and ``[m, 4]``."""
    shared = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    inside = shared.clip(0).prod(2)
    areas = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None]
    return inside / (areas - inside).clip(1e-12)


def _entry(box: NDArray[np.float32], image: int, label: int, number: int) -> dict[str, Any]:
    left, top, right, bottom = (float(edge) for edge in box)
    size = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
    return {"id": number, "image_id": image, "category_id": label, **size}


def _summary(by_overlap: NDArray[np.float64]) -> dict[str, float]:
    return {"ap": float(by_overlap.mean()), "ap50": float(by_overlap[0]), "ap75": float(by_overlap[5])}
