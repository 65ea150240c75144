import json
from pathlib import Path

import pytest
from PIL import Image

from sslfast.cli import demo
from sslfast.recipes import RECIPES


def test_demo_ends_with_a_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--epochs", "1", "--train-per-photo", "5", "--val-per-photo", "1"]
    arguments += ["--device", "cpu"]
    assert demo.demo(arguments) == 0
    screen = capsys.readouterr().out
    for expected in ("raw pixels", "untrained", "PIRL", "linear probe", "kNN, k = 20", "chance 5.6 %"):
        assert expected in screen
    for name in ("preview.png", "neighbours.png"):
        assert str(tmp_path / name) in screen
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 500
    assert str(tmp_path / "report.html") in screen
    assert "Embedding map" in (tmp_path / "report.html").read_text()
    run = tmp_path / "seed0"
    checkpoint = max((run / "checkpoints").glob("step_*.pt"))
    before = checkpoint.stat().st_mtime_ns
    result = json.loads((run / "evaluation" / "demo.json").read_text())
    assert len(result["knn"]) == 9
    # Run again: nothing is trained or written twice, the numbers are the same.
    assert demo.demo(arguments) == 0
    assert checkpoint.stat().st_mtime_ns == before
    again = json.loads((run / "evaluation" / "demo.json").read_text())
    assert (again["knn"], again["linear"]) == (result["knn"], result["linear"])


def test_recipe_is_pirl_with_jigsaw() -> None:
    config = RECIPES["demo"]()
    assert (config.recipe, config.method.name, config.method.pretext) == ("demo", "pirl", "jigsaw")
    assert config.method.pretext_weight == 0.5
    assert config.model.name == "resnet18"


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.demo(["--help"]) == 0
    screen = capsys.readouterr().out
    assert "18 photographs" in screen
    assert "--train-per-photo" in screen
    with pytest.raises(ValueError, match="unknown option or argument --sede 1; did you mean --seed"):
        demo.demo(["--sede", "1"])
    with pytest.raises(ValueError, match="--train-per-photo must be at least 1"):
        demo.demo(["--train-per-photo", "0"])
