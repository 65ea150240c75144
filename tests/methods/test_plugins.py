"""Methods of installed packages: found by name through entry points, trained, resumed and evaluated like ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_images

MODULE = '''
from dataclasses import dataclass, replace
from typing import ClassVar
import sslfast
from sslfast.methods import Rotation, register_method
from sslfast.models import ResNetConfig
from sslfast.training import LOGGERS

@register_method
class Theirs(Rotation):
    @dataclass(kw_only=True)
    class Config(Rotation.Config):
        name: ClassVar[str] = "theirs"

def theirs():
    """A recipe of theirs."""
    base = sslfast.RECIPES["rotation-small"]()
    method = Theirs.Config(**vars(base.method))
    method.image_view.crop.size = 16
    return replace(base, method=method, model=replace(base.model, width=0.125), epochs=1, batch_size=8)

sslfast.RECIPES["theirs-small"] = theirs
LOGGERS["theirs"] = "their_package:Log"

class Log:
    def __init__(self, context): self.path = context.run.path / "theirs.txt"
    def write(self, record): self.path.write_text(str(record["step"]))
    def sync(self): pass
    def close(self): pass
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as pip installs into: a package with a plugin, and one whose plugin is broken."""
    site = tmp_path / "site"
    for package, module, content in (("their-package", "their_package", MODULE), ("broken", "broken", "1 / 0\n")):
        info = site / f"{module}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[sslfast.plugins]\n{module} = {module}\n")
        (site / f"{module}.py").write_text(content)
    return site


def command(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    line = [sys.executable, "-m", "sslfast", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def test_trained_resumed_and_evaluated(site: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data", 16)
    run = str(tmp_path / "run")
    train = ["pretrain", str(tmp_path / "data"), "--recipe", "theirs-small", "-o", run, "--log", "theirs"]
    train += ["--device", "cpu"]
    done = command(site, *train)
    assert done.returncode == 0, done.stderr
    line = "sslfast: plugin broken of broken 1.2 cannot be used (ZeroDivisionError: division by zero); correct or"
    assert [text.startswith(line) for text in done.stderr.splitlines() if "plugin" in text] == [True]
    assert (tmp_path / "run" / "theirs.txt").read_text() == "2"
    again = command(site, *train)
    assert (again.returncode, "resumed from" in again.stderr) == (0, True)
    embedded = command(site, "embed", run, str(tmp_path / "data"), "-o", str(tmp_path / "out.npy"))
    assert embedded.returncode == 0, embedded.stderr
    without = command(tmp_path, "embed", run, str(tmp_path / "data"), "-o", str(tmp_path / "out.npy"))
    assert without.returncode == 2
    assert "--plugin MODULE, or install its package" in without.stderr


def test_listed(site: Path) -> None:
    listed = json.loads(command(site, "info", "--json").stdout)["plugins"]
    assert listed == {
        "their_package": "their-package 1.2",
        "broken": "broken 1.2, not usable: ZeroDivisionError: division by zero",
    }
    done = command(site, "pretrain", "--help")
    assert done.returncode == 0
    assert "theirs-small: A recipe of theirs." in done.stdout
    missing = command(site, "pretrain", "synthetic:9", "--recipe", "theirs-smal")
    assert missing.returncode == 2
    assert "unknown recipe 'theirs-smal'; did you mean theirs-small" in missing.stderr


def test_our_own_names_import_no_plugin(site: Path) -> None:
    done = command(site, "pretrain", "synthetic:9", "--recipe", "pirl-small", "--print-config")
    assert (done.returncode, done.stderr) == (0, "")
