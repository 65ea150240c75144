"""W&B, MLflow and pictures: offline, continued by a resume, and no failure of theirs ends a run."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.cli.options import expand
from sslfast.methods import Method
from sslfast.report import draw_pictures
from sslfast.runs import read_log
from sslfast.training import RunInterruptedError, Trainer
from tests.tiny import Tiny, TinyConfig, write_images
from tests.training.test_logging import stop_at

LINES: list[str] = []


def trainer(data: Path | int, output: Path, *loggers: str, **changes: Any) -> Trainer:
    config = TinyConfig(loggers=loggers, **{"log_every_steps": 5, "checkpoint_every_steps": 12, **changes})
    return Trainer(config, data, output, report=LINES.append, draw=draw_pictures)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    LINES.clear()
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def interrupt_and_resume(data: Path | int, output: Path, *loggers: str, **changes: Any) -> None:
    stopped = trainer(data, output, *loggers, **changes)
    stop_at(stopped, 13)
    with pytest.raises(RunInterruptedError):
        stopped.fit()
    assert trainer(data, output, *loggers, **changes).fit().step == 36


def test_mlflow_has_the_records_of_the_log_in_one_run(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 24)
    run = tmp_path / "run"
    interrupt_and_resume(tmp_path / "data", run, "mlflow", pictures_every_epochs=3)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "sslfast"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.info.run_id == json.loads((run / "mlflow.json").read_text())["run_id"]
    assert found.data.params["loader.workers"] == "0"
    records = read_log(run / "log.jsonl")
    history = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "loss")}
    assert history == {record["step"]: record["loss"] for record in records}
    assert {item.path for item in client.list_artifacts(found.info.run_id, "pictures")} == {
        "pictures/preview.png", "pictures/neighbours.png",
    }  # fmt: skip
    assert [line for line in LINES if "cannot" in line] == []


def test_wandb_is_offline_and_continued(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 24)
    run = tmp_path / "run"
    interrupt_and_resume(tmp_path / "data", run, "wandb", pictures_every_epochs=3)
    name = (run / "wandb" / "sslfast-run-id").read_text().strip()
    starts = sorted((run / "wandb").glob(f"offline-run-*-{name}"))
    assert len(starts) in (1, 2)  # two starts in the same second share a folder
    content = b"".join(path.read_bytes() for start in starts for path in start.glob("*.wandb"))
    for word in (b"loss", b"time/samples_per_second", b"checkpoint_every_steps"):
        assert word in content
    assert len(list((run / "wandb").rglob("media/images/*.png"))) == 3
    assert [line for line in LINES if "cannot" in line] == []


@pytest.mark.parametrize("is_kept", [True, False])
def test_pictures_in_tensorboard(is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bank's rows, and for a method without any of the trunk's features."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not is_kept:
        monkeypatch.setattr(Tiny, "embeddings", Method.embeddings)

    write_images(tmp_path / "data", 24)
    trainer(tmp_path / "data", tmp_path / "run", pictures_every_epochs=2, tensorboard=True).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("preview")] == [12]
    assert [image.step for image in events.Images("neighbours")] == [12, 24, 36]
    last, png = events.Images("neighbours")[-1], (tmp_path / "run" / "pictures" / "neighbours.png").read_bytes()
    assert last.encoded_image_string == png
    assert (last.width, last.height) == struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("is_kept", [True, False])
def test_training_is_the_same_with_and_without_pictures(
    is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_kept:
        monkeypatch.setattr(Tiny, "embeddings", Method.embeddings)
    write_images(tmp_path / "data", 24)
    states = []
    for every in (0, 1):
        result = trainer(tmp_path / "data", tmp_path / str(every), pictures_every_epochs=every).fit()
        states.append(torch.load(result.checkpoint, weights_only=True)["method"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_picture_that_cannot_be_drawn_is_a_line(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 24)
    started = trainer(tmp_path / "data", tmp_path / "run", pictures_every_epochs=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures").touch()
    assert started.fit().step == 36
    (line,) = [line for line in LINES if "cannot" in line]
    assert line.startswith("cannot draw pictures (")
    with pytest.raises(ValueError, match="pictures_every_epochs=3 draws image files, and there are none"):
        trainer(24, tmp_path / "other", pictures_every_epochs=3)


class Refused:
    """A log whose server does not answer."""

    made = 0

    def __init__(self, context: Any) -> None:
        Refused.made += 1
        raise RuntimeError("the server does not answer")


def test_a_log_that_cannot_be_opened_ends_nothing_and_is_tried_once(tmp_path: Path) -> None:
    Refused.made = 0
    assert trainer(24, tmp_path / "run", "tests.training.test_dashboards:Refused", "csv").fit().step == 36
    assert Refused.made == 1
    told = [line for line in LINES if "Refused" in line]
    assert len(told) == 2
    assert "the server does not answer" in told[0]
    assert told[1].startswith("lost, because they could not be written: 8 of tests.training")
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == 9


def test_log_options_add_up() -> None:
    assert expand(["x", "--log", "wandb", "--log=csv", "--log", "csv"], ("mlflow",)) == [
        "x", "--loggers", "mlflow", "wandb", "csv",
    ]  # fmt: skip
    assert expand(["x", "--workers=2"], ("csv",)) == ["x", "--loader.workers=2"]
    with pytest.raises(ValueError, match="--log needs the name of a log: tensorboard, csv, wandb, mlflow, or module"):
        expand(["x", "--log"], ())
    with pytest.raises(ValueError, match="--log and --loggers are the same"):
        expand(["--log", "csv", "--loggers", "csv"], ())
