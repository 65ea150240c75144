"""Data whose first folders are sets, ``train/<class>/...``, taken as classes: said on the screen, with the remedy."""

import shutil
from pathlib import Path

import pytest

from sslfast.cli.main import main
from sslfast.data import Manifest
from sslfast.evaluation.folders import UnsuitableError, load_manifests
from tests.tiny import write_images


@pytest.mark.parametrize("sets", [["train"], ["train", "val"], ["Training", "test"], ["train", "valid", "test"]])
def test_sets_taken_as_classes_are_said(tmp_path: Path, sets: list[str]) -> None:
    for name in sets:
        write_images(tmp_path / name, 4)
    (line,) = Manifest.scan(tmp_path).class_remarks()
    assert f"{' and '.join(sorted(sets))}, the first folders, are taken as classes" in line
    assert line.endswith(f"to use the classes and images of {sets[0]} alone, give {tmp_path / sets[0]}")


@pytest.mark.parametrize("folders", [["a", "b"], ["train", "bus"], ["val", "test"], ["training/a", "a"]])
def test_other_folders_are_classes(tmp_path: Path, folders: list[str]) -> None:
    for name in folders:
        write_images(tmp_path / name, 4)
    assert Manifest.scan(tmp_path).class_remarks() == []


def test_a_class_of_trains_is_one(tmp_path: Path) -> None:
    write_images(tmp_path / "both", 4)
    (tmp_path / "both/class0").rename(tmp_path / "train")
    (tmp_path / "both/class1").rename(tmp_path / "test")
    (tmp_path / "both").rmdir()
    assert Manifest.scan(tmp_path).class_remarks() == []  # no folder of classes in it


def test_an_archive_has_the_right_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "d/train", 4)
    archive = Path(shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "d"))
    manifest = Manifest.scan(archive)
    assert manifest.classes == ["class0", "class1"]
    assert manifest.class_remarks() == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_sets_in_an_archive_are_said(tmp_path: Path, kind: str) -> None:
    for name in ("train", "val"):
        write_images(tmp_path / "d" / name, 4)
    (line,) = Manifest.scan(Path(shutil.make_archive(str(tmp_path / "d"), kind, tmp_path / "d"))).class_remarks()
    assert line.startswith("train and val, the first folders, are taken as classes, and all 8 images are used; ")
    assert line.endswith("alone, give the folder train of what is unpacked")


def test_every_command_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("d/train"), 8)
    said = "to use the classes and images of train alone, give"
    small = ["--recipe", "pirl-small", "--batch-size", "4", "--epochs", "1", "--model.width", "0.25", "--device", "cpu"]
    assert main(["pretrain", "d", *small, "--method.num-negatives", "4", "--loader.workers", "0", "--dry-run"]) == 0
    assert said in capsys.readouterr().out
    assert main(["data", "verify", "d", "--workers", "0"]) == 0
    assert said in capsys.readouterr().out


def test_an_evaluation_says_which_folder_it_needs(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split, 4)
    with pytest.raises(ValueError, match=f"train has no folder train: .*give the folder of both, {tmp_path}$"):
        load_manifests(tmp_path / "train")
    nested = tmp_path / "nested"
    for split in ("train", "val"):
        write_images(nested / split / "train", 4)
    with pytest.raises(UnsuitableError, match="has one class, train; an evaluation needs at least 2; train, the first"):
        load_manifests(nested)
