import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from sslfast.evaluation.knn import (
    K,
    KnnConfig,
    accuracy,
    bank_knn,
    class_scores,
    evaluate_knn,
    knn_accuracy,
    nearest_neighbours,
    render_table,
)
from sslfast.ops.philox import random_uniform
from tests.evaluation.runs import write_data, write_run


def draws(rows: int, columns: int, seed: int) -> torch.Tensor:
    return random_uniform(torch.arange(rows), columns, seed=seed, stream=0, step=0) - 0.5


def test_perfect_clusters_have_accuracy_one() -> None:
    centres = torch.eye(7)
    bank = centres.repeat_interleave(9, 0) + 0.01 * draws(63, 7, 0)
    queries = centres.repeat_interleave(3, 0) + 0.01 * draws(21, 7, 1)
    found = knn_accuracy(
        queries, torch.arange(7).repeat_interleave(3), bank, torch.arange(7).repeat_interleave(9), k=(1, 5, 9, 63)
    )
    assert {k: value.top1 for k, value in found.items()} == {1: 1.0, 5: 1.0, 9: 1.0, 63: 1.0}


def test_one_neighbour_finds_itself() -> None:
    features = draws(50, 6, 3)
    labels = torch.arange(50)
    assert knn_accuracy(features * 3, labels, features, labels, k=[1])[1].top1 == 1.0
    similarity, rows = nearest_neighbours(features, features, 1)
    torch.testing.assert_close(similarity[:, 0], torch.ones(50))
    assert torch.equal(rows[:, 0], labels)


def test_weights_by_hand_on_five_points() -> None:
    """One very close neighbour of class 1 outvotes two others of class 0 when τ is small, not when it is large."""
    angles = torch.tensor([0.1, 0.5, 0.6, 1.2, 2.0])
    bank = torch.stack((angles.cos(), angles.sin()), 1)
    bank_labels = torch.tensor([1, 0, 0, 1, 0])
    query = torch.tensor([[2.0, 0.0]])
    weights = [math.exp(math.cos(angle) / 0.07) for angle in (0.1, 0.5, 0.6)]
    similarity, rows = nearest_neighbours(query, bank, 3)
    assert rows.tolist() == [[0, 1, 2]]
    scores = class_scores(similarity, bank_labels[rows], classes=2, temperature=0.07)
    # Scores are relative to the first neighbour's weight.
    expected = torch.tensor([[(weights[1] + weights[2]) / weights[0], 1.0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)
    for temperature, hit in ((0.07, 1.0), (1.0, 0.0)):
        assert knn_accuracy(query, torch.tensor([1]), bank, bank_labels, k=[3], temperature=temperature)[3].top1 == hit


def test_against_dense_float64() -> None:
    bank, queries = draws(301, 17, 5), draws(43, 17, 6)
    bank_labels, labels = torch.arange(301) * 7 % 11, torch.arange(43) % 11
    similarity = normalize(queries.double(), dim=1) @ normalize(bank.double(), dim=1).T
    for k in (1, 6, 20, 301):
        values, rows = similarity.topk(k, dim=1)
        scores = torch.zeros(43, 11, dtype=torch.float64)
        for i in range(43):
            for value, row in zip(values[i], rows[i], strict=True):
                scores[i, bank_labels[row]] += math.exp(value / 0.07)
        expected = (scores.argmax(1) == labels).double().mean().item()
        assert knn_accuracy(queries, labels, bank, bank_labels, k=[k])[k].top1 == pytest.approx(expected)


@pytest.mark.parametrize("max_entries", [1, 7, 300, 1000, 2**24])
def test_chunks_change_nothing(max_entries: int) -> None:
    bank, queries = draws(301, 9, 7), draws(43, 9, 8)
    similarity, rows = nearest_neighbours(queries, bank, 12, max_entries=max_entries)
    expected = (normalize(queries, dim=1) @ normalize(bank, dim=1).T).topk(12, dim=1)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(similarity, expected.values)


@pytest.mark.parametrize("max_entries", [1, 50, 2000, 2**24])
def test_own_row_is_never_found(max_entries: int) -> None:
    bank = draws(60, 7, 20)
    own = torch.arange(0, 60, 7)
    similarity, rows = nearest_neighbours(bank[own], bank, 9, own=own, max_entries=max_entries)
    dense = normalize(bank[own], dim=1) @ normalize(bank, dim=1).T
    dense[torch.arange(len(own)), own] = -2
    expected = dense.topk(9, dim=1)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(similarity, expected.values)
    assert nearest_neighbours(bank, bank, 59, own=torch.arange(60))[1].sort(1).values.tolist() == [
        [column for column in range(60) if column != row] for row in range(60)
    ]
    with pytest.raises(ValueError, match=r"k must be in \[1, 59\]"):
        nearest_neighbours(bank, bank, 60, own=torch.arange(60))


def test_bank_knn_of_clusters_and_noise() -> None:
    labels = torch.arange(200) % 4
    clusters = torch.eye(4)[labels] + 0.05 * draws(200, 4, 30)
    found = bank_knn(clusters * 3, labels, (1, 20))
    assert {k: value.top1 for k, value in found.items()} == {1: 1.0, 20: 1.0}
    noise = bank_knn(draws(2000, 16, 31), torch.arange(2000) % 4, (20,))[20].top1
    assert noise == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2000) ** 0.5)


@pytest.mark.parametrize("max_entries", [64, 2**24])
def test_bank_knn_leaves_one_out(max_entries: int) -> None:
    """Each row against all others, one query at a time; rows without a label neither ask nor vote."""
    bank, labels = draws(90, 6, 32), torch.arange(90) % 5 - 1
    known = (labels >= 0).nonzero()[:, 0]
    for k in (1, 7):
        hits = []
        for row in known.tolist():
            others = known[known != row]
            found = knn_accuracy(bank[row : row + 1], labels[row : row + 1], bank[others], labels[others], k=[k])
            hits.append(found[k].top1)
        assert bank_knn(bank, labels, (k,), max_entries=max_entries)[k].top1 == pytest.approx(sum(hits) / len(hits))
        some = [hits[i * len(hits) // 10] for i in range(10)]
        assert bank_knn(bank, labels, (k,), queries=10)[k].top1 == pytest.approx(sum(some) / 10)


def test_bank_knn_errors() -> None:
    bank, labels = draws(10, 4, 0), torch.arange(10) % 2
    for arguments, words in (
        ((bank, labels[:9], (1,)), r"must be \[N, D\] and labels \[N\], got \[10, 4\] and \[9\]"),
        ((bank, labels * 0 - 1, (1,)), "no labels of two classes"),
        ((bank, labels * 0, (1,)), "no labels of two classes"),
        ((bank, labels, (10,)), r"k must be in \[1, 9\]"),
        ((bank, labels, ()), "k is empty"),
        ((bank, labels, (1,), 0.0), "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            bank_knn(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queries must be at least 1 or None"):
        bank_knn(bank, labels, (1,), queries=0)


def test_order_of_the_bank_changes_nothing() -> None:
    bank, queries = draws(200, 9, 9), draws(30, 9, 10)
    bank_labels, labels = torch.arange(200) % 8, torch.arange(30) % 8
    order = draws(200, 1, 11)[:, 0].argsort()
    k = (1, 5, 50)
    assert knn_accuracy(queries, labels, bank, bank_labels, k=k) == knn_accuracy(
        queries, labels, bank[order], bank_labels[order], k=k
    )


def test_small_temperature_does_not_overflow() -> None:
    scores = class_scores(torch.tensor([[1.0, 0.9]]), torch.tensor([[0, 1]]), classes=2, temperature=1e-4)
    assert scores.tolist() == [[1.0, 0.0]]


def test_a_class_without_votes_is_no_hit() -> None:
    scores = torch.tensor([[3.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    assert accuracy(scores, torch.tensor([3])).top5 == 1.0
    for label in (1, 2, 4, 5):
        assert accuracy(scores, torch.tensor([label])).top5 == 0.0


def test_errors() -> None:
    bank = draws(10, 4, 0)
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\], the number of training images, got k=11"):
        knn_accuracy(bank, torch.zeros(10).long(), bank, torch.zeros(10).long(), k=(1, 11))
    with pytest.raises(ValueError, match="k is empty"):
        knn_accuracy(bank, torch.zeros(10).long(), bank, torch.zeros(10).long(), k=())
    with pytest.raises(ValueError, match="temperature must be positive, got temperature=0"):
        class_scores(torch.ones(1, 1), torch.zeros(1, 1).long(), classes=1, temperature=0)


def test_evaluate_knn(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=6, val=3)
    result = evaluate_knn(run, data, KnnConfig(k=(1, 3), device="cpu"))
    assert json.loads((run / "evaluation" / "knn.json").read_text()) == result
    rows = {(row["encoder"], row["k"]): row for row in result["results"]}
    assert set(rows) == {(name, k) for name in ("trained", "untrained", "raw pixels") for k in (1, 3)}
    assert rows["trained", 3]["protocol"] == "knn-cosine-tau0.07-k3"
    assert rows["raw pixels", 1]["features"] == 768
    assert rows["trained", 1]["features"] == 512
    # The classes differ in colour alone, which raw pixels see.
    assert rows["raw pixels", 1]["top1"] == 1.0
    assert rows["raw pixels", 1]["top1_standard_error"] == 0.0
    assert result["data"]["train"]["images"] == 18
    assert result["data"]["val"]["images"] == 9
    assert result["step"] == 5
    assert result["size"] == 24
    table = render_table(result)
    assert "raw pixels" in table
    assert "100.0 ± 0.0" in table
    assert "k3 top-1 %" in table
    other = tmp_path / "elsewhere" / "result.json"
    assert (
        evaluate_knn(run, data, KnnConfig(k=(1, 3), device="cpu", workers=2, batch_size=5), output=other)["results"]
        == (result["results"])
    )
    assert other.exists()


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_votes_are_those_of_lemniscate_and_dino(k: int) -> None:
    """Both sum ``exp(s / 0.07)`` of the k largest cosines in a one-hot table and sort the classes."""
    labels, bank_labels = torch.arange(60) % 10, torch.arange(400) % 10
    centres = draws(10, 16, 1)
    queries = normalize(centres[labels] + draws(60, 16, 2), dim=1)
    bank = normalize(centres[bank_labels] + draws(400, 16, 3), dim=1)
    distances, indices = (queries @ bank.T).topk(k, dim=1, largest=True, sorted=True)
    retrieved = bank_labels[indices]
    one_hot = torch.zeros(60 * k, 10).scatter_(1, retrieved.reshape(-1, 1), 1).view(60, k, 10)
    probabilities = (one_hot * distances.div(0.07).exp()[:, :, None]).sum(1)
    hits = probabilities.sort(1, descending=True).indices == labels[:, None]
    found = knn_accuracy(queries * 3, labels, bank / 2, bank_labels, k=[k], max_entries=1 << 10)[k]
    assert 0.3 < found.top1 < 1.0
    assert found.top1 == pytest.approx(hits[:, 0].double().mean().item())
    if k >= 20:  # with fewer neighbours some classes have no vote, and which comes fifth is the sort's choice
        assert found.top5 == pytest.approx(hits[:, :5].any(1).double().mean().item())


def test_trunk_or_head(tmp_path: Path) -> None:
    """NPID's numbers are of the head's 128-d embeddings at k = 200, DINO's of the trunk's features."""
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=2, val=1)
    trunk = evaluate_knn(run, data, KnnConfig(device="cpu"))
    head = evaluate_knn(run, data, KnnConfig(device="cpu", features="head", k=(5,)))
    assert K == (1, 5, 20, 200)
    assert trunk["k"] == [1, 5]  # of six images
    for result, output, columns, source in ((trunk, "trunk", 512, "DINO"), (head, "head", 128, "NPID")):
        assert result["encoder_output"] == output
        assert source in result["source"].split(":")[0]
        assert next(row for row in result["results"] if row["encoder"] == "trained")["features"] == columns


def test_evaluate_knn_errors(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=2, val=1)
    with pytest.raises(ValueError, match=r"k must be in \[1, 6\], the number of training images, got k=20; lower --k"):
        evaluate_knn(run, data, KnnConfig(k=(20,), device="cpu"))
    assert not (run / "evaluation").exists()  # before any image was decoded
    with pytest.raises(ValueError, match=r"temperature must be at least 0\.0001"):
        KnnConfig(temperature=-1.0)
