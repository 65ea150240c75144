from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.data.manifest import Manifest
from sslfast.evaluation.cache import Cached, FeatureCache, weights_digest
from sslfast.evaluation.dataset import FeatureConfig, load_evaluation_set
from sslfast.evaluation.encoders import TrunkEncoder, extract_all, extract_layers, load_run
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.results import cache_folder
from sslfast.models import ResNetConfig, build_trunk
from sslfast.runs.checkpoint import save_checkpoint
from tests.evaluation.runs import write_data, write_run
from tests.pictures import write_folder

CPU = torch.device("cpu")


class Counting:
    """The mean colour, and how many images were asked about."""

    def __init__(self, weight: int = 1) -> None:
        self.weight, self.images = weight, 0

    def to(self, device: torch.device) -> "Counting":
        return self

    def identity(self) -> dict[str, Any]:
        return {"encoder": "counting", "weights": self.weight}

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self.weight * images.float().mean((2, 3))


def test_cached_features_need_no_image(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_folder(tmp_path / "data", [f"c/{i}.jpg" for i in range(5)]))
    cache, encoder = FeatureCache(tmp_path / "features"), Counting()
    first = extract_all({"a": encoder}, manifest, size=16, cache=cache)
    second = extract_all({"a": encoder}, manifest, size=16, cache=cache)
    assert encoder.images == 5
    assert torch.equal(first.values["a"], second.values["a"])
    assert torch.equal(first.rows, second.rows)
    # Another name is no other encoder; a second encoder alone is computed.
    other = Counting(2)
    both = extract_all({"b": encoder, "c": other}, manifest, size=16, cache=cache)
    assert (encoder.images, other.images) == (5, 5)
    assert torch.equal(both.values["c"], 2 * both.values["b"])


@pytest.mark.parametrize("change", ["weights", "size", "data", "deleted", "cut", "rubbish"])
def test_changed_inputs_are_extracted_again(tmp_path: Path, change: str) -> None:
    root = write_folder(tmp_path / "data", [f"c/{i}.jpg" for i in range(4)])
    cache, encoder, size = FeatureCache(tmp_path / "features"), Counting(), 16
    extract_all({"": encoder}, Manifest.scan(root), size=size, cache=cache)
    (file,) = (tmp_path / "features").iterdir()
    if change == "weights":
        encoder.weight = 3
    elif change == "size":
        size = 17
    elif change == "data":
        (root / "c" / "0.jpg").write_bytes((root / "c" / "1.jpg").read_bytes())
    elif change == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200] if change == "cut" else b"rubbish")
    expected = extract_all({"": Counting(encoder.weight)}, Manifest.scan(root), size=size)
    found = extract_all({"": encoder}, Manifest.scan(root), size=size, cache=cache)
    assert encoder.images == 8
    assert torch.equal(found.values[""], expected.values[""])


def test_bad_images_are_cached_and_still_an_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", [f"c/{i}.jpg" for i in range(3)], width=90, height=90)
    victim = root / "c" / "1.jpg"
    victim.write_bytes(victim.read_bytes()[:900])
    manifest, cache, encoder = Manifest.scan(root), FeatureCache(tmp_path / "features"), Counting()
    for _ in range(2):
        found = extract_all({"": encoder}, manifest, size=16, cache=cache, on_bad_image="skip")
        assert found.rows.tolist() == [0, 2]
        assert [path for path, _ in found.bad_images] == ["c/1.jpg"]
    assert encoder.images == 2
    with pytest.raises(ValueError, match=r"1.jpg cannot be used"):
        extract_all({"": encoder}, manifest, size=16, cache=cache)


def test_layers_are_cached_one_by_one(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_folder(tmp_path / "data", [f"c/{i}.jpg" for i in range(3)]))
    encoder = TrunkEncoder(build_trunk(ResNetConfig(name="resnet18"), seed=0))
    cache, reader = FeatureCache(tmp_path / "features"), ImageReader(manifest, 24)
    one = extract_layers({"t": encoder}, ["res3", "res5"], reader, device=CPU, cache=cache)
    assert len(list((tmp_path / "features").iterdir())) == 2
    two = extract_layers({"t": encoder}, ["res5", "res2"], ImageReader(manifest, 24), device=CPU, cache=cache)
    assert len(list((tmp_path / "features").iterdir())) == 3
    assert {name: list(value.shape) for name, value in (one.values | two.values).items()} == {
        "t/res3": [3, 128 * 9],
        "t/res5": [3, 512],
        "t/res2": [3, 64 * 36],
    }
    assert torch.equal(one.values["t/res5"], two.values["t/res5"])


def test_a_resumed_run_is_evaluated_again(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=2, val=1)
    first = load_evaluation_set(run, data, FeatureConfig(device="cpu"))
    folder = cache_folder(run)
    assert len(list(folder.iterdir())) == 6  # three encoders, train and val
    state = torch.load(run / "checkpoints" / "step_00000005.pt", weights_only=True)
    state["method"]["trunk.layer1.0.conv1.weight"] *= 1.5
    save_checkpoint(run / "checkpoints", state | {"step": 9}, 9)
    second = load_evaluation_set(run, data, FeatureConfig(device="cpu"))
    assert len(list(folder.iterdir())) == 8
    assert not torch.equal(first.train["trained"], second.train["trained"])
    assert torch.equal(first.train["untrained"], second.train["untrained"])
    assert first.facts["weights"] != second.facts["weights"]
    for path in folder.iterdir():
        path.unlink()
    load_evaluation_set(run, data, FeatureConfig(device="cpu", cache=False))
    assert list(folder.iterdir()) == []
    assert load_run(run).encoders["trained"].identity()["weights"] == second.facts["weights"]


def test_a_file_is_as_large_as_its_features(tmp_path: Path) -> None:
    """docs/scale.md computes 4 N D bytes."""
    FeatureCache(tmp_path).save({"a": 1}, Cached(values=torch.ones(500, 64), rows=torch.arange(500)))
    (path,) = tmp_path.iterdir()
    assert 4 * 500 * 64 < path.stat().st_size < 4 * 500 * 64 + 200


def test_weights_digest() -> None:
    one, two = (build_trunk(ResNetConfig(name="resnet18"), seed=seed) for seed in (0, 0))
    assert weights_digest(one) == weights_digest(two)
    two.bn1.running_mean[3] += 1e-6  # type: ignore[index, operator]
    assert weights_digest(one) != weights_digest(two)


def test_without_a_folder_nothing_is_stored() -> None:
    cache = FeatureCache(None)
    cache.save({"a": 1}, Cached(values=torch.ones(1, 1), rows=torch.zeros(1), bad_images=[]))
    assert cache.load({"a": 1}) is None
