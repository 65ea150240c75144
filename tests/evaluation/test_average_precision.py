import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from sslfast.evaluation.average_precision import average_precision, precision_recall


def ap(targets: list[int], scores: list[float], kind: str = "area") -> float:
    return average_precision(np.array(targets, dtype=bool), np.array(scores), kind=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["area", "11-point"])
def test_perfect_ranking(kind: str) -> None:
    assert ap([1, 1, 0, 0, 0], [5, 4, 3, 2, 1], kind) == 1.0


@pytest.mark.parametrize("kind", ["area", "11-point"])
@pytest.mark.parametrize(("positives", "total"), [(1, 7), (3, 10), (10, 10)])
def test_equal_scores_give_the_share_of_positives(kind: str, positives: int, total: int) -> None:
    targets = [0] * (total - positives) + [1] * positives
    assert ap(targets, [0.5] * total, kind) == pytest.approx(positives / total)


@pytest.mark.parametrize("place", [1, 2, 5, 8])
def test_one_positive(place: int) -> None:
    """Alone at place p of 8 its precision is 1 / p at every recall."""
    targets = [int(number == place) for number in range(1, 9)]
    scores = [-float(number) for number in range(8)]
    assert ap(targets, scores) == pytest.approx(1 / place)
    assert ap(targets, scores, "11-point") == pytest.approx(1 / place)


def test_by_hand() -> None:
    """Right, wrong, right, wrong, wrong, right: precision 1, 2/3, 1/2 at recall 1/3, 2/3, 1."""
    targets, scores = [1, 0, 1, 0, 0, 1], [9, 8, 7, 6, 5, 4.0]
    assert ap(targets, scores) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    # Recall levels 0 to .3, .4 to .6, .7 to 1.
    assert ap(targets, scores, "11-point") == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11)


def test_interpolation_takes_the_best_to_the_right() -> None:
    """Wrong, right, right: precision 1/2, then 2/3, which also counts at recall 1/2."""
    assert ap([0, 1, 1], [3, 2, 1]) == pytest.approx(2 / 3)


def test_worst_ranking() -> None:
    """All n negatives before all p positives: the best precision is p / (n + p), at recall 1."""
    assert ap([0] * 6 + [1] * 3, [-float(n) for n in range(9)]) == pytest.approx(1 / 3)


def test_random_scores_are_near_the_share() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random(20_000) < 0.25
    assert average_precision(targets, rng.random(20_000)) == pytest.approx(0.25, abs=0.02)


def test_points_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    targets, scores = rng.random(200) < 0.3, rng.integers(0, 60, 200) / 60
    precision, recall = precision_recall(targets, scores)
    expected_precision, expected_recall, _ = precision_recall_curve(targets, scores, drop_intermediate=False)
    np.testing.assert_allclose(precision[::-1], expected_precision[:-1])
    np.testing.assert_allclose(recall[::-1], expected_recall[:-1])


def test_area_beside_scikit_learn() -> None:
    """scikit-learn sums the same points without interpolation: never more, and as much where precision only falls."""
    rng = np.random.default_rng(3)
    for count in (5, 60, 400):
        targets, scores = rng.random(count) < 0.4, rng.integers(0, count, count).astype(float)
        targets[0] = True
        theirs, ours = average_precision_score(targets, scores), average_precision(targets, scores)
        precision, recall = precision_recall(targets, scores)
        assert theirs == pytest.approx(float((np.diff(recall, prepend=0.0) * precision).sum()))
        assert theirs - 1e-12 <= ours <= theirs + 0.12
    falling = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], dtype=bool)
    scores = -np.arange(18.0)
    assert average_precision(falling, scores) == pytest.approx(average_precision_score(falling, scores))


def test_order_of_the_entries_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    targets, scores = rng.random(90) < 0.4, rng.integers(0, 9, 90).astype(float)
    order = rng.permutation(90)
    assert average_precision(targets, scores) == average_precision(targets[order], scores[order])


def test_errors() -> None:
    with pytest.raises(ValueError, match="not defined without a positive"):
        ap([0, 0], [1, 2])
    with pytest.raises(ValueError, match="scores hold NaN"):
        ap([0, 1], [1, float("nan")])
    with pytest.raises(ValueError, match=r"must be \[N\], got \[2\] and \[3\]"):
        ap([0, 1], [1, 2, 3])
