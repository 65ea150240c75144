import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslfast.data import demo as demo_data
from sslfast.data.demo import MARKER, PHOTOGRAPHS, demo_crops, make_demo_data, photograph_path
from sslfast.data.manifest import Manifest


def make(root: Path, train: int = 3, val: int = 2, crop_size: int = 40) -> Path:
    return make_demo_data(root, train_per_photo=train, val_per_photo=val, crop_size=crop_size)


def test_layout_sizes_and_classes(tmp_path: Path) -> None:
    root = make(tmp_path / "data", train=3, val=2, crop_size=96)
    assert root == tmp_path / "data"
    for split, count in (("train", 3), ("val", 2)):
        manifest = Manifest.scan(root / split)
        assert manifest.classes == sorted(PHOTOGRAPHS)
        assert np.bincount(manifest.labels).tolist() == [count] * len(PHOTOGRAPHS)
        for path in manifest.paths:
            with Image.open(root / split / path) as image:
                assert (image.size, image.mode) == ((96, 96), "RGB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("crop_size", [8, 61, 96])
def test_halves_share_no_pixel(crop_size: int) -> None:
    crops = demo_crops(train_per_photo=40, val_per_photo=40, crop_size=crop_size)
    for name in PHOTOGRAPHS:
        with Image.open(photograph_path(name)) as image:
            width, height = image.size
        # Pixels of each split, painted.
        used = {split: np.zeros((height, width), dtype=bool) for split in ("train", "val")}
        for crop in crops:
            if crop.photograph == name:
                left, top, right, bottom = crop.box
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height
                assert right - left == bottom - top
                assert crop_size <= right - left <= 2 * crop_size
                used[crop.split][top:bottom, left:right] = True
        assert not (used["train"] & used["val"]).any()
        for split in used:
            assert used[split].mean() > 0.1 * (1 if crop_size > 8 else 0.01)


def test_crops_vary_and_do_not_depend_on_their_number() -> None:
    few = demo_crops(train_per_photo=4, val_per_photo=2)
    many = demo_crops(train_per_photo=9, val_per_photo=5)
    assert set(few) < set(many)
    assert len({(crop.photograph, crop.box) for crop in many}) == len(many)
    assert len({crop.box for crop in many}) == len(many)


def test_images_are_the_cropped_squares(tmp_path: Path) -> None:
    root = make(tmp_path / "data")
    crop = demo_crops(train_per_photo=3, val_per_photo=2, crop_size=40)[-1]
    with Image.open(photograph_path(crop.photograph)) as photograph, Image.open(root / crop.path) as found:
        square = photograph.convert("RGB").crop(crop.box)
        assert np.array_equal(found, square.resize((40, 40), Image.Resampling.LANCZOS))


def test_built_once_and_rebuilt_when_something_differs(tmp_path: Path) -> None:
    root = make(tmp_path / "data")
    picture = root / "train" / "cat" / "0000.png"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*.png")}
    make(root)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*.png")} == before
    digest = Manifest.scan(root / "train").digest()
    picture.unlink()
    make(root)
    assert picture.exists()
    assert Manifest.scan(root / "train").digest() == digest
    make(root, train=2)
    assert len(list(root.rglob("train/cat/*.png"))) == 2
    make(root, crop_size=44)
    with Image.open(picture) as image:
        assert image.size == (44, 44)
    assert json.loads((root / MARKER).read_text())["crop_size"] == 44


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "data")

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        make(root, train=4)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert len(list(root.rglob("train/cat/*.png"))) == 3


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds something other than a demo set \(no demo.json\)"):
        make(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["holiday.jpg"]
    with pytest.raises(ValueError, match="is a file; name a folder"):
        make(tmp_path / "mine" / "holiday.jpg")
    (tmp_path / "empty").mkdir()
    assert (make(tmp_path / "empty") / MARKER).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": 0}, r"train_per_photo must be in \[1, 9999\], got 0"),
        ({"val": 10_000}, r"val_per_photo must be in \[1, 9999\], got 10000"),
        ({"crop_size": 7}, "crop_size must be at least 8 pixels, got 7"),
        ({"crop_size": 200}, r"crop_size=200 does not fit into half of .* choose at most"),
    ],
)
def test_arguments(tmp_path: Path, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(tmp_path / "data", **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PHOTOGRAPHS, "gone", ("skimage", "data/gone.png"))
    with pytest.raises(ValueError, match=r"scikit-image as installed does not hold .*gone.png: pip install --upgrade"):
        photograph_path("gone")
    monkeypatch.setattr(demo_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="ship inside scikit-learn: pip install scikit-learn"):
        photograph_path("flower")
