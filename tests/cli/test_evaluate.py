"""Commands whose options are the parameters of a function and the fields of its configuration."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sslfast.cli.evaluate import run_function


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings."""

    neighbours: int = 20
    """How many vote."""

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got neighbours={self.neighbours}")


def evaluate(
    run: Path,
    data: Path,
    config: Config = Config(),
    *,
    output: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Accuracy of something.

    Args:
        run: run directory.
        data: folder of images.
        config: settings.
        output: file to write.
        report: receives lines.
    """
    report("a line")
    return {"run": run, "accuracy": config.neighbours / 100, "output": output}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("sslfast_test_evaluation")
    made.evaluate = evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def run(*arguments: str) -> int:
    return run_function("sslfast_test_evaluation:evaluate", list(arguments), "sslfast evaluate knn")


def test_options_come_from_the_function_and_its_configuration(
    module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("RUN", "DATA", "--neighbours", "5") == 0
    assert capsys.readouterr().out == f"a line\n{{'run': {Path('RUN')!r}, 'accuracy': 0.05, 'output': None}}\n"
    assert run("RUN", "DATA", "-o", "file.json") == 0
    assert f"'output': {Path('file.json')!r}" in capsys.readouterr().out
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "How many vote" in text
    assert "--output" in text
    assert "--report" not in text
    usage = text.splitlines()[0]
    assert usage.startswith("usage: sslfast evaluate knn [-h] ")
    assert " RUN DATA" in usage
    with pytest.raises(ValueError, match="DATA is missing"):
        run("RUN")
    with pytest.raises(ValueError, match="neighbours must be at least 1, got neighbours=0"):
        run("RUN", "DATA", "--neighbours", "0")


def test_a_module_prints_its_result_its_own_way(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    module.render_table = lambda result: f"accuracy {result['accuracy']}"  # type: ignore[attr-defined]
    assert run("RUN", "DATA") == 0
    assert capsys.readouterr().out == "a line\naccuracy 0.2\n"
