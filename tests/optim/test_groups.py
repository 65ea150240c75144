"""Options of the parameters below a name, schedules of decay, clipping and frozen parameters."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from sslfast.optim import (
    OPTIMIZERS,
    OptimConfig,
    ParameterOptions,
    build_optimizer,
    load_optimizer,
    prepare_gradients,
    set_learning_rate,
    set_weight_decay,
)
from sslfast.optim.groups import parameter_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.header = nn.Linear(4, 2)
        self.double()


def gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def named(net: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_two_groups_for_each_name() -> None:
    net = Net()
    groups = parameter_groups(net, OptimConfig(), {"head": ParameterOptions(), "trunk.0.weight": ParameterOptions()})
    assert named(net, groups) == [
        ["header.weight"],
        ["trunk.0.bias", "trunk.1.weight", "trunk.1.bias", "header.bias"],
        ["head.weight"],
        ["head.bias"],
        ["trunk.0.weight"],
        [],
    ]
    with pytest.raises(ValueError, match="Net has no trained parameter below 'heads', which has options"):
        parameter_groups(net, OptimConfig(), {"heads": ParameterOptions()})
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(net.requires_grad_(False), OptimConfig())


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_rate_decay_and_momentum_of_their_own(name: str) -> None:
    """Three steps against the formulas in plain float64; without adaptation LARS is SGD with the rate inside."""
    config = OptimConfig(name=name, weight_decay=0.1, momentum=0.9, bias_norm_lr_factor=0.25)  # type: ignore[arg-type]
    options = {
        "head": ParameterOptions(constant_lr=True, weight_decay=0.3, momentum=0.0, adapt=False),
        "header": ParameterOptions(lr_factor=2.0, adapt=False),
        "trunk": ParameterOptions(adapt=False),
    }
    net = Net()
    optimizer = build_optimizer(net, config, lr=0.5, options=options)
    weights = {key: p.detach().clone() for key, p in net.named_parameters()}
    momenta = {key: torch.zeros_like(p) for key, p in weights.items()}
    for step, lr in enumerate((0.5, 0.25, 0.125)):
        set_learning_rate(optimizer, lr)
        gradients(net, step)
        for key, p in net.named_parameters():
            assert p.grad is not None
            decays = key in ("trunk.0.weight", "head.weight", "header.weight")
            is_head = key.startswith("head.")
            decay = (0.3 if is_head else 0.1) if decays else 0.0
            rate = (0.5 if is_head else lr * (2.0 if key.startswith("header.") else 1.0)) * (1.0 if decays else 0.25)
            keep = 0.0 if is_head else 0.9
            move = p.grad + decay * weights[key]
            if name == "lars":
                momenta[key] = keep * momenta[key] + rate * move
                weights[key] = weights[key] - momenta[key]
            else:
                momenta[key] = keep * momenta[key] + move
                weights[key] = weights[key] - rate * momenta[key]
        optimizer.step()
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), weights[key], rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_what_decays_is_adapted(name: str) -> None:
    """Without exclusions, as SwAV: biases and normalisation layers decay, and have layer-wise rates too."""
    config = OptimConfig(name=name, decay_norm=True, decay_bias=True)  # type: ignore[arg-type]
    groups = build_optimizer(Net(), config, lr=0.1).param_groups
    assert [(group["adapt"], len(group["params"])) for group in groups] == [(True, 8), (False, 0)]
    groups = build_optimizer(Net(), OptimConfig(name=name), lr=0.1).param_groups  # type: ignore[arg-type]
    assert [(group["adapt"], len(group["params"])) for group in groups] == [(True, 3), (False, 5)]


def test_weight_decay_along_a_cosine() -> None:
    config = OptimConfig(weight_decay=0.04, final_weight_decay=0.4)
    decay = config.decay(10)
    for step in range(10):
        expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / 10))
        assert decay(step) == pytest.approx(expected, rel=1e-14)
    optimizer = build_optimizer(Net(), config, lr=0.1, options={"head": ParameterOptions(weight_decay=0.2)})
    set_weight_decay(optimizer, decay(5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.22), 0.0, 0.2, 0.0]
    assert {OptimConfig(weight_decay=0.3).decay(10)(step) for step in range(10)} == {0.3}


@pytest.mark.parametrize("bound", [0.5, 1e3])
def test_clipping_by_the_norm_of_all_gradients_is_torch_s(bound: float) -> None:
    net, other = Net(), Net()
    config = OptimConfig(clip_grad_norm=bound)
    gradients(net, 1)
    gradients(other, 1)
    prepare_gradients(build_optimizer(net, config, lr=0.1), config, 0)
    nn.utils.clip_grad_norm_(other.parameters(), bound)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None  # noqa: PT018
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


def test_clipping_each_gradient() -> None:
    net = Net()
    config = OptimConfig(clip_grad_norm=1.5, clip_each=True)
    gradients(net, 1)
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    prepare_gradients(build_optimizer(net, config, lr=0.1), config, 0)
    norms = [float(gradient.norm()) for gradient in before]
    assert min(norms) < 1.5 < max(norms)
    for p, old, norm in zip(net.parameters(), before, norms, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, old * min(1.0, 1.5 / (norm + 1e-6)), rtol=1e-12, atol=0)


def test_clipping_hides_no_nan_and_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    config = OptimConfig(clip_grad_norm=1.0)
    optimizer = build_optimizer(net, config, lr=0.1)
    gradients(net, 1)
    assert net.head.weight.grad is not None
    net.head.weight.grad[0, 0] = torch.nan

    def forbidden(*args: object) -> None:
        raise AssertionError("host sync in a step")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, forbidden)
        prepare_gradients(optimizer, config, 0)
    assert all(p.grad is not None and p.grad.isnan().all() for p in net.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_stay_and_gather_no_momentum(name: str) -> None:
    config = OptimConfig(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    net, late = Net(), Net()
    optimizer = build_optimizer(net, config, lr=0.1, options={"head": ParameterOptions(frozen_steps=2)})
    first = build_optimizer(late, config, lr=0.1)
    before = copy.deepcopy(net.head.state_dict())
    for step in range(3):
        if step == 2:
            assert all(torch.equal(value, before[key]) for key, value in net.head.state_dict().items())
        gradients(net, step)
        prepare_gradients(optimizer, config, step)
        optimizer.step()
    gradients(late, 2)
    first.step()  # the first update of the head is that of a new optimizer
    assert torch.equal(net.head.weight, late.head.weight)
    assert not torch.equal(net.header.weight, late.header.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_before_the_options_loads(name: str) -> None:
    """Groups had fewer keys; the state continues bit-equal."""
    config = OptimConfig(name=name)  # type: ignore[arg-type]
    net = Net()
    optimizer = build_optimizer(net, config, lr=0.1)
    gradients(net, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in ("scheduled_decay", "lr_factor", "constant_lr", "frozen_steps"):
            del group[key]
        if name not in ("lars", "lamb"):
            del group["adapt"]
    other = copy.deepcopy(net)
    resumed = build_optimizer(other, config, lr=0.1)
    load_optimizer(resumed, state)
    for module, chosen in ((net, optimizer), (other, resumed)):
        gradients(module, 1)
        prepare_gradients(chosen, config, 1)
        chosen.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_options_survive_a_resume() -> None:
    options = {"head": ParameterOptions(constant_lr=True, momentum=0.0)}
    optimizer = build_optimizer(Net(), OptimConfig(), lr=0.1, options=options)
    set_learning_rate(optimizer, 0.01)
    resumed = build_optimizer(Net(), OptimConfig(), lr=0.1, options=options)
    load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.01, 0.1, 0.1]
    assert [group["momentum"] for group in resumed.param_groups] == [0.9, 0.9, 0.0, 0.0]
