"""Accuracies on a labelled set during training: those of the evaluations, and training the same to the bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslfast.evaluation import TrunkEncoder, extract_all, knn_accuracy, train_probe
from sslfast.evaluation.folders import load_manifests
from sslfast.recipes.registry import RECIPES
from sslfast.runs.checkpoint import checkpoint_path, load_checkpoint
from sslfast.training.config import TrainConfig
from sslfast.training.probe import STRENGTH
from sslfast.training.trainer import Trainer
from tests.methods.harness import TinyTrunk, tiny, tiny_trunks
from tests.tiny import log_values, same, write_images


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_images(folder / "train", 24)
    write_images(folder / "val", 10)
    return folder


def config(recipe: str, **changes: object) -> TrainConfig:
    return replace(tiny(RECIPES[recipe]()), epochs=4, checkpoint_every_steps=1, keep_checkpoints=100, **changes)


@pytest.mark.parametrize("recipe", ["pirl-small", "colorization-small"])  # its trunk sees lightness
def test_values_are_those_of_the_evaluations_and_training_is_unchanged(
    recipe: str, labelled: Path, tmp_path: Path
) -> None:
    probing = config(recipe, probe_data=str(labelled), probe_every_epochs=2, log_every_steps=3)
    with tiny_trunks():
        for name, chosen in (("probed", probing), ("plain", config(recipe, log_every_steps=3))):
            Trainer(chosen, 2 * chosen.batch_size, tmp_path / name, report=pytest.fail).fit()
    states = [load_checkpoint(checkpoint_path(tmp_path / name / "checkpoints", 8)) for name in ("probed", "plain")]
    assert same(states[0]["method"], states[1]["method"])
    assert same(states[0]["optimizer"], states[1]["optimizer"])
    records = {record["step"]: record for record in log_values(tmp_path / "probed")}
    assert [step for step in records if "val_knn_top1" in records[step]] == [4, 8]
    assert not list((tmp_path / "probed").glob(".probe*"))
    method = probing.method
    for step in (4, 8):
        state = load_checkpoint(checkpoint_path(tmp_path / "probed" / "checkpoints", step))["method"]
        trunk = TinyTrunk(probing.model)  # type: ignore[arg-type]
        trunk.load_state_dict({k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")})
        statistics = method.image_view.augment
        encoder = TrunkEncoder(trunk, mean=statistics.mean, std=statistics.std, colours=method.trunk_input)
        train, val = load_manifests(labelled)
        size = method.image_view.crop.size
        with torch.no_grad():
            features = [
                extract_all({"": encoder}, m, size=size, preprocessing="centre-square").values[""] for m in (train, val)
            ]
        labels = [torch.from_numpy(m.labels) for m in (train, val)]
        expected = knn_accuracy(features[1], labels[1], features[0], labels[0], k=(20,))[20].top1
        assert records[step]["val_knn_top1"] == expected
        layer = train_probe(features[0], labels[0], classes=2, strengths=(STRENGTH,))
        assert records[step]["val_linear_top1"] == (layer(features[1]).argmax(1) == labels[1]).double().mean().item()


def test_a_file_that_vanishes_is_one_line(labelled: Path, tmp_path: Path) -> None:
    data = shutil.copytree(labelled, tmp_path / "data")
    lines: list[str] = []
    chosen = config("pirl-small", probe_data=str(data), probe_every_epochs=2)
    with tiny_trunks():
        trainer = Trainer(chosen, 2 * chosen.batch_size, tmp_path / "run", report=lines.append)
        shutil.rmtree(data / "val")
        assert trainer.fit().step == 8
    assert [line for line in lines if line.startswith("step 4: not measured on probe_data: no usable image in ")]


def test_settings_that_cannot_be_measured(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="probe_data=None with probe_every_epochs=1; give both or neither"):
        TrainConfig(probe_every_epochs=1)
    with pytest.raises(ValueError, match="probe_data=x with probe_every_epochs=0; give both or neither"):
        TrainConfig(probe_data="x")
    few = tmp_path / "few"
    write_images(few / "train", 4)
    write_images(few / "val", 4)
    for data, words in ((few, "has 4 training images, and kNN needs 20"), (tmp_path / "none", "has no folder train")):
        chosen = config("pirl-small", probe_data=str(data), probe_every_epochs=2)
        with tiny_trunks(), pytest.raises(ValueError, match=words):
            Trainer(chosen, 2 * chosen.batch_size, tmp_path / "run", report=pytest.fail)
