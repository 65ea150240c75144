from pathlib import Path

import pytest
import torch

from sslfast.bench.loader import measure_loader, render_table
from sslfast.cli.bench import loader
from sslfast.data.manifest import Manifest
from sslfast.views.types import CropConfig, ViewConfig
from tests.tiny import write_images

VIEWS = {"image": ViewConfig(crop=CropConfig(size=16))}


@pytest.mark.parametrize("render", [False, True])
def test_rates_come_from_the_loader_that_is_named(tmp_path: Path, render: bool) -> None:
    write_images(tmp_path, 24)
    row = measure_loader(
        "pillow", Manifest.scan(tmp_path), VIEWS, batch_size=4, workers=0, seconds=0.0,
        device=torch.device("cpu"), render=render,
    )  # fmt: skip
    assert row["loader"] == "pillow"
    assert row["batches"] == 5
    assert row["samples_per_second"] > 0
    assert row["quantile_20"] <= row["median"] <= row["quantile_80"]
    assert "pillow" in render_table([row])


def test_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", 8)
    arguments = ["--loader", "synthetic", "--recipe", "demo", "--batch-size", "4", "--seconds", "0", "--workers", "0"]
    assert (
        loader(
            [
                str(tmp_path / "images"),
                *arguments,
                "--json",
                str(tmp_path / "rates.json"),
                "--chart",
                str(tmp_path / "rates.png"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "8 images, recipe demo" in out
    assert "with views" in out
    assert (tmp_path / "rates.json").is_file()
    assert (tmp_path / "rates.png").stat().st_size > 1000


def test_too_few_images_are_an_error_before_work_starts(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    with pytest.raises(ValueError, match="--batch-size 32 is more than the 3 images"):
        loader([str(tmp_path)])


def test_an_unknown_loader_is_an_error_before_work_starts(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    with pytest.raises(ValueError, match="unknown loader 'synthetics'; did you mean synthetic"):
        loader([str(tmp_path), "--batch-size", "2", "--loader", "synthetics"])
