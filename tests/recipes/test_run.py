"""``sslfast.pretrain`` and ``sslfast.RECIPES``: the same run as the command's, from Python."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sslfast
from sslfast.cli.main import main
from sslfast.config import load_json, to_dict
from sslfast.methods import SimCLR
from sslfast.models import ResNetConfig
from sslfast.recipes import RECIPES, configure
from sslfast.training import TrainResult
from tests.tiny import same

SMALL = {
    "epochs": 1,
    "batch_size": 8,
    "device": "cpu",
    "precision": "fp32",
    "tensorboard": False,
    "progress": "off",
    "model.width": 0.125,
    "loader": {"workers": 0},
    "method": {"num_negatives": 8, "image_view.crop.size": 16},
    "method.jigsaw_view": {"crop.size": 24, "jigsaw.patch_size": 8},
}
OPTIONS = (
    "--epochs 1 --batch-size 8 --device cpu --precision fp32 --no-tensorboard --progress off --model.width 0.125 "
    "--loader.workers 0 --method.num-negatives 8 --method.image-view.crop.size 16 --method.jigsaw-view.crop.size 24 "
    "--method.jigsaw-view.jigsaw.patch-size 8"
)


def test_equals_the_command(tmp_path: Path) -> None:
    result = sslfast.pretrain("synthetic:17", "pirl-small", tmp_path / "python", **SMALL)
    assert isinstance(result, TrainResult)
    assert (result.step, result.checkpoint.parent.parent) == (2, tmp_path / "python")
    command = ["pretrain", "synthetic:17", "--recipe", "pirl-small", "-o", str(tmp_path / "command"), *OPTIONS.split()]
    assert main(command) == 0
    files = [tmp_path / run / "checkpoints" / result.checkpoint.name for run in ("python", "command")]
    states = [torch.load(file, weights_only=True) for file in files]
    assert same(states[0]["method"], states[1]["method"])
    configs = [load_json(tmp_path / run / "config.json") for run in ("python", "command")]
    assert configs[0] == configs[1]
    assert configs[0]["recipe"] == "pirl-small"
    assert isinstance(sslfast.load(tmp_path / "python"), torch.nn.Module)

    again = sslfast.pretrain(17, "pirl-small", tmp_path / "python", **SMALL)  # finished: nothing is trained again
    assert again.step == 2
    with pytest.raises(ValueError, match="already holds a run"):
        sslfast.pretrain(17, "pirl-small", tmp_path / "python", resume="never", **SMALL)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_overrides_it_is_the_recipe(recipe: str) -> None:
    expected = RECIPES[recipe]()
    expected.recipe = recipe
    assert configure(recipe, {}) == expected


def test_nested_fields_by_dotted_name_mapping_or_dataclass() -> None:
    for overrides in (
        {"model.name": "resnet18", "model.width": 2},
        {"model": {"name": "resnet18", "width": 2}},
        {"model": ResNetConfig(name="resnet18", width=2.0)},
    ):
        assert configure("pirl-paper", overrides).model == ResNetConfig(name="resnet18", width=2.0)
    assert configure("pirl-small", {"method": SimCLR.Config(temperature=0.3)}).method == SimCLR.Config(temperature=0.3)
    before = to_dict(RECIPES["pirl-paper"]())
    configure("pirl-paper", {"method": {"num_negatives": 1}})
    assert to_dict(RECIPES["pirl-paper"]()) == before


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("pirl-smal", {}, "unknown recipe 'pirl-smal'; did you mean pirl-small"),
        ("pirl-small", {"epoch": 3}, "config field epoch is unknown; did you mean epochs?"),
        ("pirl-small", {"method.num_negative": 3}, "config field method.num_negative is unknown; did you mean num_neg"),
        ("pirl-small", {"optim": {"momentun": 0.5}}, "config field optim.momentun is unknown; did you mean momentum"),
        ("pirl-small", {"epochs": "2"}, "config field epochs: expected a whole number, got '2'"),
        ("pirl-small", {"epochs": torch.ones(1)}, "config field epochs: Tensor cannot be stored as JSON"),
        ("pirl-small", {"epochs.x": 2}, r"config field epochs: expected a whole number, got {'x': 2}"),
        ("pirl-small", {"model.name": "resnet19"}, "model.name must be one of resnet18, .*; did you mean torchvision"),
        ("pirl-small", {"epochs": 0}, "epochs must be at least 1, got 0"),
        ("pirl-small", {"method.name": "simclr"}, "method.name is 'pirl' in recipe 'pirl-small' and cannot become"),
        ("pirl-small", {"method": 3}, "config field method: expected"),
    ],
)
def test_mistakes_are_one_clear_error(recipe: str, overrides: dict[str, object], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        sslfast.pretrain("synthetic:17", recipe, tmp_path / "run", **overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_importing_sslfast_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import sslfast;"
        "print(*sorted(m for m in set(sys.modules) - before if m.partition('.')[0] not in sys.stdlib_module_names));"
        "print('pretrain' in dir(sslfast), hasattr(sslfast, 'pretrian'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["sslfast", "True False"]
    assert sslfast.RECIPES is RECIPES
