"""Tables of the Hugging Face Hub as data: columns, labels, identity, damage, and the commands that take them."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sslfast.cli import main as cli
from sslfast.data import parquet, parquet_pages
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data, reopen_data
from sslfast.data.parquet import ParquetSource
from sslfast.evaluation.folders import load_manifests
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import LoaderConfig
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import encoded, picture
from tests.tiny import TinyConfig

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24))}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(key: int, format: str = "JPEG") -> bytes:
    return encoded(picture(48 + key % 5, 40, key), format)


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def hub_table(keys: Any, *, labels: Any = None, names: list[str] | None = None, type: Any = None) -> pa.Table:
    """As ``datasets`` writes one: structs of bytes and path, and what its columns mean in the schema."""
    images = pa.array([{"bytes": image(key), "path": f"images/n{key}.jpg"} for key in keys], IMAGE)
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    columns = {"image": images}
    if labels is not None:
        columns["label"] = pa.array(labels, type)
        features["label"] = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "string", "_type": "Value"}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"row_group_size": 4} | options)
    return path


def write_shards(root: Path, shards: int = 3, rows: int = 10) -> Path:
    for shard in range(shards):
        keys = range(shard * rows, (shard + 1) * rows)
        table = hub_table(keys, labels=[key % 2 for key in keys], names=["dog", "cat"])
        write(root / f"train-{shard:05d}-of-{shards:05d}.parquet", table)
    return root


def labels_of(manifest: Manifest) -> list[str | None]:
    return [None if label < 0 else manifest.classes[label] for label in manifest.labels]


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd", "gzip"])
def test_rows_are_those_of_the_tables_in_order(tmp_path: Path, compression: str) -> None:
    root = tmp_path / "data"
    for shard in range(2):
        keys = range(shard * 10, shard * 10 + 10)
        table = hub_table(keys, labels=[key % 2 for key in keys], names=["dog", "cat"])
        write(root / f"{shard:04d}.parquet", table, compression=compression)
    manifest = open_data(root)
    assert isinstance(manifest.source, ParquetSource)
    assert manifest.paths[12] == "0001.parquet/000000002/n12.jpg"
    assert manifest.path(12) == root / manifest.paths[12]
    assert (manifest.classes, labels_of(manifest)) == (["cat", "dog"], ["dog", "cat"] * 10)
    assert manifest.source.row_shards.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4] * 4 + [5] * 2
    taken = manifest.take([19, 3])
    for source, keys in ((manifest.source, range(20)), (manifest.source.packed(), range(20)), (taken.source, (19, 3))):
        assert [source.read(row) for row in range(len(source))] == [image(key) for key in keys]
    assert manifest.bytes.tolist() == [len(image(key)) for key in range(20)]


@pytest.mark.parametrize(
    ("labels", "type", "wanted"),
    [
        (["cat", "dog", None], pa.string(), ["cat", "dog", None]),
        ([b"cat", b"dog", None], pa.binary(), ["cat", "dog", None]),
        (["cat", "dog", "cat"], pa.dictionary(pa.int8(), pa.string()), ["cat", "dog", "cat"]),
        ([10, 9, 10], pa.uint8(), ["10", "9", "10"]),
        ([1.0, 0.0, None], pa.float64(), ["1", "0", None]),
        ([True, False, True], pa.bool_(), ["1", "0", "1"]),
        (None, None, [None] * 3),
    ],
)
def test_labels(tmp_path: Path, labels: Any, type: Any, wanted: list[str | None]) -> None:
    path = write(tmp_path / "x.parquet", hub_table(range(3), labels=labels, type=type))
    manifest = open_data(path)
    assert labels_of(manifest) == wanted
    if wanted[0] == "10":
        assert manifest.classes == ["9", "10"]


@pytest.mark.parametrize("name", ["Label", "class-name", "className", "Species"])
def test_the_column_of_labels_in_any_spelling(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "x.parquet", pa.table({"image": [image(0), image(1)], name: ["b", "a"]}))
    assert labels_of(open_data(path)) == ["b", "a"]


def test_folders_of_partitions_are_labels(tmp_path: Path) -> None:
    for key, place in enumerate(["label=cat/year=2024", "label=dog%20wild", "other", "year=2024"]):
        write(tmp_path / "d" / place / "x.parquet", pa.table({"image": [image(key)]}))
    manifest = open_data(tmp_path / "d")
    assert dict(zip(manifest.paths, labels_of(manifest), strict=True)) == {
        "label=cat/year=2024/x.parquet/000000000": "cat",
        "label=dog%20wild/x.parquet/000000000": "dog wild",
        "other/x.parquet/000000000": None,
        "year=2024/x.parquet/000000000": None,
    }


def test_numbers_in_one_file_and_names_in_another_are_no_classes_side_by_side(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.parquet", hub_table([0], labels=["cat"]))
    write(tmp_path / "d" / "b.parquet", hub_table([1], labels=[0]))
    with raises(r"whose labels are numbers \(b.parquet\) and files whose labels are names \(a.parquet\): write them"):
        open_data(tmp_path / "d")
    write(tmp_path / "d" / "b.parquet", hub_table([1], labels=[0], names=["dog"]))
    assert labels_of(open_data(tmp_path / "d")) == ["cat", "dog"]


def test_class_names_come_from_the_schema_and_minus_one_is_no_class(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", hub_table(range(3), labels=[1, -1, 0], names=["b", "a"]))
    assert labels_of(open_data(path)) == ["a", None, "b"]
    write(path, hub_table(range(3), labels=[1, 2, 0], names=["b", "a"]))
    with raises(r"x.parquet: label 2 in column 'label', which names 2 classes: write the table again"):
        open_data(path)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("name", ["jpg", "img.jpg", "anything"])
def test_plain_binary_columns(tmp_path: Path, kind: Any, name: str) -> None:
    values = [image(0), image(1, "PNG"), None]
    table = pa.table({"id": [0, 1, 2], name: pa.array(values, kind), "cls": ["a", "b", "c"]})
    path = write(tmp_path / "x.parquet", table)
    with raises(r"1 of 3 images in .*: 000000002 \(no image in this row of the table"):
        open_data(path)
    manifest = open_data(path, on_bad_image="skip")
    assert [manifest.source.read(row) for row in range(2)] == values[:2]
    assert (list(manifest.paths), labels_of(manifest)) == (["000000000", "000000001"], ["a", "b"])


def test_rows_without_bytes_and_names_that_are_hostile(tmp_path: Path) -> None:
    rows = [{"bytes": image(0), "path": "../../._x.jpg"}, {"bytes": None, "path": "/etc/passwd"}, None]
    rows += [{"bytes": b"", "path": None}, {"bytes": b"x" * 50, "path": "a\tb\n.jpg"}]
    path = write(tmp_path / "x.parquet", pa.table({"image": pa.array(rows, IMAGE)}))
    manifest = open_data(path, on_bad_image="skip")
    assert list(manifest.paths) == ["000000000/._x.jpg"]
    assert [reason.partition(":")[0] for _, reason in manifest.excluded] == [
        "no image in this row of the table",
        "no image in this row of the table",
        "empty file",
        "not an image, or of a format that is not supported",
    ]
    manifest.save(tmp_path / "m.tsv")
    reopen_data(path, tmp_path / "m.tsv").check(contents=True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": ["a"]}, r"has no column of images, .* \(its columns: x\): write the image files into such a column"),
        ({"a": [b"x"], "b": [b"x"]}, r"has several columns of images \(a, b\): write a table with one of them"),
        (
            {"image": [b"x"], "label": [[1, 2]]},
            r"a label that is neither a number nor a name in column 'label': \[1, 2",
        ),
        ({"image": [b"x"], "label": [0.5]}, r"a label that is neither a number nor a name in column 'label': 0.5"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path / "x.parquet", pa.table(columns))
    for policy in ("error", "skip"):
        with raises(message) as error:
            Manifest.scan(tmp_path, on_bad_image=policy)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_splits_in_one_folder_and_other_files_beside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_shards(tmp_path / "hub" / "data", shards=2)
    write(root / "test-00000-of-00001.parquet", hub_table(range(3)))
    with raises(
        rf"several splits \(test, train\): .*`mkdir {root}/test && mv {root}/test\[-_.\]\*.parquet {root}/test/`"
    ):
        open_data(tmp_path / "hub")
    assert os.system(f"mkdir {root}/test && mv {root}/test[-_.]*.parquet {root}/test/") == 0
    assert len(open_data(root / "test")) == 3
    (root / "0.jpg").write_bytes(image(0))
    beside = open_data(root)
    assert (list(beside.paths), beside.ignored) == (["0.jpg"], {".parquet": 3})
    assert "not read beside images or .tar shards; give them a folder of their own" in beside.left_out()[0]


@pytest.mark.parametrize("harm", ["empty", "head", "tail", "footer", "page"])
def test_damaged_files_are_one_line(tmp_path: Path, harm: str) -> None:
    root = write_shards(tmp_path / "data", shards=2)
    path = root / "train-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    if harm == "page":
        data[40:4000] = bytes(3960)
    cut = {"empty": b"", "head": data[:1000], "tail": data[:-1], "footer": data[:-60] + bytes(52) + data[-8:]}
    path.write_bytes(cut.get(harm, data))
    for policy in ("error", "skip"):
        with raises(r"train-00001-of-00002.parquet is not a whole Parquet file \(.*get a good copy") as error:
            Manifest.scan(root, on_bad_image=policy)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_the_manifest_knows_its_tables_and_what_changed(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data")
    manifest = open_data(root)
    manifest.save(tmp_path / "m.tsv")
    again = reopen_data(root, tmp_path / "m.tsv")
    assert (again.digest(), again.labels.tolist()) == (manifest.digest(), manifest.labels.tolist())
    assert [again.source.read(row) for row in (0, 29)] == [image(0), image(29)]
    again.check(contents=True)
    shards = sorted(root.iterdir())
    for path in shards:
        os.utime(path, ns=(5, 5))  # copied: not changed
    again.check()
    other = np.arange(10, 20)
    other[3] = 98
    write(shards[1], hub_table(other, labels=[0] * 10, names=["dog", "cat"]))
    size = int(manifest.source.shard_sizes[1])  # type: ignore[attr-defined]
    os.truncate(shards[0], 99)
    write(root / "train-9.parquet", hub_table(range(2)))
    with raises("no longer matches its manifest of 30 images") as error:
        again.check()
    assert f"{shards[0].name} (" in str(error.value)
    assert "-> 99 bytes)" in str(error.value)
    assert f"{shards[1].name} ({size} -> " in str(error.value) or f"{shards[1].name}/000000003" in str(error.value)
    assert "1 added: train-9.parquet" in str(error.value)
    with raises(r"started with Parquet files, and .* is another kind of data"):
        reopen_data(tmp_path / "x.csv", tmp_path / "m.tsv")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_table_lost_at_run_time_ends_the_run(tmp_path: Path, workers: int, harm: str) -> None:
    root = write_shards(tmp_path / "data", shards=1)
    loader = PillowLoader(Manifest.scan(root), VIEWS, batch_size=5, seed=0, workers=workers, on_bad_image="skip")
    path = next(root.iterdir())
    os.truncate(path, 500) if harm == "cut" else path.unlink()
    with raises(r"shard .*train-00000.*(cannot be read \(No such file|changed while it was in use \(\d+ -> 500)"):
        next(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("by_page", [True, False])
def test_the_memory_of_pages_and_row_groups_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_page: bool
) -> None:
    source = open_data(write_shards(tmp_path / "data")).source
    assert isinstance(source, ParquetSource)
    cache = parquet_pages.Cache()
    monkeypatch.setattr(parquet, "_CACHE", cache)
    monkeypatch.setattr(parquet_pages, "_CACHE_BYTES", 12_000)  # two row groups of four images of 1.1 kB
    if not by_page:
        monkeypatch.setattr(source, "_find_pages", lambda _shard, _group: None)
    name = "_read_page" if by_page else "_read_group"
    reads: list[Any] = []
    read = getattr(source, name)

    def counted(*place: Any) -> list[Any]:
        reads.append(place)
        return read(*place)

    monkeypatch.setattr(source, name, counted)
    for row in range(30):
        assert source.read(row) == image(row)
    assert len(reads) == 9  # each once, in order
    assert 1 <= len(cache._parts) < 9
    assert cache._bytes <= 12_000
    source.read(29)
    source.read(28)
    assert len(reads) == 9


VALUES = [image(k) if k % 5 else None for k in range(37)]
STRUCTS = [None if k % 7 == 3 else {"bytes": value, "path": "x"} for k, value in enumerate(VALUES)]
COLUMNS = {
    "plain values": pa.array(VALUES, pa.binary()),
    "large values": pa.array(VALUES, pa.large_binary()),
    "structs": pa.array(STRUCTS, IMAGE),
    "few different values": pa.array([image(k % 3) for k in range(37)], pa.binary()),
    "no null allowed": pa.array([image(k) for k in range(37)], pa.binary()),
    "nulls alone": pa.array([None] * 37, pa.binary()),
    "empty values": pa.array([b""] * 20 + [b"x"] * 17, pa.binary()),
}
WRITTEN = {
    "as datasets does": {},
    "uncompressed": {"compression": "none"},
    "small pages": {"data_page_size": 1, "write_batch_size": 3},
    "pages of version 2": {"data_page_version": "2.0", "data_page_size": 1, "write_batch_size": 3},
    "version 2, gzip": {"data_page_version": "2.0", "compression": "gzip"},
    "no dictionary": {"use_dictionary": False, "compression": "zstd"},
    "dictionary, then plain": {"dictionary_pagesize_limit": 3000, "data_page_size": 2000, "write_batch_size": 2},
    "lz4": {"compression": "lz4"},
    "page index and checksums": {"write_page_index": True, "write_page_checksum": True},
    "delta lengths": {"use_dictionary": False, "column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}},
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("is_large", [False, True])
def test_pages_hold_what_pyarrow_reads(
    tmp_path: Path, name: str, written: str, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_pages, "_LARGE", 0 if is_large else 1 << 18)
    array, options = COLUMNS[name], dict(WRITTEN[written])
    inner = ".bytes" if name == "structs" else ""
    if "column_encoding" in options:
        options["column_encoding"] = {f"image{inner}": "DELTA_LENGTH_BYTE_ARRAY"}
    field = pa.field("image", array.type, nullable=name != "no null allowed")
    file = str(tmp_path / "x.parquet")
    pq.write_table(pa.table([array], schema=pa.schema([field])), file, row_group_size=20, **options)
    wanted = [value and value["bytes"] if inner else value for value in array.to_pylist()]
    with pq.ParquetFile(file) as opened:
        for group, rows in enumerate((wanted[:20], wanted[20:])):
            chunk = parquet_pages.chunk_pages(file, opened, group, f"image{inner}")
            if "column_encoding" in options:
                assert chunk is None
                continue
            assert chunk is not None
            assert chunk.starts[-1] == len(rows)
            assert len(chunk.pages) > 1 or options.get("data_page_size") != 1
            pages = [parquet_pages.read_page(file, chunk, at) for at in range(len(chunk.pages))]
            found = [page.value(at) for page in pages if page is not None for at in range(len(page.places))]
            assert [None if value is None else bytes(value) for value in found] == rows


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
def test_a_value_of_a_large_page_costs_its_parts(tmp_path: Path, compression: str) -> None:
    """Values that compress and values that do not, over several borders of 64 KiB."""
    rng = np.random.default_rng(0)
    values = [rng.bytes(int(count)) + b"abcd" * int(count // 9) for count in rng.integers(0, 90_000, 25)]
    file = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": pa.array(values)}), file, compression=compression)
    with pq.ParquetFile(file) as opened:
        chunk = parquet_pages.chunk_pages(file, opened, 0, "image")
    assert chunk is not None
    (page,) = [parquet_pages.read_page(file, chunk, at) for at in range(len(chunk.pages))]
    assert page is not None
    assert isinstance(page.data, parquet_pages.Parts) == (compression != "zstd")
    assert (page.nbytes < 2000) == (compression != "zstd")
    assert [page.value(at) for at in range(25)] == values


def test_damaged_pages_are_left_to_pyarrow(tmp_path: Path) -> None:
    """A flipped byte anywhere in the file ends in the right bytes, other bytes of the image, or a refusal."""
    path = write(tmp_path / "x.parquet", hub_table(range(6)), compression="snappy", row_group_size=6)
    source, data = open_data(path).source, bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in [*range(4, 120), *rng.integers(120, len(data), 60)]:
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        parquet._CACHE._start()
        for row in (0, 5):
            with suppress(ValueError):
                source.read(row)
    path.write_bytes(data)


def test_a_run_resumes_and_mixes_row_groups(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data")
    config = TinyConfig(epochs=2, loader=LoaderConfig(workers=0, shuffle="shards", mixed_shards=2))
    whole = Trainer(config, root, tmp_path / "whole", report=lambda _: None).fit()
    run = tmp_path / "run"
    Trainer(config, root, run, report=lambda _: None).fit()
    sorted((run / "checkpoints").glob("step_*.pt"))[-1].unlink()
    again = Trainer(config, root, run, report=lambda _: None)
    assert again.manifest is not None
    assert isinstance(again.manifest.source, ParquetSource)
    assert again.fit().metrics["loss"] == whole.metrics["loss"]


def test_commands_and_evaluations_take_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    root = write_shards(tmp_path / "set" / "train", shards=1)
    table = hub_table(range(4, 8), labels=[0, 1, 0, 1], names=["dog", "cat"])
    write(tmp_path / "set" / "val.parquet", table)
    train, val = load_manifests(tmp_path / "set")
    assert (train.classes, len(val)) == (["cat", "dog"], 4)
    rows = [{"bytes": image(0), "path": "a.jpg"}, {"bytes": image(1)[:-300], "path": "b.jpg"}]
    write(root / "train-00001-of-00002.parquet", pa.table({"image": pa.array(rows, IMAGE)}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "verify", str(root), "-o", "m.tsv", "--workers", "2"]) == 1
    assert "train-00001-of-00002.parquet/000000001/b.jpg\tdamaged" in capsys.readouterr().out
    assert len(open_data(tmp_path / "m.tsv", on_bad_image="skip")) == 11


def test_without_pyarrow_the_error_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_shards(tmp_path, shards=1)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert cli.main(["data", "verify", str(tmp_path)]) == 2
    assert "reading .parquet files needs pyarrow: pip install pyarrow" in capsys.readouterr().err
