"""No checkpoint holds, and no run goes on from, values that are NaN or infinite, wherever they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.runs.checkpoint import (
    CorruptCheckpointError,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from sslfast.runs.log import read_log
from sslfast.training.nonfinite import NonFiniteLossError
from sslfast.training.trainer import Trainer
from tests.distributed.test_training import enter
from tests.distributed.test_training import run as run_ranks
from tests.tiny import TinyConfig, same

ROWS = 18


def quiet(line: str) -> None:
    pass


def make(output: Path, lines: list[str] | None = None, **changes: Any) -> Trainer:
    report = quiet if lines is None else lines.append
    return Trainer(replace(TinyConfig(), **changes), ROWS, output, report=report)


def spoil_after(trainer: Trainer, step: int, spoil: Callable[[], None]) -> None:
    """Call ``spoil`` at the end of a step (1-based), whose loss is finite."""
    after_step = trainer.method.after_step

    def hook() -> None:
        after_step()  # type: ignore[operator]
        if trainer.step + 1 == step:
            spoil()

    trainer.method.after_step = hook  # type: ignore[method-assign, assignment]


def momentum_of(trainer: Trainer) -> Tensor:
    return trainer.optimizer.state[trainer.method.head.weight]["momentum_buffer"]  # type: ignore[index, union-attr]


def spoil_one(values: Tensor, value: float) -> None:
    """One number, in whatever memory format."""
    values[(-1,) * values.dim()] = value


STATE: dict[str, Callable[[Trainer], Tensor]] = {
    "the gradient of head.weight": lambda t: t.method.head.weight.grad,  # type: ignore[union-attr, return-value]
    "head.bias": lambda t: t.method.head.bias.data,  # type: ignore[union-attr, return-value]
    "trunk.1.running_var": lambda t: t.method.trunk[1].running_var,  # type: ignore[index, return-value]
    "bank": lambda t: t.method.bank,  # type: ignore[return-value]
    "momentum_buffer of head.weight": momentum_of,
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", STATE)
def test_no_checkpoint_is_made_of_a_state_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    trainer = make(tmp_path)
    # The last step before a checkpoint, so that no loss shows it.
    spoil_after(trainer, 10, lambda: spoil_one(STATE[name](trainer), value))
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit()
    assert str(caught.value).startswith(f"after step 10 values of {name} are NaN or infinite; the last good checkpoint")
    assert str(checkpoint_path(tmp_path / "checkpoints", 5)) in str(caught.value)
    assert "lower optim.lr_per_256_images" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path / "checkpoints") == [checkpoint_path(tmp_path / "checkpoints", 5)]


def test_the_final_checkpoint_is_checked_too(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    spoil_after(trainer, 24, lambda: STATE["head.bias"](trainer).fill_(torch.nan))
    with pytest.raises(NonFiniteLossError, match=r"after step 24 values of head\.bias"):
        trainer.fit()


@pytest.mark.parametrize("name", STATE)
def test_skip_rolls_back_a_step_that_leaves_such_a_state(tmp_path: Path, name: str) -> None:
    trainer = make(tmp_path, on_nonfinite="skip")
    spoil_after(trainer, 10, lambda: spoil_one(STATE[name](trainer), torch.inf))
    trainer.fit()
    assert read_log(tmp_path / "log.jsonl")[-1]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in trainer.method.state_dict().values())


@pytest.mark.parametrize("place", [("method", "bank"), ("method", "trunk.1.running_mean"), ("optimizer", "state")])
def test_a_saved_value_that_is_not_finite_is_passed_over_at_resume(tmp_path: Path, place: tuple[str, str]) -> None:
    make(tmp_path).fit()
    whole = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", 24))
    saved = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", 24))
    entry = saved[place[0]][place[1]]
    spoil_one(entry if isinstance(entry, Tensor) else entry[0]["momentum_buffer"], torch.nan)
    save_checkpoint(tmp_path / "checkpoints", saved, 24)
    lines: list[str] = []
    make(tmp_path, lines).fit()
    assert "are NaN or infinite" in lines[0]
    assert lines[0].endswith("trying the one before, step_00000020.pt")
    assert same(load_checkpoint(checkpoint_path(tmp_path / "checkpoints", 24)), whole)


def test_a_named_checkpoint_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    make(tmp_path).fit()
    path = checkpoint_path(tmp_path / "checkpoints", 24)
    saved = load_checkpoint(path)
    saved["method"]["bank"][3] = torch.nan
    save_checkpoint(path.parent, saved, 24)
    with pytest.raises(CorruptCheckpointError, match=r"values of bank in .*step_00000024\.pt are NaN or infinite"):
        Trainer(TinyConfig(), ROWS, tmp_path, resume=path, report=quiet).fit()


def _spoil_on_one_rank(rank: int, ranks: int, port: int, output: Path) -> None:
    enter(rank, ranks, port)
    trainer = make(output)
    if rank == 1:
        spoil_after(trainer, 5, lambda: STATE["trunk.1.running_var"](trainer).fill_(torch.inf))
    with pytest.raises(NonFiniteLossError, match=r"after step 5 values of trunk\.1\.running_var"):
        trainer.fit()


def test_ranks_agree_where_one_has_such_a_state(tmp_path: Path) -> None:
    run_ranks(_spoil_on_one_rank, 2, tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints") == []
