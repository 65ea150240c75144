"""What README shows runs as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from sslfast.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("sslfast ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from sslfast.cli.main import main

    assert main([*command[1:], "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "help"} <= named
    for target in named:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


def test_recipes_are_listed() -> None:
    table = README[README.index("| recipe | what |") : README.index("First-step values")]
    assert set(re.findall(r"`([a-z0-9-]+)`", table)) == set(RECIPES)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
