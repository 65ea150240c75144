"""Manifests of many rows: read and kept without a Python object for every row."""

from pathlib import Path

import numpy as np
import pytest

from sslfast.data import Manifest, columns, source
from sslfast.data.folder import FolderSource
from sslfast.data.source import ListedImage, PackedPaths
from sslfast.runs.directory import RunDirectory
from sslfast.training.data import RunData
from tests.tiny import TinyConfig, write_images

NAMES = ["", "a/0.jpg", "ä\udcff.png", "tab\there", "a/0.jpg"]


def test_packed_strings_join_and_compare_as_lists() -> None:
    parts = [PackedPaths(NAMES[:2]), PackedPaths([]), PackedPaths(NAMES[2:])]
    whole = PackedPaths.join(parts)
    assert list(whole) == NAMES
    assert whole == NAMES
    assert whole == NAMES
    assert whole == PackedPaths(NAMES) == PackedPaths(whole)
    assert whole != NAMES[:4]
    assert whole != PackedPaths([*NAMES[:4], "b/0.jpg"])
    assert whole != "no list"
    assert PackedPaths.join([]) == []
    assert (len(whole), whole[-1], whole[1:3]) == (5, "a/0.jpg", NAMES[1:3])


def manifest(rows: int) -> Manifest:
    images = [ListedImage(f"c{i % 7}/{i:06d}\t.jpg", 10 + i, f"{i:016x}", f"c{i % 7}") for i in range(rows)]
    images.sort()
    files = FolderSource(root=Path("/data"), paths=[image.path for image in images])
    return Manifest.from_images(files, images, excluded=[("bad.jpg", "empty file")], on_bad_image="skip")


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
def test_a_manifest_is_read_in_chunks_and_packed(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BLOCK", 101)
    monkeypatch.setattr(source, "_STRINGS", 16)
    before = manifest(rows)
    before.save(tmp_path / "m.tsv")
    assert (tmp_path / "m.tsv").read_text() == before.dump()
    for again in (Manifest.load(tmp_path / "m.tsv"), Manifest.parse(before.dump(), "m"), before.packed()):
        assert (again.paths, again.sha1, again.classes) == (before.paths, before.sha1, before.classes)
        assert np.array_equal(again.bytes, before.bytes)
        assert np.array_equal(again.labels, before.labels)
        assert again.excluded == before.excluded
        assert again.digest() == before.digest()
        assert isinstance(again.paths, PackedPaths)
        assert isinstance(again.sha1, PackedPaths)
    for cut in range(1, 60):
        (tmp_path / "cut.tsv").write_text(before.dump()[:-cut])
        with pytest.raises(ValueError, match="cut"):
            Manifest.load(tmp_path / "cut.tsv")


def test_a_run_hashes_its_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "data", 5)
    data = RunData(TinyConfig(), tmp_path / "data", RunDirectory(tmp_path / "run"), device="cpu")  # type: ignore[arg-type]
    assert data.manifest is not None
    assert isinstance(data.manifest.paths, PackedPaths)
    expected = Manifest.scan(tmp_path / "data").digest()
    assert data.digest() == expected
    monkeypatch.setattr(Manifest, "digest", lambda _self: pytest.fail("a second pass over all rows"))
    assert data.digest() == expected
