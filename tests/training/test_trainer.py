import io
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.config import from_dict, load_json, to_dict
from sslfast.device import resolve_device, resolve_precision
from sslfast.distributed.process_group import process_group
from sslfast.loaders.registry import LoaderConfig
from sslfast.optim.optimizers import OptimConfig
from sslfast.recipes import RECIPES
from sslfast.runs.checkpoint import (
    CorruptCheckpointError,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from sslfast.runs.directory import RunDirectory, git_state, versions
from sslfast.runs.log import LogFile, read_log
from sslfast.training.config import TrainConfig
from sslfast.training.dry_run import summary
from sslfast.training.logging import LoaderTimer, LogContext
from sslfast.training.metrics import DeviceMeans
from sslfast.training.nonfinite import NonFiniteLossError
from sslfast.training.progress import Progress
from sslfast.training.signals import GracefulShutdown, RunInterruptedError
from sslfast.training.trainer import Trainer
from tests.pictures import write_folder
from tests.tiny import Tiny, TinyConfig, log_values, same

ROWS = 17
STEPS = 24


def quiet(line: str) -> None:
    pass


def run(output: Path, config: TrainConfig | None = None, **options: Any) -> Trainer:
    trainer = Trainer(config or TinyConfig(), ROWS, output, **{"report": quiet, **options})
    trainer.fit()
    return trainer


def stop_at(trainer: Trainer, step: int, action: Any) -> None:
    """Call ``action`` in the middle of a step."""
    after_step = trainer.method.after_step

    def hook() -> None:
        after_step()  # type: ignore[operator]
        if trainer.step == step:
            action()

    trainer.method.after_step = hook  # type: ignore[assignment]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    run(output)
    return output


def equals_whole(output: Path, whole: Path) -> bool:
    last = [load_checkpoint(checkpoint_path(path / "checkpoints", STEPS)) for path in (output, whole)]
    return same(last[0], last[1]) and log_values(output) == log_values(whole)


def test_run_directory_and_result(tmp_path: Path) -> None:
    config = TinyConfig(keep_every_steps=10, tensorboard=True)
    result = Trainer(config, ROWS, tmp_path, report=quiet).fit()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "log.jsonl",
        "tensorboard",
        "versions.json",
    ]
    kept = [int(p.stem.removeprefix("step_")) for p in list_checkpoints(tmp_path / "checkpoints")]
    assert kept == [10, 20, 24]
    assert from_dict(TinyConfig, load_json(tmp_path / "config.json")) == config
    facts = load_json(tmp_path / "versions.json")["starts"][0]
    assert facts["torch"] == torch.__version__
    expected = {
        "sslfast",
        "torch",
        "python",
        "platform",
        "devices",
        "git",
        "command",
        "unix_seconds",
        "device",
        "precision",
        "processes",
    }
    assert set(facts) == expected
    assert result.step == STEPS
    assert result.checkpoint == checkpoint_path(tmp_path / "checkpoints", STEPS)
    assert result.metrics["loss"] == log_values(tmp_path)[-1]["loss"]
    assert result.bad_images == 0
    assert 0 <= result.loader_wait_share <= 1


FEATURES = ("feature_std", "feature_rank", "feature_cosine")


def test_log_records(whole: Path) -> None:
    records = read_log(whole / "log.jsonl")
    assert [r["step"] for r in records] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert records[1]["epoch"] == 1.5
    assert set(records[0]) == {"step", "epoch", "lr", "loss", "positive", *FEATURES, "time"}
    assert set(records[0]["time"]) == {"unix_seconds", "samples_per_second", "loader_wait_share"}
    for record in records:
        schedule = OptimConfig().learning_rate(batch_size=4, steps_per_epoch=4, epochs=6)
        assert record["lr"] == schedule(record["step"] - 1)


def test_logged_loss_is_the_mean_over_the_interval(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, TinyConfig(log_every_steps=1))
    single = [r["loss"] for r in log_values(tmp_path)]
    means = [sum(single[i : i + 3]) / 3 for i in range(0, STEPS, 3)]
    assert [r["loss"] for r in log_values(whole)] == pytest.approx(means, rel=1e-12)


def test_training_lowers_the_loss_and_moves_the_bank(whole: Path, tmp_path: Path) -> None:
    losses = [r["loss"] for r in log_values(whole)]
    assert losses[-1] < losses[0]
    fresh = Trainer(TinyConfig(), ROWS, tmp_path / "x").method.state_dict()["bank"]
    last = load_checkpoint(checkpoint_path(whole / "checkpoints", STEPS))["method"]["bank"]
    assert not torch.equal(fresh, last)


def test_runs_are_reproducible_and_seeds_differ(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "same")
    assert equals_whole(tmp_path / "same", whole)
    run(tmp_path / "other", TinyConfig(seed=1))
    assert log_values(tmp_path / "other") != log_values(whole)


def test_global_generator_is_neither_read_nor_advanced(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert equals_whole(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 6, 13])
def test_signal_finishes_the_step_saves_and_resumes_exactly(
    tmp_path: Path, whole: Path, number: signal.Signals, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Step 13 lies inside a log interval and inside an epoch."""
    handler = signal.getsignal(number)
    trainer = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet)
    stop_at(trainer, step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(RunInterruptedError, match=rf"stopped by {number.name} after step {step + 1}/24, saved .*\.pt"):
        trainer.fit()
    assert signal.getsignal(number) is handler
    assert f"{number.name}: finishing the step and saving" in capfd.readouterr().err
    assert load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])["step"] == step + 1
    lines: list[str] = []
    run(tmp_path, report=lines.append)
    assert lines == [f"resumed from {checkpoint_path(tmp_path / 'checkpoints', step + 1)}: step {step + 1}/24"]
    assert equals_whole(tmp_path, whole)
    assert len(load_json(tmp_path / "versions.json")["starts"]) == 2


def test_second_sigint_stops_at_once(tmp_path: Path, whole: Path) -> None:
    trainer = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_at(trainer, 11, twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])["step"] == 10
    run(tmp_path)
    assert equals_whole(tmp_path, whole)


def test_signal_handlers_stay_outside_the_main_thread() -> None:
    import threading

    seen: list[Any] = []

    def enter() -> None:
        with GracefulShutdown() as shutdown:
            seen.append((shutdown.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


@pytest.mark.parametrize("step", [1, 4, 12])
def test_crash_in_a_step_resumes_exactly(tmp_path: Path, whole: Path, step: int) -> None:
    trainer = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet)

    def crash() -> None:
        raise MemoryError

    stop_at(trainer, step, crash)
    with pytest.raises(MemoryError):
        trainer.fit()
    run(tmp_path)
    assert equals_whole(tmp_path, whole)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, whole: Path) -> None:
    trainer = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet)
    stop_at(trainer, 16, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    newest = checkpoint_path(tmp_path / "checkpoints", 17)
    newest.write_bytes(newest.read_bytes()[:-7])
    lines: list[str] = []
    run(tmp_path, report=lines.append)
    assert len(lines) == 3
    assert "step_00000017.pt is damaged or truncated" in lines[0]
    assert "trying the one before, step_00000015.pt" in lines[0]
    assert "set aside step_00000017.pt.superseded" in lines[1]
    assert equals_whole(tmp_path, whole)


def test_no_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, TinyConfig(keep_checkpoints=1))
    checkpoint_path(tmp_path / "checkpoints", STEPS).write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match="every checkpoint"):
        run(tmp_path)


def test_a_finished_run_is_left_unchanged(tmp_path: Path) -> None:
    first = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet).fit()
    written = first.checkpoint.stat().st_mtime_ns
    again = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet).fit()
    assert (again.step, again.metrics, again.checkpoint) == (first.step, first.metrics, first.checkpoint)
    assert first.checkpoint.stat().st_mtime_ns == written


def test_resume_never(tmp_path: Path) -> None:
    run(tmp_path, resume="never")
    with pytest.raises(ValueError, match="already holds a run; choose another output directory"):
        run(tmp_path, resume="never")


def test_resume_from_an_older_checkpoint_of_the_same_run(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, TinyConfig(keep_checkpoints=9))
    lines: list[str] = []
    run(tmp_path, resume=checkpoint_path(tmp_path / "checkpoints", 10), report=lines.append)
    assert [line.split()[2] for line in lines[:-1]] == [
        "step_00000015.pt.superseded,",
        "step_00000020.pt.superseded,",
        "step_00000024.pt.superseded,",
    ]
    assert log_values(tmp_path) == log_values(whole)


def test_resume_from_another_run_directory(tmp_path: Path, whole: Path) -> None:
    trainer = Trainer(TinyConfig(), ROWS, tmp_path / "a", report=quiet)
    stop_at(trainer, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    run(tmp_path / "b", resume=tmp_path / "a")
    last = [load_checkpoint(checkpoint_path(p / "checkpoints", STEPS)) for p in (tmp_path / "b", whole)]
    assert same(last[0], last[1])
    with pytest.raises(ValueError, match="already holds another run"):
        run(tmp_path / "b", resume=tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        run(tmp_path / "c", resume=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(tmp_path / "c", resume=tmp_path / "nowhere.pt")


def test_a_changed_configuration_is_refused_in_one_line_with_every_field(tmp_path: Path) -> None:
    run(tmp_path)
    changed = TinyConfig(optim=OptimConfig(momentum=0.8), method=Tiny.Config(bank_momentum=0.25), epochs=9)
    with pytest.raises(ValueError, match=r"cannot resume .*step_00000024\.pt") as caught:
        run(tmp_path, changed)
    message = str(caught.value)
    for words in (
        "optim.momentum was 0.9, is 0.8",
        "method.bank_momentum was 0.5, is 0.25",
        "epochs was 6, is 9",
        "choose another output directory",
    ):
        assert words in message
    assert "\n" not in message
    assert from_dict(TinyConfig, load_json(tmp_path / "config.json")) == TinyConfig()


def test_a_checkpoint_older_than_a_field_resumes_with_its_default(tmp_path: Path, whole: Path) -> None:
    trainer = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet)
    stop_at(trainer, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    state = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    for field in ("schedule", "milestones", "gamma", "betas"):
        del state["config"]["optim"][field]
    save_checkpoint(tmp_path / "checkpoints", state, state["step"])
    with pytest.raises(ValueError, match=r"optim\.schedule was 'cosine', is 'constant'"):
        run(tmp_path, TinyConfig(optim=OptimConfig(schedule="constant")))
    run(tmp_path)
    last = [load_checkpoint(checkpoint_path(p / "checkpoints", STEPS)) for p in (tmp_path, whole)]
    assert same(last[0], last[1])
    state["config"]["flavour"] = 1
    with pytest.raises(ValueError, match=r"cannot resume .*: config field flavour is unknown; .* another output"):
        run(tmp_path / "other", resume=save_checkpoint(tmp_path / "newer", state, state["step"]))


def test_adamw_stopped_and_resumed(tmp_path: Path) -> None:
    """Its moments and counts are in the checkpoint, and skipped steps leave them alone."""
    adam = OptimConfig(name="adamw", lr_per_256_images=0.5, schedule="steps", milestones=(2.0,))
    config = TinyConfig(optim=adam, on_nonfinite="skip", method=Tiny.Config(bad_step=5))
    run(tmp_path / "whole", config)
    trainer = Trainer(config, ROWS, tmp_path / "stopped", report=quiet)
    stop_at(trainer, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    run(tmp_path / "stopped", config)
    a, b = (load_checkpoint(checkpoint_path(tmp_path / n / "checkpoints", STEPS)) for n in ("whole", "stopped"))
    assert same(a, b)
    assert a["optimizer"]["state"][0]["step"] == STEPS - 1
    assert log_values(tmp_path / "whole") == log_values(tmp_path / "stopped")
    assert [record["lr"] for record in log_values(tmp_path / "whole")][1:4] == [0.5 / 64, 0.05 / 64, 0.05 / 64]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "other", {"step": 1, "weights": torch.zeros(1)}, 1)
    with pytest.raises(CorruptCheckpointError, match=r"is no checkpoint of a run \(method, optimizer, .* missing\)"):
        run(tmp_path / "run", resume=path)


def test_resumable_fields_may_change(tmp_path: Path, whole: Path) -> None:
    trainer = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet)
    stop_at(trainer, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    loader = LoaderConfig(workers=1, on_bad_image="skip")
    other = TinyConfig(recipe="x", loader=loader, log_every_steps=2, checkpoint_every_steps=7, keep_checkpoints=1)
    run(tmp_path, other)
    last = [load_checkpoint(checkpoint_path(p / "checkpoints", STEPS)) for p in (tmp_path, whole)]
    assert same(last[0]["method"], last[1]["method"])
    assert same(last[0]["optimizer"], last[1]["optimizer"])
    assert [r["step"] for r in log_values(tmp_path)] == [3, 6, 9, 12, 14, 16, 18, 20, 22, 24]


def test_another_precision_of_another_device_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(TinyConfig(), ROWS, tmp_path, report=quiet)
    before = trainer.dtype
    stop_at(trainer, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterruptedError):
        trainer.fit()
    after = torch.float32 if before == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr("sslfast.training.trainer.resolve_precision", lambda precision, device: after)
    lines: list[str] = []
    run(tmp_path, report=lines.append)
    assert lines[1:] == [f"precision was {before} so far and is {after} on this device"]


def test_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="the images are not those it was trained on"):
        Trainer(TinyConfig(), ROWS + 1, tmp_path, report=quiet).fit()


@pytest.mark.parametrize(("bad", "good"), [(0, None), (7, 5), (23, 20)])
def test_nan_stops_with_step_and_last_good_checkpoint(tmp_path: Path, bad: int, good: int | None) -> None:
    trainer = Trainer(TinyConfig(method=Tiny.Config(bad_step=bad)), ROWS, tmp_path, report=quiet)
    words = "no checkpoint was saved before it" if good is None else rf"good checkpoint is .*step_{good:08d}\.pt"
    with pytest.raises(NonFiniteLossError, match=rf"the loss of step {bad + 1} is not finite; .*{words}") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert kept == ([] if good is None else [*kept[:-1], checkpoint_path(tmp_path / "checkpoints", good)])
    for path in kept:
        state = load_checkpoint(path)["method"]
        assert all(value.isfinite().all() for value in state.values())


def test_nan_never_reaches_a_checkpoint_between_log_points(tmp_path: Path) -> None:
    config = TinyConfig(method=Tiny.Config(bad_step=3), log_every_steps=100)
    with pytest.raises(NonFiniteLossError, match="the loss of step 4 is not finite"):
        run(tmp_path, config)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_step_reads_nothing_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """CUDA: torch itself forbids every wait. CPU: no tensor is turned into a number after the view stage."""
    trainer = Trainer(TinyConfig(device=device.type), ROWS, tmp_path, report=quiet)
    batches = list(trainer.loader.epoch(0))
    trainer.train_step(iter(batches))
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    else:
        views = iter([trainer.stage(batch) for batch in batches[1:]])
        monkeypatch.setattr(trainer, "stage", lambda batch: next(views))

        def forbidden(*args: Any) -> Any:
            raise AssertionError("host sync in a step")

        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, forbidden)
    try:
        for batch in batches[1:]:
            trainer.train_step(iter([batch]))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.undo()
    assert (trainer.step, trainer.means.count) == (4, 4)


def test_bf16_and_layout_options(tmp_path: Path) -> None:
    trainer = run(tmp_path, TinyConfig(precision="bf16", channels_last=False, epochs=1))
    state = trainer.method.state_dict()
    assert {v.dtype for k, v in state.items() if "num_batches" not in k} == {torch.float32}
    assert trainer.stage is not None
    cases = ((None, "fp32", True), (None, "bf16", False), (True, "bf16", True), (False, "fp32", False))
    for choice, precision, chosen in cases:
        config = TinyConfig(channels_last=choice, precision=precision, device="cpu")
        other = Trainer(config, ROWS, tmp_path / f"{choice}-{precision}")
        weight = other.method.trunk[0].weight  # type: ignore[index, union-attr]
        assert weight.is_contiguous(memory_format=torch.channels_last) == chosen


def test_two_processes_in_one_run_directory(tmp_path: Path) -> None:
    """Neither reading the lock file nor a second attempt in the same process frees the lock."""
    lock = RunDirectory(tmp_path)
    lock.create()
    with lock.locked():
        for again in (lock.check_unlocked, lambda: RunDirectory(tmp_path).locked().__enter__()):
            with pytest.raises(ValueError, match=rf"in use by another run of this process \({os.getpid()}\)"):
                again()
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        pid = os.fork()
        if pid == 0:
            try:
                with RunDirectory(tmp_path).locked():
                    os._exit(1)
            except ValueError as error:
                words = f"{tmp_path} is in use by process {os.getppid()}; wait for it, stop it, or choose another"
                os._exit(0 if words in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with lock.locked():
        pass


@pytest.mark.parametrize("kind", ["ofd", "flock"])
def test_a_worker_that_outlives_its_killed_trainer_does_not_hold_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "flock":
        monkeypatch.delattr("fcntl.F_OFD_SETLK", raising=False)
    lock = RunDirectory(tmp_path)
    lock.create()
    ready, say_ready = os.pipe()
    goes_on, end = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        os.close(end)
        with lock.locked():
            if os.fork() == 0:  # the worker
                os.write(say_ready, b"x")
                os.read(goes_on, 1)
                os._exit(0)
            time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    with pytest.raises(ValueError, match=f"in use by process {trainer}"):
        lock.check_unlocked()
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    with lock.locked():
        pass
    os.close(end)  # the worker reads the end of the pipe


def test_a_second_fit_on_the_same_directory_is_refused(tmp_path: Path, whole: Path) -> None:
    first, second = (Trainer(TinyConfig(), ROWS, tmp_path, report=quiet) for _ in range(2))

    def again() -> None:
        for start in (second.check, second.fit):
            with pytest.raises(ValueError, match="in use by another run of this process"):
                start()

    stop_at(first, 6, again)
    first.fit()
    assert equals_whole(tmp_path, whole)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"log_every_steps": 0}, "log_every_steps must be at least 1"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"keep_every_steps": -1}, "keep_every_steps must be at least 0"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyConfig(**values)


def test_a_run_that_cannot_start_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    for config, message in (
        (TinyConfig(device="cuda:99"), "device='cuda:99', but torch sees .* CUDA devices; use device cpu"),
        (TinyConfig(device="tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (TinyConfig(device="meta"), "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        (TinyConfig(batch_size=18), "18"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(config, ROWS, output)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Trainer(TinyConfig(), tmp_path / "nowhere", output)
    monkeypatch.setattr(RunDirectory, "free_bytes", lambda self: 10)
    with pytest.raises(ValueError, match=r"the checkpoints need .* GB and .* has 0\.00 GB free"):
        Trainer(TinyConfig(), ROWS, output).fit()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but MASTER_ADDR is not set; start several"):
        Trainer(TinyConfig(), ROWS, output)
    assert not output.exists()


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*choose another output directory"):
        Trainer(TinyConfig(), ROWS, tmp_path / "file").fit()


def test_environment() -> None:
    assert process_group({}).is_main
    assert process_group({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).world_size == 1
    with pytest.raises(ValueError, match="RANK must be a whole number of at least 0, got RANK='x'"):
        process_group({"RANK": "x"})
    with pytest.raises(ValueError, match="RANK must be below"):
        process_group({"RANK": "3"})


def test_device_and_precision() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_precision("fp32", torch.device("cpu")) == torch.float32
    assert resolve_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)  # as the CPU has it
    assert resolve_precision("bf16", torch.device("cpu")) == torch.bfloat16


def test_summary_describes_the_run(tmp_path: Path) -> None:
    lines = dict(
        summary(Trainer(TinyConfig(recipe="tiny-recipe", device="cpu", precision="fp32"), ROWS, tmp_path / "run"))
    )
    assert lines["recipe"] == "tiny-recipe"
    assert lines["data"] == "synthetic: 17 images"
    assert lines["device"].startswith("cpu (CPU), float32")
    assert lines["steps"] == "6 epochs x 4 steps of 4 = 24 steps"
    assert lines["learning rate"].startswith("0.0004687 to 4.688e-07")
    assert "new run" in lines["output"]
    assert "GB free" in lines["disk"]
    assert not (tmp_path / "run").exists()


def test_summary_names_the_cells_of_res5(tmp_path: Path) -> None:
    def line(recipe: str, stem: str) -> str:
        config = RECIPES[recipe]()
        config = replace(config, model=replace(config.model, stem=stem, width=0.125), device="cpu", tensorboard=False)
        trainer = Trainer(replace(config, loader=LoaderConfig(name="synthetic")), 1024, tmp_path / "run", report=quiet)
        return dict(summary(trainer))["res5"]

    hint = "; 3 x 3 convolutions see one cell there: --model.stem small keeps four times the resolution"
    assert line("jigsaw-small", "small") == "2 x 2 of jigsaw patches, 16 px"
    assert line("jigsaw-small", "imagenet") == "1 x 1 of jigsaw patches, 16 px" + hint
    assert line("pirl-small", "imagenet") == "2 x 2 of image, 64 px; 1 x 1 of pretext patches, 16 px" + hint
    assert line("rotation-small", "imagenet") == "2 x 2 of image, 64 px"
    assert line("pirl-paper", "imagenet") == "7 x 7 of image, 224 px; 2 x 2 of pretext patches, 64 px"


def test_summary_says_where_val_is_trained_on(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", [f"{split}/a/{i}.png" for split in ("train", "val") for i in range(4)])
    for data, words in (
        (folder, f"8 images, val included; for train alone give {folder}/train"),
        (folder / "train", "4 images"),
    ):
        trainer = Trainer(TinyConfig(device="cpu"), data, tmp_path / "run")
        assert words in dict(summary(trainer))["data"]
        trainer.close()


@pytest.mark.parametrize(
    ("warmup", "words"),
    [
        (2.0, "0.0004687 after 2 epochs of warm-up to 4.688e-07, cosine"),
        (12.0, "grows to 0.0002344: the 12 epochs of warm-up (optim.warmup_epochs) last to the end"),
    ],
)
def test_summary_names_the_warm_up(tmp_path: Path, warmup: float, words: str) -> None:
    config = TinyConfig(device="cpu", precision="fp32")
    config.optim = replace(config.optim, warmup_epochs=warmup)
    assert dict(summary(Trainer(config, ROWS, tmp_path / "run")))["learning rate"].startswith(words)


def test_checkpoint_size_is_predicted(tmp_path: Path) -> None:
    trainer = Trainer(TinyConfig(), 100_000, tmp_path, report=quiet)
    trainer.run.create()
    assert trainer._save().stat().st_size == pytest.approx(trainer.saver.checkpoint_bytes(), rel=0.01)


def test_means_report_the_first_bad_step() -> None:
    means = DeviceMeans(torch.device("cpu"))
    for step, loss in enumerate([1.0, 2.0, float("inf"), float("nan")]):
        means.add({"loss": torch.tensor(loss), "x": torch.tensor(float(step))}, step=torch.tensor(step))
    values, bad = means.read()
    assert bad == 2
    assert values["x"] == 1.5


def test_log_is_truncated_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for last_step, content, kept in (
        (2, b'{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2),
        (9, b'{"step": 1}\n{"step": 2}\n{"st', 2),
        (9, b'{"step": 1}\n\x00\x00\x00\n{"step": 2}\n', 2),
        (0, b'{"step": 1}\n', 0),
    ):
        path.write_bytes(content)
        log = LogFile(path, last_step=last_step)
        log.write({"step": 10})
        log.close()
        assert [r["step"] for r in read_log(path)] == [*range(1, kept + 1), 10]


def test_waiting_time_is_counted_and_errors_are_attributed_to_the_loader() -> None:
    def batches() -> Any:
        yield 1
        yield 2
        raise RuntimeError("worker died")

    timer = LoaderTimer(5)
    stream = timer.waiting(batches())
    assert [next(stream), next(stream)] == [1, 2]
    assert not timer.is_waiting
    with pytest.raises(RuntimeError, match="worker died"):
        next(stream)
    assert timer.is_waiting
    assert list(timer.waiting(iter(()))) == []
    assert not timer.is_waiting  # an error after the last batch is not the loader's
    steps, seconds, waited = timer.lap(7)
    assert steps == 2
    assert 0 <= waited <= seconds


def context(output: Path, first_step: int) -> LogContext:
    return LogContext(config=TinyConfig(), run=RunDirectory(output), first_step=first_step, total_steps=STEPS)


CLOCK = {"samples_per_second": 100.0, "loader_wait_share": 0.25}
RECORD = {"step": 10, "epoch": 0.5, "lr": 0.03, "loss": 2.5, "time": CLOCK}


def test_plain_progress_is_one_line_per_record() -> None:
    stream = io.StringIO()
    progress = Progress("auto", total_steps=20, first_step=0, batch_size=1000, stream=stream)
    for _ in range(10):
        progress.step()
    progress.write(RECORD)
    progress.close()
    assert stream.getvalue() == (
        "step 10/20  epoch 0.50  lr 0.03  loss 2.5000  100 samples/s  waiting for data 25%  left 0:01:40\n"
    )


def test_bar_shows_the_same_values() -> None:
    stream = io.StringIO()
    progress = Progress("bar", total_steps=20, first_step=0, batch_size=1000, stream=stream)
    for _ in range(10):
        progress.step()
    progress.write(RECORD)
    progress.close()
    assert "10/20" in stream.getvalue()
    assert "loss 2.5000" in stream.getvalue()


def test_accuracies_stay_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    progress = Progress("bar", total_steps=400, first_step=0, batch_size=1000, stream=stream)
    progress.write({**RECORD, "knn_top1": 0.25, "val_linear_top1": 0.5})
    progress.write({**RECORD, "step": 20})
    progress.close()
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    shown = " ".join(" ".join(lines[lines.index("epoch 0.50  kNN 25.0%  val linear 50.0%") + 1 :]).split())
    assert shown.startswith("step 0/400 ")
    assert all(words in shown for words in ("loss 2.5000", "100 samples/s", "waiting for data 25%", "left 1:03:20"))


def test_progress_off_is_silent() -> None:
    stream = io.StringIO()
    progress = Progress("off", total_steps=20, first_step=0, batch_size=1000, stream=stream)
    progress.write(RECORD)
    assert stream.getvalue() == ""


def test_missing_tensorboard_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sslfast.training.tensorboard_log", raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"needs the package tensorboard .*pip install tensorboard, or pass --no-"):
        Trainer(TinyConfig(tensorboard=True), ROWS, tmp_path)


def test_tensorboard_hides_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sslfast.training.tensorboard_log import TensorBoardLog

    for last_step, values in ((0, [1.0, 2.0, 3.0]), (2, [30.0])):
        log = TensorBoardLog(context(tmp_path, last_step))
        for offset, value in enumerate(values):
            log.write({"step": last_step + 1 + offset, "loss": value, "time": {"samples_per_second": 5.0}})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert set(events.Tags()["scalars"]) == {"loss", "time/samples_per_second"}


def test_bad_images_are_merged_over_starts(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.add_bad_images([]) == 0
    assert not directory.bad_images.exists()
    assert directory.add_bad_images([("b.jpg", "cut short"), ("a\tx.jpg", "two\nlines")]) == 2
    assert directory.add_bad_images([("b.jpg", "cut short"), ("c.jpg", "empty")]) == 3
    assert directory.bad_images.read_text() == "a x.jpg\ttwo lines\nb.jpg\tcut short\nc.jpg\tempty\n"


def test_versions_need_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["git"] is None
    json.dumps(versions())


def test_configuration_survives_json() -> None:
    config = replace(TinyConfig(), epochs=3)
    assert from_dict(TinyConfig, json.loads(json.dumps(to_dict(config)))) == config
    method = to_dict(config)["method"]
    assert method.pop("image_view") == to_dict(config.method.image_view)
    assert method == {"name": "tiny", "bank_momentum": 0.5, "bad_step": -1}
