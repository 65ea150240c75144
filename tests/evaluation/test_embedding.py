"""Embeddings of folders, labelled and flat, as parquet and npy; neighbours from such a file."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import sslfast
from sslfast.cli.main import main
from sslfast.data import Manifest
from sslfast.evaluation import EmbedConfig, read_embeddings, write_embeddings
from sslfast.evaluation.encoders import extract_all, load_run
from tests.evaluation.runs import write_data, write_run

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), train=3, val=1) / "train"


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    for number in range(4):
        level = 60 * number
        Image.fromarray(np.full((30, 34, 3), [level, 255 - level, 90], np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_the_command_writes_what_the_encoder_gives(suffix: str, run: Path, labelled: Path, tmp_path: Path) -> None:
    output = tmp_path / f"e{suffix}"
    assert main(["embed", str(run), str(labelled), "-o", str(output), *CPU]) == 0
    found = read_embeddings(output)
    encoders = {"trained": load_run(run).encoders["trained"]}
    expected = extract_all(encoders, Manifest.scan(labelled), size=24, preprocessing="centre-square")
    torch.testing.assert_close(found.values, expected.values["trained"])
    own = sslfast.embed(run, labelled, EmbedConfig(device="cpu"))
    assert torch.equal(found.values, own.values)
    assert found.rows.tolist() == own.rows.tolist() == list(range(9))
    assert found.paths == own.paths == [f"{c}/{i}.png" for c in ("blue", "green", "red") for i in range(3)]
    assert found.classes == own.classes == ["blue"] * 3 + ["green"] * 3 + ["red"] * 3


def test_flat_folders_have_no_classes(run: Path, flat: Path, tmp_path: Path) -> None:
    found = sslfast.embed(run, flat, EmbedConfig(device="cpu", cache=False), output=tmp_path / "e.npy")
    assert found.values.shape == (4, 512)
    assert found.classes == [None] * 4
    assert np.array_equal(np.load(tmp_path / "e.npy"), found.values.numpy())
    with (tmp_path / "e.csv").open() as file:
        assert list(csv.reader(file)) == [["path", "row", "class"], *([f"{i}.png", str(i), ""] for i in range(4))]
    assert read_embeddings(tmp_path / "e.npy").classes == [None] * 4


def test_layers_and_heads(run: Path, flat: Path) -> None:
    trunk = sslfast.embed(run, flat, EmbedConfig(device="cpu"))
    for layer, columns in (("res5avg", 512), ("conv1", 64 * 144)):
        found = sslfast.embed(run, flat, EmbedConfig(device="cpu", layer=layer)).values
        assert found.shape == (4, columns)
        assert layer != "res5avg" or torch.allclose(found, trunk.values, rtol=1e-4, atol=1e-5)
    head = sslfast.embed(run, flat, EmbedConfig(device="cpu", head=True)).values
    assert head.shape == (4, 128)
    torch.testing.assert_close(normalize(head, dim=1), head)


def test_bad_images_are_left_out(run: Path, flat: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in flat.iterdir():
        content = path.read_bytes()
        (data / path.name).write_bytes(content[:-40] if path.name == "1.png" else content)
    with pytest.raises(ValueError, match=r"1.png cannot be used"):
        sslfast.embed(run, data, EmbedConfig(device="cpu"))
    found = sslfast.embed(run, data, EmbedConfig(device="cpu", on_bad_image="skip"))
    assert (found.paths, found.rows.tolist()) == (["0.png", "2.png", "3.png"], [0, 2, 3])


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_neighbours_of_a_file(suffix: str, run: Path, flat: Path, labelled: Path, tmp_path: Path) -> None:
    for data in (flat, labelled):
        file, sheet = tmp_path / f"e{suffix}", tmp_path / "n.png"
        sslfast.embed(run, data, EmbedConfig(device="cpu"), output=file)
        assert main(["neighbours", str(file), str(data), "--k", "2", "--queries", "3", "-o", str(sheet)]) == 0
        with Image.open(sheet) as picture:
            assert picture.width > 300
        sheet.unlink()


def test_errors(run: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "e.npy"
    sslfast.embed(run, flat, EmbedConfig(device="cpu"), output=file)
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (30, 30)).save(other / "a.png")
    for arguments, words in (
        (["embed", str(run), str(flat), "-o", str(tmp_path / "e.txt")], "embeddings are written as .parquet or .npy"),
        (["embed", str(run), str(flat), "--layer", "res9"], "layers must be some of conv1"),
        (["embed", str(run), str(flat), "--layer", "res5", "--head"], "layer and head exclude each other"),
        (["neighbours", str(file), str(other)], "e.npy has 0.png, which is not in"),
        (["neighbours", str(file), str(flat), "--k", "4"], "k must be in [1, 3]"),
        (["neighbours", str(tmp_path / "no.npy"), str(flat)], "no.npy is no file of embeddings"),
    ):
        assert main([*arguments, *CPU]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "e.csv").write_text("path,row,class\na,0,\n")
    with pytest.raises(ValueError, match=r"e.csv has 1 lines for 4 embeddings"):
        read_embeddings(file)
    np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="it holds float64"):
        read_embeddings(file)


def test_without_pyarrow(run: Path, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow, or write FILE\.npy"):
        sslfast.embed(run, flat, EmbedConfig(device="cpu"), output=tmp_path / "e.parquet")
    write_embeddings(sslfast.embed(run, flat, EmbedConfig(device="cpu")), tmp_path / "e.npy")
