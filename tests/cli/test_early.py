"""Mistakes that are told before torch is imported, and the table of options that this needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from sslfast.cli import early
from sslfast.cli import main as cli
from sslfast.cli.completion import _help, _options, known_help, known_options

CODE = """
import sys
from sslfast.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "numpy", "tyro", "PIL"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("pretrain . --recipe nosuch", "unknown recipe 'nosuch'; known: pirl-paper, "),
        ("pretrain . --recipe=pirl-smal", "unknown recipe 'pirl-smal'; did you mean pirl-small or "),
        ("pretrain . --recipe pirl-small --epchs 3", "unknown option --epchs; did you mean --epochs?"),
        ("pretrain . --recipe moco-v2 --method.image_view.crop.sise=3", "did you mean --method.image-view.crop.size"),
        ("preview . --recipe pirl-small --zzz", "unknown option --zzz; `sslfast preview --help` lists the options"),
        ("evaluate knn run . --kk 3", "unknown option --kk; did you mean --k?"),
        ("bench loader . --secnds 3", "unknown option --secnds; did you mean --seconds?"),
        ("pretrain /nowhere --recipe pirl-small", "/nowhere does not exist: correct the path of DATA"),
        ("evaluate semisup run nowhere", "nowhere does not exist in "),
        ("embed run dangling", "dangling does not exist in "),
        ("data verify dangling", "(it is a link to nothing): correct the path of DATA"),
        (
            "data verify a.jpg/b",
            "a.jpg/b cannot be read (Not a directory): correct the path of DATA, or its permissions",
        ),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(arguments: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "a.jpg").touch()
    words = [sys.executable, "-c", CODE, *arguments.split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_data_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for a user who is not root
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\): change its permissions \(chmod"):
        early.check_path(str(tmp_path), "DATA")


@pytest.mark.parametrize("data", ["s3://bucket/x-{00..09}.tar", "https://host/x.tar", "synthetic:9"])
def test_what_is_no_path_is_not_looked_for(data: str) -> None:
    early.check_path(data, "DATA")


def test_tables_of_options_and_help_are_complete() -> None:
    """Else: ``python -m sslfast.cli.completion sslfast/cli/known_options.txt``."""
    assert early.TABLE.read_text() == known_options()
    assert early.HELP.read_text() == known_help()


EVERY_HELP = """
import contextlib, io, sys
from sslfast.cli.main import COMMANDS, main

def names(commands, before):
    for name, command in commands.items():
        yield from names(command.commands, [*before, name]) if command.commands else [[*before, name]]

for words in names(COMMANDS, []):
    assert main([*words, "--help"]) == 0
    assert main([*words, "x", "--unknown", "-h"]) == 0
print("heavy:", *sorted({"torch", "numpy", "tyro", "PIL"} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    done = subprocess.run([sys.executable, "-c", EVERY_HELP], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text, _, heavy = done.stdout.rstrip("\n").rpartition("\n")
    assert heavy == "heavy:"
    assert cli.main(["evaluate", "knn", "--help"]) == 0  # torch is imported here: the command's own
    assert text.count(capsys.readouterr().out) == 2


def test_help_that_depends_on_more_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    for arguments in (
        "--recipe moco-v2 -h",
        "--config=mine.yaml --help",
        "--model.factory m:f -h",
        "data",
        "-- --help",
    ):
        assert not early.show_help(["pretrain"], arguments.split())
    monkeypatch.setattr(early, "_has_plugins", lambda: True)
    assert not early.show_help(["pretrain"], ["--help"])
    monkeypatch.setattr(early, "HELP", early.HELP.with_name("nothing"))
    assert not early.show_help(["export"], ["--help"])


@pytest.mark.parametrize("recipe", ["pirl-small", "moco-v2", "dino", "relative-position"])
def test_no_option_of_the_help_is_unknown(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        name
        for option, _, _ in _options(_help(["pretrain", "--recipe", recipe, "--help"], cli.main))
        for name in option
    ]
    assert any(name.startswith("--method.") for name in names)
    monkeypatch.delitem(sys.modules, "torch")
    early.check_options(["pretrain"], ["--recipe", recipe, *(name for name in names if name not in ("-h", "--help"))])
    with pytest.raises(ValueError, match="unknown option --nothing"):
        early.check_options(["pretrain"], ["--recipe", recipe, "--nothing"])


def test_what_the_table_cannot_know_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    for arguments in (
        "--config mine.yaml --method.own 3",
        "--recipe pirl-small --model.factory m:f --model.options width 3",
        "--recipe pirl-small --model.name timm/vit --model.own 3",
        "--method.own 3",
    ):
        early.check_options(["pretrain"], arguments.split())
    early.check_options(["launch", "slurm"], ["--own", "3"])
    monkeypatch.setattr(early, "_has_plugins", lambda: True)
    early.check_options(["pretrain"], ["--recipe", "of-a-plugin", "--method.own", "3"])
