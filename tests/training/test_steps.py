"""Variants of a step: micro-batches, rollback, torch.compile, prefetching; checks before a run; rendezvous."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from sslfast.distributed.rendezvous import rendezvous
from sslfast.runs import checkpoint as checkpoint_module
from sslfast.runs import directory as rundir
from sslfast.runs.checkpoint import (
    CheckpointWriteError,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from sslfast.runs.directory import RunDirectory
from sslfast.runs.log import read_log
from sslfast.training.dry_run import check_memory, estimate_memory, summary
from sslfast.training.nonfinite import NonFiniteLossError
from sslfast.training.prefetch import Prefetcher
from sslfast.training.signals import RunInterruptedError
from sslfast.training.trainer import Trainer
from sslfast.views.types import Batch
from tests.tiny import Tiny, TinyConfig, same, write_images

ROWS = 17


def make(output: Path, lines: list[str] | None = None, **changes: Any) -> Trainer:
    return Trainer(TinyConfig(**changes), ROWS, output, report=(lines if lines is not None else []).append)


def state(trainer: Trainer) -> dict[str, Any]:
    return {
        "method": {name: value.clone() for name, value in trainer.method.state_dict().items()},
        "momentum": [values["momentum_buffer"].clone() for values in trainer.optimizer.state.values()],
    }


def interrupt_at(trainer: Trainer, step: int) -> None:
    after_step = trainer.method.after_step

    def hook() -> None:
        after_step()
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.method.after_step = hook  # type: ignore[method-assign]


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """BatchNorm by its running statistics, so that a sample's output does not depend on the others."""
    whole = make(tmp_path / "1", precision="fp32")
    parts = make(tmp_path / "2", precision="fp32", accumulate_steps=2)
    for trainer in (whole, parts):
        trainer.method.eval()
        batches = trainer.loader.epoch(0)
        for _ in range(4):
            trainer.train_step(batches)
    assert parts.step == 4
    (means, _), (others, _) = whole.means.read(), parts.means.read()
    assert means == pytest.approx(others, rel=1e-6)
    for a, b in zip(state(whole)["momentum"], state(parts)["momentum"], strict=True):
        torch.testing.assert_close(a, b)
    for name, value in state(whole)["method"].items():
        torch.testing.assert_close(state(parts)["method"][name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_runs_of_micro_batches_resume_bit_equal(tmp_path: Path) -> None:
    make(tmp_path / "whole", accumulate_steps=2).fit()
    trainer = make(tmp_path / "run", accumulate_steps=2)
    interrupt_at(trainer, 10)
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    make(tmp_path / "run", accumulate_steps=2).fit()
    last = [load_checkpoint(checkpoint_path(tmp_path / name / "checkpoints", 24)) for name in ("run", "whole")]
    assert same(last[0], last[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accumulate_steps": 0}, "accumulate_steps must be at least 1, got 0"),
        ({"accumulate_steps": 3}, r"batch_size=4 must be a multiple of processes x accumulate_steps = 1 x 3 = 3"),
        ({"accumulate_steps": 2, "compile": "reduce-overhead"}, "needs accumulate_steps=1, got 2; use compile=default"),
        ({"nonfinite_limit": 0}, "nonfinite_limit must be at least 1"),
    ],
)
def test_invalid_configurations_are_rejected_first(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **values)


def test_the_error_of_a_nan_names_the_samples(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 17)
    trainer = Trainer(TinyConfig(method=Tiny.Config(bad_step=6)), tmp_path / "data", tmp_path / "run", report=print)
    rows = trainer.loader.plan.share(trainer.loader.plan.order(1), 2)
    assert trainer.manifest is not None
    named = ", ".join(f"row {row} ({trainer.manifest.paths[row]})" for row in rows.tolist())
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit()
    assert f"the loss of step 7 is not finite; first samples of that batch: {named}; the last" in str(caught.value)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_skipped_step_leaves_no_trace(tmp_path: Path, parts: int) -> None:
    trainer = make(
        tmp_path, method=Tiny.Config(bad_step=2), on_nonfinite="skip", log_every_steps=4, accumulate_steps=parts
    )
    trainer.method.train()
    batches, states, named = trainer.loader.epoch(0), [], []
    for _ in range(4):
        states.append(state(trainer))
        trainer.nonfinite.snapshot()
        trainer.train_step(batches)
        trainer.nonfinite.restore()
        named.append(trainer.nonfinite.sample_ids())
    states.append(state(trainer))
    assert same(states[2], states[3])
    assert not same(states[1], states[2])
    assert not same(states[3], states[4])
    means = trainer._read_means()
    assert means["skipped_steps"] == 1
    assert 0 < means["loss"] < 10
    skipped = trainer.loader.plan.share(trainer.loader.plan.order(0), 2).tolist()[: 4 // parts]
    assert named == [[], [], skipped, []]  # a rolled back step is not reported with a later one


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_nonfinite="skip")
    seen: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(len(seen))
        return gradient * (torch.inf if len(seen) in (5, 6) else 1.0)

    trainer.method.head.weight.register_hook(spoil)  # type: ignore[union-attr, operator]
    trainer.fit()
    records = read_log(tmp_path / "log.jsonl")
    assert [record["skipped_steps"] for record in records] == [0, 2, 2, 2, 2, 2, 2, 2]
    last = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", 24))
    assert all(value.isfinite().all() for value in last["method"].values())
    assert last["nonfinite"]["counts"].tolist() == [2, 0, 2]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_nonfinite="skip", nonfinite_limit=3)
    trainer.method.head.weight.register_hook(lambda g: g * torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(
        NonFiniteLossError, match="more than nonfinite_limit=3 steps in a row, up to step 5, had a loss"
    ):
        trainer.fit()


def test_error_and_skip_may_change_at_a_resume(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    interrupt_at(trainer, 10)
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    make(tmp_path, on_nonfinite="skip").fit()
    records = read_log(tmp_path / "log.jsonl")
    assert records[-1]["skipped_steps"] == 0
    make(tmp_path / "whole").fit()
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in read_log(tmp_path / "whole/log.jsonl")])


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    trainer = make(tmp_path, lines)
    write, fails = checkpoint_module._HashingWriter.write, [10, 24]

    def full(self: Any, data: Any) -> int:
        if trainer.step in fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(checkpoint_module._HashingWriter, "write", full)
    with pytest.raises(
        CheckpointWriteError, match=r"24\.pt \(No space left on device\); free .*one is step_00000020\.pt"
    ):
        trainer.fit()
    assert len(lines) == 1
    assert "cannot write checkpoint" in lines[0]
    assert "the last good one is step_00000005.pt; training continues, the next one is due in 5 steps" in lines[0]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [name for name in names if name.endswith(".pt")] == ["step_00000015.pt", "step_00000020.pt"]
    assert len(names) == 4
    fails.clear()
    make(tmp_path).fit()
    make(tmp_path / "whole").fit()
    last = [load_checkpoint(checkpoint_path(path / "checkpoints", 24)) for path in (tmp_path, tmp_path / "whole")]
    assert same(last[0], last[1])


def test_a_log_that_cannot_be_made_durable_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def bad_disk(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("log.jsonl"):
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", bad_disk)
        make(tmp_path / "run", lines).fit()
    assert lines == ["cannot sync log.jsonl (Input/output error); training continues; correct the disk"]
    make(tmp_path / "whole").fit()
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("run", "whole")]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]


def test_a_read_only_disk_does_not_hide_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint_module._HashingWriter, "write", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(CheckpointWriteError, match=r"step_00000003\.pt \(Read-only file system\)"):
        save_checkpoint(tmp_path, {"step": 3}, 3)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    for name in ("fcntl", "flock"):
        monkeypatch.setattr(rundir.fcntl, name, no_lock)
    with pytest.raises(ValueError, match=r"without locks \(Function not implemented\); mount it .* or choose"):
        make(tmp_path).fit()


def test_compiled_steps_are_close_to_eager_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph capture of torch.compile without its code generator, which takes minutes."""
    monkeypatch.setattr(
        Tiny, "compile", lambda self, mode: torch.nn.Module.compile(self, backend="aot_eager"), raising=False
    )
    make(tmp_path / "eager", epochs=2, precision="fp32").fit()
    trainer = make(tmp_path / "compiled", epochs=2, precision="fp32", compile="default")
    interrupt_at(trainer, 4)
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    make(tmp_path / "compiled", epochs=2, precision="fp32", compile="default").fit()
    losses = [[r["loss"] for r in read_log(tmp_path / name / "log.jsonl")] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    last = load_checkpoint(checkpoint_path(tmp_path / "compiled" / "checkpoints", 8))
    assert last["method"].keys() == trainer.method.state_dict().keys()


class FakeStream:
    """The part of a CUDA stream that the prefetcher uses."""

    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prefetcher's CUDA side on the CPU; the list takes what is recorded."""
    recorded: list[str] = []

    class Context:
        def __init__(self, stream: FakeStream) -> None:
            pass

        def __enter__(self) -> None:
            recorded.append("side")

        def __exit__(self, *error: object) -> None:
            recorded.append("main")

    monkeypatch.setattr(torch.cuda, "stream", Context)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append("kept"))
    return recorded


@pytest.mark.parametrize("ahead", [False, True])
def test_prefetching_keeps_order_and_errors(tmp_path: Path, ahead: bool, streams: list[str]) -> None:
    trainer = make(tmp_path)
    prefetcher = Prefetcher(trainer.stage, parts=2, device=torch.device("cpu"))
    if ahead:
        prefetcher._stream = FakeStream()  # type: ignore[assignment]
    source = list(trainer.loader.epoch(0))[:2]
    fetched: list[int] = []

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(source):
            fetched.append(number)
            yield batch
        raise RuntimeError("worker died")

    stream = batches()
    for part in range(4):
        sample_ids, views = prefetcher.take(stream)
        batch = source[part // 2]
        chosen = slice(2 * (part % 2), 2 * (part % 2) + 2)
        assert torch.equal(sample_ids, batch.sample_ids[chosen])
        assert torch.equal(views["image"].pixels, trainer.stage(batch)["image"].pixels[chosen])
        prefetcher.ahead(stream)
        prefetcher.ahead(stream)
        assert fetched == list(range(min(2, 1 + (part + ahead) // 2)))
    with pytest.raises(RuntimeError, match="worker died"):
        prefetcher.take(stream)
    if ahead:
        assert streams == ["side", "main", "kept", "kept", *["side", "main", "kept", "kept"] * 3, "side", "main"]
    sample_ids, _ = prefetcher.take(iter(source[1:]))  # another iterator starts afresh
    assert torch.equal(sample_ids, source[1].sample_ids[:2])


def test_dry_checks_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path / "run", accumulate_steps=2, on_nonfinite="skip")
    assert dict(summary(trainer))["step"] == (
        "1 process x 2 x 2 samples, SGD, steps that are not finite are skipped, at most 10 in a row"
    )
    trainer.check()
    needs = estimate_memory(trainer)
    weights = 4 * (8 * 3 * 9 + 8 + 2 * 8 + 4 * 8 + 4)
    assert [needs[name] for name in ("parameters", "gradients", "momentum")] == [weights] * 3
    assert needs["bank and other state"] == 4 * (ROWS * 4 + 2 * 8) + 8
    assert needs["copy for on_nonfinite=skip"] == 2 * weights + needs["bank and other state"]
    assert needs["views"] == 2 * 3 * 8 * 8 * trainer.dtype.itemsize
    # Kept at least: the input, and the output of convolution, BatchNorm's normalisation and ReLU.
    assert needs["activations"] >= (2 * 3 * 64 + 2 * 2 * 8 * 36) * trainer.dtype.itemsize
    assert not (tmp_path / "run").exists()
    assert "activations" in check_memory(trainer)
    monkeypatch.setattr("sslfast.training.dry_run.device_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"a step needs about .* on cpu; raise accumulate_steps, lower batch_size"):
        check_memory(trainer)
    monkeypatch.setattr(RunDirectory, "free_bytes", lambda self: 10)
    with pytest.raises(ValueError, match="the checkpoints need"):
        trainer.check()


def test_dry_run_finds_what_would_prevent_the_start(tmp_path: Path) -> None:
    make(tmp_path).fit()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        make(tmp_path, seed=1).check()
    make(tmp_path).check()
    assert list_checkpoints(tmp_path / "checkpoints")


def test_a_restart_waits_for_the_lock_of_its_predecessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    directory.check_unlocked()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunDirectory(tmp_path).locked():
            os.write(writer, b"x")
            time.sleep(0.5)
        os._exit(0)
    os.read(reader, 1)
    for refused in (directory.check_unlocked, lambda: directory.locked().__enter__()):
        with pytest.raises(ValueError, match=f"is in use by process {pid}; wait for it"):
            refused()
    monkeypatch.setattr(rundir, "_WAIT_SECONDS", 20.0)
    with directory.locked(is_restart=True):
        os.waitpid(pid, 0)
    directory.check_unlocked()


def test_rendezvous_leaves_out_stale_ranks() -> None:
    """The store still holds the keys of two earlier attempts: a complete one, and one that lost its leader."""
    store = HashStore()

    def attempt(ranks: list[int], seconds: float) -> dict[int, Any]:
        found: dict[int, Any] = {}

        def take_part(rank: int) -> None:
            time.sleep(0.03 * rank)
            try:
                found[rank] = rendezvous(store, rank=rank, world_size=3, timeout=timedelta(seconds=seconds))
            except TimeoutError as error:
                found[rank] = error

        threads = [threading.Thread(target=take_part, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    first = attempt([0, 1, 2], 20)
    first[1].set("address", "of a stale rank")
    assert first[2].get("address") == b"of a stale rank"
    lost = attempt([1, 2], 0.3)
    assert all("waited 0:00:00.300000 for the other processes of 3" in str(error) for error in lost.values())
    third = attempt([0, 1, 2], 20)
    assert not third[0].check(["address"])
    third[0].set("address", "of this attempt")
    assert [third[rank].get("address") for rank in range(3)] == [b"of this attempt"] * 3
