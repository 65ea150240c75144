import hashlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.runs.checkpoint import (
    CorruptCheckpointError,
    HashedFileStore,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from sslfast.runs.checkpoint_store import prune, set_aside_newer
from tests.tiny import fork_server


def state(step: int) -> dict[str, Any]:
    return {"step": step, "method": {"w": torch.full((3, 5), float(step)), "n": torch.tensor(7)}, "config": {"a": [1]}}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_and_names(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "new" / "checkpoints", state(12), 12)
    assert names(path.parent) == ["step_00000012.pt", "step_00000012.pt.sha256"]
    loaded = load_checkpoint(path)
    assert loaded["step"] == 12
    assert loaded["config"] == {"a": [1]}
    assert torch.equal(loaded["method"]["w"], torch.full((3, 5), 12.0))


def test_strides_survive(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    loaded = load_checkpoint(save_checkpoint(tmp_path, {"step": 0, "w": weight}, 0))
    assert loaded["w"].stride() == weight.stride()
    assert torch.equal(loaded["w"], weight)


def test_checksum_file_is_what_sha256sum_reads(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), 1)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name("step_00000001.pt.sha256").read_text() == f"{digest}  step_00000001.pt\n"


def test_every_rename_comes_after_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    save_checkpoint(tmp_path, state(1), 1)
    assert events == [
        "fsync .step_00000001.pt.tmp",
        "fsync .step_00000001.pt.sha256.tmp",
        "rename step_00000001.pt.sha256",
        "rename step_00000001.pt",
        f"fsync {tmp_path.name}",
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_sum(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


def spoil_sum(path: Path) -> None:
    path.with_name(path.name + ".sha256").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("damage", [flip, cut, empty, lose_sum, spoil_sum])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path: Path, damage: Any) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    damage(save_checkpoint(tmp_path, state(2), 2))
    lines: list[str] = []
    found = load_latest(tmp_path, report=lines.append)
    assert found is not None
    assert found[1]["step"] == 1
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "step_00000002.pt" in lines[0]
    assert "trying the one before, step_00000001.pt" in lines[0]
    assert found[0] == checkpoint_path(tmp_path, 1)
    with pytest.raises(CorruptCheckpointError, match=r"step_00000002\.pt"):
        load_checkpoint(checkpoint_path(tmp_path, 2))


def test_all_damaged_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    cut(save_checkpoint(tmp_path, state(1), 1))
    with pytest.raises(CorruptCheckpointError, match=r"every checkpoint in .* is damaged .*start again with another"):
        load_latest(tmp_path, report=lambda line: None)


def test_default_report_is_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    cut(save_checkpoint(tmp_path, state(2), 2))
    load_latest(tmp_path)
    assert capsys.readouterr().err.startswith("sslfast: checkpoint ")


def test_no_checkpoints(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "step_00000001.pt")


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = save_checkpoint(tmp_path, {"step": 1, "x": Evil()}, 1)
    with pytest.raises(CorruptCheckpointError, match="is not a checkpoint of sslfast"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_file_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"other": 1}, 1)
    with pytest.raises(CorruptCheckpointError, match="no step in it"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, 0, [6]), (2, 0, [5, 6]), (1, 2, [2, 4, 6]), (9, 0, [1, 2, 3, 4, 5, 6]), (2, 3, [3, 5, 6])],
)
def test_pruning(tmp_path: Path, keep: int, every: int, left: list[int]) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, state(step), step)
    prune(HashedFileStore(tmp_path), keep=keep, keep_every_steps=every)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, s) for s in left]
    assert len(names(tmp_path)) == 2 * len(left)


def test_order_is_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save_checkpoint(tmp_path, state(step), step)
    assert [load_checkpoint(p)["step"] for p in list_checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_clean_deletes_leftovers_only(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    (tmp_path / ".step_00000002.pt.tmp").write_bytes(b"half")
    (tmp_path / "step_00000002.pt.sha256").write_text("0  step_00000002.pt\n")
    (tmp_path / "notes.txt").write_text("mine")
    HashedFileStore(tmp_path).clean()
    assert names(tmp_path) == ["notes.txt", "step_00000001.pt", "step_00000001.pt.sha256"]


def test_newer_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step), step)
    assert [p.name for p in set_aside_newer(HashedFileStore(tmp_path), 1)] == [
        "step_00000002.pt.superseded",
        "step_00000003.pt.superseded",
    ]
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1)]
    assert (tmp_path / "step_00000003.pt.superseded").exists()


def write_forever(directory: str, done: Any) -> None:
    """A child that does nothing but write 8 MB checkpoints."""
    torch.set_num_threads(1)
    block = torch.arange(1_000_000)
    for step in range(1, 1_000_000):
        save_checkpoint(Path(directory), {"step": step, "w": block + step}, step)
        done.value = step


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL at random moments: every checkpoint reported as saved exists and is complete."""
    rng = random.Random(0)
    server = fork_server()
    for trial in range(5):
        directory, done = tmp_path / str(trial), server.RawValue("q", 0)
        child = server.Process(target=write_forever, args=(str(directory), done))
        child.start()
        while child.is_alive() and not done.value:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found = load_latest(directory, report=pytest.fail)
        assert found is not None
        assert found[1]["step"] >= done.value
        assert torch.equal(found[1]["w"], torch.arange(1_000_000) + found[1]["step"])
