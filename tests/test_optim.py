import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from sslfast.optim import OptimConfig, build_optimizer, learning_rate, parameter_groups, set_learning_rate

PAPER = {"batch_size": 1024, "steps_per_epoch": 10, "epochs": 100}


def test_paper_schedule_by_epoch() -> None:
    config = OptimConfig()
    assert learning_rate(0, config, **PAPER) == pytest.approx(0.12)
    assert learning_rate(9, config, **PAPER) == learning_rate(0, config, **PAPER)
    assert learning_rate(10, config, **PAPER) < learning_rate(9, config, **PAPER)
    assert learning_rate(500, config, **PAPER) == pytest.approx((0.12 + 1.2e-4) / 2)
    last = 1.2e-4 + (0.12 - 1.2e-4) * 0.5 * (1 + math.cos(math.pi * 99 / 100))
    assert learning_rate(999, config, **PAPER) == pytest.approx(last)


def test_schedule_by_step_falls_at_every_step_to_the_final_rate() -> None:
    rates = [learning_rate(s, OptimConfig(lr_update="step"), **PAPER) for s in range(1001)]
    assert all(a > b for a, b in pairwise(rates))
    assert rates[-1] == pytest.approx(1.2e-4)


def test_rate_scales_with_the_batch() -> None:
    config = OptimConfig()
    assert learning_rate(0, config, **{**PAPER, "batch_size": 256}) == pytest.approx(0.03)


@pytest.mark.parametrize("update", ["epoch", "step"])
def test_warmup_rises_to_the_peak_and_never_starts_at_zero(update: str) -> None:
    config = OptimConfig(warmup_epochs=5, lr_update=update)  # type: ignore[arg-type]
    rates = [learning_rate(s, config, **PAPER) for s in range(1000)]
    assert rates[0] == pytest.approx(0.12 / (5 if update == "epoch" else 50))
    assert all(a <= b for a, b in pairwise(rates[:50]))
    assert max(rates) == pytest.approx(0.12)
    assert rates[50] == pytest.approx(0.12)
    assert rates[999] < 0.001


def test_warmup_as_long_as_the_run_stays_finite() -> None:
    config = OptimConfig(warmup_epochs=100)
    assert all(0 < learning_rate(s, config, **PAPER) <= 0.12 + 1e-12 for s in range(1001))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.LayerNorm(2))


@pytest.mark.parametrize(
    ("flags", "decayed"),
    [
        ({}, ["0.weight", "3.weight"]),
        ({"decay_bias": True}, ["0.weight", "0.bias", "3.weight", "3.bias"]),
        ({"decay_norm": True}, ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"]),
    ],
)
def test_weight_decay_rule(flags: dict[str, bool], decayed: list[str]) -> None:
    net = network()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net, OptimConfig(**flags))  # type: ignore[arg-type]
    assert [names[id(p)] for p in groups[0]["params"]] == decayed  # type: ignore[attr-defined]
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (1e-4, 0.0)
    rest = [n for n in names.values() if n not in decayed]
    assert [names[id(p)] for p in groups[1]["params"]] == rest  # type: ignore[attr-defined]


def test_frozen_parameters_are_left_out() -> None:
    net = network()
    net[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in parameter_groups(net, OptimConfig())) == 6  # type: ignore[arg-type, misc]
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(net.requires_grad_(False), OptimConfig())


def test_two_steps_match_the_formula() -> None:
    """v = 0.9 v + (g + wd w), w = w - lr v."""
    layer = nn.Linear(1, 1).double()
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
    config = OptimConfig(weight_decay=0.1)
    optimizer = build_optimizer(layer, config, batch_size=256)
    weight, bias, v_weight, v_bias = 2.0, 1.0, 0.0, 0.0
    for lr in (0.5, 0.25):
        set_learning_rate(optimizer, lr)
        optimizer.zero_grad()
        layer(torch.full((1, 1), 3.0, dtype=torch.float64)).sum().backward()
        optimizer.step()
        v_weight = 0.9 * v_weight + 3.0 + 0.1 * weight
        v_bias = 0.9 * v_bias + 1.0
        weight, bias = weight - lr * v_weight, bias - lr * v_bias
    assert layer.weight.item() == pytest.approx(weight, rel=1e-12)
    assert layer.bias.item() == pytest.approx(bias, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_per_256_images": 0.0}, "lr_per_256_images must be above 0, got 0.0"),
        ({"lr_per_256_images": float("nan")}, "lr_per_256_images must be above 0, got nan"),
        ({"final_lr_per_256_images": 1.0}, "final_lr_per_256_images must be in"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"warmup_epochs": -1.0}, "warmup_epochs must be at least 0"),
    ],
)
def test_bad_values(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]
