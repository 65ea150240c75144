"""What every image source keeps, and what a new one has to define."""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import sslfast.data.source as source_module
from sslfast.data.images import OnBadImage, open_image
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data, parse_data, reopen_data
from sslfast.data.parts import PartsSource
from sslfast.data.prepare import prepare_beton
from sslfast.data.source import SOURCES, Changes, ImageSource, ListedImage, PackedPaths, all_sources, content_hash
from sslfast.data.verify import verify_images
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import loaders_for
from sslfast.views.types import CropConfig, ViewConfig
from tests.data.test_arrow import save
from tests.data.test_parquet import write_shards as write_tables
from tests.data.test_tar import write_shards
from tests.pictures import encoded, picture, write_folder

NAMES = [f"class{i % 3}/{i:02}.jpg" for i in range(11)]


@dataclass(kw_only=True, eq=False, repr=False)
class PackSource(ImageSource):
    """Image files in a .pack: the members that the interface asks for, and nothing else."""

    name: ClassVar[str] = "pack"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.suffix == ".pack"

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        images = []
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                data = archive.read(name)
                open_image(data)
                images.append(ListedImage(name, len(data), content_hash(data[: source_module.HASHED_BYTES]), "all"))
        source = cls(root=path, paths=[image.path for image in images])
        return Manifest.from_images(source, images, excluded=[], on_bad_image=on_bad_image)

    def read(self, row: int) -> bytes:
        with zipfile.ZipFile(self.root) as archive:
            return archive.read(self.paths[row])

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        with zipfile.ZipFile(self.root) as archive:
            names = set(archive.namelist())
        return Changes(missing=[(path, "") for path in self.paths if path not in names])


@pytest.fixture
def zipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(source_module, "all_sources", lambda known=all_sources: [PackSource, *known()])
    with zipfile.ZipFile(tmp_path / "data.pack", "w") as archive:
        for key, name in enumerate(NAMES):
            archive.writestr(name, encoded(picture(key=key)))
    return tmp_path / "data.pack"


def test_a_source_of_five_members_trains_resumes_and_is_verified(zipped: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", [])
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(folder)
    manifest = open_data(zipped)
    assert (manifest.paths, manifest.classes) == (sorted(NAMES), ["all"])
    assert manifest.sha1 == Manifest.scan(folder).sha1
    manifest.save(tmp_path / "m.tsv")
    assert "# source\tpack\n" in (tmp_path / "m.tsv").read_text()
    again = reopen_data(zipped, tmp_path / "m.tsv")
    assert (type(again.source), again.digest()) == (PackSource, manifest.digest())
    views = {"image": ViewConfig(crop=CropConfig(size=24))}
    loaders = [
        PillowLoader(data, views, batch_size=5, seed=1, workers=workers)
        for data, workers in ((again, 2), (Manifest.scan(folder), 0))
    ]
    for ours, theirs in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(ours.crops["image"], theirs.crops["image"])
    for loader in loaders:
        loader.close()
    verified, bad = verify_images(zipped, workers=2)
    assert (verified.digest(), bad) == (manifest.digest(), [])
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(NAMES[0], b"")
    with pytest.raises(ValueError, match=r"data.pack no longer matches its manifest of 11 images: 10 missing"):
        reopen_data(zipped, tmp_path / "m.tsv")


def test_a_manifest_of_an_unknown_source_is_an_error(
    zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_data(zipped).save(tmp_path / "m.tsv")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"m.tsv is of a source 'pack' that this version does not know: beton, csv"):
        Manifest.load(tmp_path / "m.tsv")


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


@pytest.fixture
def manifests(tmp_path: Path) -> list[Manifest]:
    """One of every source."""
    folder = write_folder(tmp_path / "folder", NAMES)
    (folder / "list.csv").write_text("".join(f"{name},{name[:6]}\n" for name in NAMES))
    (folder / "list.txt").write_text("".join(f"{name} {name[:6]}\n" for name in NAMES))
    prepare_beton(folder, tmp_path / "data.beton", workers=0)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in NAMES:
            archive.write(folder / name, name)
    lists = (folder / "list.csv", folder / "list.txt")
    tables = write_tables(tmp_path / "tables", rows=12)
    shards = write_shards(tmp_path / "shards")
    saved = save(tmp_path / "saved", rows=6)
    items = [picture(key=key) for key in range(11)]
    (tmp_path / "x.roots").write_text("folder/list.txt\n")
    places = (
        tmp_path / "data.beton",
        *lists,
        tmp_path / "data.zip",
        shards,
        tables,
        saved,
        tmp_path / "x.roots",
        Items(items),
        folder,
    )
    return [open_data(place) for place in places]


def test_each_source_is_found_by_its_name_and_once(manifests: list[Manifest]) -> None:
    made = {type(manifest.source) for manifest in manifests}
    assert {source.name for source in all_sources() if source not in made} == {"hub", "remote"}  # tests of their own
    assert [type(manifest.source) for manifest in manifests] == [source for source in all_sources() if source in made]
    assert len(all_sources()) == len(SOURCES) == len({source.name for source in all_sources()})


def test_packed_sources_are_picklable_without_an_object_per_row(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        source = manifest.source.packed()
        assert isinstance(source.paths, PackedPaths)
        for value in vars(source).values():
            assert not isinstance(value, list | tuple) or len(value) < len(manifest)
        travelled = pickle.loads(pickle.dumps(source))
        assert [travelled.where(row) for row in range(len(source))] == [
            str(manifest.location(row)) for row in range(len(manifest))
        ]
        assert travelled.read(3) == manifest.location(3).read()


def test_some_rows_of_a_manifest(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        part = manifest.take([7, 2, 2])
        assert part.paths == [manifest.paths[row] for row in (7, 2, 2)]
        assert part.labels.tolist() == manifest.labels[[7, 2, 2]].tolist()
        assert (part.classes, type(part.source)) == (manifest.classes, type(manifest.source))
        assert np.array_equal(part.bytes, manifest.bytes[[7, 2, 2]])
        if part.source.loader is None:
            assert part.source.read(0) == manifest.source.read(7)


def test_the_data_argument() -> None:
    assert parse_data("synthetic:12") == 12
    assert parse_data("synthetic") == Path("synthetic")
    with pytest.raises(ValueError, match="needs a number of images of at least 1, got 'synthetic:0'"):
        parse_data("synthetic:0")


def test_the_table_of_sources_in_the_docs_is_true(manifests: list[Manifest]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `") and line.count("|") == 8
    ]
    table = {name.strip("`"): row for row in rows for name in row[0].split(", ")}
    assert table.keys() == {source.name for source in all_sources()}
    for manifest in manifests:
        *_, loaders, _, shuffle = table[manifest.source.name]
        assert sorted(loaders.split(", ")) == sorted(name for name in loaders_for(manifest) if name != "synthetic")
        if not isinstance(manifest.source, PartsSource):
            assert shuffle.startswith("yes") == (manifest.source.row_shards is not None)
