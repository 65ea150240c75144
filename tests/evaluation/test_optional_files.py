"""A disk that is full, read-only or in the way never ends an evaluation; broken numbers do."""

import errno
import json
import os
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sslfast import files
from sslfast.cli.main import main
from sslfast.evaluation.cache import MAGIC, Cached, FeatureCache
from sslfast.evaluation.encoders import load_run
from sslfast.evaluation.sgd import ResumeState
from sslfast.optim import OptimConfig, build_optimizer
from sslfast.runs.checkpoint import save_checkpoint
from tests.evaluation.runs import write_data, write_run

KNN = ["--k", "1", "--device", "cpu"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", train=2, val=1)
    return write_run(tmp_path / "run")


def stop_writing(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str) -> None:
    """Nothing can be written below ``folder``."""
    if kind == "in the way":
        (folder / "evaluation").write_text("")
        return
    number, create = getattr(errno, kind), files._create

    def fail(path: Path) -> int:
        if folder in path.parents:
            raise OSError(number, os.strerror(number), str(path))
        return create(path)

    monkeypatch.setattr(files, "_create", fail)


@pytest.mark.parametrize("kind", ["in the way", "ENOSPC", "EROFS", "EACCES", "EIO"])
def test_the_cache_is_optional(
    run: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_writing(monkeypatch, run, kind)
    output = run.parent / "knn.json"
    assert main(["evaluate", "knn", str(run), str(run.parent / "data"), *KNN, "-o", str(output)]) == 0
    found = capsys.readouterr()
    assert "trained" in found.out
    assert found.err.count("\n") == 1
    assert "features are not kept" in found.err
    assert json.loads(output.read_text())["results"]
    assert not list(run.rglob("*.tmp"))


def test_a_folder_of_results_that_is_none_is_told_before_the_work(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_writing(monkeypatch, run, "in the way")
    for protocol in ("knn", "linear", "semisup"):
        assert main(["evaluate", protocol, str(run), str(run.parent / "data")]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        assert (
            f"cannot write {run}/evaluation/{protocol}.json ({run}/evaluation is no folder); name another" in found.err
        )
        assert found.err.count("\n") == 1


@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS"])
def test_a_result_that_cannot_be_written_is_printed(
    run: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_writing(monkeypatch, run, kind)
    moco = ["linear", "--protocol", "moco", "--epochs", "1", "--device", "cpu", "--batch-size", "4"]
    for arguments in (["knn", *KNN], moco):
        protocol, *options = arguments
        assert main(["evaluate", protocol, str(run), str(run.parent / "data"), *options]) == 2
        found = capsys.readouterr()
        assert "top-1" in found.out
        assert "name another file with --output" in found.err.splitlines()[-1]
        assert len(found.err.splitlines()) == 2
        assert not list(run.rglob("*.tmp"))


def test_a_changed_byte_is_not_used(tmp_path: Path) -> None:
    cache, key = FeatureCache(tmp_path), {"a": 1}
    cache.save(key, Cached(values=torch.ones(5, 3), rows=torch.arange(5), bad_images=[]))
    (path,) = tmp_path.iterdir()
    assert cache.load(key) is not None
    whole = path.read_bytes()
    position = whole.index(torch.ones(5, 3).numpy().tobytes())
    path.write_bytes(whole[:position] + b"\x01" + whole[position + 1 :])
    assert cache.load(key) is None


def write_table(path: Path, values: torch.Tensor, table: dict[str, Any]) -> None:
    text = json.dumps(table).encode()
    path.write_bytes(values.numpy().tobytes() + text + struct.pack("<Q", len(text)) + MAGIC)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "{}"}, {"identity": None}, {"rows": 4}, {"rows": -1}, {"rows": "5"},
        {"columns": 2**40}, {"crc32": 0}, {"missing": [9]}, {"missing": 3}, {"missing": [-1]}, {"bad_images": 3},
        {"bad_images": [["a"]]},
    ],
)  # fmt: skip
def test_a_foreign_file_is_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    cache, key, values = FeatureCache(tmp_path), {"a": 1}, torch.arange(15.0).reshape(5, 3)
    cache.save(key, Cached(values=values, rows=torch.tensor([0, 1, 3, 4, 5])))
    (path,) = tmp_path.iterdir()
    table = {"identity": json.dumps(key), "missing": [2], "bad_images": [], "rows": 5, "columns": 3,
             "crc32": zlib.crc32(values.numpy().tobytes())}  # fmt: skip
    write_table(path, values, table)
    found = cache.load(key)
    assert found is not None
    assert torch.equal(found.values, values)
    assert found.rows.tolist() == [0, 1, 3, 4, 5]
    write_table(path, values, {**table, **change})
    found = cache.load(key)
    assert found is None or ("missing" in change and len(found.rows) == 5), change
    for content in (b"", b"x" * 40, path.read_bytes()[:-1]):
        path.write_bytes(content)
        assert cache.load(key) is None
    torch.save({"values": values}, path)
    assert cache.load(key) is None
    path.unlink()
    os.mkfifo(path)
    assert cache.load(key) is None


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written so far is taken back into memory, and the rest follows it."""
    cache, parts = FeatureCache(tmp_path), [torch.full((4, 8), float(i)) for i in range(6)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        writer = cache.writer({"a": 1})
        for part in parts:
            writer.append(part)
        values = writer.values()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(values, torch.cat(parts))
    assert writer.commit({}) is None
    assert list(tmp_path.iterdir()) == []
    assert "features are not kept" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["shape", "cut", "byte", "key", "count", "nothing"])
def test_resume_states(tmp_path: Path, wrong: str) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        return module, build_optimizer(module, OptimConfig(), lr=0.1)

    path, key = tmp_path / "state.pt", {"a": 1}
    module, optimizer = parts()
    with torch.no_grad():
        module.weight.zero_()  # type: ignore[union-attr, operator]
    ResumeState(path, key).save(module, optimizer, 3)
    state, whole = torch.load(path), path.read_bytes()
    if wrong == "shape":
        torch.save(state | {"module": {"weight": torch.zeros(2, 3), "bias": torch.zeros(7)}}, path)
    elif wrong == "count":
        torch.save(state | {"epochs_done": "3"}, path)
    elif wrong == "cut":
        path.write_bytes(whole[:-30])
    elif wrong == "byte":
        position = whole.index(module.bias.detach().numpy().tobytes())  # type: ignore[operator, union-attr]
        path.write_bytes(whole[:position] + b"\0" + whole[position + 1 :])
    module, optimizer = parts()
    before = module.weight.clone()  # type: ignore[operator]
    done = ResumeState(path, {"a": 2} if wrong == "key" else key).load(module, optimizer)
    assert done == (3 if wrong == "nothing" else 0)
    assert torch.equal(before, module.weight) == (wrong != "nothing")  # type: ignore[arg-type]


def spoil(run: Path, value: float) -> None:
    path = run / "checkpoints" / "step_00000005.pt"
    state = torch.load(path, weights_only=True)
    state["method"]["trunk.layer2.0.conv1.weight"][0, 0] = value
    for old in (run / "checkpoints").iterdir():
        old.unlink()
    save_checkpoint(run / "checkpoints", state | {"step": 9}, 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "command", [["evaluate", "knn"], ["evaluate", "linear"], ["evaluate", "semisup"], ["neighbours"],
                ["evaluate", "linear", "--protocol", "goyal"]],
)  # fmt: skip
def test_broken_weights_give_no_number(
    run: Path, command: list[str], value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run, value)
    output = ["-o", str(run.parent / ("n.png" if command == ["neighbours"] else "n.json"))]
    assert main([*command, str(run), str(run.parent / "data"), "--device", "cpu", *output]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "step_00000009.pt are NaN or infinite" in found.err
    assert not Path(output[1]).exists()


def test_features_that_overflow_give_no_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(run, 1e38)
    load_run(run)
    assert main(["evaluate", "knn", str(run), str(run.parent / "data"), *KNN]) == 2
    assert "gives NaN or infinite features for 6 of 6 images (blue/0.png, ...)" in capsys.readouterr().err
