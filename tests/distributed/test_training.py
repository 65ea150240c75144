"""Several processes of one run, on this machine's CPU over gloo: the same samples, losses, weights and bank as one."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sslfast.methods.pirl
from sslfast.data.waiting import LostBatchError
from sslfast.distributed.collectives import (
    broadcast_object,
    gather_objects,
    gather_rows,
    max_over_ranks,
    mean_over_ranks,
)
from sslfast.distributed.data_parallel import check_replicas
from sslfast.distributed.process_group import (
    LostRankError,
    destroy_process_group,
    init_process_group,
    lost_ranks_named,
    process_group,
)
from sslfast.loaders.registry import LoaderConfig
from sslfast.methods.pirl import PIRL
from sslfast.optim.optimizers import OptimConfig
from sslfast.runs.checkpoint import list_checkpoints, load_checkpoint
from sslfast.runs.directory import RunDirectory
from sslfast.runs.log import read_log
from sslfast.training.config import TrainConfig
from sslfast.training.feature_pass import FeaturePass
from sslfast.training.signals import RunInterruptedError
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, JigsawConfig, ViewConfig
from tests.tiny import fork_server, same, write_images

IMAGE = ViewConfig(crop=CropConfig(size=16))
JIGSAW = ViewConfig(crop=CropConfig(size=16), jigsaw=JigsawConfig(grid=2, patch_size=6))


PLAIN = {"loss": "infonce", "negatives": "sampled"}


class NormFree(nn.Module):
    """A trunk without BatchNorm, whose output for an image does not depend on the rest of the batch."""

    out_features = 12

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 12, 3)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.convolution(images)).mean(dim=(2, 3))


def config(loss: str = "infonce", negatives: str = "sampled", **changes: Any) -> TrainConfig:
    method = PIRL.Config(
        dimensions=8, num_negatives=20, loss=loss, negatives=negatives, z="running", temperature=0.2,
        image_view=IMAGE, jigsaw_view=JIGSAW, rotation_view=replace(IMAGE, rotation=True),
    )  # type: ignore[arg-type]  # fmt: skip
    whole = TrainConfig(
        method=method, optim=OptimConfig(lr_per_256_images=3.0), loader=LoaderConfig(workers=0), epochs=3, batch_size=4,
        log_every_steps=3, checkpoint_every_steps=4, keep_checkpoints=9, device="cpu", precision="fp32",
        tensorboard=False, progress="off",
    )  # fmt: skip
    return replace(whole, **changes)


def enter(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def train(rank: int, ranks: int, port: int, data: Path, output: Path, arguments: dict[str, Any], linger: float) -> None:
    """One rank of a run. ``linger``: seconds that each step takes longer."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    trainer = Trainer(config(**arguments), data, output, report=lambda _line: None)
    after_step = trainer.method.after_step
    trainer.method.after_step = lambda: (after_step(), time.sleep(linger))  # type: ignore[assignment]
    try:
        trainer.fit()
    except RunInterruptedError:
        os._exit(3)
    destroy_process_group()


def run(target: Any, ranks: int, *arguments: Any, expect: int | list[int] = 0, meanwhile: Any = None) -> None:
    """``target(rank, ranks, port, *arguments)`` in a process for each rank. ``expect``: their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = fork_server()
    children = [context.Process(target=target, args=(rank, ranks, port, *arguments)) for rank in range(ranks)]
    for child in children:
        child.start()
    if meanwhile is not None:
        meanwhile(children)
    for child in children:
        child.join(120)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == (expect if isinstance(expect, list) else [expect] * ranks)


def final(output: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(RunDirectory(output).checkpoints)[-1])


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_log(RunDirectory(output).log)]


def assert_near(a: Tensor, b: Tensor, name: str) -> None:
    """Sums over ranks round in another order. InfoNCE leaves Z unset, not a number."""
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``trained(ranks, **arguments)``: the directory of an uninterrupted run, which tests share and must not change."""
    outputs: dict[str, Path] = {}

    def get(ranks: int, **arguments: Any) -> Path:
        key = repr((ranks, arguments))
        if key not in outputs:
            outputs[key] = tmp_path_factory.mktemp("uninterrupted")
            run(train, ranks, data, outputs[key], arguments, 0.0)
        return outputs[key]

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 19)
    return folder


class Collects(nn.Module):
    """A method that wants features."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def needs_feature_pass(self, epoch: int) -> bool:
        return True


class Nothing:
    """A loader of no batch."""

    steps_per_epoch = 0

    def epoch(self, epoch: int) -> Any:
        return iter(())


def exchange(rank: int, ranks: int, port: int) -> None:
    enter(rank, ranks, port)
    group = process_group()
    init_process_group(group, torch.device("cpu"))
    own = torch.arange(4.0).reshape(2, 2) + 10 * rank
    everyone = torch.cat([torch.arange(4.0).reshape(2, 2) + 10 * r for r in range(ranks)])
    assert torch.equal(gather_rows(own.T).T, torch.cat(everyone.split(2), dim=1))
    assert torch.equal(gather_rows(torch.tensor([rank])), torch.arange(ranks))
    assert mean_over_ranks(torch.tensor(float(rank))) == (ranks - 1) / 2
    assert torch.equal(max_over_ranks(torch.tensor([rank, -rank])), torch.tensor([ranks - 1, 0]))
    assert broadcast_object({"rank": rank}) == {"rank": 0}
    norms = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    for buffer in norms.buffers():
        buffer.fill_(10 + rank)
    cpu = torch.device("cpu")
    FeaturePass(Collects(norms), Nothing(), None, device=cpu, dtype=torch.float32).run(0)  # type: ignore[arg-type]
    assert all((buffer == 10).all() for buffer in norms.buffers())
    assert gather_objects([rank] * rank) == [[r] * r for r in range(ranks)]
    equal = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    check_replicas([equal, torch.arange(3)])
    equal[1] += rank
    with pytest.raises(RuntimeError, match="weights or bank differ between ranks"):
        check_replicas([torch.arange(3), equal])
    destroy_process_group()


def test_collectives() -> None:
    run(exchange, 3)


def test_collectives_in_one_process() -> None:
    x = torch.arange(3.0)
    assert gather_rows(x) is x
    assert mean_over_ranks(x) is x
    assert broadcast_object("a") == "a"
    assert gather_objects(1) == [1]
    check_replicas([x])
    destroy_process_group()


@pytest.mark.parametrize(("loss", "negatives"), [("infonce", "sampled"), ("nce", "full"), ("nce", "shared")])
def test_two_processes_train_as_one(trained: Callable[..., Path], loss: str, negatives: str) -> None:
    outputs = [trained(ranks, loss=loss, negatives=negatives) for ranks in (1, 2)]
    one, two = map(final, outputs)
    assert one["step"] == two["step"] == 12
    assert losses(outputs[0]) == pytest.approx(losses(outputs[1]), rel=1e-5)
    for name, value in one["method"].items():
        assert_near(two["method"][name], value, name)


def test_two_processes_with_micro_batches_train_as_one_without(trained: Callable[..., Path]) -> None:
    """Gradients are averaged once per step, in the backward of the last micro-batch."""
    outputs = [trained(1, **PLAIN), trained(2, accumulate_steps=2)]
    assert losses(outputs[0]) == pytest.approx(losses(outputs[1]), rel=1e-5)
    one, two = map(final, outputs)
    for name, value in one["method"].items():
        assert_near(two["method"][name], value, name)


def test_resume_in_another_number_of_processes(data: Path, tmp_path: Path, trained: Callable[..., Path]) -> None:
    whole = trained(2, **PLAIN)
    shutil.copytree(whole, tmp_path / "part")
    checkpoints = list_checkpoints(RunDirectory(tmp_path / "part").checkpoints)
    assert [path.stem for path in checkpoints] == ["step_00000004", "step_00000008", "step_00000012"]
    for path in checkpoints[1:]:
        path.unlink()
    run(train, 1, data, tmp_path / "part", {}, 0.0)
    assert losses(tmp_path / "part") == pytest.approx(losses(whole), rel=1e-5)
    for name, value in final(whole)["method"].items():
        assert_near(final(tmp_path / "part")["method"][name], value, name)


@pytest.mark.parametrize(("ranks", "accumulate_steps"), [(3, 1), (4, 3)])
def test_a_run_of_several_processes_resumes_bit_equal(
    data: Path, tmp_path: Path, trained: Callable[..., Path], ranks: int, accumulate_steps: int
) -> None:
    """More than two summands: their order matters, and with it the places of gradients in DDP's buckets."""
    arguments = {"batch_size": 12, "accumulate_steps": accumulate_steps, "epochs": 4, "checkpoint_every_steps": 2}
    whole = trained(ranks, **arguments)
    shutil.copytree(whole, tmp_path / "part")
    first, *later = list_checkpoints(RunDirectory(tmp_path / "part").checkpoints)
    assert first.stem == "step_00000002"
    for path in later:
        path.unlink()
    run(train, ranks, data, tmp_path / "part", arguments, 0.0)
    for key in ("method", "optimizer", "step"):
        assert same(final(tmp_path / "part")[key], final(whole)[key])


def fail(rank: int, ranks: int, port: int, data: Path, output: Path, who: int, when: str) -> None:
    """One rank of a run in which rank ``who`` fails; it then destroys the group, as the command does."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    try:
        trainer = Trainer(config(), data / "nowhere" if when == "data" else data, output, report=lambda _line: None)
        if rank == who and when == "step":
            trainer.method.after_step = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        if rank == who and when == "lock":
            trainer.run.locked = lambda **_options: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        trainer.fit()
    except Exception:
        destroy_process_group()
        os._exit(4)


@pytest.mark.parametrize(("who", "when"), [(0, "data"), (0, "lock"), (0, "step"), (1, "step")])
def test_no_rank_waits_for_one_that_has_failed(data: Path, tmp_path: Path, who: int, when: str) -> None:
    run(fail, 2, data, tmp_path, who, when, expect=4)


def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_bit_equal(
    data: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    arguments = {"loss": "nce", "negatives": "shared"}
    whole = trained(2, **arguments)

    def interrupt_second(children: list[Any]) -> None:
        log = RunDirectory(tmp_path / "stopped").log
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(children[1].pid, signal.SIGTERM)

    run(train, 2, data, tmp_path / "stopped", arguments, 0.1, expect=3, meanwhile=interrupt_second)
    stopped = final(tmp_path / "stopped")["step"]
    assert 3 <= stopped < 12
    run(train, 2, data, tmp_path / "stopped", arguments, 0.0)
    for key in ("method", "optimizer", "step"):
        assert same(final(tmp_path / "stopped")[key], final(whole)[key])
    assert losses(tmp_path / "stopped") == pytest.approx(losses(whole), rel=1e-12)


def stall(rank: int, ranks: int, port: int, data: Path, output: Path, arguments: dict[str, Any], who: int) -> None:
    """One rank of a run in which rank ``who`` waits in vain for the batch of step 5."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    trainer = Trainer(config(**arguments), data, output, report=lambda _line: None)
    epoch, patience = trainer.loader.epoch, trainer.loader.patience
    patience.limit = 0.5

    def stalling(number: int, start_step: int = 0) -> Any:
        for step, batch in enumerate(epoch(number, start_step), start_step):
            if number * trainer.steps_per_epoch + step == 5 and rank == who:
                patience.wait(lambda seconds: bool(time.sleep(seconds)), lambda: "a batch")
            yield batch

    trainer.loader.epoch = stalling  # type: ignore[method-assign]
    try:
        trainer.fit()
    except LostBatchError as error:
        says = f"rank {who}: waited " if rank != who else "waited "
        os._exit(3 if str(error).startswith(says) and "saved" in str(error) else 5)


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_without_a_batch_stops_all_saved_and_the_run_resumes_bit_equal(
    data: Path, tmp_path: Path, trained: Callable[..., Path], who: int
) -> None:
    arguments = {"loss": "nce", "negatives": "shared"}
    run(stall, 2, data, tmp_path, arguments, who, expect=3)
    assert final(tmp_path)["step"] == 5
    run(train, 2, data, tmp_path, arguments, 0.0)
    for key in ("method", "optimizer", "step"):
        assert same(final(tmp_path)[key], final(trained(2, **arguments))[key])


def survive(rank: int, ranks: int, port: int, data: Path, output: Path, says: str) -> None:
    """Rank 1 ends in a step, or stands still as on a machine without its network; the other one says so."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    changes = {"rank_timeout": 4.0, "loader": LoaderConfig(workers=0, timeout=2.0)} if says == "did not answer" else {}
    trainer = Trainer(config(**changes), data, output, report=lambda _line: None)
    if rank == 1:
        lost = (lambda: time.sleep(120)) if changes else (lambda: os._exit(3))
        trainer.method.after_step = lost  # type: ignore[assignment, method-assign]
    try:
        with lost_ranks_named():
            trainer.fit()
    except LostRankError as error:
        os._exit(3 if f"rank 0 of 2: another process of the run {says}" in str(error) else 5)


def test_a_lost_rank_is_named_in_one_line(data: Path, tmp_path: Path) -> None:
    run(survive, 2, data, tmp_path, "has ended", expect=3)


def test_a_rank_that_ends_before_the_group_is_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LostRankError, match="rank 1 of 2: another process of the run has ended"), lost_ranks_named():
        raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(torch.distributed.DistNetworkError), lost_ranks_named():
        raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes")


def test_a_rank_that_does_not_answer_is_waited_for_as_long_as_told(data: Path, tmp_path: Path) -> None:
    start = time.monotonic()

    def end_the_other(children: list[Any]) -> None:
        children[0].join(60)
        children[1].kill()

    run(survive, 2, data, tmp_path, "did not answer", expect=[3, -signal.SIGKILL], meanwhile=end_the_other)
    assert 4 < time.monotonic() - start < 60


def check(rank: int, ranks: int, port: int, data: Path, output: Path, words: str) -> None:
    """The checks of a start, on every rank; ``words`` are of the error that all ranks raise."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    trainer = Trainer(config(), data, output, report=lambda _line: None)
    if words and rank == 0:
        trainer.run.free_bytes = lambda: 0  # type: ignore[method-assign]
    try:
        trainer.check()
    except ValueError as error:
        os._exit(3 if words and words in str(error) else 5)
    destroy_process_group()


def test_the_checks_of_a_start_leave_nothing_and_fail_on_all_ranks(data: Path, tmp_path: Path) -> None:
    run(check, 2, data, tmp_path / "run", "")
    run(check, 2, data, tmp_path / "run", "0.00 GB free", expect=3)
    assert not (tmp_path / "run").exists()
