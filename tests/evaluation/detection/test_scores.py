from pathlib import Path

import numpy as np
import pytest

from sslfast.evaluation.detection.data import BoxedImage
from sslfast.evaluation.detection.scores import OVERLAPS, Detections, box_overlaps, coco_scores, voc07_scores

A, B, C = (10.0, 10.0, 30.0, 30.0), (50.0, 50.0, 90.0, 80.0), (100.0, 10.0, 120.0, 60.0)
AWAY = (200.0, 200.0, 230.0, 240.0)


def image(*boxes: tuple[float, ...], names: str = "", hard: str = "", crowd: str = "") -> BoxedImage:
    """Letters of ``names`` are classes (all ``x`` without); ``hard`` and ``crowd`` mark by ``1``."""
    count = len(boxes)
    return BoxedImage(
        path=Path("x.jpg"),
        names=tuple(names or "x" * count),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        difficult=np.array([mark == "1" for mark in hard or "0" * count], dtype=bool),
        crowd=np.array([mark == "1" for mark in crowd or "0" * count], dtype=bool),
    )


def found(*boxes: tuple[float, ...], scores: tuple[float, ...] = (), labels: tuple[int, ...] = ()) -> Detections:
    count = len(boxes)
    return Detections(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.array(scores or [1 - 0.1 * i for i in range(count)], dtype=np.float32),
        labels=np.array(labels or [1] * count, dtype=np.int64),
    )


def both(detections: list[Detections], images: list[BoxedImage], classes: str = "x") -> tuple[dict, dict]:  # type: ignore[type-arg]
    return coco_scores(detections, images, list(classes))[0], voc07_scores(detections, images, list(classes))


def test_perfect_and_empty_detections() -> None:
    images = [image(A, B), image(C)]
    for scores in both([found(A, B), found(C)], images):
        assert scores == pytest.approx({"ap": 1.0, "ap50": 1.0, "ap75": 1.0})
    for scores in both([found(), found()], images):
        assert scores == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    # A second box on an object is wrong, but comes after all that is right.
    for scores in both([found(A, B, A), found(C)], images):
        assert scores["ap50"] == pytest.approx(1.0)


def test_known_curve() -> None:
    """Right, wrong, right of three objects: precision 1 up to recall 1/3, then 2/3 up to 2/3."""
    coco, voc = both([found(A, AWAY, B)], [image(A, B, C)])
    assert voc["ap50"] == pytest.approx((4 + 3 * 2 / 3) / 11)
    assert coco["ap50"] == pytest.approx((34 + 33 * 2 / 3) / 101)


def test_overlaps() -> None:
    """An overlap of 0.62 counts at 0.5, 0.55 and 0.6."""
    truth, box = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 62.0, 100.0)
    assert box_overlaps(np.array([box]), np.array([truth, AWAY]))[0] == pytest.approx([0.62, 0.0])
    for scores in both([found(box)], [image(truth)]):
        assert scores == pytest.approx({"ap": 0.3, "ap50": 1.0, "ap75": 0.0})


def test_difficult_objects_are_ignored() -> None:
    images = [image(A, B, hard="01")]
    for detections in (found(A), found(B, B, A), found(B, A)):
        for scores in both([detections], images):
            assert scores["ap50"] == pytest.approx(1.0)
    # Beside it, not on it: an overlap with the difficult object of less than a half is wrong.
    beside = (50.0, 50.0, 65.0, 60.0)
    for scores, points in zip(both([found(beside, A)], images), (101, 11), strict=True):
        assert scores["ap50"] == pytest.approx(0.5), points
    # Nothing but difficult objects: the class has no precision.
    assert coco_scores([found(B)], [image(B, hard="1")], ["x"]) == ({"ap": 0.0, "ap50": 0.0, "ap75": 0.0}, {})


def test_crowds_take_any_box_inside() -> None:
    region, inside = (0.0, 0.0, 200.0, 200.0), (150.0, 150.0, 170.0, 170.0)
    images = [image(A, region, crowd="01")]
    assert coco_scores([found(inside, inside, A)], images, ["x"])[0]["ap50"] == pytest.approx(1.0)


def test_classes_are_averaged() -> None:
    images = [image(A, B, names="xy"), image(C, names="y")]
    detections = [found(A, B, labels=(1, 2)), found()]
    mean, by_class = coco_scores(detections, images, ["x", "y", "z"])
    assert by_class == pytest.approx({"x": 1.0, "y": 51 / 101})
    assert mean["ap50"] == pytest.approx((1 + 51 / 101) / 2)
    assert voc07_scores(detections, images, ["x", "y", "z"])["ap50"] == pytest.approx((1 + 6 / 11) / 2)
    # The right box of the wrong class.
    assert both([found(A, labels=(2,))], [image(A, names="x")], "xy")[1]["ap50"] == 0.0


def devkit(detections: list[Detections], images: list[BoxedImage], at: float) -> float:
    """VOC 2007's rule for one class, box by box."""
    order = sorted(
        ((-float(score), number, box) for number, some in enumerate(detections)
         for score, box in zip(some.scores, some.boxes, strict=True)),
        key=lambda item: item[:2],
    )  # fmt: skip
    taken: set[tuple[int, int]] = set()
    hits: list[bool] = []
    for _, number, box in order:
        truth = images[number]
        shared = box_overlaps(box[None].astype(np.float64), truth.boxes.astype(np.float64))[0]
        best = int(shared.argmax()) if len(shared) else -1
        if best >= 0 and shared[best] > at:
            if truth.difficult[best]:
                continue
            hits.append((number, best) not in taken)
            taken.add((number, best))
        else:
            hits.append(False)
    wanted = sum(int((~one.difficult).sum()) for one in images)
    points = []
    for level in range(11):
        above = [sum(hits[:k]) / k for k in range(1, len(hits) + 1) if 10 * sum(hits[:k]) >= level * wanted]
        points.append(max(above, default=0.0))
    return float(np.mean(points))


def test_detectron2_s_levels_and_rounding() -> None:
    """Three of ten objects found: np.arange asks for a recall of 0.30000000000000004, which 3 / 10 does not reach."""
    images = [image(A) for _ in range(10)]
    detections = [found(A) for _ in range(3)] + [found() for _ in range(7)]
    assert voc07_scores(detections, images, ["x"])["ap50"] == pytest.approx(4 / 11)
    assert voc07_scores(detections, images, ["x"], detectron2=True)["ap50"] == pytest.approx(3 / 11)
    # 0.91234 and 0.91231 are both written as 0.912: the wrong box, first in the file, then counts before the right one.
    ties = [found(AWAY, A, scores=(0.91231, 0.91234))]
    assert voc07_scores(ties, [image(A)], ["x"])["ap50"] == pytest.approx(1.0)
    assert voc07_scores(ties, [image(A)], ["x"], detectron2=True)["ap50"] == pytest.approx(0.5)
    # Corners are written with one decimal in coordinates from 1 on: an overlap of 0.5004 becomes 0.5.
    truth, box = (0.0, 0.0, 100.0, 10.0), (0.0, 0.0, 50.04, 10.0)
    assert box_overlaps(np.array([box]), np.array([truth]))[0, 0] > 0.5
    near = [found(box)], [image(truth)], ["x"]
    assert voc07_scores(*near)["ap50"] == pytest.approx(1.0)
    assert voc07_scores(*near, detectron2=True)["ap50"] == 0.0  # 50.0: not above a half


def test_voc07_against_the_devkit_rule() -> None:
    rng = np.random.default_rng(4)

    def boxes(count: int) -> np.ndarray:  # type: ignore[type-arg]
        corner = rng.uniform(0, 40, (count, 2))
        return np.concatenate((corner, corner + rng.uniform(15, 40, (count, 2))), 1).astype(np.float32)

    images, detections = [], []
    for _ in range(12):
        truth = boxes(int(rng.integers(0, 4)))
        hard = "".join("1" if rng.random() < 0.25 else "0" for _ in truth)
        images.append(image(*map(tuple, truth), hard=hard))
        near = [truth + rng.normal(0, 3, truth.shape).astype(np.float32) for _ in range(2)]
        all_boxes = np.concatenate((*near, boxes(3)))
        scores = tuple(rng.permutation(len(all_boxes)) / len(all_boxes) + rng.random() * 0.01)
        detections.append(found(*map(tuple, all_boxes), scores=scores))
    ours = voc07_scores(detections, images, ["x"])
    theirs = [devkit(detections, images, at) for at in OVERLAPS]
    assert 0.1 < ours["ap"] < 0.9
    assert ours == pytest.approx({"ap": np.mean(theirs), "ap50": theirs[0], "ap75": theirs[5]})
    again = voc07_scores(detections, images, ["x"], detectron2=True)
    written = [detectron2_rule(detections, images, at) for at in OVERLAPS]
    assert again == pytest.approx({"ap": np.mean(written), "ap50": written[0], "ap75": written[5]})


def detectron2_rule(detections: list[Detections], images: list[BoxedImage], at: float) -> float:
    """Box by box from the lines of detectron2's file; widths count both end pixels."""
    lines = []
    for number, some in enumerate(detections):
        for score, (left, top, right, bottom) in zip(some.scores.tolist(), some.boxes.tolist(), strict=True):
            lines.append(f"{number} {score:.3f} {left + 1:.1f} {top + 1:.1f} {right:.1f} {bottom:.1f}".split())
    confidence = np.array([float(line[1]) for line in lines])
    taken: set[tuple[int, int]] = set()
    right_, wrong = [], []
    for position in np.argsort(-confidence, kind="stable"):
        number, box = int(lines[position][0]), [float(word) for word in lines[position][2:]]
        best, match = -np.inf, -1
        for index, (left, top, right, bottom) in enumerate(images[number].boxes.astype(float)):
            truth = [left + 1, top + 1, right, bottom]
            width = max(0.0, min(box[2], truth[2]) - max(box[0], truth[0]) + 1)
            height = max(0.0, min(box[3], truth[3]) - max(box[1], truth[1]) + 1)
            areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, truth)]
            overlap = width * height / (sum(areas) - width * height)
            if overlap > best:
                best, match = overlap, index
        is_hit = best > at and not images[number].difficult[match] and (number, match) not in taken
        right_.append(float(is_hit))
        wrong.append(float(not is_hit and not (best > at and images[number].difficult[match])))
        if is_hit:
            taken.add((number, match))
    tp, fp = np.cumsum(right_), np.cumsum(wrong)
    recall = tp / sum(int((~one.difficult).sum()) for one in images)
    precision = tp / np.maximum(tp + fp, np.finfo(np.float64).eps)
    return float(sum(precision[recall >= t].max(initial=0.0) / 11 for t in np.arange(0.0, 1.1, 0.1)))
