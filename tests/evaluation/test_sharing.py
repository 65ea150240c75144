"""Features of ranks that share no files: each machine has a copy in its own folder, and none holds all in memory."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sslfast.config import load_json
from sslfast.data import open_data
from sslfast.distributed import distributed_device, gather_objects, rank
from sslfast.evaluation import extract as extraction
from sslfast.evaluation.cache import FeatureCache
from sslfast.evaluation.embed import embed_all, read_embeddings
from sslfast.evaluation.encoders import RawPixels, extract_all
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from tests.distributed.test_training import enter
from tests.distributed.test_training import run as run_ranks
from tests.evaluation.runs import write_data, write_run
from tests.pictures import encoded, picture

COLUMNS = 512
ONE = ("trained",)


def anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def rank_shares(number: int, ranks: int, port: int, folder: Path) -> None:
    enter(number, ranks, port)
    with distributed_device("cpu"):
        alone = extraction._leader
        extraction._leader = lambda _writer: rank()  # as if on machines without a common file system
        extraction._CHUNK_BYTES = 1 << 10
        own = folder / f"machine{number}"
        config = KnnConfig(k=(1, 3), device="cpu", batch_size=4, features_dir=own, encoders=ONE)
        evaluate_knn(folder / "run", folder / "data", config, output=folder / "kept.json")
        kept = sorted(path.name for path in own.iterdir())
        assert len(kept) == 2
        assert set(map(tuple, gather_objects(kept))) == {tuple(kept)}
        before = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
        evaluate_knn(folder / "run", folder / "data", config, output=folder / "again.json")
        assert before == {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
        config = KnnConfig(k=(1, 3), device="cpu", batch_size=4, features_dir=own / "once", cache=False, encoders=ONE)
        evaluate_knn(folder / "run", folder / "data", config, output=folder / "once.json")
        assert not list((own / "once").iterdir())
        found = embed_all(folder / "run", folder / "data", device="cpu", output=folder / "e.npy", features_dir=own)
        assert (len(found.values), found.preprocessing[:13]) == (18, "centre-square")
        assert sorted(path.name for path in own.iterdir()) == sorted([*kept, "once"])

        extraction._leader = alone  # and with one
        shared = FeatureCache(folder / "shared")
        manifest = open_data(folder / "data" / "val")
        parts = extract_all({"raw": RawPixels(side=4)}, manifest, size=24, cache=shared)
        assert all(torch.equal(value, parts.values["raw"]) for value in gather_objects(parts.values["raw"]))
        assert len(list((folder / "shared").iterdir())) == 1

        # A disk that is full on one machine only.
        extraction._leader = lambda _writer: rank()
        full = FeatureCache(folder / f"full{number}")
        write = extraction.FeatureWriter._write

        def fail(self: extraction.FeatureWriter, data: bytes) -> None:
            if self.count >= 3:
                raise OSError(28, "No space left on device")
            write(self, data)

        if number == 1:
            extraction.FeatureWriter._write = fail  # type: ignore[method-assign]
        again = extract_all({"raw": RawPixels(side=4)}, manifest, size=24, batch_size=2, cache=full)
        assert torch.equal(again.values["raw"], parts.values["raw"])
        needed = FeatureCache(folder / f"needed{number}", needed_for=folder / "e.npy")
        with pytest.raises((ValueError, OSError), match=r"cannot write .*e.npy \(No space left on device\)"):
            extract_all({"raw": RawPixels(side=4)}, manifest, size=24, batch_size=2, cache=needed)


def test_ranks_that_share_no_files(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=4, val=2)
    run_ranks(rank_shares, 2, tmp_path)
    alone = evaluate_knn(run, data, KnnConfig(k=(1, 3), device="cpu", encoders=ONE), output=tmp_path / "alone.json")
    for name in ("kept", "again", "once"):
        found = load_json(tmp_path / f"{name}.json")["results"]
        for row, expected in zip(found, alone["results"], strict=True):
            assert row["top1"] == pytest.approx(expected["top1"], abs=1e-6), name
    assert not list(tmp_path.rglob("*.tmp"))


def rank_joins(number: int, ranks: int, port: int, folder: Path) -> None:
    enter(number, ranks, port)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    with distributed_device("cpu"):
        extraction._leader = lambda _writer: rank()
        extraction._CHUNK_BYTES = 1 << 20
        threading.Thread(target=watch, daemon=True).start()
        peaks = []
        for count in (1_000, 1_000, 30_000):
            cache, key = FeatureCache(folder / str(number)), {"n": count}
            peak = 0
            writer = cache.writer(key)
            for first in range(0, count, 100):
                value = torch.arange(first, first + 100) + number * count
                writer.append(value[:, None].float().expand(-1, COLUMNS))
            values = extraction._joined(cache, key, writer, torch.arange(2 * count), [])
            writer.discard()
            assert torch.equal(values[:, 0], torch.arange(2 * count).float())
            assert torch.equal(values[:, -1], values[:, 0])
            assert cache.load(key) is not None
            peaks.append(peak)
        assert peaks[2] < peaks[1] + 20_000_000, peaks


def test_memory_of_the_exchange_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """30 times the images: 4 MB and 123 MB of features."""
    run_ranks(rank_joins, 2, tmp_path)


EMBED = """
import sys
import threading
import time
from pathlib import Path

import torch

import sslfast
from tests.evaluation.test_sharing import anonymous

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

torch.set_num_threads(1)
threading.Thread(target=watch, daemon=True).start()
root = Path(sys.argv[1])
for name in ("few", "few", "many"):
    peak = 0
    options = {"device": "cpu", "layer": "conv1", "batch_size": 32, "output": root / f"{name}.npy"}
    found = sslfast.embed(root / "run", root / name, **options)
    assert found.values.shape == (len(list((root / name).iterdir())), 9216)
    print(peak)
"""


def test_memory_of_embeddings_in_a_file_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """2 MB and 17 MB of features."""
    write_run(tmp_path / "run")
    for name, count in (("few", 64), ("many", 448)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(picture(24, 24), "PNG"))
    done = subprocess.run([sys.executable, "-c", EMBED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, few, many = (int(line) for line in done.stdout.splitlines())
    assert many < few + 8_000_000, (few, many)


def test_embeddings_in_python_are_mapped_from_a_file(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=2, val=1)
    expected = embed_all(run, data, device="cpu")
    found = embed_all(run, data, device="cpu", output=tmp_path / "e.npy")
    assert str(tmp_path / "e.npy") in Path("/proc/self/maps").read_text()
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.values, read_embeddings(tmp_path / "e.npy").values)
    for name in ("paths", "classes", "left_out", "preprocessing"):
        assert getattr(found, name) == getattr(expected, name)
    table = embed_all(str(run), str(data), device="cpu", output=str(tmp_path / "e.parquet"))
    assert torch.equal(table.values, expected.values)
    scratch = embed_all(run, data, device="cpu", features_dir=tmp_path / "scratch")
    assert torch.equal(scratch.values, expected.values)
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(ValueError, match=r"files .npy or .parquet, got '.*e.csv'"):
        embed_all(run, data, output=tmp_path / "e.csv")
