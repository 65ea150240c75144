"""Average precision of detections, in two ways: COCO's by pycocotools, and VOC 2007's, which published numbers use.

COCO's: 101-point interpolation, at most 100 boxes per image, mean over the IoU thresholds 0.5, 0.55 ... 0.95. VOC
2007's: 11-point interpolation, over the same thresholds. In both, difficult objects and the boxes matched to them are
ignored. ``voc07`` is exact; ``voc07_detectron2`` is the number that detectron2 prints for ``voc_2007_test`` and papers
report: it writes scores with three decimals and boxes with one before it ranks and matches them, and asks for the
recalls ``np.arange(0, 1.1, 0.1)``, of which 0.3, 0.6 and 0.7 lie just above the true level.
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
LEVELS = np.arange(11) / 10 - 1e-12
"""Recalls 0, 0.1 ... 1; 1e-12: shares such as 3 / 10 are not exact in binary."""
DETECTRON2_LEVELS = np.arange(0.0, 1.1, 0.1)
DIFFICULT_RULE = "a box whose match is a difficult object is left out, and the object is not asked for"


@dataclass(kw_only=True)
class Detections:
    """Detections on one image."""

    boxes: NDArray[np.floating]
    """``[n, 4]`` left, top, right, bottom in pixels of the image."""
    scores: NDArray[np.floating]
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


def voc07_scores(
    found: Sequence[Detections], images: Sequence[BoxedImage], classes: Sequence[str], *, detectron2: bool = False
) -> dict[str, float]:
    """``ap``, ``ap50``, ``ap75`` over classes by the rules of VOC 2007's devkit; or as detectron2 computes them."""
    if detectron2:
        found = [_as_written(some) for some in found]
    levels = DETECTRON2_LEVELS if detectron2 else LEVELS
    rows = [
        precision
        for label, name in enumerate(classes, 1)
        if (precision := _voc07_class(found, images, label, name, levels)) is not None
    ]
    return _summary(np.mean(rows, axis=0) if rows else np.zeros(len(OVERLAPS)))


def _as_written(found: Detections) -> Detections:
    """Detections after detectron2's text file: scores ``%.3f``, corners ``%.1f`` in VOC's coordinates (from 1 on)."""
    one = np.array([1.0, 1.0, 0.0, 0.0], dtype=np.float32)  # to pixels counted from 1, the last one inside
    boxes = np.char.mod("%.1f", (found.boxes + one).astype(np.float64)).astype(np.float64) - one
    scores = np.char.mod("%.3f", found.scores.astype(np.float64)).astype(np.float64)
    return Detections(boxes=boxes, scores=scores, labels=found.labels)


def _voc07_class(
    found: Sequence[Detections], images: Sequence[BoxedImage], label: int, name: str, levels: NDArray[np.float64]
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
    return np.array([_eleven_points(overlap > at, matched, hard, wanted, levels) for at in OVERLAPS])


def _eleven_points(
    meets: NDArray[np.bool_],
    matched: NDArray[np.int64],
    hard: NDArray[np.bool_],
    wanted: int,
    levels: NDArray[np.float64],
) -> float:
    """Mean over recalls ``levels`` of the interpolated precision; boxes in decreasing order of score."""
    counted = ~(meets & hard)
    right = np.zeros(len(meets), dtype=bool)
    candidates = np.flatnonzero(meets & ~hard)
    right[candidates[np.unique(matched[candidates], return_index=True)[1]]] = True
    hits = np.cumsum(right[counted])
    precision = hits / np.arange(1, len(hits) + 1)
    recall = hits / wanted
    best = [precision[recall >= level].max(initial=0.0) for level in levels]
    return float(np.mean(best))


def box_overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union ``[n, m]`` of boxes ``[n, 4]`` and ``[m, 4]``."""
    shared = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    inside = shared.clip(0).prod(2)
    areas = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None]
    return inside / (areas - inside).clip(1e-12)


def _entry(box: NDArray[np.floating], image: int, label: int, number: int) -> dict[str, Any]:
    left, top, right, bottom = (float(edge) for edge in box)
    size = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
    return {"id": number, "image_id": image, "category_id": label, **size}


def _summary(by_overlap: NDArray[np.float64]) -> dict[str, float]:
    return {"ap": float(by_overlap.mean()), "ap50": float(by_overlap[0]), "ap75": float(by_overlap[5])}
