from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sslfast.data.manifest import Manifest
from sslfast.evaluation.folders import UnsuitableError, drawn_rows, listed_rows, load_manifests
from tests.pictures import write_folder


def folder(root: Path, **counts: int) -> Manifest:
    names = [f"{name}/{name}_{i}.jpg" for name, count in counts.items() for i in range(count)]
    return Manifest.scan(write_folder(root, names, width=8, height=8))


def test_drawn_rows_are_balanced(tmp_path: Path) -> None:
    manifest = folder(tmp_path, a=20, b=10, c=3)
    rows = drawn_rows(manifest, 0.2, seed=0)
    assert np.bincount(manifest.labels[rows]).tolist() == [4, 2, 1]
    assert rows == sorted(set(rows)) == drawn_rows(manifest, 0.2, seed=0)
    assert rows != drawn_rows(manifest, 0.2, seed=1)
    assert set(rows) <= set(drawn_rows(manifest, 0.5, seed=0))
    assert drawn_rows(manifest, 1.0, seed=3) == list(range(33))
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"fraction must be above 0 and at most 1, got {fraction}"):
            drawn_rows(manifest, fraction, seed=0)


def test_listed_rows(tmp_path: Path) -> None:
    manifest = folder(tmp_path / "data", a=4, b=3)
    names = tmp_path / "1percent.txt"
    names.write_text("b_1.jpg\na/a_3.jpg\n\nb_0.jpg\n")
    rows = listed_rows(manifest, names)
    assert [manifest.paths[row] for row in rows] == ["a/a_3.jpg", "b/b_0.jpg", "b/b_1.jpg"]
    part = manifest.take(rows)
    assert (part.paths, part.labels.tolist()) == (["a/a_3.jpg", "b/b_0.jpg", "b/b_1.jpg"], [0, 1, 1])
    assert part.classes == ["a", "b"]
    assert part.path(0).is_file()
    assert len({part.digest(), manifest.digest()}) == 2
    for text, words in (
        ("", "lists nothing"),
        ("a_0.jpg\nx.jpg\nb_0.jpg\n", r"1 of 3 files of .*1percent.txt are not in .*: x.jpg"),
        ("a_0.jpg\n", r"has no image of 1 of 2 classes \(b\)"),
    ):
        names.write_text(text)
        with pytest.raises(ValueError, match=words):
            listed_rows(manifest, names)
    write_folder(tmp_path / "data", ["b/a_0.jpg"])
    names.write_text("a_0.jpg\nb_0.jpg\n")
    with pytest.raises(ValueError, match=r"1 of 2 files .* are the name of several images in .*: a_0.jpg"):
        listed_rows(Manifest.scan(tmp_path / "data"), names)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["folder", "csv", "parquet"])
def test_images_without_a_label_name_a_remedy_of_their_kind(kind: str, split: str, tmp_path: Path) -> None:
    other = "val" if split == "train" else "train"
    write_folder(tmp_path, [f"{other}/{name}/{k}.jpg" for name in "ab" for k in range(2)])
    write_folder(tmp_path, [f"{split}/{k}.jpg" for k in range(2)])
    if kind == "csv":
        (tmp_path / f"{split}.csv").write_text(f"path,caption\n{split}/0.jpg,x\n{split}/1.jpg,y\n")
    elif kind == "parquet":
        images = [(tmp_path / split / f"{k}.jpg").read_bytes() for k in range(2)]
        (tmp_path / split).rename(tmp_path / "images")
        parquet.write_table(pa.table({"image": images}), tmp_path / f"{split}.parquet")
    classes = "" if split == "train" else rf"--train {tmp_path}/train "
    words = {
        "folder": rf"{split} has 2 images outside class folders .*LABELS {classes}-o {tmp_path}/{split}\.csv`",
        "csv": rf"{split}\.csv has 2 images without a label \(train/0\.jpg\).*every line one, in a column named label",
        "parquet": rf"{split}\.parquet has 2 images without a label .*write them into a column named label",
    }[kind].replace("train/0", f"{split}/0")
    with pytest.raises(UnsuitableError, match=words):
        load_manifests(tmp_path)
