"""A method outside the package: a module of its own, registered, trained, saved, resumed and evaluated."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sslfast.cli import main as cli
from sslfast.config import from_dict, load_json, to_dict
from sslfast.evaluation.encoders import load_run
from sslfast.methods import METHODS
from sslfast.methods.base import BaseConfig, Method
from sslfast.methods.pirl import PIRL
from sslfast.methods.registry import register_method
from sslfast.recipes import RECIPES
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from tests.methods.harness import final, losses
from tests.tiny import same

MODULE = '''
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from sslfast.loaders import LoaderConfig
from sslfast.methods import BaseConfig, Method, MethodContext, register_method
from sslfast.models import ResNetConfig, build_trunk, seeded
from sslfast.recipes import RECIPES
from sslfast.training import TrainConfig
from sslfast.views import CropConfig, View, ViewConfig


@register_method
class Consistency(Method):
    """Two draws of an image have similar features."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        name: ClassVar[str] = "consistency"

        weight: float = 1.0
        """Factor on the loss."""
        image_view: ViewConfig = field(default_factory=lambda: ViewConfig(crop=CropConfig(size=16)))

        def views(self) -> dict[str, ViewConfig]:
            return {"first": self.image_view, "second": self.image_view}

        def build(self, context: MethodContext) -> "Consistency":
            return Consistency(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.head = nn.Linear(self.trunk.out_features, 4)

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        first, second = (self.head(self.trunk(views[name].pixels)).float() for name in ("first", "second"))
        return {"loss": self.config.weight * (first - second).square().mean()}


def consistency() -> TrainConfig:
    """Consistency of two views."""
    return TrainConfig(
        recipe="consistency",
        method=Consistency.Config(),
        model=ResNetConfig(name="resnet18", stem="small", width=0.125),
        loader=LoaderConfig(name="synthetic", workers=0),
        epochs=1,
        batch_size=4,
        device="cpu",
        precision="fp32",
        log_every_steps=1,
        checkpoint_every_steps=1,
        tensorboard=False,
        progress="off",
    )


RECIPES["consistency"] = consistency
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "consistency_of_views.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    yield importlib.import_module("consistency_of_views")
    del METHODS["consistency"], RECIPES["consistency"], sys.modules["consistency_of_views"]


def test_a_method_of_another_module_trains_saves_and_resumes(module: Any, tmp_path: Path) -> None:
    config = RECIPES["consistency"]()
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trainer = Trainer(config, 8, whole, report=lambda _line: None)
    context = trainer.method.context
    assert (context.num_rows, context.steps_per_epoch, context.total_steps, context.epochs) == (8, 2, 2, 1)
    assert trainer.fit().step == 2

    saved = load_json(whole / "config.json")
    assert saved["method"]["name"] == "consistency"
    assert from_dict(TrainConfig, saved) == config
    assert type(from_dict(TrainConfig, saved).method) is module.Consistency.Config

    Trainer(config, 8, stopped, report=lambda _line: None).fit()
    (stopped / "checkpoints" / "step_00000002.pt").unlink()
    lines: list[str] = []
    assert Trainer(from_dict(TrainConfig, saved), 8, stopped, report=lines.append).fit().step == 2
    assert "step 1/2" in lines[0]
    assert same(final(stopped)["method"], final(whole)["method"])
    assert losses(stopped)[-1] == losses(whole)[-1]
    other = replace(config, method=replace(config.method, weight=2.0))
    with pytest.raises(ValueError, match=r"method\.weight was 1\.0, is 2\.0"):
        Trainer(other, 8, stopped, report=lines.append).fit()


def test_its_fields_are_options_of_the_command(module: Any, tmp_path: Path) -> None:
    command = [
        "pretrain",
        "synthetic:8",
        "--recipe",
        "consistency",
        "--method.weight",
        "0.5",
        "-o",
        str(tmp_path / "r"),
    ]
    assert cli.main(command) == 0
    assert from_dict(TrainConfig, load_json(tmp_path / "r" / "config.json")).method == module.Consistency.Config(
        weight=0.5
    )
    assert set(load_run(tmp_path / "r").encoders) == {"trained", "untrained", "raw pixels"}


def test_a_run_of_a_method_that_is_not_registered(module: Any, tmp_path: Path) -> None:
    Trainer(RECIPES["consistency"](), 8, tmp_path / "run", report=lambda _line: None).fit()
    known = METHODS.pop("consistency")
    try:
        with pytest.raises(ValueError, match=r"method\.name: 'consistency' is not one of .*pirl.*; import the module"):
            from_dict(TrainConfig, load_json(tmp_path / "run" / "config.json"))
        with pytest.raises(ValueError, match="'consistency', which is not registered: import the module"):
            load_run(tmp_path / "run")
    finally:
        METHODS["consistency"] = known


def test_every_recipe_can_be_read_back() -> None:
    for name, recipe in RECIPES.items():
        config = recipe()
        assert config.recipe == name
        assert METHODS[config.method.name] is type(config.method)
        assert from_dict(TrainConfig, to_dict(config)) == config


def test_names_are_taken_once() -> None:
    class Other(Method):
        class Config(BaseConfig):
            name = "pirl"

    with pytest.raises(
        ValueError, match=r"method name 'pirl' is taken by sslfast\.methods\.pirl\.PIRL\.Config; choose"
    ):
        register_method(Other)
    assert register_method(PIRL) is PIRL
    assert METHODS["pirl"] is PIRL.Config
