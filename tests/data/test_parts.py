"""Several data sets as one: kinds mixed, classes by name, identity of each, resume, loaders and commands."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslfast.cli import main as cli
from sslfast.data import open_data, parse_data, prepare_beton, reopen_data, verify_images
from sslfast.data.manifest import Manifest
from sslfast.data.parts import PartsSource
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import LoaderConfig
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, ViewConfig
from tests.data.test_arrow import save
from tests.data.test_parquet import write_shards as write_tables
from tests.data.test_source import Items
from tests.data.test_tar import write_shards
from tests.pictures import picture, write_folder
from tests.tiny import TinyConfig

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24))}


def raises(pattern: str) -> Any:
    return pytest.raises(ValueError, match=pattern)


def labels_of(manifest: Manifest) -> list[str | None]:
    return [None if label < 0 else manifest.classes[label] for label in manifest.labels]


@pytest.fixture
def roots(tmp_path: Path) -> list[Any]:
    """One of every kind that is image files."""
    folder = write_folder(tmp_path / "folder", [f"dog/{k}.jpg" for k in range(3)] + ["cat/1.jpg"])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(folder / "dog" / "0.jpg", "eel/0.jpg")
    (tmp_path / "other").mkdir()
    write_folder(tmp_path / "listed", ["a.jpg", "b.jpg"])
    (tmp_path / "l.csv").write_text("listed/a.jpg,dog\nlisted/b.jpg,\n")
    tables, shards, saved = (
        write_tables(tmp_path / "t", shards=1, rows=4),
        write_shards(tmp_path / "s"),
        save(tmp_path / "a", rows=2),
    )
    items = Items([picture(key=key) for key in range(2)])
    return [folder, shards, tmp_path / "x.zip", tmp_path / "l.csv", tables, saved, items]


def test_rows_are_those_of_the_parts_in_order(roots: list[Any], tmp_path: Path) -> None:
    manifest, alone = open_data(roots), [open_data(root) for root in roots]
    assert isinstance(manifest.source, PartsSource)
    assert len(manifest) == sum(map(len, alone))
    assert manifest.paths[0] == "0/cat/1.jpg"
    wanted = [one.source.read(row) for one in alone for row in range(len(one))]
    assert labels_of(manifest) == [label for one in alone for label in labels_of(one)]
    assert manifest.classes == sorted({name for one in alone for name in one.classes})
    for source in (manifest.source, pickle.loads(pickle.dumps(manifest.source.packed()))):
        assert [source.read(row) for row in range(len(source))] == wanted
    some = [len(manifest) - 1, 0, 5, 0]
    taken = manifest.take(some)
    assert [taken.source.read(row) for row in range(4)] == [wanted[row] for row in some]
    assert [taken.source.where(row) for row in range(4)] == [manifest.source.where(row) for row in some]
    manifest.save(tmp_path / "m.tsv")
    again = reopen_data(roots, tmp_path / "m.tsv")
    assert (again.digest(), again.classes) == (manifest.digest(), manifest.classes)
    assert [again.source.read(row) for row in range(len(again))] == wanted
    loaders = [PillowLoader(again, VIEWS, batch_size=7, seed=1, workers=workers) for workers in (0, 2)]
    for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(one.crops["image"], other.crops["image"])
    for loader in loaders:
        loader.close()
    assert verify_images(roots, workers=0)[0].digest() == manifest.digest()


def test_what_changed_is_named_with_its_part(roots: list[Any], tmp_path: Path) -> None:
    open_data(roots).save(tmp_path / "m.tsv")
    moved = (tmp_path / "folder").rename(tmp_path / "elsewhere")
    assert reopen_data([moved, *roots[1:]], tmp_path / "m.tsv").source.read(0) == (moved / "cat/1.jpg").read_bytes()
    (moved / "dog" / "1.jpg").unlink()
    write_folder(moved, ["new/1.jpg"])
    (tmp_path / "listed" / "a.jpg").write_bytes(b"x")
    with raises(r"1 missing: 0/dog/1.jpg .*1 changed: 3/listed/a.jpg \(.*1 added: 0/new/1.jpg"):
        reopen_data([moved, *roots[1:]], tmp_path / "m.tsv")
    with raises(r"the run that .*m.tsv belongs to the list is 6 roots, and the run started with 7"):
        reopen_data(roots[:6], tmp_path / "m.tsv")
    with raises(r"started with tar files, and .*x.zip is another kind of data"):
        reopen_data([moved, roots[2], roots[1], *roots[3:]], tmp_path / "m.tsv")
    with raises(r"started with several data sets, and .*elsewhere is another kind"):
        reopen_data(moved, tmp_path / "m.tsv")


def test_a_place_twice_and_what_is_no_part(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder", ["dog/1.jpg", "cat/1.jpg"])
    (tmp_path / "link").symlink_to(root)
    for other in (root, tmp_path / "link", root / "dog", tmp_path / "folder" / ".." / "folder"):
        with raises("are the same data, or one lies in the other: every image is one row"):
            open_data([root, other])
    with raises("synthetic images cannot be a part of several: give 4 alone"):
        open_data(parse_data([str(root), "synthetic:4"]))
    with raises("the list names no data"):
        open_data([])
    prepare_beton(root, tmp_path / "x.beton", workers=0)
    with raises(r"x.beton cannot be a part of several: name what it was made of \(.*folder\)"):
        open_data([root, tmp_path / "x.beton"])
    (root / "cat" / "2.jpg").write_bytes(b"x")
    other = write_folder(tmp_path / "other", ["eel/1.jpg"])
    with raises(r"1 of 3 images in .*folder cannot be used: cat/2.jpg"):
        open_data([other, root])
    skipped = open_data([other, root], on_bad_image="skip")
    assert [path for path, _ in skipped.excluded] == ["1/cat/2.jpg"]
    skipped.save(tmp_path / "m.tsv")
    assert reopen_data([other, root], tmp_path / "m.tsv").excluded == skipped.excluded


def test_shards_of_all_parts_are_mixed(tmp_path: Path) -> None:
    one, other = write_shards(tmp_path / "s"), write_tables(tmp_path / "t", shards=1, rows=6)
    manifest = open_data([one, other])
    shards = manifest.source.row_shards
    assert shards is not None
    assert len(np.unique(shards)) == len(np.unique(open_data(one).source.row_shards)) + 2
    assert open_data([one, write_folder(tmp_path / "f", ["a.jpg"])]).source.row_shards is None


def test_commands_take_several_and_a_file_of_roots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_folder(tmp_path / name, [f"{name}{k}/{k}.jpg" for k in range(4)])
    options = ["--recipe", "npid-small", "--batch-size", "4", "--device", "cpu", "--dry-run", "--loader.workers", "0"]
    run = ["-o", str(tmp_path / "run")]
    assert cli.main(["pretrain", str(tmp_path / "a"), str(tmp_path / "b"), *options, *run]) == 0
    assert f"{tmp_path}/a + {tmp_path}/b: 8 images" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "all.roots").write_text("# both\na\n\nb\n")
    assert cli.main(["data", "verify", str(tmp_path / "all.roots"), "-o", str(tmp_path / "all.tsv")]) == 0
    assert "8 of 8 images can be used, 8 classes" in capsys.readouterr().out
    for place in ("all.roots", "all.tsv"):
        assert open_data(tmp_path / place).digest() == open_data([tmp_path / "a", tmp_path / "b"]).digest()
    with raises(r"none.roots cannot be read \(No such file or directory\): name a file of roots"):
        open_data(tmp_path / "none.roots")


def test_a_run_resumes_bit_equal(tmp_path: Path) -> None:
    roots = [write_folder(tmp_path / name, [f"{k}.jpg" for k in range(8)], width=48 + k) for k, name in enumerate("ab")]
    config = TinyConfig(epochs=2, loader=LoaderConfig(workers=0))
    whole = Trainer(config, roots, tmp_path / "whole", report=lambda _: None).fit()
    Trainer(config, roots, tmp_path / "run", report=lambda _: None).fit()
    sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))[-1].unlink()
    assert (
        Trainer(config, roots, tmp_path / "run", report=lambda _: None).fit().metrics["loss"] == whole.metrics["loss"]
    )
    with raises("no longer matches its manifest"):
        Trainer(config, roots[::-1], tmp_path / "run", report=lambda _: None)
