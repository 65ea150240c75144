"""Methods, networks and image sources of installed packages: found through entry points, trained, resumed and evaluated
like ours."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny import write_images

SOURCES = """
import zipfile
from dataclasses import dataclass
from torch import nn
from sslfast.data import HASHED_BYTES, Changes, ImageSource, ListedImage, Manifest, content_hash, register_source
from sslfast.models import register_trunk

class Net(nn.Sequential):
    out_features = 8

@register_trunk("their-net")
def their_net(slope: float = 0.1) -> nn.Module:
    return Net(nn.Conv2d(3, 8, 3), nn.LeakyReLU(slope), nn.AdaptiveAvgPool2d(1), nn.Flatten())

@register_source
@dataclass(kw_only=True, eq=False, repr=False)
class Pack(ImageSource):
    name = "their-pack"

    @classmethod
    def accepts(cls, path):
        return path.suffix == ".pack"

    @classmethod
    def open(cls, path, *, on_bad_image, progress):
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in sorted(archive.namelist())}
        images = [
            ListedImage(name, len(data), content_hash(data[:HASHED_BYTES]), name.partition("/")[0])
            for name, data in files.items()
        ]
        return Manifest.from_images(cls(root=path, paths=list(files)), images, excluded=[], on_bad_image=on_bad_image)

    def read(self, row):
        with zipfile.ZipFile(self.root) as archive:
            return archive.read(self.paths[row])

    def changes(self, manifest, *, contents):
        with zipfile.ZipFile(self.root) as archive:
            names = set(archive.namelist())
        return Changes(missing=[(path, "") for path in self.paths if path not in names])
"""

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


def test_a_network_and_a_source(site: Path, tmp_path: Path) -> None:
    """In loader workers, in a new process for the resume, and in evaluations, which need the network's module alone."""
    info = site / "their_sources-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-sources\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sslfast.plugins]\ntheir_sources = their_sources\n")
    (site / "their_sources.py").write_text(SOURCES)
    shutil.rmtree(site / "broken-1.2.dist-info")
    data, run = tmp_path / "data", str(tmp_path / "run")
    for split in ("train", "val"):
        write_images(data / split, 16)
        with zipfile.ZipFile(data / f"{split}.pack", "w") as archive:
            for path in sorted((data / split).rglob("*.*")):
                archive.write(path, path.relative_to(data / split))
        shutil.rmtree(data / split)
    options = ["--device", "cpu", "--loader.workers", "1", "--epochs", "2", "-o", run]
    train = ["pretrain", str(data / "train.pack"), "--recipe", "theirs-small", "--model.name", "their-net", *options]
    done = command(site, *train, "--model.options", "slope", "0.2")
    assert done.returncode == 0, done.stderr
    assert "# source\ttheir-pack\n" in (tmp_path / "run" / "manifest.tsv").read_text()
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert model == {"name": "custom", "factory": "their_sources:their_net", "options": {"slope": 0.2}}
    again = command(site, *train, "--model.options", "slope", "0.2")
    assert (again.returncode, "resumed from" in again.stderr) == (0, True), again.stderr
    scored = command(site, "evaluate", "knn", run, str(data), "--k", "1", "--workers", "0")
    assert scored.returncode == 0, scored.stderr
    assert re.search(r"2 classes, 16 training and 16 validation images", scored.stdout)
    (tmp_path / "settings.json").write_text('{"recipe": "theirs-small", "model": {"name": "their-net"}}')
    shown = command(site, "pretrain", "--config", str(tmp_path / "settings.json"), "--print-config")
    assert "factory: their_sources:their_net" in shown.stdout, shown.stderr
    unknown = command(
        site, "pretrain", str(data / "train.pack"), "--recipe", "theirs-small", "--model.name", "their-ne"
    )
    assert "did you mean their-net" in unknown.stderr
    manifest = str(tmp_path / "run" / "manifest.tsv")
    without = command(tmp_path, "pretrain", manifest, "--recipe", "pirl-small", "--dry-run")
    assert "of a source 'their-pack' that this version does not know" in without.stderr


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
