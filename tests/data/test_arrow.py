"""Folders that ``datasets`` wrote by ``save_to_disk``, written here by pyarrow alone, in the same layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sslfast.data import open_data, reopen_data, verify_images
from sslfast.data.arrow import ArrowSource
from sslfast.loaders.dali import DaliLoader
from sslfast.loaders.pillow import PillowLoader
from sslfast.views.types import CropConfig, ViewConfig
from tests.data.test_parquet import IMAGE, hub_table, image, labels_of

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24))}


def write_arrow(path: Path, table: pa.Table, *, options: Any = None, stream: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def save(root: Path, shards: int = 2, rows: int = 10) -> Path:
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for shard, name in enumerate(names):
        keys = range(shard * rows, (shard + 1) * rows)
        write_arrow(root / name, hub_table(keys, labels=[key % 2 for key in keys], names=["dog", "cat"]))
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (root / "dataset_info.json").write_text("{}")
    return root


def raises(pattern: str) -> Any:
    return pytest.raises(ValueError, match=pattern)


def test_rows_are_those_of_the_files_in_order(tmp_path: Path) -> None:
    root = save(tmp_path / "saved")
    manifest = open_data(root)
    assert isinstance(manifest.source, ArrowSource)
    assert manifest.paths[12] == "data-00001-of-00002.arrow/000000002/n12.jpg"
    assert (manifest.classes, labels_of(manifest)) == (["cat", "dog"], ["dog", "cat"] * 10)
    assert np.array_equal(manifest.source.row_shards, [0] * 10 + [1] * 10)
    for source in (manifest.source, manifest.source.packed()):
        assert [source.read(row) for row in range(20)] == [image(key) for key in range(20)]
    assert verify_images(root, workers=0)[0].digest() == manifest.digest()
    loaders = [
        PillowLoader(manifest, VIEWS, batch_size=5, seed=1, workers=0, mixed_shards=1),
        DaliLoader(manifest, VIEWS, batch_size=5, seed=1, workers=2, mixed_shards=1),
    ]
    for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_one_file_with_a_plain_column(tmp_path: Path, kind: Any, stream: bool) -> None:
    table = pa.table({"jpg": pa.array([image(0), b"no image", None, image(1)], kind), "cls": [4, 5, 6, 7]})
    path = write_arrow(tmp_path / "x.arrow", table.slice(0, 4), stream=stream)
    manifest = open_data(path, on_bad_image="skip")
    assert [manifest.source.read(row) for row in range(2)] == [image(0), image(1)]
    assert labels_of(manifest) == ["4", "7"]
    assert [name for name, _ in manifest.excluded] == ["000000001", "000000002"]
    with raises(
        r"2 of 4 images in .*x.arrow cannot be used: 000000001 \(not an image.*000000002 \(no image in this row"
    ):
        open_data(path)


def test_resume_and_what_changed(tmp_path: Path) -> None:
    root = save(tmp_path / "saved")
    manifest = open_data(root)
    manifest.save(tmp_path / "m.tsv")
    moved = root.rename(tmp_path / "moved")
    again = reopen_data(moved, tmp_path / "m.tsv")
    assert (type(again.source), again.digest(), again.source.read(3)) == (ArrowSource, manifest.digest(), image(3))
    first = moved / "data-00000-of-00002.arrow"
    data = bytearray(first.read_bytes())
    data[data.index(image(3)) + 200] ^= 255
    first.write_bytes(data)
    with raises(r"1 changed: data-00000-of-00002.arrow/000000003/n3.jpg \(same size, other content\)"):
        reopen_data(moved, tmp_path / "m.tsv")
    first.write_bytes(data[:-8])
    with raises(r"data-00000-of-00002.arrow changed while it was in use"):
        again.source.read(3)
    first.unlink()
    with raises(r"data-00000-of-00002.arrow cannot be read \(No such file or directory\): put it back"):
        again.source.read(3)


def test_splits_damage_and_compression_are_one_line(tmp_path: Path) -> None:
    save(tmp_path / "dict" / "train")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with raises(r"dict holds the splits train, test: give one of them, for example .*dict/train"):
        open_data(tmp_path / "dict")
    path = write_arrow(tmp_path / "x.arrow", hub_table(range(9)), options=pa.ipc.IpcWriteOptions(compression="zstd"))
    with raises(r"x.arrow is compressed, so that no image can be read alone: write it without compression"):
        open_data(path)
    whole = write_arrow(tmp_path / "y.arrow", hub_table(range(9))).read_bytes()
    (tmp_path / "y.arrow").write_bytes(whole[:5000])
    with raises(r"y.arrow is not a whole Arrow file \(.*; 5,000 bytes\): get a good copy"):
        open_data(tmp_path / "y.arrow")
    (tmp_path / "dict" / "train" / "state.json").write_text("{")
    with raises(r"state.json cannot be read \(.*\): save the dataset again by save_to_disk"):
        open_data(tmp_path / "dict" / "train")
    with raises(r"z.arrow cannot be read \(No such file or directory\): correct the path"):
        open_data(tmp_path / "z.arrow")
    write_arrow(tmp_path / "w.arrow", pa.table({"image": pa.array([None], IMAGE)}))
    with raises("no usable image in .*w.arrow; all 1 are bad"):
        open_data(tmp_path / "w.arrow", on_bad_image="skip")
