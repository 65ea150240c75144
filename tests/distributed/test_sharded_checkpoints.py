"""Sharded checkpoints of several processes: the same bits as files, no rank with more than its part, and failures of
one rank that all hear of."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sslfast.methods.pirl
from sslfast.distributed import destroy_process_group, gather_objects, is_main, together, world_size
from sslfast.models.memory_bank import initial_rows
from sslfast.runs import sharded_store, stored_tensors
from sslfast.runs.checkpoint import list_checkpoints, load_checkpoint
from sslfast.training import saving
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from tests.distributed.test_training import NormFree, config, enter, final, losses, run, train
from tests.runs.test_sharded_store import plain
from tests.tiny import same, write_images

SHARDED = {"checkpoint_store": "sharded"}


def layout(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a run with this layout of the bank."""
    return {**changes, "method": replace(config().method, bank_layout=name)}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 19)
    return folder


@pytest.fixture(scope="module")
def file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes with a sharded bank and a file per checkpoint."""
    output = tmp_path_factory.mktemp("file")
    run(train, 2, data, output, layout("sharded"), 0.0)
    return output


def until(rank: int, ranks: int, port: int, data: Path, output: Path, arguments: dict[str, Any], who: int) -> None:
    """One rank of a run in which rank ``who`` (-1: every one) is killed while it writes the checkpoint of step 8."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    write = sharded_store.write_part

    def dying(path: Path, parts: Any) -> Any:
        if who in (rank, -1) and "00000008" in str(path):
            path.write_bytes(b"a part")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, parts)

    sharded_store.write_part = dying
    lines: list[str] = []
    try:
        Trainer(config(**arguments), data, output, report=lines.append).fit()
    except RuntimeError:  # another rank is gone
        os.kill(os.getpid(), signal.SIGKILL)
    destroy_process_group()


@pytest.mark.parametrize("who", [0, 1, -1])
def test_a_rank_killed_in_a_save_costs_that_checkpoint_alone(data: Path, file: Path, tmp_path: Path, who: int) -> None:
    arguments = layout("sharded", **SHARDED)
    run(until, 2, data, tmp_path, arguments, who, expect=-signal.SIGKILL)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]
    run(train, 2, data, tmp_path, arguments, 0.0)
    assert not [*(tmp_path / "checkpoints").glob(".*")]
    folder = tmp_path / "checkpoints" / "step_00000012"
    assert [path.name for path in sorted(folder.glob("*.bin"))] == ["rank_00000.bin", "rank_00001.bin"]
    for step in (4, 8, 12):
        ours, theirs = (load_checkpoint(path / "checkpoints" / f"step_{step:08d}{suffix}") for path, suffix in (
            (tmp_path, ""), (file, ".pt")))  # fmt: skip
        assert same(plain(ours) | {"config": None}, plain(theirs) | {"config": None})
    assert losses(tmp_path) == losses(file)


@pytest.mark.parametrize(("ranks", "name"), [(1, "sharded"), (2, "replicated"), (4, "sharded"), (4, "replicated")])
def test_any_number_of_ranks_and_layout_resumes_as_from_a_file(
    data: Path, file: Path, tmp_path: Path, ranks: int, name: str
) -> None:
    run(train, 2, data, tmp_path / "first", layout("sharded", epochs=3, **SHARDED), 0.0)
    for source, output in ((file, "from file"), (tmp_path / "first", "from parts")):
        checkpoint = next(p for p in list_checkpoints(source / "checkpoints") if "00000008" in p.name)
        target = tmp_path / output / "checkpoints" / checkpoint.name
        target.parent.mkdir(parents=True)
        if checkpoint.is_dir():
            shutil.copytree(checkpoint, target)
        else:
            shutil.copy(checkpoint, target)
            shutil.copy(f"{checkpoint}.sha256", f"{target}.sha256")
        run(train, ranks, data, tmp_path / output, layout(name, **SHARDED), 0.0)
    ours, theirs = (plain(final(tmp_path / output)) for output in ("from parts", "from file"))
    assert ours["step"] == 12
    assert same(ours, theirs)
    assert len([*(tmp_path / "from file" / "checkpoints" / "step_00000012").glob("*.bin")]) == ranks


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_damage_in_the_file_of_one_rank_is_seen_by_all(data: Path, file: Path, tmp_path: Path, kind: str) -> None:
    arguments = layout("sharded", **SHARDED)
    run(train, 2, data, tmp_path, arguments, 0.0)
    checkpoint = tmp_path / "checkpoints" / "step_00000012"
    part = checkpoint / "rank_00001.bin"  # which rank 1 alone verifies
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content if kind == "flipped" else content[:-1])
    if kind == "missing":
        part.unlink()
    run(train, 2, data, tmp_path, arguments, 0.0)
    assert same(plain(final(tmp_path)) | {"config": 0}, plain(final(file)) | {"config": 0})
    assert (checkpoint.parent / "step_00000012.superseded").is_dir()


def full(rank: int, ranks: int, port: int, data: Path, output: Path) -> None:
    """The disk of rank 1 is full at step 4, and at the end."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    write = sharded_store.write_part

    def fails(path: Path, parts: Any) -> Any:
        if rank == 1 and ("00000004" in str(path) or "00000012" in str(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, parts)

    sharded_store.write_part = fails
    lines: list[str] = []
    trainer = Trainer(config(**layout("sharded", **SHARDED)), data, output, report=lines.append)
    with pytest.raises(OSError, match=r"12 \(rank 1: No space .*; free some space; the last good one is step_00000008"):
        trainer.fit()
    assert len(lines) == is_main()
    assert all("step_00000004 (rank 1: No space left on device); free some space; training" in line for line in lines)
    destroy_process_group()


def test_a_full_disk_of_one_rank_costs_that_checkpoint_alone(data: Path, tmp_path: Path) -> None:
    run(full, 2, data, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000008"]


def automatic(rank: int, ranks: int, port: int, data: Path, output: Path) -> None:
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    saving._GATHERED_BYTES = 1000
    lines: list[str] = []
    Trainer(config(), data, output, report=lines.append).fit()
    told = "checkpoints: a file a process (0.00 GB, more than 0.0 GB, and 2 processes); --checkpoint-store file writes"
    assert not lines if rank else lines[0].startswith(told)
    destroy_process_group()


def test_a_large_checkpoint_of_several_processes_is_sharded_by_itself(data: Path, tmp_path: Path) -> None:
    run(automatic, 2, data, tmp_path)
    assert all(path.is_dir() for path in list_checkpoints(tmp_path / "checkpoints"))


ROWS, DIMENSIONS, BLOCK = 400_000, 64, 4 << 20  # 102 MB in fp32


def large(layout: str) -> TrainConfig:
    method = replace(config().method, bank_layout=layout, dimensions=DIMENSIONS)  # type: ignore[arg-type]
    return config(method=method, batch_size=8, epochs=1, **SHARDED)


def peak(action: Any) -> int:
    """Bytes by which the resident memory of this process exceeds at some time what it is before."""

    def read(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(f"{name}:")[2].split()[0])

    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    action()
    return read("VmHWM") - before


def measured(rank: int, ranks: int, port: int, output: Path, layout: str) -> None:
    """Save where there is no checkpoint, resume where there is one, and write the peaks of all ranks."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    stored_tensors.BLOCK_BYTES = BLOCK
    trainer = Trainer(large(layout), ROWS, output, report=lambda _line: None)
    together(trainer.run.create, only_main=True)
    bank = trainer.method.bank
    peaks = {}
    if not trainer.store.list():
        bank.vectors.neg_()
        trainer.step = 1
        trainer._save()  # the process group of the threads, and whatever else is loaded once
        trainer.saver.settle(wait=True)
        trainer.step = 2
        peaks["saving"] = peak(lambda: trainer._save(must=True))
        trainer.step = 3
        peaks["in the background"] = peak(lambda: (trainer._save(), trainer.saver.settle(wait=True)))
    else:
        peaks["resuming"] = peak(trainer._resume)
        assert trainer.step == 3
        expected = -initial_rows(len(bank.vectors), DIMENSIONS, seed=0, first_row=bank.first_row)
        assert torch.equal(bank.vectors, expected)
        peaks["held"] = bank.vectors.nbytes
    found = gather_objects(peaks)
    if is_main():
        (output / f"{world_size()} {layout}.json").write_text(json.dumps(found))
    trainer.close()
    destroy_process_group()


def test_no_rank_needs_memory_for_more_than_its_part(tmp_path: Path) -> None:
    whole, noise = ROWS * DIMENSIONS * 4, 6 << 20
    runs = [(4, "sharded"), (2, "sharded"), (8, "sharded"), (2, "replicated")]
    for ranks, name in [runs[0], *runs]:
        run(measured, ranks, tmp_path, name)
        for peaks in json.loads((tmp_path / f"{ranks} {name}.json").read_text()):
            if "saving" in peaks:
                assert peaks["saving"] < 2 * BLOCK + noise
                assert peaks["in the background"] < whole / 4 + 2 * BLOCK + noise
            else:
                assert peaks["resuming"] < 2 * BLOCK + noise
                assert peaks["held"] == (whole if name == "replicated" else whole / ranks)
