import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sslfast.evaluation.linear_sgd as heads_module
from sslfast.config import from_dict
from sslfast.evaluation.encoders import TrunkEncoder
from sslfast.evaluation.linear import LinearConfig, evaluate_linear, render_table
from sslfast.evaluation.linear_sgd import FrozenMaps, Heads
from sslfast.evaluation.sgd import GOYAL, check_finite
from sslfast.models import ResNetConfig, build_trunk
from tests.evaluation.runs import write_data, write_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), train=8, val=4)


def test_heads() -> None:
    heads = Heads({"trained/res4": (4, 3, 3), "trained/res5avg-plain": (5, 1, 1)}, classes=6, seed=2)
    norm, plain = heads.heads
    assert [type(part) for part in norm] == [nn.BatchNorm2d, nn.Flatten, nn.Linear]  # type: ignore[arg-type]
    assert [type(part) for part in plain] == [nn.Flatten, nn.Linear]  # type: ignore[arg-type]
    found = heads({"trained/res4": torch.rand(2, 4, 3, 3), "trained/res5avg-plain": torch.rand(2, 5, 1, 1)})
    assert {name: list(value.shape) for name, value in found.items()} == {
        "trained/res4": [2, 6],
        "trained/res5avg-plain": [2, 6],
    }
    linear = norm[2]  # type: ignore[index]
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not linear.bias.any()
    again = Heads({"x": (4, 3, 3)}, classes=6, seed=2).heads[0][2]  # type: ignore[index]
    assert torch.equal(again.weight, linear.weight)


def test_trunk_is_not_modified() -> None:
    trunk = build_trunk(ResNetConfig(name="resnet18"), seed=0)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    maps = FrozenMaps({"trained": TrunkEncoder(trunk)}, GOYAL.layers, device=CPU, precision=torch.float32)
    found = maps(torch.zeros(2, 3, 24, 24, dtype=torch.uint8))
    assert list(found) == [f"trained/{layer}" for layer in GOYAL.layers]
    assert torch.equal(found["trained/res5avg"], found["trained/res5avg-plain"])
    assert not any(value.requires_grad for value in found.values())
    assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())


def test_goyal(run: Path, data: Path) -> None:
    encoders = ("trained", "untrained")
    config = LinearConfig(protocol="goyal", encoders=encoders, epochs=4, batch_size=8, device="cpu")
    result = evaluate_linear(run, data, config)
    assert from_dict(LinearConfig, result["config"]) == config
    assert json.loads((run / "evaluation" / "linear-goyal.json").read_text()) == result
    assert result["protocol"] == "linear-goyal-4ep"
    assert (result["epochs"], result["published_epochs"], result["drops"]) == (4, 28, [1, 2, 3])
    assert result["lr"] == pytest.approx(0.01 * 8 / 256)
    assert [row["protocol"] for row in result["results"]] == [f"linear-goyal-4ep-{layer}" for layer in GOYAL.layers] * 2
    assert [row["protocol"] for row in result["best"]] == ["linear-goyal-4ep-best-of-7"] * 2
    for best, encoder in zip(result["best"], ("trained", "untrained"), strict=True):
        assert best["top1"] == max(row["top1"] for row in result["results"] if row["encoder"] == encoder)
    # Colours tell the classes apart, and BatchNorm makes maps of any scale learnable.
    assert max(row["top1"] for row in result["results"]) == 1.0
    assert all(row["top5"] == 1.0 for row in result["results"])
    assert not list((run / "evaluation").glob("*.partial.pt"))
    table = render_table(result)
    for words in ("linear-goyal-4ep: 3 classes, 24 training", "best-of-7", "100.0 ± 0.0"):
        assert words in table, words


def test_seeds_give_mean_and_spread(run: Path, data: Path, tmp_path: Path) -> None:
    def evaluate(*seeds: int) -> dict[str, object]:
        path = tmp_path / f"{seeds}.json"
        config = LinearConfig(protocol="moco", seeds=seeds, epochs=2, batch_size=8, device="cpu")
        row: dict[str, object] = evaluate_linear(run, data, config, output=path)["results"][0]
        return row

    both, one, two = evaluate(0, 1), evaluate(0), evaluate(1)
    assert both["protocol"] == "linear-moco-2ep-res5avg-plain"
    values = [float(part["top1"]) for part in (one, two)]  # type: ignore[arg-type]
    assert both["top1_of_seeds"] == values
    assert both["top1"] == pytest.approx(sum(values) / 2)
    assert both["top1_spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert one["top1_spread"] == 0.0


def test_stopped_evaluation_resumes(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LinearConfig(protocol="goyal", layers=("res3",), epochs=3, batch_size=8, device="cpu")
    whole = evaluate_linear(run, data, config, output=tmp_path / "whole.json")
    begun: list[int] = []

    def stop(losses: dict[str, torch.Tensor], epoch: int, *, remedy: str) -> None:
        begun.append(epoch)
        if len(begun) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(heads_module, "check_finite", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_linear(run, data, config, output=tmp_path / "parts.json")
    assert (tmp_path / "parts-seed0.partial.pt").exists()
    parts = evaluate_linear(run, data, config, output=tmp_path / "parts.json")
    assert begun == [0, 1, 1, 2]
    assert parts["results"] == whole["results"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.json", "whole.json"]


def test_errors(run: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"layers of linear-goyal must be some of conv1, .*, got 'res6'"):
        evaluate_linear(run, data, LinearConfig(protocol="goyal", layers=("res6",), device="cpu"))
    with pytest.raises(ValueError, match="encoders must be trained and untrained or one of them, got 'raw pixels'"):
        evaluate_linear(run, data, LinearConfig(protocol="goyal", encoders=("raw pixels",), device="cpu"))
    with pytest.raises(ValueError, match="belong to --protocol goyal or moco"):
        LinearConfig(epochs=3)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        LinearConfig(protocol="goyal", epochs=0)
    with pytest.raises(ValueError, match=r"batch_size=256 is larger than the data set \(24 images\)"):
        evaluate_linear(run, data, LinearConfig(protocol="goyal", device="cpu"))
    with pytest.raises(ValueError, match="the loss of trained/res5 is nan after epoch 3"):
        check_finite({"trained/res5": torch.tensor(float("nan"))}, 2, remedy="use --protocol probe")
