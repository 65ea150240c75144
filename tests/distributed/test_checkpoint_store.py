"""A store to which every rank writes its part, and failures that all ranks must see."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sslfast.methods.pirl
from sslfast.distributed.process_group import destroy_process_group, init_process_group, process_group
from sslfast.runs import checkpoint as checkpoint_module
from sslfast.runs.checkpoint import CheckpointWriteError, HashedFileStore
from sslfast.runs.checkpoint_store import load_newest, prune
from sslfast.training.trainer import Trainer
from tests.distributed.test_training import NormFree, config, enter, final, losses, run, train
from tests.runs.stores import FolderStore
from tests.tiny import same, write_images


def train_until(rank: int, ranks: int, port: int, data: Path, output: Path, last_step: int) -> None:
    """One rank of a run that ends, all ranks at once, in the middle of step ``last_step``."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    trainer = Trainer(config(), data, output, report=lambda _line: None, open_store=FolderStore)
    after_step = trainer.method.after_step
    trainer.method.after_step = lambda: (after_step(), trainer.step == last_step and os._exit(9))  # type: ignore[assignment, method-assign, return-value]
    trainer.fit()
    destroy_process_group()


def test_every_rank_keeps_its_part(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 19)
    run(train, 2, tmp_path / "data", tmp_path / "whole", {}, 0.0)
    run(train_until, 2, tmp_path / "data", tmp_path / "parts", 6, expect=9)
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pt")) == ["4/0.pt", "4/1.pt"]
    run(train_until, 2, tmp_path / "data", tmp_path / "parts", 99)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for rank in range(2):
        state = torch.load(folder / "12" / f"{rank}.pt", weights_only=True)
        assert state["step"] == 12
        assert same(state["method"], final(tmp_path / "whole")["method"])


def full_disk(*_arguments: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def exchange(rank: int, ranks: int, port: int, folder: Path) -> None:
    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    store = HashedFileStore(folder)
    for step in (1, 2, 3):
        store.save({"step": step, "rank": rank}, step)
    assert store.load(3) == {"step": 3, "rank": 0}
    prune(store, keep=2)
    lines: list[str] = []
    if rank == 1:  # this rank alone cannot read the newest one: all take the one before
        store.load = lambda step, load=store.load: load(step if step < 3 else 99)  # type: ignore[method-assign, misc]
    found = load_newest(store, report=lines.append, all_ranks=True)
    assert found == (2, {"step": 2, "rank": 0})
    assert "step_00000099.pt does not exist" in lines[0]
    if rank == 0:
        checkpoint_module._HashingWriter.write = full_disk  # type: ignore[method-assign]
    with pytest.raises(CheckpointWriteError, match=r"step_00000004\.pt \(No space left on device\)"):
        store.save({"step": 4}, 4)
    assert list(store.list()) == [2, 3]
    destroy_process_group()


def test_ranks_agree_on_what_was_read_and_written(tmp_path: Path) -> None:
    run(exchange, 2, tmp_path)
