"""Objects of Hugging Face's ``datasets`` as data. Nothing is downloaded: the datasets are made here."""

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest

from sslfast.data import open_data, reopen_data, verify_images
from sslfast.data.hub_dataset import HubDatasetSource
from sslfast.loaders.pillow import PillowLoader
from sslfast.views.types import CropConfig, ViewConfig
from tests.data.test_parquet import image, labels_of
from tests.pictures import write_folder

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24))}


def raises(pattern: str) -> Any:
    return pytest.raises(ValueError, match=pattern)


def made(count: int = 20, *, first: int = 0) -> datasets.Dataset:
    keys = range(first, first + count)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [{"bytes": image(key), "path": None} for key in keys], "label": [key % 2 for key in keys]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_rows_are_the_bytes_of_the_files(tmp_path: Path) -> None:
    manifest = open_data(made())
    assert isinstance(manifest.source, HubDatasetSource)
    assert (manifest.classes, labels_of(manifest)) == (["cat", "dog"], ["dog", "cat"] * 10)
    travelled = pickle.loads(pickle.dumps(manifest.source.packed()))
    for source in (manifest.source, travelled):
        assert [source.read(row) for row in range(20)] == [image(key) for key in range(20)]
    shuffled = made().select([7, 3]).with_format("torch")
    assert [open_data(shuffled).source.read(row) for row in range(2)] == [image(7), image(3)]
    assert verify_images(made(), workers=2)[0].digest() == manifest.digest()
    made().save_to_disk(tmp_path / "saved", num_shards=2)
    saved = open_data(tmp_path / "saved")
    assert (saved.source.name, saved.sha1, saved.classes) == ("arrow", manifest.sha1, manifest.classes)
    loaders = [
        PillowLoader(data, VIEWS, batch_size=10, seed=1, workers=workers)
        for data, workers in ((manifest, 2), (saved, 0))
    ]
    for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert (one.crops["image"] == other.crops["image"]).all()
    for loader in loaders:
        loader.close()


def test_images_may_be_files_and_bad(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["a.jpg", "b.jpg"])
    rows: list[Any] = [{"bytes": None, "path": str(root / "a.jpg")}, {"bytes": None, "path": str(root / "gone.jpg")}]
    rows += [{"bytes": b"no image", "path": "x.jpg"}, None, {"bytes": image(1), "path": None}]
    data = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    manifest = open_data(data, on_bad_image="skip")
    assert [manifest.source.read(row) for row in range(2)] == [(root / "a.jpg").read_bytes(), image(1)]
    assert [reason.partition(":")[0] for _, reason in manifest.excluded] == [
        "unreadable",
        "not an image, or of a format that is not supported",
        "no image in this row of the table",
    ]
    with raises("3 of 5 images in datasets.arrow_dataset.Dataset of 5 items cannot be used"):
        open_data(data)
    manifest.save(tmp_path / "m.tsv")
    assert reopen_data(data, tmp_path / "m.tsv").source.read(1) == image(1)


def test_what_a_resume_checks(tmp_path: Path) -> None:
    manifest = open_data(made())
    manifest.save(tmp_path / "m.tsv")
    assert reopen_data(made(), tmp_path / "m.tsv").digest() == manifest.digest()
    with raises("1 missing: 000000019"):
        reopen_data(made(19), tmp_path / "m.tsv")
    with raises("1 added: 000000020"):
        reopen_data(made(21), tmp_path / "m.tsv")
    with raises(r"16 changed: 000000000 \(other content\)|17 changed"):
        reopen_data(made(first=2), tmp_path / "m.tsv")


def test_splits_and_streams_are_one_line() -> None:
    with raises(r"this DatasetDict has the splits train, test: give one, data\['train'\]"):
        open_data(datasets.DatasetDict(train=made(), test=made()))
    with raises(r"IterableDataset is a stream, .*: load the dataset without streaming=True"):
        open_data(made().to_iterable_dataset())
    with raises(r"the dataset has no column of images, .* \(its columns: x\)"):
        open_data(datasets.Dataset.from_dict({"x": [1]}))
