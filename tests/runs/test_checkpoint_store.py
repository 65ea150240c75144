"""The trainer with a checkpoint store that is not the library's own."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.runs.checkpoint import CorruptCheckpointError, HashedFileStore
from sslfast.runs.checkpoint_store import CheckpointStore, load_newest, stored_bytes
from sslfast.training.dry_run import summary
from sslfast.training.trainer import Trainer
from tests.runs.stores import FolderStore
from tests.tiny import Tiny, TinyConfig, fork_server, log_values, same

ROWS = 17


def trainer(output: Path | str, report: Any = lambda _line: None, **options: Any) -> Trainer:
    return Trainer(TinyConfig(), ROWS, output, report=report, open_store=FolderStore, **options)


def train(output: str, last_step: int) -> None:
    """A child that is killed in the middle of step ``last_step``, if that comes."""
    torch.set_num_threads(1)
    steps, after_step = [0], Tiny.after_step

    def count(self: Tiny) -> None:
        after_step(self)
        steps[0] += 1
        if steps[0] == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    Tiny.after_step = count  # type: ignore[method-assign]
    trainer(output).fit()


def train_plainly(output: str) -> None:
    torch.set_num_threads(1)
    Trainer(TinyConfig(), ROWS, output, report=lambda _line: None).fit()


def test_a_run_killed_and_resumed_ends_as_one_with_the_the_default_store(tmp_path: Path) -> None:
    server = fork_server()
    for target, name, arguments, code in (
        (train_plainly, "plain", (), 0),
        (train, "other", (13,), -signal.SIGKILL),
        (train, "other", (99,), 0),
    ):
        child = server.Process(target=target, args=(str(tmp_path / name), *arguments))
        child.start()
        child.join()
        assert child.exitcode == code
    store: CheckpointStore = FolderStore(tmp_path / "other" / "checkpoints")
    plain: CheckpointStore = HashedFileStore(tmp_path / "plain" / "checkpoints")
    assert list(store.list()) == list(plain.list()) == [20, 24]
    assert same(store.load(24), plain.load(24))
    assert log_values(tmp_path / "other") == log_values(tmp_path / "plain")
    assert abs(stored_bytes(store) / stored_bytes(plain) - 1) < 0.1


def test_damage_other_paths_and_messages(tmp_path: Path) -> None:
    run, lines = tmp_path / "run", []
    result = trainer(run).fit()
    assert result.checkpoint == run / "checkpoints" / "24"
    again = trainer(run, report=lines.append)
    assert dict(summary(again))["output"].endswith("(resumes after step 24)")
    (run / "checkpoints" / "24" / "0.pt").write_bytes(b"PK")
    again.fit()
    assert lines[0].endswith("0.pt is damaged; trying the one before, 20")
    assert lines[1:] == ["set aside 0.old, newer than 20", f"resumed from {run / 'checkpoints' / '20'}: step 20/24"]
    lines.clear()
    trainer(tmp_path / "one", report=lines.append, resume=run / "checkpoints" / "20").fit()
    trainer(tmp_path / "two", report=lines.append, resume=run).fit()
    assert [line.split()[-1] for line in lines] == ["20/24", "24/24"]
    with pytest.raises(ValueError, match="already holds a run"):
        trainer(run, resume="never").fit()


def test_no_readable_checkpoint_is_an_error_and_none_at_all_is_a_new_run(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert load_newest(store) is None
    for step in (1, 2):
        store.save({"step": step}, step)
    (tmp_path / "2" / "0.pt").write_bytes(b"")
    lines: list[str] = []
    assert load_newest(store, report=lines.append, all_ranks=True) == (1, {"step": 1})
    assert len(lines) == 1
    (tmp_path / "1" / "0.pt").write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"every checkpoint in .* is damaged \(1, 2\); restore one"):
        load_newest(store, report=lines.append)
