"""kNN accuracy of the bank during training: its value, its place in the log, resume, and what is refused."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sslfast.methods.pirl
from sslfast.config import to_dict
from sslfast.data.manifest import Manifest
from sslfast.distributed.process_group import destroy_process_group
from sslfast.evaluation.knn import NearestImages, bank_knn
from sslfast.methods.base import Method
from sslfast.recipes import RECIPES
from sslfast.runs.checkpoint import checkpoint_path, load_checkpoint
from sslfast.training.progress import Progress
from sslfast.training.signals import RunInterruptedError
from sslfast.training.trainer import Trainer
from tests.distributed.test_training import NormFree, config, enter, final, run, train
from tests.methods.harness import build, tiny
from tests.tiny import TinyConfig, log_values, same, write_images

ROWS = 24
STEPS = 36  # six steps an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, ROWS)
    return folder


def trainer(data: Path | int, output: Path, config: TinyConfig | None = None) -> Trainer:
    chosen = config or TinyConfig(knn_every_epochs=2, log_every_steps=5, checkpoint_every_steps=12)
    return Trainer(chosen, data, output, report=lambda _line: None)


def test_the_accuracy_of_the_bank_is_in_the_record_of_the_epoch(data: Path, tmp_path: Path) -> None:
    result = trainer(data, tmp_path).fit()
    records = {record["step"]: record for record in log_values(tmp_path)}
    assert [step for step in records if "knn_top1" in records[step]] == [12, 24, 36]
    assert list(records) == [5, 10, 12, 15, 20, 24, 25, 30, 35, 36]
    labels = torch.from_numpy(Manifest.scan(data).labels)
    for step in (24, 36):
        bank = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", step))["method"]["bank"]
        assert records[step]["knn_top1"] == bank_knn(bank, labels, (20,))[20].top1
    assert result.metrics["knn_top1"] == records[36]["knn_top1"]


def test_training_is_unchanged_and_a_resumed_run_logs_the_same(data: Path, tmp_path: Path) -> None:
    trainer(data, tmp_path / "whole").fit()
    trainer(data, tmp_path / "without", TinyConfig(log_every_steps=5, checkpoint_every_steps=12)).fit()
    stopped = trainer(data, tmp_path / "stopped")
    after_step = stopped.method.after_step

    def interrupted() -> None:
        after_step()
        if stopped.step == 11:  # in the step at whose end it is due
            os.kill(os.getpid(), signal.SIGTERM)

    stopped.method.after_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(RunInterruptedError, match="after step 12/36"):
        stopped.fit()
    trainer(data, tmp_path / "stopped").fit()
    last = [load_checkpoint(checkpoint_path(tmp_path / n / "checkpoints", STEPS)) for n in ("whole", "stopped")]
    assert same(last[0], last[1])
    assert log_values(tmp_path / "stopped") == log_values(tmp_path / "whole")
    without = load_checkpoint(checkpoint_path(tmp_path / "without" / "checkpoints", STEPS))
    assert same(without["method"], last[0]["method"])


def test_two_processes_with_half_of_the_bank_each(data: Path, tmp_path: Path) -> None:
    method = replace(config().method, bank_layout="sharded")  # type: ignore[arg-type]
    run(train, 2, data, tmp_path, {"method": method, "epochs": 1, "knn_every_epochs": 1}, 0.0)
    bank, labels = final(tmp_path)["method"]["bank.vectors"], torch.from_numpy(Manifest.scan(data).labels)
    assert bank.shape[0] == ROWS
    assert log_values(tmp_path)[-1]["knn_top1"] == bank_knn(bank, labels, (20,))[20].top1


def draw_nothing(rank: int, ranks: int, port: int, data: Path, output: Path, shares: bool) -> None:
    """A rank of a run whose pictures are the tensors that they would be drawn from."""
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()
    layout = "sharded" if shares else "replicated"
    method = replace(config().method, bank_layout=layout)  # type: ignore[arg-type]
    found: list[NearestImages] = []

    def draw(_config: Any, _manifest: Manifest, nearest: NearestImages, _folder: Path) -> dict[str, Path]:
        found.append(nearest)
        return {}

    chosen = config(method=method, batch_size=6, epochs=1, pictures_every_epochs=1)
    run_of = Trainer(chosen, data, output, report=lambda _line: None, draw=draw)
    held = [len(x) for x in run_of.method.state_dict().values() if x.ndim == 2 and x.shape[1] == 8]
    run_of.fit()
    destroy_process_group()
    assert (ROWS in held) != shares
    assert len(found) == (rank == 0)
    if found:
        torch.save([found[0].queries, found[0].neighbours, found[0].similarity], output / "found.pt")


@pytest.mark.parametrize("shares", [True, False])
def test_neighbours_of_pictures_are_found_in_every_share_of_the_bank(data: Path, tmp_path: Path, shares: bool) -> None:
    run(draw_nothing, 3, data, tmp_path, shares)
    queries, neighbours, similarity = torch.load(tmp_path / "found.pt")
    bank = torch.nn.functional.normalize(final(tmp_path)["method"]["bank.vectors"], dim=1)
    assert queries.tolist() == list(range(0, ROWS, 3))
    all_of_them = (bank[queries] @ bank.T).scatter(1, queries[:, None], -2.0)
    values, rows = all_of_them.topk(6, dim=1)
    assert torch.equal(neighbours, rows)
    torch.testing.assert_close(similarity, values)


@pytest.mark.parametrize("recipe", ["pirl-small", "npid-small", "deepcluster-small", "sela-small"])
def test_embeddings_are_rows_of_all_images(recipe: str) -> None:
    changes = {"clusters": 4} if recipe.startswith(("deepcluster", "sela")) else {}
    embeddings = build(tiny(RECIPES[recipe](), **changes), rows=ROWS).embeddings()
    assert embeddings is not None
    assert embeddings.ndim == 2
    assert len(embeddings) == ROWS


def test_images_without_enough_labels_are_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    config = TinyConfig(knn_every_epochs=1)
    with pytest.raises(ValueError, match=r"knn_every_epochs=1 needs more than 20 labelled images .* 0 of 0; put each"):
        trainer(30, tmp_path / "run", config)
    write_images(tmp_path / "few", 20)
    with pytest.raises(ValueError, match=r"there are 20 of 2; .* or set knn_every_epochs to 0"):
        trainer(tmp_path / "few", tmp_path / "run", config)
    one = tmp_path / "one"
    (one / "class").mkdir(parents=True)
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        (one / "class" / f"{number}.png").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="there are 24 of 1"):
        trainer(one, tmp_path / "run", config)
    with pytest.raises(ValueError, match="knn_every_epochs must be at least 0, got -1"):
        TinyConfig(knn_every_epochs=-1)
    assert "knn_every_epochs" in to_dict(config)
    assert not (tmp_path / "run").exists()


def test_a_method_without_a_bank_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tiny.Tiny.embeddings", Method.embeddings)
    with pytest.raises(ValueError, match="needs a method with a bank or buffer of embeddings, and Tiny has none; set"):
        trainer(data, tmp_path, TinyConfig(knn_every_epochs=1))


def test_the_accuracy_is_shown_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"step": 5, "epoch": 1.0, "lr": 0.1, "loss": 2.0, "knn_top1": 0.4321}
    record |= {"val_linear_top1": 0.5}
    clock = {"samples_per_second": 10.0, "loader_wait_share": 0.0}
    Progress("plain", total_steps=10, first_step=0, batch_size=10).write({**record, "time": clock})
    assert "kNN 43.2%  val linear 50.0%  loss 2.0000" in capsys.readouterr().err
