import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sslfast.evaluation import linear_probe
from sslfast.evaluation.linear import LinearConfig, evaluate_linear, render_table
from sslfast.evaluation.linear_probe import StandardFeatures, fit_linear, held_out_mask, probe_scores, train_probe
from sslfast.ops.philox import random_uniform
from tests.evaluation.runs import write_data, write_run


def noise(rows: int, columns: int, seed: int) -> torch.Tensor:
    return random_uniform(torch.arange(rows), columns, seed=seed, stream=0, step=0) - 0.5


def test_separable_data_is_classified_perfectly() -> None:
    labels = torch.arange(120) % 6
    features = torch.eye(6)[labels] @ noise(6, 10, 0) * 4 + 0.05 * noise(120, 10, 1)
    probe = train_probe(features, labels, classes=6)
    assert torch.equal(probe(features).argmax(1), labels)
    fresh = torch.eye(6)[labels] @ noise(6, 10, 0) * 4 + 0.05 * noise(120, 10, 2)
    assert torch.equal(probe(fresh).argmax(1), labels)
    assert max(probe.held_out.values()) == 1.0


def test_noise_is_about_chance() -> None:
    labels, fresh = torch.arange(400) % 4, torch.arange(2000) % 4
    probe = train_probe(noise(400, 20, 3), labels, classes=4)
    top1 = (probe(noise(2000, 20, 4)).argmax(1) == fresh).double().mean().item()
    assert abs(top1 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("strength", [0.5, 1e-2, 1e-4])
def test_optimum_is_that_of_scikit_learn(strength: float) -> None:
    labels = torch.arange(150) % 3
    features = (torch.eye(3)[labels] @ noise(3, 7, 5) + noise(150, 7, 6)).double()
    layer = fit_linear(features, labels, classes=3, strength=strength, tolerance=1e-9)
    assert layer.gradient < 1e-7
    reference = LogisticRegression(C=1 / (strength * 150), tol=1e-10, max_iter=10_000)
    reference.fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(layer.weight.T.numpy(), reference.coef_, atol=2e-4)
    # A constant added to all biases changes nothing.
    bias = layer.bias - layer.bias.mean()
    np.testing.assert_allclose(bias.numpy(), reference.intercept_ - reference.intercept_.mean(), atol=2e-4)


def test_rotation_changes_nothing_but_time() -> None:
    """More columns than rows, strongly correlated: the probe is the optimum that a plain fit finds."""
    labels = torch.arange(60) % 3
    features = noise(60, 5, 9) @ noise(5, 80, 10) + 0.3 * noise(60, 80, 11) + 2
    probe = train_probe(features, labels, classes=3, strengths=[1e-2])
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    plain = fit_linear(standard, labels, classes=3, strength=1e-2, tolerance=1e-9)
    torch.testing.assert_close(probe.layer.weight, plain.weight, atol=1e-3, rtol=0)
    assert probe.layer.iterations < plain.iterations


def test_start_does_not_change_the_optimum() -> None:
    labels, features = torch.arange(90) % 3, noise(90, 5, 7).double()
    cold = fit_linear(features, labels, classes=3, strength=1e-2, tolerance=1e-9)
    far = fit_linear(features, labels, classes=3, strength=1.0, tolerance=1e-9)
    warm = fit_linear(features, labels, classes=3, strength=1e-2, start=far, tolerance=1e-9)
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-6, rtol=0)


def test_probe_is_deterministic_and_ignores_constant_columns() -> None:
    labels = torch.arange(60) % 3
    features = noise(60, 5, 8)
    features[:, 2] = 7.25
    one, two = (train_probe(features, labels, classes=3) for _ in range(2))
    assert torch.equal(one.layer.weight, two.layer.weight)
    assert one.strength == two.strength
    assert one.deviation[2] == 1.0
    torch.testing.assert_close(one.layer.weight[2], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("columns", [5, 90])
def test_blocks_of_rows_find_the_same_probe(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows in float32, read again at every pass: the optimum of all rows in float64."""
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] @ noise(3, columns, 5) + noise(60, columns, 6) + 1
    whole = train_probe(features, labels, classes=3)
    monkeypatch.setattr(linear_probe, "BLOCK_BYTES", 7 * 8 * (2 * columns + 9))
    blocks = train_probe(features, labels, classes=3)
    assert StandardFeatures(features, labels, classes=3, device=torch.device("cpu")).block == 7
    assert (blocks.strength, blocks.held_out) == (whole.strength, whole.held_out)
    torch.testing.assert_close(blocks.layer.weight, whole.layer.weight, atol=2e-3, rtol=1e-2)
    fresh = noise(50, columns, 8)
    assert (blocks(fresh).argmax(1) == whole(fresh).argmax(1)).all()
    expected = probe_scores(whole, features, labels, classes=3)
    assert probe_scores(blocks, features, labels, classes=3) == pytest.approx(expected, abs=1e-3)
    logits = whole(features)
    assert expected[2] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert expected[0] == (logits.argmax(1) == labels).double().mean().item()


def test_held_out_fifth() -> None:
    labels = torch.tensor([0] * 13 + [1] * 4 + [2] * 25)
    mask = held_out_mask(labels)
    assert [int(mask[labels == label].sum()) for label in range(3)] == [2, 0, 5]
    assert torch.equal(mask, held_out_mask(labels))
    assert not torch.equal(mask, held_out_mask(labels, seed=1))


def test_errors() -> None:
    features, labels = noise(8, 3, 0), torch.arange(8) % 2
    with pytest.raises(ValueError, match="no class has 5 training images"):
        train_probe(features, labels, classes=2)
    assert train_probe(features, labels, classes=2, strengths=[0.1]).held_out == {}
    with pytest.raises(ValueError, match="strengths must be positive numbers"):
        train_probe(features, labels, classes=2, strengths=[0.1, 0.0])
    with pytest.raises(ValueError, match="infinite values or NaN"):
        train_probe(features / 0, labels, classes=2, strengths=[0.1])


def test_evaluate_linear(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=6, val=3)
    result = evaluate_linear(run, data, LinearConfig(device="cpu"))
    assert json.loads((run / "evaluation" / "linear.json").read_text()) == result
    rows = {row["encoder"]: row for row in result["results"]}
    assert set(rows) == {"trained", "untrained", "raw pixels"}
    assert result["protocol"] == rows["trained"]["protocol"] == "linear-frozen-avgpool-lbfgs"
    assert rows["raw pixels"]["top1"] == 1.0
    assert rows["raw pixels"]["top5"] == 1.0
    assert all(row["largest_gradient"] <= 1e-5 for row in rows.values())
    assert "linear-frozen-avgpool-lbfgs: 3 classes, 18 training and 9 validation images" in render_table(result)
    both = evaluate_linear(run, data, LinearConfig(seeds=(0, 5), device="cpu"))["results"][0]
    assert len(both["top1_of_seeds"]) == len(both["strength_of_seeds"]) == 2
    assert both["top1"] == pytest.approx(sum(both["top1_of_seeds"]) / 2)
    with pytest.raises(ValueError, match="strengths must be positive"):
        LinearConfig(strengths=())
    with pytest.raises(ValueError, match="seeds must be whole numbers"):
        LinearConfig(seeds=())
