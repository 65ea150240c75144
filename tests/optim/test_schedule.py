"""The learning rate of pretraining and of the evaluations: shapes, warm-up, and bit-equality with the formulas of the
protocols."""

import math
from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise

import pytest

from sslfast.evaluation.detection.train import PROTOCOLS
from sslfast.evaluation.sgd import GOYAL, MOCO, SEMISUP, SGDProtocol
from sslfast.optim.optimizers import OptimConfig
from sslfast.optim.schedule import LearningRate
from sslfast.recipes import RECIPES

PAPER = {"batch_size": 1024, "steps_per_epoch": 10, "epochs": 100}


def test_paper_schedule_by_epoch() -> None:
    config = OptimConfig()
    rate = config.learning_rate(**PAPER)
    assert rate(0) == pytest.approx(0.12)
    assert rate(9) == rate(0)
    assert rate(10) < rate(9)
    assert rate(500) == pytest.approx((0.12 + 1.2e-4) / 2)
    last = 1.2e-4 + (0.12 - 1.2e-4) * 0.5 * (1 + math.cos(math.pi * 99 / 100))
    assert rate(999) == pytest.approx(last)


def test_schedule_by_step_falls_at_every_step_to_the_final_rate() -> None:
    rates = [OptimConfig(lr_update="step").learning_rate(**PAPER)(s) for s in range(1001)]
    assert all(a > b for a, b in pairwise(rates))
    assert rates[-1] == pytest.approx(1.2e-4)


def test_rate_scales_with_the_batch() -> None:
    config = OptimConfig()
    assert config.learning_rate(**{**PAPER, "batch_size": 256})(0) == pytest.approx(0.03)


@pytest.mark.parametrize("update", ["epoch", "step"])
def test_warmup_rises_to_the_peak_and_never_starts_at_zero(update: str) -> None:
    config = OptimConfig(warmup_epochs=5, lr_update=update)  # type: ignore[arg-type]
    rates = [config.learning_rate(**PAPER)(s) for s in range(1000)]
    assert rates[0] == pytest.approx(0.12 / (5 if update == "epoch" else 50))
    assert all(a <= b for a, b in pairwise(rates[:50]))
    assert max(rates) == pytest.approx(0.12)
    assert rates[50] == pytest.approx(0.12)
    assert rates[999] < 0.001


def test_warmup_as_long_as_the_run_stays_finite() -> None:
    config = OptimConfig(warmup_epochs=100)
    assert all(0 < config.learning_rate(**PAPER)(s) <= 0.12 + 1e-12 for s in range(1001))


def test_steps_at_their_milestones() -> None:
    config = OptimConfig(schedule="steps", milestones=(30, 60.5, 300), gamma=0.1, warmup_epochs=2)
    rates = [config.learning_rate(**PAPER)(10 * epoch) for epoch in range(100)]
    assert rates[:2] == [pytest.approx(0.06), pytest.approx(0.12)]
    assert rates[29:31] == [pytest.approx(0.12), pytest.approx(0.012)]
    assert rates[60:62] == [pytest.approx(0.012), pytest.approx(0.0012)]  # whole epochs: 60.5 comes with the next
    assert rates[99] == pytest.approx(0.0012)  # 300 is behind the end
    by_step = OptimConfig(schedule="steps", milestones=(60.5,), lr_update="step")
    assert by_step.learning_rate(**PAPER)(604) == pytest.approx(0.12)
    assert by_step.learning_rate(**PAPER)(605) == pytest.approx(0.012)


def test_constant_rate_after_the_warmup() -> None:
    config = OptimConfig(schedule="constant", warmup_epochs=2)
    rates = [config.learning_rate(**PAPER)(step) for step in range(1000)]
    assert rates == [pytest.approx(0.06)] * 10 + [pytest.approx(0.12)] * 990


@pytest.mark.parametrize(
    ("recipe", "epochs"),
    [
        ("npid", (120, 160)), ("moco-v1", (120, 160)), ("jigsaw", (30, 60, 90, 100)), ("rotation", (30, 60, 90, 100)),
        ("relative-position", (30, 50)), ("sela", (150,)), ("deepcluster", ()),
    ],
)  # fmt: skip
def test_recipes_fall_where_their_sources_do(recipe: str, epochs: tuple[int, ...]) -> None:
    config = RECIPES[recipe]()
    rates = [config.optim.learning_rate(batch_size=256, steps_per_epoch=1, epochs=200)(e) for e in range(5, 200)]
    falls = [e for e, (before, after) in enumerate(pairwise(rates), 6) if after < before]
    assert falls == list(epochs)
    assert rates[-1] == pytest.approx(rates[0] * 0.1 ** len(epochs))


def pretraining(step: int, config: OptimConfig, *, batch_size: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of a pretraining step, spelled out."""
    peak, final = (rate * (batch_size / 256) for rate in (config.lr_per_256_images, config.final_lr_per_256_images))
    if config.lr_update == "epoch":
        done, interval = float(step // steps_per_epoch), 1.0
    else:
        done, interval = step / steps_per_epoch, 1 / steps_per_epoch
    if done < config.warmup_epochs and config.warmup_factor is not None:
        return peak * min(1.0, config.warmup_factor + (1 - config.warmup_factor) * done / config.warmup_epochs)
    if done < config.warmup_epochs:
        return peak * min(1.0, (done + interval) / config.warmup_epochs)
    if config.schedule == "steps":
        return peak * config.gamma ** bisect_right(config.milestones, done)
    if config.schedule == "constant":
        return peak
    share = min(1.0, (done - config.warmup_epochs) / max(epochs - config.warmup_epochs, interval))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize("update", ["epoch", "step"])
@pytest.mark.parametrize("name", RECIPES)
def test_pretraining_rates_are_bit_equal_to_the_formula(name: str, update: str) -> None:
    recipe = RECIPES[name]()
    for warmup in (recipe.optim.warmup_epochs, 3.3, 1000.0):
        config = replace(recipe.optim, lr_update=update, warmup_epochs=warmup)
        run = {"batch_size": recipe.batch_size, "steps_per_epoch": 7, "epochs": recipe.epochs}
        rate = config.learning_rate(**run)
        assert all(rate(step) == pretraining(step, config, **run) for step in range(7 * recipe.epochs + 3))


@pytest.mark.parametrize("protocol", [GOYAL, MOCO, SEMISUP], ids=lambda protocol: protocol.name)
def test_rates_of_sgd_protocols_are_bit_equal_to_the_formula(protocol: SGDProtocol) -> None:
    for epochs in (1, 2, 3, protocol.epochs, 84):
        for batch_size in (1, 48, 256, 1000):
            for epoch in range(epochs + 1):
                drops = sum(epoch >= drop for drop in protocol.drops_of(epochs))
                expected = protocol.lr_per_256_images * batch_size / 256 * 0.1**drops
                assert protocol.learning_rate(epoch, epochs=epochs, batch_size=batch_size) == expected


@pytest.mark.parametrize("name", PROTOCOLS)
def test_rates_of_detection_are_bit_equal_to_the_formula(name: str) -> None:
    for sets, iterations, batch_size, lr in (
        (1, None, 16, None),
        (2, None, 6, None),
        (2, 3, 16, 0.017),
        (1, 700, 1, None),
    ):
        chosen = PROTOCOLS[name].schedule(sets=sets, iterations=iterations, batch_size=batch_size, lr=lr)
        for iteration in range(chosen.iterations):
            expected = chosen.lr * 0.1 ** sum(iteration >= drop for drop in chosen.drops)
            if iteration < chosen.warmup:
                expected *= chosen.warmup_factor + (1 - chosen.warmup_factor) * iteration / chosen.warmup
            assert chosen.learning_rate(iteration) == expected


def test_a_schedule_in_steps() -> None:
    rate = LearningRate(peak=2.0, shape="cosine", epochs=10, warmup=4, warmup_factor=0.5)
    assert [rate(step) for step in (0, 2, 4, 7, 10, 99)] == [1.0, 1.5, 2.0, pytest.approx(1.0), 0.0, 0.0]
    assert [LearningRate(peak=2.0, warmup=4)(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
