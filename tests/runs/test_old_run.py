"""A run that an earlier version began, commit 04364c3: it loads, and it resumes to the losses that version computed.

``tests/fixtures/make_old_run.py`` made it and says what is in it.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import sslfast
from sslfast.config import from_dict, load_json
from sslfast.data.manifest import Manifest
from sslfast.models.resnet import ResNetConfig
from sslfast.runs.checkpoint import list_checkpoints, load_checkpoint, load_latest
from sslfast.runs.directory import RunDirectory
from sslfast.runs.log import read_log
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "old_run.tar.xz"
STOPPED, STEPS = 6, 16


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def expected(old: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((old / "expected.json").read_text())
    return values


def test_archive_is_small() -> None:
    assert ARCHIVE.stat().st_size < 100_000


def test_its_files_load(old: Path) -> None:
    run = RunDirectory(old / "run")
    stored = load_json(run.config)
    assert stored == expected(old)["config"]
    assert stored["loader"]["name"] == "torch"
    config = from_dict(TrainConfig, stored)
    assert (config.method.name, config.model, config.batch_size, config.epochs) == (
        "pirl", ResNetConfig(name="resnet18", width=0.125, stem="small"), 4, 4,
    )  # fmt: skip
    manifest = Manifest.load(run.manifest, root=old / "data")
    manifest.check()
    assert (len(manifest), manifest.classes) == (16, ["class0", "class1"])
    found = load_latest(run.checkpoints, report=pytest.fail)
    assert found is not None
    assert found[1]["step"] == STOPPED
    assert found[1]["manifest_digest"] == manifest.digest()
    assert found[1]["method"]["bank.rows"].shape == (16, 32)
    assert [record["step"] for record in read_log(run.log)] == [*range(1, STOPPED + 1)]


def test_it_resumes_to_the_losses_of_that_version(old: Path) -> None:
    run, lines = RunDirectory(old / "run"), []
    config = from_dict(TrainConfig, load_json(run.config))
    bank = load_checkpoint(list_checkpoints(run.checkpoints)[-1])["method"]["bank.rows"]
    result = Trainer(config, old / "data", run.path, report=lines.append).fit()
    assert lines == [f"resumed from {run.checkpoints / 'step_00000006.pt'}: step 6/16"]
    assert result.step == STEPS
    losses = [record["loss"] for record in read_log(run.log)]
    assert len(losses) == STEPS
    assert losses[:10] == pytest.approx(expected(old)["losses"][:10], rel=1e-3)
    # The order of additions in a convolution differs between CPUs, and batches of four let BatchNorm amplify it.
    assert losses == pytest.approx(expected(old)["losses"], rel=1e-2)
    assert max(losses[STOPPED:]) - min(losses[STOPPED:]) > 1e-2  # not a constant
    last = load_checkpoint(result.checkpoint)["method"]
    assert "bank.rows" not in last
    assert last["bank.vectors"].shape == bank.shape
    assert not torch.equal(last["bank.vectors"], bank)
    assert len(load_json(run.versions)["starts"]) == 2


def test_its_trunk_loads(old: Path) -> None:
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        features = sslfast.load(old / "run")(image)[0]
    torch.testing.assert_close(features, torch.tensor(expected(old)["features"]), rtol=1e-4, atol=1e-5)
