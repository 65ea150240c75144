"""Every file of examples/ runs as it stands."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sslfast

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for number in range(8):
        place = root / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return str(root)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plain_pytorch", "lightning_module", "lightly_on_our_bank"])
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_script(name: str, folder: str) -> None:
    assert math.isfinite(load(name).main(folder, 1))


def test_own_method(folder: str, tmp_path: Path) -> None:
    load("own_method")
    small = {"model.width": 0.125, "method.dimensions": 8}
    result = sslfast.pretrain(folder, "alignment-small", tmp_path / "run", epochs=1, batch_size=4, **small)
    assert result.metrics["loss"] == pytest.approx(result.metrics["alignment"] + result.metrics["uniformity"], abs=1e-6)
    assert sslfast.load(tmp_path / "run").out_features == 64
    del sslfast.RECIPES["alignment-small"]


def test_all_are_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in listed, path.name


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other, on less data; IPython is not needed to run them."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "first_run.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells if "evaluate_knn" in "".join(cell["source"]) and "outputs" in cell)
    changes = {
        "train_per_photo=30": "train_per_photo=2",
        "val_per_photo=20": "val_per_photo=2",
        "**narrow)": "**narrow, epochs=1, batch_size=18)",
        "from IPython.display import Image": "Image = lambda *_, **__: None",
    }
    names: dict[str, Any] = {}
    for cell in code:
        for whole, part in changes.items():
            cell = cell.replace(whole, part)
        exec(compile(cell, "first_run.ipynb", "exec"), names)
    assert names["embeddings"].values.shape == (36, 128)
    assert math.isfinite(names["loss"].sum().item())
