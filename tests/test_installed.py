"""The package as interpreters are started and as it is installed: ``-O``, ``-W error``, ``-P``, a folder that cannot be
written, an archive."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT = """
import sys
from sslfast.cli.main import main
assert main(["--version"]) == main(["--help"]) == main(["evaluate", "knn", "--help"]) == 0
assert main(["pretrain", ".", "--recipe", "pirl-smal"]) == 2
assert "torch" not in sys.modules
"""
OPS = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sslfast.ops as ops, sslfast.adapters
own = [str(one.message) for one in caught if "sslfast" in str(one.message)]
bank = torch.nn.functional.normalize(torch.arange(12.0).reshape(4, 3), dim=1)
loss = ops.bank_nce(bank[:2], bank, torch.tensor([0, 1]), negatives="full")
torch.testing.assert_close(loss, ops.bank_nce_reference(bank[:2], bank, torch.tensor([0, 1]), negatives="full"))
try:
    ops.bank_nce(bank[:2], bank, torch.tensor([0, 4]), negatives="full")
except RuntimeError as error:
    assert "index must be in [0, 4)" in str(error)
else:
    raise SystemExit("a row outside of the bank was scored")
print(ops.is_compiled(), len(own), *own)
"""


def started(
    code: str, *options: str, path: Path = ROOT, variables: dict[str, str] | None = None, folder: Path = ROOT
) -> str:
    environment = os.environ | {"PYTHONPATH": str(path)} | (variables or {})
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


MODES = {
    "O": (["-O"], {}),
    "OO": (["-OO"], {}),
    "P": (["-P"], {}),
    "PYTHONSAFEPATH": ([], {"PYTHONSAFEPATH": "1"}),
    "PYTHONDONTWRITEBYTECODE": ([], {"PYTHONDONTWRITEBYTECODE": "1"}),
    "X dev": (["-X", "dev"], {}),
    "ascii": ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_ways_to_start_the_interpreter(mode: str, tmp_path: Path) -> None:
    options, variables = MODES[mode]
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the current directory was imported')\n")
    folder = tmp_path if mode.startswith(("P", "PYTHONSAFE")) and mode != "PYTHONDONTWRITEBYTECODE" else ROOT
    started(LIGHT, *options, variables=variables, folder=folder)
    assert started(OPS, *options, variables=variables, folder=folder).startswith("True 0")


def test_the_light_part_gives_no_warning() -> None:
    started(LIGHT, "-W", "error")
    started("import torch, warnings; warnings.simplefilter('error'); import sslfast.ops, sslfast.adapters")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is written beside the modules; as root, which ``chmod`` does not stop, this is what can be seen."""
    site = tmp_path / "site"
    site.mkdir()
    for path in ["", *(str(found.relative_to(ROOT / "sslfast")) for found in (ROOT / "sslfast").rglob("*"))]:
        source, target = ROOT / "sslfast" / path, site / "sslfast" / path
        if "__pycache__" in path:
            continue
        if source.is_dir():
            target.mkdir(mode=0o755)
        else:
            target.symlink_to(source)
    before = sorted(site.rglob("*"))
    for place in (site, *(path for path in before if path.is_dir())):
        place.chmod(0o555)
    started(LIGHT, path=site, folder=tmp_path, variables={"PYTHONDONTWRITEBYTECODE": "1"})
    assert started(OPS, path=site, folder=tmp_path, variables={"PYTHONDONTWRITEBYTECODE": "1"}).startswith("True 0")
    assert sorted(site.rglob("*")) == before
    for place in (site, *(path for path in before if path.is_dir())):
        place.chmod(0o755)


def test_an_archive_has_no_core_and_says_so(tmp_path: Path) -> None:
    """A library cannot be loaded from an archive: one warning, and the references."""
    archive = tmp_path / "sslfast.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (ROOT / "sslfast").rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                file.write(path, path.relative_to(ROOT))
    started(LIGHT, path=archive, folder=tmp_path)
    printed = started(OPS, path=archive, folder=tmp_path)
    assert printed.startswith("False 1 sslfast's compiled core cannot be loaded from an archive")
