"""Configurations from files: what is printed is read back, mistakes name the file and the field."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sslfast
from sslfast.cli.main import main
from sslfast.config import load_json, to_dict
from sslfast.methods import METHODS, SimCLR
from sslfast.models import LibraryTrunkConfig, ResNetConfig
from sslfast.recipes import RECIPES, as_yaml, changed, find_recipe, load_settings
from sslfast.training import TrainConfig
from tests.tiny import Tiny, TinyConfig


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_printed_configuration_is_read_back(recipe: str, tmp_path: Path) -> None:
    config = changed(find_recipe(recipe), {"epochs": 7, "loggers": ["csv"], "init": "gone/é: x", "probe_data": None})
    for name, text in (("all.yaml", as_yaml(config)), ("all.json", json.dumps(to_dict(config)))):
        (tmp_path / name).write_text(text)
        assert load_settings(tmp_path / name) == config
    assert load_settings(tmp_path / "all.yaml", recipe) == config


def test_of_a_method_without_a_recipe(tmp_path: Path) -> None:
    config = TrainConfig(method=SimCLR.Config(temperature=0.25), model=LibraryTrunkConfig(name="torchvision/resnet18"))
    path = tmp_path / "all.yaml"
    path.write_text(as_yaml(config))
    assert load_settings(path) == config
    path.write_text("method.name: simclr\nmethod.temperature: 0.25\nmodel: {name: torchvision/resnet18}\n")
    assert load_settings(path) == config


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "recipe: pirl-small\nepochs: 010\ncompile: off\noptim.lr_per_256_images: 1e-2\nmodel: {width: 2}\n"),
        (
            "a.yml",
            'recipe: pirl-small\n\'epochs\': 10\n"compile": "off"\noptim: {lr_per_256_images: .01}\nmodel.width: 2',
        ),
        ("a.toml", 'recipe = "pirl-small"\nepochs = 10\noptim.lr_per_256_images = 1e-2\n[model]\nwidth = 2'),
        ("a.json", '{"recipe": "pirl-small", "epochs": 10, "optim.lr_per_256_images": 1e-2, "model": {"width": 2}}'),
    ],
)
def test_some_settings_on_a_recipe(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    config = load_settings(tmp_path / name)
    wanted = {"epochs": 10, "optim.lr_per_256_images": 0.01, "model.width": 2.0}
    assert config == changed(find_recipe("pirl-small"), wanted)
    assert isinstance(config.model, ResNetConfig)


def test_an_empty_file_with_a_recipe_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert load_settings(tmp_path / "a.yaml", "moco-v2") == find_recipe("moco-v2")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "recipe: pirl-small\nepochz: 3", "config field epochz is unknown; did you mean epochs?"),
        ("a.yaml", "recipe: pirl-small\nmodel: {widht: 2}", "config field model.widht is unknown; did you mean width?"),
        (
            "a.yaml",
            "recipe: pirl-small\nepochs: yes",
            "config field epochs: expected a whole number, got 'yes'; correct",
        ),
        ("a.yaml", "recipe: pirl-small\nepochs: 0", "epochs must be at least 1, got 0"),
        ("a.yaml", "recipe: pirl-small\nloader: 3", "config field loader: expected a table"),
        ("a.yaml", "recipe: pirl-smal", "unknown recipe 'pirl-smal'; did you mean pirl-small"),
        ("a.yaml", "recipe: 3", "config field recipe: expected a text, got 3"),
        ("a.yaml", "epochs: 3", "config field recipe is missing; add one (known: pirl-paper"),
        ("a.yaml", "method.name: pirll", "config field method.name: 'pirll' is not one of"),
        (
            "a.yaml",
            "recipe: pirl-small\nmethod: {name: moco}",
            "config field method.name is 'pirl' in recipe 'pirl-small'",
        ),
        ("a.yaml", "epochs: 3\nepochs: 4", "is no YAML: 'epochs' is there twice"),
        ("a.yaml", "epochs: [3", "is no YAML: while parsing"),
        ("a.yaml", "a: &a [*a]\nrecipe: pirl-small", "a table holds itself"),
        ("a.yaml", "!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a.yaml", "- 3", "must hold a table of fields such as `epochs: 100`, got list"),
        ("a.yaml", "1: 2", "must hold a table of fields"),
        ("a.json", '{"epochs": 1, "epochs": 2}', "is no JSON: 'epochs' is there twice"),
        ("a.json", "[" * 100_000, "is no JSON: "),
        ("a.toml", "epochs 3", "is no TOML: Expected '='"),
        ("a.txt", "epochs: 3", "is no configuration: name a run directory or a file .json, .toml, .yaml, .yml"),
        ("a.yaml", "\xff\xfe", "is no YAML: 'utf-8' codec"),
    ],
)
def test_mistakes_name_the_file_and_the_field(
    name: str, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    assert main(["pretrain", "synthetic:9", "--config", str(path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"sslfast: error: {path}")
    assert expected in line
    assert line.count("\n") == 1


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, expected in ((tmp_path / "a.yaml", "correct the path"), (tmp_path, "config.json does not exist")):
        assert main(["pretrain", "synthetic:9", f"--config={path}"]) == 2
        assert expected in capsys.readouterr().err


def test_another_recipe_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: pirl-small\n")
    with pytest.raises(ValueError, match="based on recipe pirl-small, --recipe moco-v2 is another one; leave one"):
        load_settings(tmp_path / "a.yaml", "moco-v2")


def test_yaml_without_its_package(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: pirl-small\n")
    code = f"import sys; sys.modules['yaml'] = None; import sslfast.recipes as r; r.load_settings('{tmp_path}/a.yaml')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a.yaml needs the package pyyaml; pip install pyyaml, or use .toml or .json" in done.stderr


def test_a_run_starts_another_with_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny() -> TrainConfig:
        return TrainConfig(**vars(TinyConfig(epochs=1)))

    monkeypatch.setitem(RECIPES, "tiny", tiny)
    monkeypatch.setitem(METHODS, "tiny", Tiny.Config)
    first, second, third = (tmp_path / name for name in "abc")
    sslfast.pretrain(17, "tiny", first, seed=5)
    command = ["pretrain", "synthetic:17", "--config", str(first), "-o", str(second), "--batch-size", "2"]
    assert main([*command, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert main(command) == 0
    before, after = (load_json(run / "config.json") for run in (first, second))
    assert after == before | {"batch_size": 2}
    (tmp_path / "printed.yaml").write_text(text)
    assert to_dict(load_settings(tmp_path / "printed.yaml")) == after
    sslfast.pretrain(17, None, third, config=second / "config.json", epochs=2)
    assert load_json(third / "config.json") == after | {"epochs": 2}
    with pytest.raises(ValueError, match="recipe is None; name a recipe"):
        sslfast.pretrain(17, None, third)


def test_printing_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--recipe", "jigsaw-small", "--print-config", "--model.width", "0.5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("recipe: jigsaw-small\nmethod:\n  name: jigsaw\n")
    assert "\n  width: 0.5\n" in text
