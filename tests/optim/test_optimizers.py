import copy
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from sslfast.optim.groups import parameter_groups
from sslfast.optim.lars import LARS
from sslfast.optim.optimizers import OPTIMIZERS, OptimConfig, build_optimizer
from sslfast.optim.schedule import set_learning_rate
from sslfast.optim.state import load_optimizer


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
    optimizer = build_optimizer(layer, config, lr=0.03)
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


def test_adamw_matches_the_paper() -> None:
    """Algorithm 2 of Loshchilov & Hutter 2019 in plain float64; biases and norm layers without decay."""
    torch.manual_seed(3)
    net = network().double()
    config = OptimConfig(name="adamw", lr_per_256_images=0.1, weight_decay=0.02, betas=(0.8, 0.9))
    optimizer = build_optimizer(net, config, lr=0.03)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    means = {name: torch.zeros_like(p) for name, p in weights.items()}
    squares = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step, lr in enumerate((0.1, 0.05, 0.025), 1):
        set_learning_rate(optimizer, lr)
        gradients(net, step)
        for name, p in net.named_parameters():
            assert p.grad is not None
            means[name] = 0.8 * means[name] + 0.2 * p.grad
            squares[name] = 0.9 * squares[name] + 0.1 * p.grad**2
            unbiased = means[name] / (1 - 0.8**step) / ((squares[name] / (1 - 0.9**step)).sqrt() + 1e-8)
            decay = 0.02 if name in ("0.weight", "3.weight") else 0.0
            weights[name] = weights[name] - lr * (unbiased + decay * weights[name])
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-14)


def test_preallocated_adamw_state_changes_nothing() -> None:
    torch.manual_seed(0)
    net = network().double()
    plain = copy.deepcopy(net)
    config = OptimConfig(name="adamw", weight_decay=0.1)
    optimizer = build_optimizer(net, config, lr=0.03)
    usual = torch.optim.AdamW(parameter_groups(plain, config), lr=0.03)
    for module, chosen in ((net, optimizer), (plain, usual)):
        for number in range(3):
            gradients(module, number)
            chosen.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    states = [list(chosen.state_dict()["state"].values()) for chosen in (optimizer, usual)]
    for ours, theirs in zip(*states, strict=True):
        assert ours.keys() == theirs.keys()
        assert all((ours[k].dtype, ours[k].device) == (theirs[k].dtype, theirs[k].device) for k in ours)


def lars_pair(lr: float | torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = network().double()
    groups = parameter_groups(net, OptimConfig(name="lars", weight_decay=0.02))
    optimizer = LARS([{**groups[0], "adapt": True}, {**groups[1], "adapt": False}], lr=lr, trust_coefficient=0.01)
    return net, optimizer


def gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def test_lars_matches_the_paper() -> None:
    """Algorithm 1 of You et al. 2017, in plain float64; biases and norm layers with trust 1 and no decay."""
    net, optimizer = lars_pair(0.5)
    names = {name: p.detach().clone() for name, p in net.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in names.items()}
    for step, lr in enumerate((0.5, 0.25, 0.125)):
        set_learning_rate(optimizer, lr)
        gradients(net, step)
        for name, p in net.named_parameters():
            w, g = names[name], p.grad
            assert g is not None
            trust, decay = 1.0, 0.0
            if name in ("0.weight", "3.weight"):
                decay = 0.02
                trust = 0.01 * math.sqrt((w**2).sum()) / (math.sqrt((g**2).sum()) + decay * math.sqrt((w**2).sum()))
            momenta[name] = 0.9 * momenta[name] + lr * trust * (g + decay * w)
            names[name] = w - momenta[name]
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), names[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.02])
def test_lars_beside_google_s(decay: float) -> None:
    """The TPU benchmarks' LARS has this paper's trust ratio; SimCLR's takes the norm of ``g + βw`` in place of the sum
    of norms: the same without decay, larger by at most the share of β|w| (triangle inequality), 1e-6 in SimCLR."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    weights = [nn.Parameter(start.clone())] + [start.clone() for _ in range(2)]
    momenta = [torch.zeros_like(start) for _ in range(2)]
    groups = [{"params": weights[:1], "adapt": True, "weight_decay": decay}]
    optimizer = LARS(groups, lr=0.5, trust_coefficient=0.001)
    for _ in range(4):
        gradient = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        for number, together in enumerate((False, True)):
            w = weights[number + 1]
            moved = gradient + decay * w
            norm = moved.norm() if together else gradient.norm() + decay * w.norm()
            momenta[number] = 0.9 * momenta[number] + 0.5 * (0.001 * w.norm() / norm) * moved
            weights[number + 1] = w - momenta[number]
        weights[0].grad = gradient
        optimizer.step()
    ours, tpu, simclr = (weight.detach() for weight in weights)
    torch.testing.assert_close(ours, tpu, rtol=1e-13, atol=1e-15)
    share = decay * start.norm() / gradient.norm()
    assert (ours - simclr).norm() <= 1e-13 + 3 * share * (ours - start).norm()


def test_lars_where_norms_are_zero() -> None:
    """Neither a weight nor a gradient of zeros divides by zero: trust is 1."""
    weight = nn.Parameter(torch.zeros(2, 3))
    still = nn.Parameter(torch.ones(2, 3))
    absent = nn.Parameter(torch.ones(1))
    optimizer = LARS([{"params": [weight, still, absent]}], lr=0.5, momentum=0.0)
    weight.grad, still.grad = torch.ones(2, 3), torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(weight, torch.full((2, 3), -0.5))
    assert torch.equal(still, torch.ones(2, 3))
    assert torch.equal(absent, torch.ones(1))
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)


def test_lars_accepts_a_tensor_as_rate() -> None:
    """Its address does not change, as a captured graph requires."""
    (net, optimizer), (other, plain) = lars_pair(torch.tensor(0.5, dtype=torch.float64)), lars_pair(0.5)
    rate = optimizer.param_groups[0]["lr"]
    for step, lr in enumerate((0.5, 0.125)):
        for module, chosen in ((net, optimizer), (other, plain)):
            set_learning_rate(chosen, lr)
            gradients(module, step)
            chosen.step()
    assert optimizer.param_groups[0]["lr"] is rate
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_lars_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = lars_pair(0.5)
    gradients(net, 0)

    def forbidden(*args: object) -> None:
        raise AssertionError("host sync in a step")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    optimizer.step()


def test_every_optimizer_of_the_table_can_be_configured() -> None:
    assert get_args(get_type_hints(OptimConfig)["name"]) == tuple(OPTIMIZERS)
    with pytest.raises(ValueError, match=r"optim.name must be one of sgd, lars, .*, got 'adam'"):
        OptimConfig(name="adam")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_allocated_before_the_first_step_and_keeps_its_place(name: str) -> None:
    """Steps can be rolled back and captured, and the size of a checkpoint is known from the start."""
    net = network().double()
    optimizer = build_optimizer(net, OptimConfig(name=name), lr=0.03)  # type: ignore[arg-type]
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.03]

    def addresses() -> list[int]:
        return [v.data_ptr() for values in optimizer.state.values() for v in values.values() if v is not None]

    before = addresses()
    assert len(before) >= len(list(net.parameters()))
    for number in range(2):
        gradients(net, number)
        optimizer.step()
    assert addresses() == before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_optimizer_continues_bit_equal(name: str) -> None:
    config = OptimConfig(name=name)  # type: ignore[arg-type]

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            gradients(net, number)
            optimizer.step()

    torch.manual_seed(0)
    net = network().double()
    optimizer = build_optimizer(net, config, lr=0.03)
    steps(net, optimizer, range(2))
    other = network().double()
    resumed = build_optimizer(other, config, lr=0.03)
    other.load_state_dict(net.state_dict())
    load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
    for module, chosen in ((net, optimizer), (other, resumed)):
        steps(module, chosen, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_preallocated_momentum_changes_nothing() -> None:
    torch.manual_seed(0)
    net = network().double()
    plain = copy.deepcopy(net)
    optimizer = build_optimizer(net, OptimConfig(), lr=0.03)
    usual = torch.optim.SGD(parameter_groups(plain, OptimConfig()), lr=0.03, momentum=0.9)
    for module, chosen in ((net, optimizer), (plain, usual)):
        for number in range(3):
            gradients(module, number)
            chosen.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_loading_keeps_the_kernels_of_the_device() -> None:
    """A checkpoint of a CUDA run says fused; the CPU continues with foreach."""
    optimizer = build_optimizer(network(), OptimConfig(), lr=0.03)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["fused"], group["foreach"] = True, None
    load_optimizer(optimizer, state)
    assert [(group["fused"], group["foreach"]) for group in optimizer.param_groups] == [(None, True)] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_per_256_images": 0.0}, "lr_per_256_images must be above 0, got 0.0"),
        ({"lr_per_256_images": float("nan")}, "lr_per_256_images must be a finite number, got nan"),
        ({"final_lr_per_256_images": 1.0}, "final_lr_per_256_images must be in"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs"),
        ({"trust_coefficient": 0.0}, "trust_coefficient must be above 0, got 0.0"),
        ({"schedule": "steps"}, "milestones must be increasing epochs above 0, at least one with optim.schedule=steps"),
        ({"schedule": "steps", "milestones": (3.0, 2.0)}, r"milestones must be increasing .*, got \(3.0, 2.0\)"),
        ({"milestones": (0.0,)}, "milestones must be increasing"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"name": "adamw", "nesterov": True}, "optim.nesterov must be False with optim.name=adamw"),
        ({"name": "lars", "nesterov": True}, "optim.nesterov must be False with optim.name=lars"),
        ({"warmup_factor": 1.5}, r"warmup_factor must be in \[0, 1\], got 1.5"),
        ({"bias_norm_lr_factor": -1.0}, "bias_norm_lr_factor must be at least 0"),
        ({"final_weight_decay": -1.0}, "final_weight_decay must be at least 0"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be at least 0"),
        ({"clip_each": True}, "clip_each needs optim.clip_grad_norm above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"warmup_epochs": -1.0}, "warmup_epochs must be at least 0"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)


def test_rates_follow_the_batch_size_or_its_root() -> None:
    """SimCLR: 0.3 per 256 and 0.075 sqrt(batch) are both 4.8 at 4096."""
    linear = OptimConfig(lr_per_256_images=0.3, final_lr_per_256_images=0.03)
    root = OptimConfig(lr_per_256_images=1.2, final_lr_per_256_images=0.12, lr_scaling="sqrt")
    for batch_size, expected in ((4096, (4.8, 4.8)), (1024, (1.2, 2.4)), (64, (0.075, 0.6))):
        assert (linear.peak_lr(batch_size), root.peak_lr(batch_size)) == pytest.approx(expected)
        for config, peak in zip((linear, root), expected, strict=True):
            rate = config.learning_rate(batch_size=batch_size, steps_per_epoch=1, epochs=10)
            assert (rate.peak, rate.final) == pytest.approx((peak, peak / 10))
