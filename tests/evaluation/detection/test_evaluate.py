import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sslfast.cli.main import main
from sslfast.config import from_dict, load_json
from sslfast.evaluation.detection import train as detection_train
from sslfast.evaluation.detection.data import load_splits
from sslfast.evaluation.detection.evaluate import DetectionConfig, evaluate_detection, protocol_name, render_table
from sslfast.evaluation.detection.train import PIRL
from sslfast.evaluation.encoders import load_run
from sslfast.evaluation.sgd import ResumeState
from sslfast.models.resnet import ResNetConfig
from tests.evaluation.detection.fixtures import (
    SMALL,
    train_detector,
    write_boxed_coco,
    write_boxed_voc,
    write_narrow_run,
)
from tests.tiny import same

FLAGS = """
--iterations 1 --batch-size 2 --train-sides 48 64 --test-side 64 --longest-side 96 --anchors 28 --regions 8
--workers 0 --device cpu --examples 0"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_narrow_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxed_voc(tmp_path_factory.mktemp("voc"), trainval=range(24), test=range(24, 36))


def test_learns_to_find_rectangles(run: Path, voc: Path) -> None:
    before = load_run(run).encoders["trained"].identity()["weights"]
    config = DetectionConfig(protocol="moco", iterations=40, difficult="ignore", examples=5, **SMALL)
    result = evaluate_detection(run, (voc,), config)
    assert from_dict(DetectionConfig, result["config"]) == config
    (row,) = result["results"]
    assert row["ap50"] > 0.4
    assert row["voc07_ap50"] > 0.4
    assert row["ap75"] <= row["ap50"]
    assert set(row["ap50_of_classes"]) == {"bird", "car"}
    assert result["protocol"] == row["protocol"] == "detect-moco-voc07-40it"
    assert result["schedule"]["drops"] == [30, 37]
    assert result["schedule"]["published_iterations"] == 9_000
    assert result["schedule"]["lr"] == pytest.approx(0.2)
    assert (result["batch_norm"], result["extra_norm"]) == ("trained over all processes", True)
    assert result["difficult"]["training"] == "ignore"
    assert "iterations: 40, published 9000" in result["departures"]
    assert result["data"]["train"] | {"digest": ""} == {"images": 24, "left_out": 0, "digest": ""}
    assert result["data"]["val"]["digest"] == load_splits([voc])[1].digest()
    assert {"torch", "torchvision", "pycocotools"} <= result["versions"].keys()
    assert json.loads((run / "evaluation" / "detect.json").read_text()) == result
    with Image.open(run / "evaluation" / "detect-examples.png") as sheet:
        assert sheet.size == (4 * (320 + 8) + 8, 2 * (256 + 8) + 8)
    assert not list((run / "evaluation").glob("*.partial.pt"))
    table = render_table(result)
    assert "detect-moco-voc07-40it: 2 classes, 24 training and 12 validation images" in table
    assert f"{100 * row['ap50']:.1f}" in table
    assert load_run(run).encoders["trained"].identity()["weights"] == before


def test_seeds_encoders_and_formats(run: Path, voc: Path, tmp_path: Path) -> None:
    """One iteration of a tiny rate finds nothing; COCO's format gives what VOC's gives."""
    coco = write_boxed_coco(tmp_path / "coco", train=range(24), val=range(24, 36))
    options: dict[str, Any] = {**SMALL, "lr": 1e-6, "iterations": 1, "batch_size": 2, "examples": 0}
    encoders = ("trained", "untrained")
    both = DetectionConfig(encoders=encoders, seeds=(0, 1), **options)
    lines: list[str] = []
    one = evaluate_detection(run, (voc,), both, output=tmp_path / "voc.json", report=lines.append)
    assert len(lines) == 4
    assert re.fullmatch(r"detect-pirl-voc07-1it, untrained, seed 1: iteration 1 of 1, loss \d+\.\d{3}", lines[-1])
    two = evaluate_detection(run, (coco,), DetectionConfig(**options), output=tmp_path / "coco.json")
    assert (one["protocol"], two["protocol"]) == ("detect-pirl-voc07-1it", "detect-pirl-coco-1it")
    assert [row["encoder"] for row in one["results"]] == ["trained", "untrained"]
    for row in one["results"]:
        assert row["ap50"] < 0.3
        assert row["ap"] == pytest.approx(sum(row["ap_of_seeds"]) / 2)
        assert row["ap_spread"] == pytest.approx(abs(row["ap_of_seeds"][0] - row["ap_of_seeds"][1]) / 2**0.5)
    for key in ("ap", "ap50", "ap75", "voc07_ap", "voc07_ap50", "voc07_ap75"):
        assert two["results"][0][key] == one["results"][0][f"{key}_of_seeds"][0]
    assert " ± " not in render_table(two)
    assert " ± " in render_table(one)
    assert one["data"]["train"]["digest"] == two["data"]["train"]["digest"]
    assert (one["batch_norm"], one["freeze_at"], one["extra_norm"]) == ("frozen", 2, False)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("moco", [False, True])
def test_stopped_evaluation_resumes(
    run: Path, voc: Path, tmp_path: Path, moco: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_detector(run, voc, moco=moco).state_dict()
    judge, looks = detection_train._finite, []

    def stop(value: float, losses: dict[str, torch.Tensor], done: int) -> str | None:
        looks.append(done)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return judge(value, losses, done)

    monkeypatch.setattr(detection_train, "_finite", stop)
    resume = ResumeState(tmp_path / "state.partial.pt", {"what": moco})
    with pytest.raises(KeyboardInterrupt):
        train_detector(run, voc, moco=moco, resume=resume)
    parts = train_detector(run, voc, moco=moco, resume=resume).state_dict()
    assert looks == [2, 4, 4]
    assert same(parts, whole)


def test_a_loss_that_is_not_finite(run: Path, voc: Path) -> None:
    config = DetectionConfig(protocol="moco", iterations=4, examples=0, save_every=1, **{**SMALL, "lr": 1e6})
    with pytest.raises(ValueError, match=r"the loss is not finite after iteration \d+ \(loss_.*\): lower --lr"):
        evaluate_detection(run, (voc,), config)


def test_protocol_names(tmp_path: Path) -> None:
    published = PIRL.schedule(sets=2, iterations=None, batch_size=16, lr=None)
    short = PIRL.schedule(sets=2, iterations=100, batch_size=16, lr=None)
    both = [tmp_path / "VOC2007", tmp_path / "VOC2012"]
    assert protocol_name("pirl", both, published) == "detect-pirl-voc07+12"
    assert protocol_name("pirl", both, short) == "detect-pirl-voc07+12-100it"
    assert protocol_name("moco", [tmp_path / "Street"], published) == "detect-moco-street"


def test_command(run: Path, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    assert main(["evaluate", "detect", str(run), str(voc), *FLAGS.split(), "-o", str(output)]) == 0
    assert "detect-pirl-voc07-1it: 2 classes, 24 training and 12 validation images" in capsys.readouterr().out
    assert load_json(output)["train_sides"] == [48, 64]
    for arguments, words in (
        ([str(tmp_path / "none")], "is no VOC folder: it needs Annotations, ImageSets/Main, JPEGImages"),
        ([str(voc), "--iterations", "0"], "iterations must be at least 1, got 0"),
        ([str(voc), "--lr", "0"], "lr must be above 0"),
        ([str(voc), "--regions", "0"], "regions must be at least 1, got 0"),
        ([str(voc), "--encoders", "raw pixels"], "encoders must be trained and untrained"),
    ):
        assert main(["evaluate", "detect", str(run), *arguments, "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err
    small = write_narrow_run(tmp_path / "small", model=ResNetConfig(name="resnet18", stem="small", width=0.125))
    assert main(["evaluate", "detect", str(small), str(voc), "--device", "cpu"]) == 2
    assert "detect needs stride 16 at res4" in capsys.readouterr().err


def test_without_pycocotools(
    run: Path, voc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    assert main(["evaluate", "detect", str(run), str(voc), "--device", "cpu"]) == 2
    assert "detection scores need pycocotools: pip install pycocotools" in capsys.readouterr().err
