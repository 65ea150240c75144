"""``--plugin``: a module of the user adds recipes before anything is parsed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sslfast.cli import main as cli
from sslfast.recipes.registry import RECIPES

PLUGIN = """
import sslfast
from tests.tiny import TinyConfig

def mine() -> TinyConfig:
    \"\"\"A recipe of my own.\"\"\"
    return TinyConfig(epochs=2)

sslfast.RECIPES["mine"] = mine
"""


def is_in(module: ModuleType, folder: Path) -> bool:
    return Path(getattr(module, "__file__", None) or "/").is_relative_to(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with modules that no other test sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    known = dict(RECIPES)
    (tmp_path / "my_recipes.py").write_text(PLUGIN)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if is_in(module, tmp_path)]:
        del sys.modules[name]
    RECIPES.clear()
    RECIPES.update(known)


@pytest.mark.parametrize("option", [["--plugin", "my_recipes"], ["--plugin=my_recipes"]])
def test_recipe_of_a_module_in_the_current_directory(
    option: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", "synthetic:17", "--recipe", "mine", "-o", "run"]
    assert cli.main(command) == 2
    assert "unknown recipe 'mine'" in capsys.readouterr().err
    assert cli.main([*command, *option, "--dry-run"]) == 0
    assert "2 epochs x 4 steps" in capsys.readouterr().out
    assert cli.main([*option, *command, "--epochs", "1"]) == 0
    assert (folder / "run" / "config.json").exists()
    assert cli.main(["pretrain", *option, "--help"]) == 0
    assert "mine: A recipe of my own." in capsys.readouterr().out


def test_several_modules_for_every_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (folder / f"plugin_{name}.py").write_text(f"print('imported {name}')\n")
    assert cli.main(["evaluate", "knn", "--help", "--plugin", "plugin_one", "--plugin=plugin_two"]) == 0
    assert capsys.readouterr().out.startswith("imported one\nimported two\nusage: sslfast evaluate knn")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--plugin"], "--plugin needs the name of a module"),
        (["--plugin", "--recipe"], "--plugin needs the name of a module"),
        (
            ["--plugin", "not_there"],
            "--plugin not_there: no such module; run the command in the folder of not_there.py",
        ),
        (["--plugin", "broken"], "--plugin broken: importing it failed: NameError: name 'undefined' is not defined;"),
        (["--plugin", "needs"], "--plugin needs: importing it failed: ModuleNotFoundError: No module named 'not_here'"),
    ],
)
def test_mistakes_are_one_line(
    option: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.py").write_text("undefined\n")
    (folder / "needs.py").write_text("import not_here\n")
    assert cli.main(["pretrain", "synthetic:17", *option]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"sslfast: error: {expected}")
    assert line.count("\n") == 1


def test_a_file_of_the_current_directory_hides_no_package(folder: Path) -> None:
    (folder / "random.py").write_text("raise SystemExit('the wrong random')\n")
    code = "import sys; sys.path.remove(''); from sslfast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "bench", "--help", "--plugin", "my_plain"]
    (folder / "my_plain.py").write_text("import random; random.random()\n")
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
