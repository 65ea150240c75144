"""What README and the pages of docs/ show runs as it stands there, and the site can be built from them."""

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sslfast.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
TEXT = {name: (ROOT / name).read_text() for name in DOCUMENTS}
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, code) of every block, each code once."""
    found = {
        code: page for page in reversed(PAGES) for code in re.findall(rf"```{language}\n(.*?)```", TEXT[page], re.S)
    }
    return sorted((page, code) for code, page in found.items())


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value.split("\n")[0])
def test_python_blocks_run(page: str, code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    exec(compile(code, page, "exec"), {})


def commands() -> list[str]:
    lines = [line for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line for line in lines if line.startswith("sslfast ")})


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sslfast.cli.main import main

    assert main([*shlex.split(command, comments=True)[1:], "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_make_targets_exist() -> None:
    named = {target for text in TEXT.values() for target in re.findall(r"[`\n]make ([a-z-]+)", text)}
    assert {"demo", "test", "install"} <= named
    for target in named:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


def test_recipes_are_listed() -> None:
    table = TEXT["docs/recipes.md"]
    table = table[table.index("| recipe | what |") : table.index("From Python")]
    assert set(re.findall(r"`([a-z0-9-]+)`", table)) == set(RECIPES)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_readme_is_two_screens() -> None:
    assert len(TEXT["README.md"].splitlines()) <= 110


def test_site(tmp_path: Path) -> None:
    """``make docs``: builds without a warning and documents everything that a package exports."""
    mkdocs = shutil.which("mkdocs", path=str(Path(sys.executable).parent))
    assert mkdocs, 'pip install ".[docs]"'
    command = [mkdocs, "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs/api").glob("*.md"):
        html = (tmp_path / f"api/{page.stem}.html").read_text()
        package = importlib.import_module("sslfast" if page.stem == "index" else f"sslfast.{page.stem}")
        if page.stem != "ops":  # a page by hand: its functions are named as their modules, references are one line
            described = [
                name
                for name in package.__all__
                if inspect.isroutine(getattr(package, name)) or inspect.isclass(getattr(package, name))
            ]
            missing = [name for name in described if f'id="{package.__name__}.{name}"' not in html]
            assert not missing, (page.name, missing)
