"""``sslfast bench step``: parts, derived numbers and files. No time is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslfast.bench.step import StepReport, covered, measure_step, render
from sslfast.cli.bench import step
from sslfast.cli.main import main as sslfast
from sslfast.loaders.registry import LoaderConfig
from sslfast.methods.pirl import PIRL
from sslfast.models.resnet import ResNetConfig
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, JigsawConfig, ViewConfig
from tests.tiny import write_images


def small_run() -> TrainConfig:
    return TrainConfig(
        recipe="small",
        method=PIRL.Config(
            num_negatives=8,
            loss="infonce",
            image_view=ViewConfig(crop=CropConfig(size=16)),
            jigsaw_view=ViewConfig(crop=CropConfig(size=24), jigsaw=JigsawConfig(grid=3, patch_size=8)),
        ),
        model=ResNetConfig(name="resnet18", stem="small"),
        loader=LoaderConfig(workers=0),
        batch_size=4,
        device="cpu",
        precision="fp32",
    )


def test_every_part_of_a_step_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path, 8)
    report = measure_step(small_run(), tmp_path, steps=1, rounds=1)
    assert set(report.parts) == {
        "loader, not hidden by anything",
        "views",
        "trunk, forward and backward",
        "sslfast ops in the loss",
        "sslfast ops after the step",
        "optimizer",
        "heads and the rest",
    }
    assert all(seconds >= 0 for seconds in report.parts.values())
    for part in ("views", "trunk, forward and backward", "sslfast ops in the loss", "sslfast ops after the step"):
        assert report.parts[part] > 0, part
    assert report.step > 0
    assert report.synthetic_step is not None
    assert report.busy_share is None
    assert report.peak_bytes is None
    assert "samples/s" in render(report)
    json.dumps(report.as_dict())


def test_flops_are_those_of_the_layers() -> None:
    """One image view on a trunk whose convolutions can be counted by hand: 2 * products, backward twice forward."""
    config = small_run()
    config = replace(config, method=replace(config.method, pretext_weight=0.0), loader=LoaderConfig(name="synthetic"))
    report = measure_step(config, 16, steps=1, rounds=1)
    batch, size = 4, 16
    # (in, out, kernel, side of the output) of ResNet-18's convolutions with the small stem.
    layers = [(3, 64, 3, size)] + [(64, 64, 3, size)] * 4
    for width, side in ((128, size // 2), (256, size // 4), (512, size // 8)):
        layers += [(width // 2, width, 3, side), *[(width, width, 3, side)] * 3, (width // 2, width, 1, side)]
    forward = [2 * batch * i * o * k * k * side * side for i, o, k, side in layers]
    head = 2 * batch * 512 * config.method.dimensions
    # The images need no gradient, so the first layer has one product less.
    assert report.step_flops == 3 * sum(forward) - forward[0] + 3 * head
    classifier = 2 * batch * 512 * 1000
    assert report.supervised_flops == 3 * sum(forward) - forward[0] + 3 * classifier
    assert report.synthetic_step is None


def test_speed_for_the_work() -> None:
    report = StepReport(
        recipe="r", device="cpu", batch_size=10, precision="torch.float32", loader="L", steps=1, step=2.0,
        synthetic_step=1.8, parts={}, step_flops=346, supervised_step=1.0, supervised_flops=200, matmul_flops=1000.0,
        busy_share=None, peak_bytes=None,
    )  # fmt: skip
    facts = report.as_dict()
    assert facts["samples_per_second"] == 5
    assert facts["flops_ratio"] == pytest.approx(1.73)
    assert facts["against_supervised"] == pytest.approx(0.5 * 1.73)
    assert facts["share_of_matmul_rate"] == pytest.approx(0.173)
    assert facts["loader_share_of_synthetic"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0.0), ([(0.0, 2.0)], 2.0), ([(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (10.0, 11.0)], 7.0)],
)
def test_covered(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == length


def test_command_writes_json_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", 16)
    arguments = [str(tmp_path / "images"), "--recipe", "demo", "--batch-size", "2", "--steps", "1", "--rounds", "1"]
    files = ["--json", str(tmp_path / "s.json"), "--chart", str(tmp_path / "s.png")]
    assert step([*arguments, "--workers", "0", "--device", "cpu", *files]) == 0
    assert "supervised step" in capsys.readouterr().out
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["batch_size"] == 2
    assert written["torch"] == torch.__version__
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_bad_data_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert sslfast(["bench", "step", "synthetic:none"]) == 2
    assert "synthetic:N needs a number of images of at least 1" in capsys.readouterr().err
