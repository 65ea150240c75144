from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.config import load_json, save_json
from sslfast.data.manifest import Manifest
from sslfast.evaluation.dataset import FeatureConfig, load_evaluation_set
from sslfast.evaluation.encoders import RawPixels, TrunkEncoder, extract_all, extract_features, load_run
from sslfast.evaluation.folders import load_manifests
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from sslfast.evaluation.results import evaluation_folder, mean_and_spread, standard_error
from sslfast.models import ResNetConfig, build_trunk
from sslfast.runs.checkpoint import load_latest, save_checkpoint
from sslfast.views import IMAGENET_MEAN, IMAGENET_STD
from sslfast.weights.export import export_trunk
from sslfast.weights.load import build_head, read_weights
from tests.evaluation.runs import write_data, write_run
from tests.pictures import write_folder


class Pixels:
    """The preprocessed image itself."""

    def to(self, device: torch.device) -> "Pixels":
        return self

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.flatten(1).float()


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 2), (100, 3)])
def test_batches_and_threads_change_nothing(tmp_path: Path, batch_size: int, workers: int) -> None:
    manifest = Manifest.scan(write_folder(tmp_path, [f"c{i % 2}/{i}.jpg" for i in range(7)], width=50, height=37))
    expected = extract_features(Pixels(), manifest, size=20)
    found = extract_features(Pixels(), manifest, size=20, batch_size=batch_size, workers=workers)
    assert torch.equal(found, expected)
    trunk = TrunkEncoder(build_trunk(ResNetConfig(name="resnet18"), seed=0))
    torch.testing.assert_close(
        extract_features(trunk, manifest, size=20, batch_size=batch_size, workers=workers),
        extract_features(trunk, manifest, size=20),
    )


def test_trunk_encoder_is_frozen_and_normalises() -> None:
    trunk = build_trunk(ResNetConfig(name="resnet18"), seed=0)
    encoder = TrunkEncoder(trunk)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    images = torch.arange(2 * 3 * 33 * 33).remainder(256).to(torch.uint8).reshape(2, 3, 33, 33)
    with torch.no_grad():
        found = encoder(images)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        torch.testing.assert_close(found, trunk((images / 255 - mean) / std))
        torch.testing.assert_close(encoder(images[1:])[0], found[1])
    assert not trunk.training
    assert found.shape == (2, 512)
    assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())


def test_raw_pixels() -> None:
    flat = torch.full((1, 3, 40, 40), 200, dtype=torch.uint8)
    features = RawPixels(side=4)(flat).reshape(3, 16)
    for channel in range(3):
        level = (200 / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(features[channel], torch.full((16,), level))
    with pytest.raises(ValueError, match="side must be at least 1 pixel, got side=0"):
        RawPixels(side=0)


def test_run_is_rebuilt(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seed=3, weights_seed=8)
    loaded = load_run(run)
    assert loaded.size == 24
    assert loaded.step == 5
    assert loaded.checkpoint.name == "step_00000005.pt"
    images = torch.arange(3 * 24 * 24).remainder(251).to(torch.uint8).reshape(1, 3, 24, 24)
    for name, seed in (("trained", 8), ("untrained", 3)):
        expected = TrunkEncoder(build_trunk(ResNetConfig(name="resnet18"), seed=seed))(images)
        torch.testing.assert_close(loaded.encoders[name](images), expected)


def test_files_in_place_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seed=3, weights_seed=8)
    trunk = read_weights(run)
    export_trunk(run, tmp_path / "own.pth")
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in trunk.state.items()}}, tmp_path / "moco.pth.tar")
    save_checkpoint(run / "checkpoints", {"step": 6, "method": {"trunk.x": torch.zeros(1)}}, 6)
    images = torch.arange(3 * 24 * 24).remainder(251).to(torch.uint8).reshape(1, 3, 24, 24)
    for path, size, step, seed in (
        (run / "checkpoints" / "step_00000005.pt", 24, 5, 3),
        (tmp_path / "own.pth", 24, 5, 3),
        (tmp_path / "moco.pth.tar", 224, None, None),
    ):
        loaded = load_run(path)
        assert (loaded.size, loaded.step, loaded.facts["seed"], loaded.checkpoint) == (size, step, seed, path)
        for name, expected in (("trained", 8), ("untrained", seed or 0)):
            encoder = TrunkEncoder(build_trunk(ResNetConfig(name="resnet18"), seed=expected))
            torch.testing.assert_close(loaded.encoders[name](images), encoder(images))
        assert evaluation_folder(path) == Path(f"{path}.evaluation")
    assert evaluation_folder(run) == run / "evaluation"
    data = write_data(tmp_path / "data", train=2, val=1)
    result = evaluate_knn(tmp_path / "moco.pth.tar", data, KnnConfig(k=(1,), size=24, device="cpu"))
    assert load_json(tmp_path / "moco.pth.tar.evaluation" / "knn.json") == result
    assert (result["step"], result["recipe"]) == (None, None)


def test_the_head_ends_the_encoder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    images = torch.arange(2 * 3 * 24 * 24).remainder(251).to(torch.uint8).reshape(2, 3, 24, 24)
    encoders = load_run(run, head=True).encoders
    found = load_latest(run / "checkpoints")
    assert found is not None
    state = found[1]["method"]
    with torch.no_grad():
        trunk = load_run(run).encoders["trained"](images)
        expected = normalize(trunk @ state["image_head.weight"].T + state["image_head.bias"], dim=1)
        torch.testing.assert_close(encoders["trained"](images), expected)
    assert encoders["trained"].identity() != load_run(run).encoders["trained"].identity()
    export_trunk(run, tmp_path / "trunk.pth")
    with pytest.raises(ValueError, match=r"trunk.pth .* has no projection head; leave out the head"):
        load_run(tmp_path / "trunk.pth", head=True)
    mlp = {"0.weight": torch.ones(3, 2), "0.bias": torch.tensor([0.0, 1.0, -9.0]), "2.weight": torch.ones(1, 3),
           "2.bias": torch.zeros(1)}  # fmt: skip
    head = build_head(mlp, "a file")
    assert head(torch.ones(1, 2)).tolist() == [[5.0]]  # the ReLU removes the third
    with pytest.raises(ValueError, match="the head in a file is none of linear layers and BatchNorm"):
        build_head({"0.gamma": torch.ones(3)}, "a file")


def test_run_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a run directory"):
        load_run(tmp_path / "nothing")
    run = write_run(tmp_path / "run")
    found = load_latest(run / "checkpoints")
    assert found is not None
    save_checkpoint(run / "checkpoints", {"step": 6, "method": {"trunk.x": torch.zeros(1)}}, 6)
    with pytest.raises(ValueError, match=r"step_00000006.pt does not hold a resnet18"):
        load_run(run)
    config = load_json(run / "config.json")
    del config["model"]
    save_json(run / "config.json", config)
    with pytest.raises(ValueError, match="lacks 'model'"):
        load_run(run)
    empty = write_run(tmp_path / "empty")
    for path in (empty / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        load_run(empty)


def test_folder_errors(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", train=2, val=1)
    assert load_manifests(data)[0].classes == ["blue", "green", "red"]
    (data / "val" / "red").rename(data / "val" / "rot")
    with pytest.raises(ValueError, match=r"differ \(only in train: red; only in val: rot\)"):
        load_manifests(data)
    (data / "val" / "rot" / "0.png").rename(data / "val" / "0.png")
    with pytest.raises(ValueError, match=r"val has 1 images outside class folders \(0.png\)"):
        load_manifests(data)
    (data / "val").rename(data / "test")
    with pytest.raises(ValueError, match=r"has no folder val: an evaluation needs .*/val/<class>/"):
        load_manifests(data)
    write_folder(tmp_path / "one", ["train/a/0.png", "val/a/0.png"])
    with pytest.raises(ValueError, match="has one class, a; an evaluation needs at least 2"):
        load_manifests(tmp_path / "one")


def test_bad_images(tmp_path: Path) -> None:
    data, run = write_data(tmp_path / "data", train=3, val=2), write_run(tmp_path / "run")
    victim = data / "train" / "green" / "1.png"
    victim.write_bytes(victim.read_bytes()[:600])  # the header is whole, the pixels are not
    manifest = Manifest.scan(data / "train")
    with pytest.raises(ValueError, match=r"green/1.png cannot be used \(damaged.*--on-bad-image skip"):
        extract_features(Pixels(), manifest, size=24)
    found = extract_all({"pixels": Pixels()}, manifest, size=24, batch_size=2, on_bad_image="skip")
    assert found.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [path for path, _ in found.bad_images] == ["green/1.png"]
    evaluation = load_evaluation_set(run, data, FeatureConfig(device="cpu", on_bad_image="skip"))
    assert evaluation.train_labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert evaluation.facts["data"]["train"]["left_out"] == 1
    assert len(evaluation.train_locations) == len(evaluation.train["trained"]) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [({"size": 0}, "size must be"), ({"batch_size": 0}, "batch_size must be"), ({"workers": -1}, "workers must be")],
)
def test_arguments(tmp_path: Path, options: dict[str, int], words: str) -> None:
    manifest = Manifest.scan(write_folder(tmp_path, ["a/0.png"]))
    with pytest.raises(ValueError, match=words):
        extract_features(Pixels(), manifest, **{"size": 8, **options})


def test_standard_error() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 7) == 0.0


def test_mean_and_spread() -> None:
    assert mean_and_spread([0.5]) == (0.5, 0.0)
    assert mean_and_spread([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
