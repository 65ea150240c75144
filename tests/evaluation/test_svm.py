import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sslfast.evaluation.svm import (
    SvmConfig,
    class_precision,
    draw_shots,
    evaluate_svm,
    full_svm,
    linear_svm,
    normalise,
    render_table,
    shot_svm,
)
from sslfast.ops.philox import random_uniform
from tests.evaluation.runs import write_run
from tests.evaluation.voc_data import write_voc


def noise(rows: int, columns: int, seed: int) -> np.ndarray:
    return random_uniform(torch.arange(rows), columns, seed=seed, stream=0, step=0).double().numpy() - 0.5


def labelled(rows: int, classes: int) -> np.ndarray:
    """One class per row."""
    return np.where(np.arange(rows)[:, None] % classes == np.arange(classes), 1, -1).astype(np.int8)


def test_separable_features_have_perfect_precision() -> None:
    train, test = labelled(60, 4), labelled(40, 4)
    features = [
        normalise((labels > 0) + 0.1 * noise(len(labels), 4, seed)) for seed, labels in enumerate((train, test))
    ]
    found = full_svm(features[0], train, features[1], test, classes=list("abcd"), costs=(0.1, 10.0))
    assert found["mAP"] == found["mAP_11_point"] == 1.0
    assert found["ap"] == dict.fromkeys("abcd", 1.0)
    few = shot_svm(features[0], train, features[1], test, k=2, draws=3, costs=(1.0, 10.0))
    assert (few["mAP"], few["mAP_spread"], few["mAP_of_draws"]) == (1.0, 0.0, [1.0] * 3)


def test_noise_is_about_the_share_of_positives() -> None:
    train, test = labelled(120, 4), labelled(2000, 4)
    features = [normalise(noise(len(labels), 6, seed)) for seed, labels in ((3, train), (4, test))]
    found = full_svm(features[0], train, features[1], test, classes=list("abcd"), costs=(1.0,), workers=2)
    assert found["mAP"] == pytest.approx(0.25, abs=0.05)
    few = shot_svm(features[0], train, features[1], test, k=1, draws=5, costs=(1.0,))
    assert few["mAP"] == pytest.approx(0.25, abs=0.05)
    assert few["mAP_spread"] > 0


def test_svm_is_the_published_one() -> None:
    settings = linear_svm(5.0).get_params()
    expected = {
        "C": 5.0,
        "class_weight": {1: 2, -1: 1},
        "penalty": "l2",
        "loss": "squared_hinge",
        "dual": True,
        "max_iter": 2000,
    }
    assert {name: settings[name] for name in expected} == expected


def test_cost_is_the_one_of_best_validation() -> None:
    """With no signal but in one weak column, a cost near zero cannot win; the choice is per class."""
    labels = labelled(90, 3)
    features = normalise((labels > 0) * [3.0, 3.0, 3.0] + noise(90, 3, 8))
    found = full_svm(features, labels, features, labels, classes=list("abc"), costs=(1e-9, 1.0))
    assert set(found["cost"]) == set("abc")
    assert found["validation_ap"]["a"] == pytest.approx(1.0)


def test_difficult_images() -> None:
    column = np.array([1, 0, -1, 0], dtype=np.int8)
    assert class_precision(np.array([1.0, 9.0, 0.0, 5.0]), column) == (1.0, 1.0)
    # Rows 0 to 19 show class a as difficult objects that look like it: as negatives they cost the SVM its certainty.
    labels = labelled(80, 2)
    labels[:20, 0] = 0
    features = normalise((labelled(80, 2) > 0) + 0.2 * noise(80, 2, 2))
    features[:20] = features[20:40:2].repeat(2, 0)
    test = labelled(80, 2)
    aps = {
        how: full_svm(features, labels, normalise((test > 0) + 0.2 * noise(80, 2, 5)), test, classes=["a", "b"],
                      costs=(1.0,), difficult=how)["validation_ap"]["a"]  # type: ignore[arg-type]
        for how in ("ignore", "negative")
    }  # fmt: skip
    assert aps["ignore"] == pytest.approx(1.0)
    assert aps["negative"] < 0.9
    for position in range(2):
        rows = draw_shots(labels, 8, seed=0, draw=0, position=position)
        assert 0 not in labels[rows, position]


def test_draws() -> None:
    labels = labelled(60, 5)
    sets = {k: draw_shots(labels, k, seed=1, draw=2, position=3) for k in (1, 2, 8, 12)}
    for k, rows in sets.items():
        assert (labels[rows, 3] == 1).sum() == k
        assert (labels[rows, 3] == -1).sum() == 4 * k
    assert set(sets[1]) < set(sets[2]) < set(sets[8])
    assert np.array_equal(sets[8], draw_shots(labels, 8, seed=1, draw=2, position=3))
    assert not np.array_equal(sets[8], draw_shots(labels, 8, seed=1, draw=1, position=3))
    assert not np.array_equal(sets[8], draw_shots(labels, 8, seed=2, draw=2, position=3))


def test_evaluate_svm(tmp_path: Path) -> None:
    run, voc = write_run(tmp_path / "run"), write_voc(tmp_path / "voc", trainval=30, test=15)
    config = SvmConfig(
        layers=("conv1", "res5"), shots=(1, 4), shot_layers=("res3",), draws=2, costs=(1.0, 10.0), device="cpu"
    )
    result = evaluate_svm(run, voc, config)
    assert json.loads((run / "evaluation" / "lowshot.json").read_text()) == result
    assert [row["protocol"] for row in result["results"]] == [
        "voc-svm-conv1", "voc-svm-res5", "voc-svm-k1-res3", "voc-svm-k4-res3",
    ]  # fmt: skip
    conv1, _, one, _ = result["results"]
    assert conv1["mAP"] > 0.9  # colours, which the first layer keeps
    assert set(conv1["ap"]) == {"bird", "car", "dog"}
    assert one["k"] == 1
    assert len(one["mAP_of_draws"]) == 2
    assert one["cost_chosen_on"] == "test"
    assert result["data"]["train"]["split"] == "trainval"
    assert (result["data"]["train"]["images"], result["data"]["val"]["images"]) == (30, 15)
    table = render_table(result)
    for words in ("voc-svm: 3 classes, 30 training and 15 validation images", "conv1", "all", "±"):
        assert words in table, words
    again = evaluate_svm(run, tmp_path / "voc", replace(config, workers=2))
    assert again["results"] == result["results"]


def test_errors(tmp_path: Path) -> None:
    run, voc = write_run(tmp_path / "run"), write_voc(tmp_path / "voc", trainval=12, test=6)
    for options, words in (
        ({"layers": ("res9",)}, "layers must be some of conv1, .*, got res9"),
        ({"costs": ()}, "costs must be positive numbers"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"shots": (2, 0)}, r"shots must be at least 1, got \(2, 0\)"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shots": (8,)}, r"trainval has \d images of bird and \d+ without it; 8 and 3 are needed: lower --shots"),
        ({"train_split": "val"}, r"no <class>_val.txt"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_svm(run, voc, SvmConfig(device="cpu", **options))  # type: ignore[arg-type]
    (voc / "ImageSets" / "Main" / "dog_test.txt").unlink()
    with pytest.raises(ValueError, match=r"classes of trainval and test differ \(dog\)"):
        evaluate_svm(run, voc, SvmConfig(device="cpu", shots=()))
