"""A remedy is possible in the command that prints it: options that an error names are options of that command."""

import ast
import re
from pathlib import Path

import pytest

from sslfast.cli.main import main
from sslfast.files import reason_of

ROOT = Path(__file__).resolve().parents[2] / "sslfast"
PROTOCOLS = ("knn", "linear", "lowshot", "semisup", "detect")
COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluation/extract.py": ("evaluate knn", "evaluate linear", "evaluate lowshot", "evaluate semisup", "neighbours",
                              "report"),
    "evaluation/folders.py": ("data labels",),  # the command that it names
    "evaluation/results.py": tuple(f"evaluate {name}" for name in PROTOCOLS),
    "evaluation/encoders.py": (*(f"evaluate {name}" for name in PROTOCOLS), "neighbours", "report"),
    "evaluation/knn.py": ("evaluate knn", "neighbours"),
    "evaluation/linear.py": ("evaluate linear",),
    "evaluation/linear_probe.py": ("evaluate linear",),  # the report leaves the remedy out
    "evaluation/linear_sgd.py": ("evaluate linear",),
    "evaluation/semisup.py": ("evaluate semisup",),
    "evaluation/svm.py": ("evaluate lowshot",),
    "evaluation/detection/data.py": ("evaluate detect",),
    "evaluation/detection/train.py": ("evaluate detect",),
    "evaluation/detection/model.py": ("pretrain --recipe pirl-small",),  # "pretrain with --model.stem imagenet"
    "report/preview.py": ("preview --recipe pirl-small", "neighbours", "report"),
}  # fmt: skip
"""Which commands print the errors of a module."""
EVERYWHERE = {"--plugin", "--help", "--version"}


def named_options() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in [*(ROOT / "evaluation").rglob("*.py"), *(ROOT / "report").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                options = set(re.findall(r"--[a-z][a-z.-]*", node.value)) - EVERYWHERE
                if options:
                    found.setdefault(path.relative_to(ROOT).as_posix(), set()).update(options)
    return found


def test_options_that_errors_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    named = named_options()
    assert named.keys() <= COMMANDS.keys(), "say which commands print the errors of this module"
    helps: dict[str, set[str]] = {}
    for module, options in named.items():
        for command in COMMANDS[module]:
            if command not in helps:
                assert main([*command.split(), "--help"]) == 0
                helps[command] = set(re.findall(r"--[a-z][a-z.-]*", capsys.readouterr().out))
            assert options <= helps[command], f"{module} names {options - helps[command]} and {command} has none"


def test_the_file_of_export_has_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.pth").touch()
    (tmp_path / "file").touch()
    assert main(["export", str(tmp_path / "run.pth"), str(tmp_path / "file" / "t.pth")]) == 2
    assert "is no folder); name another file as OUT\n" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run.pth"), str(tmp_path / "run.pth")]) == 2
    assert "is read and would be replaced; name another file as OUT\n" in capsys.readouterr().err


def test_the_reason_that_pyarrow_gives_is_that_of_the_system() -> None:
    words = "Error writing bytes to file. Detail: [errno 28] No space left on device"
    assert reason_of(OSError(28, words)) == "No space left on device"
