import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast.data import Decoding
from sslfast.evaluation.detection import data as detection_data
from sslfast.evaluation.detection.data import (
    IGNORED,
    BoxedImage,
    BoxedImages,
    TrainingBatches,
    load_image,
    load_splits,
    scaled_size,
)
from tests.evaluation.detection.fixtures import COLOURS, SIDE, objects, write_boxed_coco, write_boxed_voc


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxed_voc(tmp_path_factory.mktemp("voc"), trainval=range(10), test=range(10, 15))


def batches(split: BoxedImages, *, difficult: str = "train", sides: tuple[int, ...] = (48, 64), **changes: int):  # type: ignore[no-untyped-def]
    options = {"batch_size": 4, "seed": 1, "workers": 0, "longest": 96} | changes
    return TrainingBatches(split, ["bird", "car"], sides=sides, difficult=difficult, **options)  # type: ignore[arg-type]


def test_voc_boxes_are_edges(voc: Path) -> None:
    train, test = load_splits([voc])
    assert (len(train.images), len(test.images)) == (10, 5)
    assert train.classes() == ["bird", "car"]
    for number, image in enumerate([*train.images, *test.images]):
        assert image.path == voc / "JPEGImages" / f"{number:06d}.jpg"
        assert image.names == tuple(name for name, _, _ in objects(number))
        assert image.boxes.tolist() == [list(box) for _, box, _ in objects(number)]
        assert image.difficult.tolist() == [difficult for _, _, difficult in objects(number)]


def test_coco_and_voc_agree(voc: Path, tmp_path: Path) -> None:
    coco = write_boxed_coco(tmp_path / "coco", train=range(10), val=range(10, 15))
    for ours, theirs in zip(load_splits([voc]), load_splits([coco]), strict=True):
        assert ours.digest() == theirs.digest()
        for a, b in zip(ours.images, theirs.images, strict=True):
            assert a.names == b.names
            for field in ("boxes", "difficult", "crowd"):
                assert np.array_equal(getattr(a, field), getattr(b, field))
    for row in (0, 4):
        one, other = (batches(load_splits([folder])[0]).sample(3, row) for folder in (voc, coco))
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.labels, other.labels)


def test_several_folders(voc: Path, tmp_path: Path) -> None:
    second = write_boxed_voc(tmp_path, trainval=range(20, 24), name="VOC2012")
    for folders in ([voc, second], [second, voc]):
        train, test = load_splits(folders)
        assert len(train.images) == 14
        assert [image.path.stem for image in test.images] == [f"{number:06d}" for number in range(10, 15)]
    digest = load_splits([voc])[0].digest()
    annotation = second / "Annotations" / "000020.xml"
    assert load_splits([second, voc])[0].digest() != digest
    annotation.unlink()
    with pytest.raises(ValueError, match=r"000020.xml cannot be read .No such file"):
        load_splits([voc, second])


@pytest.mark.parametrize(
    ("size", "side", "longest", "expected"),
    [
        ((375, 500), 600, 1333, (600, 800)),
        ((500, 375), 480, 1333, (640, 480)),
        ((500, 1000), 800, 1333, (667, 1333)),
        ((100, 100), 800, 1333, (800, 800)),
        ((3, 1000), 8, 90, (1, 90)),
    ],
)
def test_scaled_size(size: tuple[int, int], side: int, longest: int, expected: tuple[int, int]) -> None:
    assert scaled_size(*size, side=side, longest=longest) == expected


def test_every_pass_has_every_image_once(voc: Path) -> None:
    some = batches(load_splits([voc])[0], batch_size=4)
    ids = [row for iteration in range(5) for row in some.sample_ids(iteration)]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:]
    again = batches(load_splits([voc])[0], batch_size=2)
    assert [row for iteration in range(10) for row in again.sample_ids(iteration)] == ids
    assert batches(load_splits([voc])[0], seed=2).sample_ids(0) != ids[:4]


def test_ranks_share_a_batch(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = load_splits([voc])[0]
    whole = batches(split).sample_ids(2)
    monkeypatch.setattr(detection_data, "world_size", lambda: 2)
    parts = []
    for number in (0, 1):
        monkeypatch.setattr(detection_data, "rank", lambda number=number: number)
        parts += batches(split).sample_ids(2)
    assert parts == whole
    with pytest.raises(ValueError, match="batch_size=3 must be a multiple of the 2 processes"):
        batches(split, batch_size=3)


def test_boxes_follow_the_pixels(voc: Path) -> None:
    """For any size and flip, the box holds the colour of its class and nothing of it is outside."""
    some = batches(load_splits([voc])[0], sides=(48, 64, 80))
    seen, flipped = set(), 0
    for iteration in range(6):
        for row in range(10):
            sample = some.sample(iteration, row)
            seen.add(tuple(sample.image.shape))
            name, (left, _, right, _), _ = objects(row)[0]
            x0, y0, x1, y1 = sample.boxes[0].round().int().tolist()
            inside = sample.image[:, y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].float().mean((1, 2))
            assert (inside - torch.tensor(COLOURS[name])).abs().max() < 12
            outside = sample.image.float().clone()
            outside[:, max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = 120
            assert (outside - 125).abs().max() < 60
            scale = sample.image.shape[2] / (SIDE + 16)
            flipped += abs(float(sample.boxes[0, 0]) - left * scale) > 0.01 and left + right != SIDE + 16
    assert {shape[1] for shape in seen} == {48, 64, 77}  # 96 px of 80 x 64 is the most
    assert 15 < flipped < 45


def test_difficult_objects(voc: Path) -> None:
    split = load_splits([voc])[0]
    trained, ignored = batches(split), batches(split, difficult="ignore")
    assert trained.sample(0, 4).labels.tolist() == [1, 2]
    assert ignored.sample(0, 4).labels.tolist() == [1, IGNORED]
    assert ignored.sample(0, 3).labels.tolist() == [2]
    hard = BoxedImage(
        path=split.images[4].path,
        names=("bird",),
        boxes=np.array([[1, 2, 30, 40]], dtype=np.float32),
        difficult=np.array([True]),
        crowd=np.array([False]),
    )
    mixed = BoxedImages(name="train", images=[*split.images, hard])
    assert (batches(mixed).left_out, batches(mixed, difficult="ignore").left_out) == (0, 1)
    with pytest.raises(ValueError, match="every object of train is marked difficult"):
        batches(BoxedImages(name="train", images=[hard]), difficult="ignore")


def test_crowds_are_not_trained_on(tmp_path: Path) -> None:
    coco = write_boxed_coco(tmp_path, train=range(4), val=range(4, 6))
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"].append({"image_id": 0, "category_id": 20, "bbox": [0, 0, 60, 9], "iscrowd": 1, "id": 99})
    content["annotations"].append({"image_id": 0, "category_id": 20, "bbox": [5, 5, 0, 9], "iscrowd": 0, "id": 98})
    path.write_text(json.dumps(content))
    split = load_splits([coco])[0]
    assert split.images[0].names == ("bird", "car")
    assert split.images[0].crowd.tolist() == [False, True]
    assert batches(split).sample(0, 0).labels.tolist() == [1]


def test_threads_change_nothing(voc: Path) -> None:
    split = load_splits([voc])[0]
    for (i, ids, one), (j, others, two) in zip(batches(split)(2, 7), batches(split, workers=2)(2, 7), strict=True):
        assert (i, ids) == (j, others)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.boxes, b.boxes)


def test_errors(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data was named"):
        load_splits([])
    with pytest.raises(ValueError, match=r"is no VOC folder: it needs Annotations, ImageSets/Main, JPEGImages"):
        load_splits([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"other.txt does not exist; name a split that the devkit has"):
        load_splits([voc], test_split="other")
    coco = write_boxed_coco(tmp_path / "coco", train=range(2), val=range(2, 4))
    with pytest.raises(ValueError, match=r"no instances_test.json; there are train2017, val2017"):
        load_splits([coco], test_split="test")
    with pytest.raises(ValueError, match="test images show car, which no training image shows"):
        load_splits([write_boxed_voc(tmp_path / "birds", trainval=range(0, 1), test=range(1, 3))])
    (coco / "annotations" / "instances_val2017.json").write_text("[]")
    with pytest.raises(ValueError, match=r"instances_val2017.json is no file of COCO's format \(TypeError"):
        load_splits([coco])
    broken = write_boxed_voc(tmp_path / "broken", trainval=range(2), test=range(2, 3))
    path = broken / "JPEGImages" / "000001.jpg"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"000001.jpg cannot be used \(.*; repair it"):
        load_image(path, side=32, longest=64)
    path.unlink()
    with pytest.raises(ValueError, match=r"000001.jpg cannot be read \(No such file.*restore the images"):
        load_splits([broken])[0].digest()


def test_images_of_16_bits_are_decoded_as_asked(voc: Path, tmp_path: Path) -> None:
    known = load_splits([voc])[0].images[0]
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((SIDE, SIDE), 2048, dtype=np.uint16)).save(path)
    options = {"side": 48, "longest": 96}
    assert int(load_image(path, **options)[0].max()) == 8  # white at 65535
    decoding = Decoding(white_level=4095)
    assert int(load_image(path, **options, decoding=decoding)[0].min()) == 128
    split = BoxedImages(name="train", images=[dataclasses.replace(known, path=path)])
    assert int(batches(split, decoding=decoding).sample(0, 0).image.min()) == 128  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pixels"):
        load_image(path, **options, decoding=Decoding(max_pixels=10))


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e99", "null", '"3"', "true", "[1]"])
def test_coco_boxes_are_finite_numbers(tmp_path: Path, bad: str) -> None:
    coco = write_boxed_coco(tmp_path / "coco", train=range(3), val=range(3, 5))
    (path,) = (coco / "annotations").glob("instances_train*.json")
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = "BAD"
    path.write_text(json.dumps(content).replace('"BAD"', bad))
    with pytest.raises(ValueError, match=r"instances_train.*\.json is no file of COCO's format .*; restore it"):
        load_splits([coco])
