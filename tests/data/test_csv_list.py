"""A CSV list as data: labels, paths relative to the list, every mistake by its line, and the commands that take it."""

import codecs
from pathlib import Path

import pytest
import torch
from PIL import Image

from sslfast.cli import main as cli
from sslfast.data.csv_list import CsvListSource
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data, reopen_data
from sslfast.loaders.registry import LoaderConfig, build_loader, loader_status
from sslfast.report.preview import write_preview
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import write_folder
from tests.tiny import TinyConfig

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24))}
NAMES = ["x/0.jpg", "x/1.jpg", "y/2.jpg", "3.jpg"]


def write_list(root: Path, text: str | bytes, names: list[str] = NAMES) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    write_folder(root, names)
    path = root / "list.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def test_rows_are_sorted_by_path_and_labels_are_the_second_field(tmp_path: Path) -> None:
    path = write_list(tmp_path, "y/2.jpg,cat\nx/1.jpg,dog\n./3.jpg,\nx/0.jpg,cat\n")
    manifest = Manifest.scan(path)
    assert manifest.paths == ["3.jpg", "x/0.jpg", "x/1.jpg", "y/2.jpg"]
    assert (manifest.classes, manifest.labels.tolist()) == (["cat", "dog"], [-1, 0, 1, 0])
    assert str(manifest.source) == str(manifest.root) == str(path)
    for row, name in enumerate(manifest.paths):
        assert manifest.path(row) == tmp_path / name
        assert manifest.source.read(row) == (tmp_path / name).read_bytes()
        assert manifest.source.packed().read(row) == (tmp_path / name).read_bytes()


def test_a_list_without_labels_has_no_classes(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_list(tmp_path, "x/0.jpg\ny/2.jpg\n"))
    assert (manifest.paths, manifest.classes, manifest.labels.tolist()) == (["x/0.jpg", "y/2.jpg"], [], [-1, -1])


@pytest.mark.parametrize("header", ["path,label", "Path, Label", "path"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_headers_line_ends_and_byte_order_marks(tmp_path: Path, header: str, end: str, mark: bytes) -> None:
    lines = [header, "x/0.jpg,10", "", "x/1.jpg,9"]
    manifest = Manifest.scan(write_list(tmp_path, mark + end.join(lines).encode()))
    assert manifest.paths == ["x/0.jpg", "x/1.jpg"]
    assert (manifest.classes, manifest.labels.tolist()) == (["9", "10"], [1, 0])  # by number


def test_names_with_spaces_commas_quotes_and_other_letters(tmp_path: Path) -> None:
    names = ["a b.jpg", "c,d.jpg", 'e"f.jpg', "ü/漢.jpg", "line\nbreak.jpg", " lead.jpg"]
    text = 'a b.jpg,"two, words"\n"c,d.jpg",x\n"e""f.jpg",x\nü/漢.jpg,ä\n"line\nbreak.jpg",x\n lead.jpg,x\n'
    manifest = Manifest.scan(write_list(tmp_path, text, names))
    assert manifest.paths == sorted(names)
    assert manifest.classes == ["two, words", "x", "ä"]
    (tmp_path / "b.csv").write_bytes(b"\xff.jpg,x\n")
    write_folder(tmp_path, ["\udcff.jpg"])
    assert Manifest.scan(tmp_path / "b.csv").paths == ["\udcff.jpg"]


def test_paths_are_relative_to_the_list_or_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "images", ["0.jpg", "1.jpg"])
    path = write_list(tmp_path / "lists", f"../images/0.jpg,a\n{tmp_path}/images/1.jpg,b\n", [])
    monkeypatch.chdir(tmp_path)
    manifest = Manifest.scan("lists/list.csv")
    assert manifest.paths == ["../images/0.jpg", f"{tmp_path}/images/1.jpg"]
    assert manifest.source.read(0) == (tmp_path / "images/0.jpg").read_bytes()
    assert manifest.source.read(1) == (tmp_path / "images/1.jpg").read_bytes()
    manifest.check(contents=True)
    assert path.exists()


def test_missing_and_bad_files_are_named_with_their_line(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path,label\nx/0.jpg,a\ngone.jpg,a\nx/1.jpg,b\n")
    (tmp_path / "x" / "1.jpg").write_bytes(b"")
    with raises(
        r"2 of 3 images in .*list.csv cannot be used: gone.jpg \(unreadable: No such file or directory, line 3\), "
        r"x/1.jpg \(empty file, line 4\); repair or remove the files, or pass --on-bad-image skip"
    ):
        Manifest.scan(path)
    manifest = Manifest.scan(path, on_bad_image="skip")
    assert (manifest.paths, manifest.classes) == (["x/0.jpg"], ["a"])
    assert [bad for bad, _ in manifest.excluded] == ["gone.jpg", "x/1.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x/0.jpg,a\nx/1.jpg,a\n./x/0.jpg,b\n", r"lists 'x/0.jpg' twice, in lines 1 and 3: .*remove one of them"),
        ("x/0.jpg,a\nx/1.jpg,a,b\n", r"list.csv line 2 has 3 fields: write path,label and quote"),
        ("x/0.jpg,a\n,b\n", r"list.csv line 2 names no file"),
        ('x/0.jpg,a\n"x/1.jpg,b\n', r"list.csv line 2 is not CSV \(.*\): correct its quotes"),
        ("", r"no usable image in .*list.csv"),
        ("path,label\n", r"no usable image in .*list.csv"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = write_list(tmp_path, text)
    for policy in ("error", "skip"):
        with raises(message) as error:
            Manifest.scan(path, on_bad_image=policy)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_a_list_that_is_missing(tmp_path: Path) -> None:
    with raises(r"gone.csv cannot be read \(No such file or directory\): name a folder or a list"):
        open_data(tmp_path / "gone.csv")
    folder = write_folder(tmp_path / "folder.csv", ["0.jpg"])  # a folder may have any name
    assert open_data(folder).paths == ["0.jpg"]


def test_the_manifest_file_knows_its_list(tmp_path: Path) -> None:
    path = write_list(tmp_path / "data", "x/0.jpg,a\nx/1.jpg,b\ngone.jpg,b\n")
    manifest = Manifest.scan(path, on_bad_image="skip")
    manifest.save(tmp_path / "m.tsv")
    loaded = Manifest.load(tmp_path / "m.tsv")
    assert isinstance(loaded.source, CsvListSource)
    assert (loaded.root, loaded.paths, loaded.digest()) == (path, manifest.paths, manifest.digest())
    loaded.check(contents=True)
    assert reopen_data(path, tmp_path / "m.tsv").labels.tolist() == [0, 1]
    (tmp_path / "data").rename(tmp_path / "moved")
    assert reopen_data(tmp_path / "moved" / "list.csv", tmp_path / "m.tsv").digest() == manifest.digest()
    with raises(r"cannot be read"):
        loaded.check()


def test_check_names_what_changed_in_the_list_and_on_disk(tmp_path: Path) -> None:
    path = write_list(tmp_path, "3.jpg,a\nx/0.jpg,a\nx/1.jpg,b\ny/2.jpg\n")
    manifest = Manifest.scan(path)
    write_folder(tmp_path, ["4.jpg"])
    path.write_text("3.jpg,b\nx/1.jpg,b\ny/2.jpg\n4.jpg,a\n")
    (tmp_path / "x" / "1.jpg").unlink()
    with raises("no longer matches its manifest of 4 images") as error:
        manifest.check()
    message = str(error.value)
    assert "x/1.jpg (unreadable: No such file or directory)" in message
    assert "x/0.jpg (no longer in the list)" in message
    assert "1 changed: 3.jpg (label a -> b)" in message
    assert "1 added: 4.jpg (line 4)" in message


LOADERS = ["pillow", *(["dali"] if loader_status()["dali"][0] else [])]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_yield_what_they_yield_from_a_folder(tmp_path: Path, name: str, workers: int) -> None:
    names = [f"{i}.jpg" for i in range(9)]
    listed = Manifest.scan(write_list(tmp_path, "".join(f"{name},x\n" for name in names), names))
    config = LoaderConfig(name=name, workers=workers)  # type: ignore[arg-type]
    loaders = [
        build_loader(config, manifest=manifest, views=VIEWS, batch_size=4, seed=3)
        for manifest in (listed, Manifest.scan(tmp_path))
    ]
    for a, b in zip(loaders[0].epoch(1), loaders[1].epoch(1), strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.crops["image"], b.crops["image"])
    for loader in loaders:
        loader.close()


def test_a_run_on_a_list_resumes_and_knows_its_data(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(12)]
    path = write_list(tmp_path, "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)), names)
    whole = Trainer(TinyConfig(epochs=2), path, tmp_path / "whole", report=lambda _: None).fit()
    run = tmp_path / "run"
    Trainer(TinyConfig(epochs=2), path, run, report=lambda _: None).fit()
    sorted((run / "checkpoints").glob("step_*.pt"))[-1].unlink()
    again = Trainer(TinyConfig(epochs=2), path, run, report=lambda _: None)
    assert again.fit().metrics["loss"] == whole.metrics["loss"]
    with raises("for tar shards"):
        loader = LoaderConfig(workers=0, shuffle="shards")
        Trainer(TinyConfig(loader=loader), path, tmp_path / "other", report=lambda _: None)
    path.write_text("0.jpg,0\n")
    with raises("no longer in the list"):
        Trainer(TinyConfig(epochs=2), path, run, report=lambda _: None)


def test_commands_take_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    names = [f"{i}.jpg" for i in range(5)]
    path = write_list(tmp_path, "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)), names)
    (tmp_path / "4.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:-300])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "verify", "list.csv", "-o", "list.tsv", "--workers", "2"]) == 1
    assert "4.jpg\tdamaged" in capsys.readouterr().out
    manifest = open_data(tmp_path / "list.tsv", on_bad_image="skip")
    assert (len(manifest), manifest.verified, manifest.classes) == (4, True, ["0", "1"])
    if loader_status()["ffcv"][0]:
        command = ["data", "prepare", "list.csv", "list.beton", "--workers", "2", "--on-bad-image", "skip"]
        assert cli.main(command) == 0
        stored = open_data(tmp_path / "list.beton")
        assert (stored.paths, stored.labels.tolist()) == (manifest.paths, manifest.labels.tolist())
    for data in (path, tmp_path / "list.tsv"):
        write_preview(data, VIEWS, tmp_path / "sheet.png", count=2)
        assert Image.open(tmp_path / "sheet.png").size[0] > 300


def test_labels_that_an_earlier_version_did_not_see_are_no_change(tmp_path: Path) -> None:
    write_folder(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "l.csv").write_text("image,breed\n0.jpg,a\n1.jpg,b\n")
    manifest = open_data(tmp_path / "l.csv")
    assert manifest.classes == ["a", "b"]
    manifest.labelled([None, None]).check()
