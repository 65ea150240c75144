"""Embeddings of images as a file and in memory: beside the trunk applied by hand; every kind of data and of mistake."""

import csv
import errno
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import sslfast
from sslfast.cli.main import main
from sslfast.config import to_dict
from sslfast.data import Manifest
from sslfast.evaluation import embed as embed_module
from sslfast.evaluation.cache import FeatureWriter
from sslfast.evaluation.embed import SUFFIXES, EmbedConfig, Embeddings, embed, read_embeddings, write_embeddings
from sslfast.evaluation.encoders import extract_all, load_run
from sslfast.methods import read_head
from sslfast.models import ResNetConfig, build_trunk
from sslfast.recipes.registry import RECIPES
from sslfast.runs.checkpoint import load_checkpoint
from sslfast.training.trainer import Trainer
from tests.methods.harness import tiny, tiny_trunks
from tests.tiny import context, write_images

ROWS = 11


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = replace(tiny(RECIPES["pirl-small"]()), epochs=1)
    with tiny_trunks():
        Trainer(config, data, folder, report=lambda _line: None).fit()
    return folder


@pytest.fixture(scope="module")
def expected(run: Path, data: Path) -> Tensor:
    with tiny_trunks():
        loaded = load_run(run)
    trained = {"trained": loaded.encoders["trained"]}
    return extract_all(trained, Manifest.scan(data), size=loaded.size, preprocessing="centre-square").values["trained"]


def read_npy(path: Path) -> tuple[np.ndarray, list[list[str]]]:
    with path.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return np.load(path), list(csv.reader(file))


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_npy_with_its_table(run: Path, data: Path, expected: Tensor, tmp_path: Path, batch_size: int) -> None:
    output = tmp_path / "out" / "e.npy"
    with tiny_trunks():
        words = embed(run, data, EmbedConfig(batch_size=batch_size), output=output)
    values, table = read_npy(output)
    assert words == f"{output}: 11 x 24"
    assert values.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(values), expected, rtol=1e-5, atol=1e-5)
    manifest = Manifest.scan(data)
    classes = [manifest.classes[label] for label in manifest.labels]
    assert table[0] == ["row", "path", "class"]
    assert table[1:] == [
        [str(i), path, name] for i, (path, name) in enumerate(zip(manifest.paths, classes, strict=True))
    ]
    assert sorted(path.name for path in output.parent.iterdir()) == ["e.csv", "e.npy"]


def test_parquet(run: Path, data: Path, expected: Tensor, tmp_path: Path) -> None:
    with tiny_trunks():
        assert main(["embed", str(run), str(data), "-o", str(tmp_path / "e.parquet"), "--batch-size", "4"]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["row", "path", "class", "embedding"]
    assert table["row"].to_pylist() == list(range(ROWS))
    assert table["path"].to_pylist() == list(Manifest.scan(data).paths)
    assert set(table["class"].to_pylist()) == {"class0", "class1"}
    torch.testing.assert_close(torch.tensor(table["embedding"].to_pylist()), expected, rtol=1e-5, atol=1e-5)


def test_in_memory_and_without_labels(run: Path, data: Path, expected: Tensor, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in data.rglob("*.png"):
        shutil.copy(path, flat / path.name)
    with tiny_trunks():
        labelled, unlabelled = (sslfast.embed(run, folder, batch_size=3) for folder in (data, flat))
    torch.testing.assert_close(labelled.values, expected, rtol=1e-5, atol=1e-5)
    assert labelled.rows.tolist() == list(range(ROWS))
    assert unlabelled.classes == [None] * ROWS
    order = [unlabelled.paths.index(Path(path).name) for path in labelled.paths]
    torch.testing.assert_close(unlabelled.values[order], expected, rtol=1e-5, atol=1e-5)
    with tiny_trunks():
        embed(run, flat, output=tmp_path / "flat.npy")
    assert {line[2] for line in read_npy(tmp_path / "flat.npy")[1][1:]} == {""}


def test_head_and_layer(run: Path, data: Path, expected: Tensor) -> None:
    with tiny_trunks():
        head = sslfast.embed(run, data, head=True).values
        res2, res5 = (sslfast.embed(run, data, layer=layer).values for layer in ("res2", "res5avg"))
    state = load_checkpoint(next((run / "checkpoints").glob("*.pt")))["method"]
    by_hand = expected @ state["image_head.weight"].T + state["image_head.bias"]
    torch.testing.assert_close(head, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(res5, expected, rtol=1e-5, atol=1e-5)
    assert res2.shape == (ROWS, 8 * 6 * 6)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.endswith("-small")])
def test_the_head_of_every_method(recipe: str) -> None:
    config = tiny(RECIPES[recipe](), **({"first_step": 1, "last_step": 2} if recipe == "cpc-small" else {}))
    with tiny_trunks():
        method = config.method.build(context(config.model, 1000)).eval()
        head = method.teacher_head.mlp if recipe == "dino-small" else getattr(method, method.embedding_head, None)
        if not isinstance(head, nn.Module):
            with pytest.raises(ValueError, match=rf"method {config.method.name} has no projection head; take"):
                read_head(to_dict(config), method.state_dict())
            return
        found = read_head(to_dict(config), method.state_dict()).eval()
    features = torch.randn(3, method.trunk.out_features)
    assert torch.equal(found(features), head(features))


def test_images_that_cannot_be_used(run: Path, data: Path, expected: Tensor, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    bad = copy / "class0" / "04.png"
    bad.write_bytes(bad.read_bytes()[:80])
    with tiny_trunks():
        with pytest.raises(ValueError, match=r"04\.png cannot be used .* or pass --on-bad-image skip"):
            embed(run, copy, output=tmp_path / "e.npy")
        assert not (tmp_path / "e.npy").exists()
        words = embed(run, copy, EmbedConfig(on_bad_image="skip"), output=tmp_path / "e.npy")
    assert words.endswith("e.npy: 10 x 24, 1 images left out")
    values, table = read_npy(tmp_path / "e.npy")
    row = list(Manifest.scan(data).paths).index("class0/04.png")
    assert [int(line[0]) for line in table[1:]] == [i for i in range(ROWS) if i != row]
    kept = torch.cat((expected[:row], expected[row + 1 :]))
    torch.testing.assert_close(torch.from_numpy(values), kept, rtol=1e-5, atol=1e-5)


def test_mistakes(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"kept in files \.npy or \.parquet, got 'e\.txt'"):
        embed(run, data, output=Path("e.txt"))
    with pytest.raises(ValueError, match=r"layers must be some of conv1, .* got res9"):
        EmbedConfig(layer="res9")
    with pytest.raises(ValueError, match=r"got layer=res5 too; give one of them"):
        EmbedConfig(layer="res5", head=True)
    with pytest.raises(ValueError, match=r"unknown option layers; embed takes .*layer, head"):
        sslfast.embed(run, data, layers="res5")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        embed(tmp_path / "none", data, output=tmp_path / "e.npy")
    weights = tmp_path / "weights.pth"
    torch.save(build_trunk(ResNetConfig(name="resnet18"), seed=0).state_dict(), weights)
    with pytest.raises(ValueError, match=r"weights\.pth .* has no projection head; leave out the head"):
        sslfast.embed(weights, data, head=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    with tiny_trunks(), pytest.raises(ValueError, match="no usable image"):
        embed(run, empty, output=tmp_path / "e.npy")
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".npy", ".csv", ".tmp")] == []
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow, or name a \.npy file"):
        embed(run, data, output=tmp_path / "e.parquet")


def test_a_full_disk_ends_it_at_once(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gone on with in memory that cannot be written in the end."""

    def full(_self: FeatureWriter, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FeatureWriter, "_write", full)
    with tiny_trunks(), pytest.raises(OSError, match=r"cannot write .*e\.npy \(No space left on device\); free some"):
        embed(run, data, output=tmp_path / "e.npy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_read_again(suffix: str, run: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(embed_module, "_ROWS_AT_ONCE", 4)
    with tiny_trunks():
        own = sslfast.embed(run, data)
        embed(run, data, output=tmp_path / f"e{suffix}")
    found = read_embeddings(tmp_path / f"e{suffix}")
    assert torch.equal(found.values, own.values)
    assert torch.equal(found.rows, own.rows)
    assert (found.paths, found.classes) == (own.paths, own.classes)
    assert own.preprocessing.startswith("centre-square: shorter side to")
    assert found.preprocessing == ("" if suffix == ".npy" else own.preprocessing)
    again = tmp_path / f"again{suffix}"
    write_embeddings(found, again)
    assert torch.equal(read_embeddings(again).values, own.values)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_neighbours_of_a_file(
    suffix: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labelled, and flat with a name that is not UTF-8."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        shutil.copy(path, os.fsencode(flat) + b"/%d\xff.png" % number)
    file, sheet = tmp_path / f"e{suffix}", tmp_path / "n.png"
    for images in (flat, data):
        with tiny_trunks():
            embed(run, images, output=file)
        assert main(["neighbours", str(file), str(images), "--k", "2", "--queries", "3", "-o", str(sheet)]) == 0
        with Image.open(sheet) as picture:
            assert picture.width > 300
        sheet.unlink()
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (30, 30)).save(other / "a.png")
    for arguments, words in (
        ((other,), "has class0/00.png, which is not in"),
        ((data, "--k", "11"), "k must be in [1, 10]"),
        ((data, "--size", "20"), "holds embeddings, which size cannot change any more; leave that out"),
    ):
        assert main(["neighbours", str(file), *map(str, arguments), "-o", str(sheet)]) == 2
        assert words in capsys.readouterr().err


def test_files_of_another_kind(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.zeros(3))
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    for name, words in (
        ("e.npy", "it holds float64"),
        ("no.npy", "No such file"),
        ("e.parquet", "is no file of embeddings"),
    ):
        with pytest.raises(ValueError, match=words):
            read_embeddings(tmp_path / name)
    np.save(tmp_path / "e.npy", np.zeros((4, 2), np.float32))
    (tmp_path / "e.csv").write_text("row,path,class\n0,a,\n")
    with pytest.raises(ValueError, match=r"e\.csv has 1 lines for 4 embeddings"):
        read_embeddings(tmp_path / "e.npy")


@pytest.mark.parametrize("recipe", ["simsiam-small", "simclr-small", "byol-small"])
def test_the_head_of_evaluations_is_the_method_s_own(recipe: str, data: Path, tmp_path: Path) -> None:
    """A BatchNorm without scale and shift has no weight in a state dict to be guessed from."""
    config = replace(tiny(RECIPES[recipe]()), epochs=1)
    with tiny_trunks():
        trainer = Trainer(config, 2 * config.batch_size, tmp_path, report=lambda _line: None)
        trainer.fit()
        encoder = load_run(tmp_path, head=True).encoders["trained"]
    method = trainer.method.eval()
    features = torch.randn(3, method.trunk.out_features)
    assert torch.equal(encoder.head(features), getattr(method, method.embedding_head)(features))  # type: ignore[attr-defined]


def test_the_repr_is_one_short_line() -> None:
    """A list of a million paths is no help on a screen."""
    count = 10_000
    found = Embeddings(
        values=torch.zeros(count, 4),
        rows=torch.arange(count),
        paths=[f"a/{i}.png" for i in range(count)],
        classes=["a"] * (count - 1) + [None],
        left_out=[("b.png", "empty file")],
        preprocessing="",
    )
    assert repr(found) == "Embeddings(10000 x 4, 1 classes, 1 left out)"


def test_names_that_are_not_utf8_go_into_both_kinds_of_file(tmp_path: Path) -> None:
    found = Embeddings(
        values=torch.zeros(2, 4),
        rows=torch.arange(2),
        paths=["bad\udcff/0.png", "日本/1.png"],
        classes=["bad\udcff", None],
        left_out=[],
        preprocessing="",
    )
    write_embeddings(found, tmp_path / "a.npy")
    again = read_embeddings(tmp_path / "a.npy")
    assert (again.paths, again.classes) == (found.paths, found.classes)
    write_embeddings(found, tmp_path / "a.parquet")
    again = read_embeddings(tmp_path / "a.parquet")
    assert again.paths == ["bad\\xff/0.png", "日本/1.png"]
    assert again.classes == ["bad\\xff", None]


def of(count: int, key: int) -> Embeddings:
    names = [f"{key}/{row}.jpg" for row in range(count)]
    return Embeddings(
        values=torch.full((count, 3), float(key)), rows=torch.arange(count), paths=names, classes=[None] * count,
        left_out=[], preprocessing="",
    )  # fmt: skip


def test_no_table_of_other_embeddings_stands_beside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies between the two renames leaves no .npy; the next one writes both."""
    path, replace_file = tmp_path / "e.npy", os.replace
    write_embeddings(of(5, 1), path)

    def die(source: Any, target: Any) -> None:
        if str(target).endswith(".npy"):
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            write_embeddings(of(5, 2), path)
    with pytest.raises(ValueError, match=r"e\.npy is no file of embeddings .*write it with sslfast embed"):
        read_embeddings(path)
    write_embeddings(of(5, 2), path)
    assert read_embeddings(path).paths[0] == "2/0.jpg"


def test_embeddings_written_at_once_under_one_name_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "e.npy"
    children = []
    for key in (1, 2, 3):
        children.append(os.fork())
        if not children[-1]:
            for _ in range(30):
                write_embeddings(of(5, key), path)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    found = read_embeddings(path)
    assert found.paths[4] == f"{int(found.values[4, 0])}/4.jpg"
    assert sorted(file.name for file in path.parent.iterdir()) == ["e.csv", "e.npy"]
