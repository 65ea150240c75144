"""Trunks from a function outside the package: built, pretrained, evaluated, and refused where a ResNet is needed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sslfast
from sslfast.cli import main as cli
from sslfast.config import from_dict, load_json, to_dict
from sslfast.evaluation.detection.model import check_trunk
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from sslfast.methods.autoencoder import Autoencoder
from sslfast.methods.colorization import Colorization
from sslfast.methods.cpc import CPC
from sslfast.models.build import TrunkConfig, build_trunk, read_trunk_config
from sslfast.models.resnet import ResNetConfig
from sslfast.models.trunk import CustomTrunkConfig
from sslfast.training.config import TrainConfig
from sslfast.weights.export import export_trunk
from tests.evaluation.runs import write_data
from tests.tiny import context, same

MODULE = """
from torch import Tensor, nn

from sslfast.models import trunk_factory


class Patches(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.out_features = width
        self.convolution = nn.Conv2d(3, width, 8, stride=8)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.convolution(images)).relu().mean(dim=(2, 3))


@trunk_factory
def make(width: int = 6, norm: bool = True) -> nn.Module:
    return Patches(width, norm)


@trunk_factory
def no_trunk() -> nn.Module:
    return nn.ReLU()


def undecorated() -> nn.Module:
    raise AssertionError("called")
"""
FACTORY = "patches_of_eight:make"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "patches_of_eight.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    yield
    sys.modules.pop("patches_of_eight", None)


def test_a_trunk_depends_on_its_seed_alone() -> None:
    config = CustomTrunkConfig(factory=FACTORY, options={"width": 5})
    before = torch.get_rng_state()
    trunk = build_trunk(config, seed=3).eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert trunk.out_features == 5
    assert trunk(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert same(trunk.state_dict(), build_trunk(config, seed=3).state_dict())
    assert not same(trunk.state_dict(), build_trunk(config, seed=4).state_dict())


@pytest.mark.parametrize(
    "config",
    [
        CustomTrunkConfig(factory=FACTORY, options={"width": 5, "norm": False, "rate": 0.5, "kind": "a"}),
        ResNetConfig(name="resnet18", stem="small", width=0.5),
    ],
)
def test_configurations_are_read_back(config: TrunkConfig) -> None:
    assert read_trunk_config(to_dict(config)) == config
    whole = TrainConfig(model=config)
    assert from_dict(TrainConfig, to_dict(whole)) == whole


def test_configurations_of_earlier_versions_are_read() -> None:
    assert read_trunk_config({"name": "resnet34"}) == ResNetConfig(name="resnet34")
    assert read_trunk_config({"stem": "small"}) == ResNetConfig(stem="small")
    with pytest.raises(ValueError, match=r"model\.name: 'vgg' is not one of resnet18, resnet34, resnet50, custom"):
        read_trunk_config({"name": "vgg"})


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("make", "model.factory must be MODULE:FUNCTION, got 'make'"),
        ("not_installed:make", "not_installed cannot be imported .*; install it"),
        ("patches_of_eight:other", "patches_of_eight has no trunk factory 'other'; decorate"),
        ("patches_of_eight:undecorated", "has no trunk factory 'undecorated'; decorate the function"),
        ("os:system", "os has no trunk factory 'system'; decorate"),
        ("patches_of_eight:no_trunk", "must return an nn.Module with out_features.*, got ReLU with out_features=None"),
    ],
)
def test_bad_factories(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_trunk(CustomTrunkConfig(factory=factory), seed=0)


def test_the_command_pretrains_it_and_knn_evaluates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = tmp_path / "run"
    options = ["--recipe", "npid-small", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "-o", str(run)]
    options += ["--precision", "fp32", "--no-tensorboard", "--progress", "off"]
    options += ["--model.factory", FACTORY, "--model.options", "width", "7", "norm", "False"]
    assert cli.main(["pretrain", "synthetic:8", *options, "--dry-run"]) == 0
    assert f"{FACTORY} is not a ResNet" in capsys.readouterr().out
    assert cli.main(["pretrain", "synthetic:8", *options]) == 0
    expected = CustomTrunkConfig(factory=FACTORY, options={"width": 7, "norm": False})
    assert read_trunk_config(load_json(run / "config.json")["model"]) == expected
    assert load_json(run / "config.json")["epochs"] == 1

    trunk = sslfast.load(run)
    assert trunk(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    found = evaluate_knn(run, write_data(tmp_path / "data", train=4, val=2), KnnConfig(k=(1,), device="cpu"))
    assert {row["encoder"] for row in found["results"]} == {"trained", "untrained", "raw pixels"}
    with pytest.raises(ValueError, match=rf"a timm file holds a ResNet, got model\.factory={FACTORY}; export as onnx"):
        export_trunk(run, tmp_path / "trunk.pth", format="timm")


def test_what_needs_a_resnet_says_so() -> None:
    config = CustomTrunkConfig(factory=FACTORY)
    for method in (Autoencoder.Config(), Colorization.Config()):
        with pytest.raises(ValueError, match=rf"method {method.name} needs a ResNet, got model\.factory={FACTORY}"):
            method.build(context(config, 8))
    with pytest.raises(ValueError, match="detect needs a ResNet, got model"):
        check_trunk(config)
    with pytest.raises(ValueError, match="CPC needs a trunk without BatchNorm, and Patches has it"):
        CPC.Config().build(context(config, 8))
    assert CPC.Config().build(context(CustomTrunkConfig(factory=FACTORY, options={"norm": False}), 8)).trunk
