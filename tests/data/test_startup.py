"""Listing, header check and check of a resumed run: columns in place of objects, and no file opened without need."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslfast.data import Manifest, folder, listing
from sslfast.data.mapped import mapped_pickle, write_pickle
from sslfast.data.source import PackedPaths
from sslfast.distributed import barrier, destroy_process_group, first_on_machine, init_process_group, process_group
from sslfast.loaders.plan import epoch_order
from sslfast.runs.directory import RunDirectory
from sslfast.training import data as run_data
from sslfast.training.data import RunData
from tests.distributed.test_training import enter, run
from tests.tiny import TinyConfig, write_images

ORDERED = ["a!/0.jpg", "a-b.jpg", "a.jpg", "a/0.jpg", "a/b/c.jpg", "a/b.jpg", "a0/z.jpg", "ä/0.jpg", "\udcff/0.jpg"]


def touch(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folders_are_listed_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """By code point, ``/`` between folders: not the order of their names alone."""
    touch(tmp_path, [*ORDERED[::-1], "t/1.tar", "s/0.tar", "x.txt", "a/y.txt"])
    found = listing.list_files(tmp_path, sizes=True)
    assert list(found.paths) == sorted(ORDERED)
    assert isinstance(found.paths, PackedPaths)
    assert found.sizes is not None
    assert found.sizes.tolist() == [0] * len(ORDERED)
    assert (found.shards, found.ignored) == (["s/0.tar", "t/1.tar"], {".txt": 2})
    assert listing.list_files(tmp_path / "s").paths == []


@pytest.mark.parametrize("alone", [10**9, 0])
def test_a_scan_in_processes_is_that_of_one(alone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 23)
    (tmp_path / "zz").mkdir()
    (tmp_path / "zz" / "empty.jpg").touch()
    (tmp_path / "zz" / "bad.jpg").write_bytes(b"no image")
    expected = Manifest.scan(tmp_path, on_bad_image="skip")
    monkeypatch.setattr(folder, "_FILES_ALONE", alone)
    monkeypatch.setattr(folder, "_FILES", 16)
    found = Manifest.scan(tmp_path, on_bad_image="skip")
    assert (found.digest(), found.excluded, found.classes) == (expected.digest(), expected.excluded, expected.classes)
    assert [path for path, _ in found.excluded] == ["zz/bad.jpg", "zz/empty.jpg"]
    assert np.array_equal(found.labels, expected.labels)
    assert len(found) == 23


def test_a_resumed_start_opens_no_file_that_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 9)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    Manifest.scan(tmp_path, on_bad_image="skip").save(tmp_path.parent / "m.tsv")
    manifest = Manifest.load(tmp_path.parent / "m.tsv", root=tmp_path)
    opened: list[str] = []
    look = folder.identify
    monkeypatch.setattr(folder, "identify", lambda file, **options: (opened.append(file), look(file, **options))[1])
    manifest.check()
    assert not opened
    some = manifest.path(3)
    some.write_bytes(some.read_bytes() + b"more")
    gone = manifest.path(5)
    gone.unlink()
    gone.mkdir()
    gone.with_name("new.jpg").touch()
    with pytest.raises(ValueError, match=r"1 missing: .*1 changed: .* bytes.*1 added: .*new.jpg"):
        manifest.check()
    gone.with_name("new.jpg").unlink()
    gone.rmdir()
    os.mkfifo(gone)
    opened.clear()
    with pytest.raises(ValueError, match="not a regular file"):
        manifest.check()
    assert opened == [str(some), str(gone)]


def test_a_resumed_start_opens_no_file_of_a_list_that_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, 9)
    paths = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    (tmp_path / "x.csv").write_text("".join(f"{path.relative_to(tmp_path)},{len(path.name)}\n" for path in paths))
    Manifest.scan(tmp_path / "x.csv").save(tmp_path / "m.tsv")
    manifest = Manifest.load(tmp_path / "m.tsv")
    opened: list[str] = []
    look = folder.identify
    monkeypatch.setattr(folder, "identify", lambda file, **options: (opened.append(file), look(file, **options))[1])
    manifest.check()
    assert not opened
    paths[3].write_bytes(paths[3].read_bytes() + b"more")
    paths[5].unlink()
    os.mkfifo(paths[5])
    paths[7].unlink()
    with pytest.raises(ValueError, match=r"2 missing: .*not a regular file.*1 changed: .* bytes"):
        manifest.check()
    assert opened == [str(paths[number]) for number in (3, 5, 7)]


def stays(action: Any) -> tuple[float, Any]:
    """Bytes that an action leaves allocated, and its result."""
    tracemalloc.start()
    try:
        result = action()
        return tracemalloc.get_traced_memory()[0], result
    finally:
        tracemalloc.stop()


def test_bytes_of_a_row(tmp_path: Path) -> None:
    """Names of 24 characters, hashes of 16, and 8 for each end of these, size, label and place in an order: an object
    a row would be twice as much."""
    rows, kept = 12_000, 150_000  # by the interpreter for the next tuples, whatever rows are
    touch(tmp_path, [f"n{i % 10:08d}/{i:010d}.jpg"[-24:] for i in range(rows)])
    listing.list_files(tmp_path)  # what is imported once
    held, found = stays(lambda: listing.list_files(tmp_path, sizes=True))
    assert held < rows * (8 + 24 + 8) + kept
    columns: dict[str, Any] = {"sizes": found.sizes, "sha1": PackedPaths("0123456789abcdef" for _ in range(rows))}

    def build() -> Manifest:
        return Manifest.from_columns(
            folder.FolderSource(root=tmp_path, paths=found.paths), **columns, excluded=[], on_bad_image="error",
            names=map(folder.first_folder, found.paths),
        )  # fmt: skip

    held, manifest = stays(build)
    assert held < rows * 8 + kept
    manifest.save(tmp_path / "m.tsv")
    Manifest.load(tmp_path / "m.tsv")
    held, again = stays(lambda: Manifest.load(tmp_path / "m.tsv"))
    assert again.digest() == manifest.digest()
    assert held < rows * (24 + 16 + 4 * 8) + kept
    assert epoch_order(rows, seed=0, epoch=0).nbytes == 8 * rows


def test_arrays_are_mapped(tmp_path: Path) -> None:
    paths = PackedPaths(["a", "ü", ""])
    write_pickle({"paths": paths, "x": np.arange(5), "none": np.empty(0)}, tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o600
    found = mapped_pickle(tmp_path / "rows")
    (tmp_path / "rows").unlink()
    assert found["paths"] == paths
    found["x"][0] = 7
    assert found["x"].tolist() == [7, 1, 2, 3, 4]
    assert not found["x"].flags.owndata


def one_run(rank: int, ranks: int, port: int, data: Path, output: Path, machines: list[int]) -> None:
    """Ranks of the machines ``machines[rank]``: each image is looked at once a machine, on its first rank."""
    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    assert first_on_machine(output / f"rank {rank}") == rank  # no such folder
    barrier()
    run_data.distributed.first_on_machine = lambda _folder: machines.index(machines[rank])
    checks: list[Any] = []
    check = Manifest.check
    Manifest.check = lambda self, **options: (checks.append(0), check(self, **options))[1]  # type: ignore[assignment]
    found = RunData(TinyConfig(), data, RunDirectory(output / "run"), device=torch.device("cpu"))
    assert found.manifest is not None
    assert found.manifest.source.read(3) == found.manifest.path(3).read_bytes()
    assert found.digest() == Manifest.scan(data).digest()
    assert len(checks) == (rank > 0 and machines.index(machines[rank]) == rank)
    barrier()
    assert not [*(output / "temporary").glob("sslfast-*")]
    destroy_process_group()


@pytest.mark.parametrize("machines", [[0, 0, 0], [0, 1, 1]])
def test_rows_are_found_once_a_machine(machines: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "data", 11)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    run(one_run, 3, tmp_path / "data", tmp_path, machines)
