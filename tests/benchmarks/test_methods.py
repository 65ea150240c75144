"""The benchmark of methods: one budget, finished runs kept, baselines once, order as found."""

import json
from pathlib import Path

import pytest

from benchmarks.studies.methods import METHODS, SUPERVISED, VARIANTS, main, render
from tests.tiny import write_images


def row(encoder: str, top1: float, **more: object) -> dict[str, object]:
    return {"encoder": encoder, "top1": top1, "top1_standard_error": 0.01, **more}


def result(encoder: str, knn: float, linear: float, **more: object) -> dict[str, object]:
    data = {"classes": 2, "train": {"images": 8}, "val": {"images": 4}}
    return {
        "knn": {"results": [row(encoder, knn, k=1)], "data": data},
        "linear": {"results": [row(encoder, linear)]},
        "stages": [row(f"{encoder} res3", linear / 2)],
    } | more


def test_every_method_of_the_package_is_there() -> None:
    assert {"pirl", "npid", "moco-v1", "simclr", "cpc", "sela", "deepcluster", "inpainting"} < set(METHODS)
    assert set(VARIANTS) == {"pirl-rotation", "cpc-4x4", "deepcluster-50", "super-resolution-perceptual"}


def test_table_is_sorted_by_the_linear_probe_with_spread_over_seeds() -> None:
    cost = {"optimizer": "sgd 0.06", "loss": 1.25, "samples_per_second": 100.0, "minutes": 2.0}
    found = render(
        {"worse": {0: result("trained", 0.1, 0.2, **cost)},
         "better": {0: result("trained", 0.3, 0.5, **cost), 1: result("trained", 0.4, 0.7, **cost)}},
        {0: [result("untrained", 0.2, 0.3)]},
    ).splitlines()  # fmt: skip
    assert found[0] == "| encoder | seeds | kNN k=1 | linear | linear, res3 | optimizer | loss | samples/s | minutes |"
    assert found[2] == "| better | 2 | 35.0 ± 5.0 | 60.0 ± 10.0 | 30.0 ± 5.0 | sgd 0.06 | 1.25 | 100.0 | 2.0 |"
    assert found[3] == "| untrained | 1 | 20.0 | 30.0 | 15.0 | – | – | – | – |"
    assert found[4] == "| worse | 1 | 10.0 | 20.0 | 10.0 | sgd 0.06 | 1.25 | 100.0 | 2.0 |"
    assert found[-1].endswith(
        "2 classes, 8 training and 4 validation images; "
        "standard error of one number from the validation images alone about 1.0."
    )


def test_runs_are_trained_evaluated_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "data" / split, 24)
    arguments = [
        str(tmp_path / "data"),
        "-o",
        str(tmp_path / "out"),
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--workers",
        "0",
    ]
    arguments += ["--width", "0.125", "--stem", "imagenet", "--per-class", "12", "--pretrain-per-class", "8"]
    main([*arguments, "--methods", "rotation", SUPERVISED, "--lr-scale", "0.5"])
    assert "| untrained | 1 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "methods.json").read_text())
    assert set(found["results"]) == {"rotation", SUPERVISED}
    assert found["results"]["rotation"]["0"]["optimizer"] == "sgd 0.0016"  # half of 0.1 at 256, for 8
    assert {r["encoder"] for r in found["results"]["rotation"]["0"]["knn"]["results"]} == {"trained"}
    assert {r["encoder"] for r in found["baselines"]["0"][0]["linear"]["results"]} == {"untrained", "raw pixels"}
    assert [r["encoder"] for r in found["results"]["rotation"]["0"]["stages"]] == ["trained res3", "trained res4"]
    assert [r["encoder"] for r in found["baselines"]["0"][0]["stages"]] == ["untrained res3", "untrained res4"]
    assert len(list((tmp_path / "out" / "pretraining" / "train").rglob("*.png"))) == 16

    main([*arguments, "--methods", "colorization"])
    assert "| untrained, lightness | 1 |" in capsys.readouterr().out
    before = (tmp_path / "out" / "rotation-seed0" / "result.json").stat().st_mtime_ns
    main([*arguments, "--methods", "rotation", "--adamw", "0.001"])
    assert (tmp_path / "out" / "rotation-seed0" / "result.json").stat().st_mtime_ns == before
    assert f"| {SUPERVISED} | 1 |" in capsys.readouterr().out  # what other commands have done stays in the table
