"""Wrong arguments are one line; every number of every command has a range."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sslfast.cli
import sslfast.evaluation
import sslfast.report
from sslfast.cli import main as cli
from sslfast.cli import usage
from sslfast.evaluation import limits

RECIPE = ["pretrain", "synthetic:8", "--recipe", "pirl-small"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([*RECIPE, "--optim.momentum", "2"], "optim.momentum must be in [0, 1), got 2.0"),
        ([*RECIPE, "--optim.momentum", "nan"], "optim.momentum must be a finite number, got nan"),
        ([*RECIPE, "--optim.name", "x"], "--optim.name must be one of sgd, lars, adamw, lamb; got 'x'"),
        ([*RECIPE, "--optim.lr-schedule", "x"], "--optim.lr-schedule x; did you mean --optim.schedule?"),
        ([*RECIPE, "--loader.timeout", "-1"], "loader.timeout must be a number of seconds above 0, got -1.0"),
        ([*RECIPE, "--epochs", "x"], "--epochs must be a whole number, got 'x'; `sslfast pretrain --help` lists"),
        ([*RECIPE, "--optim.milestones", "x"], "--optim.milestones must be [FLOAT [FLOAT ...]], got 'x'; `sslfast"),
        ([*RECIPE, "--optim.betas", "1"], "Missing value for argument '--optim.betas'. Expected 2 values; `sslfast"),
        ([*RECIPE, "more"], "unknown option or argument more; `sslfast pretrain --help` lists the options"),
        ([*RECIPE, "--method.temperature", "0"], "method.temperature must be at least 0.001, got 0.0"),
        (["pretrain", "--recipe", "pirl-small"], "DATA is missing; `sslfast pretrain --help` lists the options"),
        (["evaluate", "knn"], "RUN is missing; `sslfast evaluate knn --help` lists the options"),
        (["evaluate", "knn", "x"], "DATA is missing; "),
        (["evaluate", "knn", "x", ".", "--k", "y"], "--k must be [INT [INT ...]], got 'y'; "),
        (["evaluate", "knn", "x", ".", "--k", "0"], "k must be at least 1, got (0,)"),
        (["evaluate", "knn", "x", ".", "--temperature", "nan"], "temperature must be a finite number, got nan"),
        (["evaluate", "linear", "x", ".", "--strengths", "inf"], "strengths must be a finite number, got (inf,)"),
        (["evaluate", "semisup", "x", ".", "--fraction", "1e9"], "fraction must be at most 1, got 1000000000.0"),
        (["evaluate", "lowshot", "x", ".", "--costs", "-1"], "costs must be at least 1e-12, got (-1.0,)"),
        (["evaluate", "detect", "x", ".", "--lr", "nan"], "lr must be a finite number, got nan"),
        (["export", "x", "y", "--format", "x"], "--format must be one of auto, torchvision, timm, "),
        (["bench", "ops", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["bench", "loader", ".", "--seconds", "nan"], "--seconds must be a finite number, got nan"),
        (["data", "verify", ".", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["data", "prepare", ".", "y.beton", "--quality", "101"], "quality must be "),
        (["preview", ".", "--recipe", "pirl-small", "--count", "0"], "--count must be at least 1, got 0"),
        (["info", "--x"], "unknown option or argument --x; `sslfast info --help` lists the options"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sslfast: error: ")
    assert line in printed.err
    assert printed.err.count("\n") == 1
    assert not set("╭│─╰") & set(printed.err)


@pytest.mark.parametrize(
    "command", ["pretrain", "preview", "data verify", "data prepare", "data labels", "bench loader"]
)
def test_data_that_does_not_exist_is_refused_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    code = f"""
import sys
from sslfast.cli.main import main
assert main({[*command.split(), "gone/data", "--nonsense"]}) == 2
assert "torch" not in sys.modules and "tyro" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == f"sslfast: error: gone/data does not exist in {tmp_path}: correct the path of DATA\n"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("evaluate knn RUN DATA", "--output"),
        ("evaluate linear RUN DATA", "--output"),
        ("report RUN", "--output"),
        ("neighbours RUN DATA", "--output"),
        ("data verify .", "--output"),
        ("data labels . labels.txt", "--output"),
        ("preview . --recipe pirl-small", "--output"),
        ("bench ops", "--json"),
        ("bench loader .", "--chart"),
    ],
)
@pytest.mark.parametrize("place", ["file/x.html", "folder.html"])
def test_outputs_are_checked_before_the_work(
    command: str, option: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.html").mkdir()
    Path("DATA").mkdir()
    assert cli.main([*command.split(), option, place]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sslfast: error: cannot write {place} (")
    assert f"name another file with {option}" in error


def test_help_is_printed_in_the_width_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert cli.main(["evaluate", "knn", "--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith((" ", "│"))]
    assert 60 < max(map(len, lines)) <= 70


def test_an_error_inside_the_called_function_is_its_own(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["export", "gone", "out.pth"]) == 2
    assert "gone does not exist" in capsys.readouterr().err


def configurations(package: Any) -> Iterator[type]:
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            is_ours = dataclasses.is_dataclass(value) and getattr(value, "__module__", "") == module.__name__
            is_options = name.endswith("Config") or (package is sslfast.cli and name != "Command")
            if is_ours and is_options:
                yield value


def numbers(config: type) -> set[str]:
    kinds = ("<class 'int'>", "<class 'float'>", "int | None", "float | None", "tuple[int, ...]", "tuple[float, ...]")
    return {field.name for field in dataclasses.fields(config) if str(field.type) in kinds}


@pytest.mark.parametrize(
    ("package", "known"),
    [(sslfast.evaluation, limits.LIMITS), (sslfast.report, limits.LIMITS), (sslfast.cli, usage.LIMITS)],
)
def test_every_number_has_a_range(package: Any, known: dict[str, tuple[float, float]]) -> None:
    found = {config: numbers(config) for config in configurations(package)}
    assert sum(map(len, found.values())) > 5 - 3 * (package is sslfast.report)
    for config, names in found.items():
        assert names <= set(known), f"{config.__name__}: give {names - set(known)} a range"


def test_a_url_as_data_need_not_be_a_file(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "sslfast", "pretrain", "https://host/x.tar", "--recipe", "no-such"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.startswith("sslfast: error: unknown recipe 'no-such'")
