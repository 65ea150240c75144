import math

import pytest
import torch
from torch import nn

from sslfast.optim.lamb import LAMB
from sslfast.optim.optimizers import OptimConfig, build_optimizer
from sslfast.optim.schedule import set_learning_rate
from tests.optim.test_optimizers import gradients, network


def test_lamb_matches_the_paper() -> None:
    """Algorithm 2 of You et al. 2020, in plain float64; biases and norm layers with trust 1 and no decay."""
    torch.manual_seed(3)
    net = network().double()
    config = OptimConfig(name="lamb", weight_decay=0.02, betas=(0.8, 0.9))
    optimizer = build_optimizer(net, config, lr=0.5)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    means = {name: torch.zeros_like(p) for name, p in weights.items()}
    squares = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step, lr in enumerate((0.5, 0.25, 0.125), 1):
        set_learning_rate(optimizer, lr)
        gradients(net, step)
        for name, p in net.named_parameters():
            w, g = weights[name], p.grad
            assert g is not None
            means[name] = 0.8 * means[name] + 0.2 * g
            squares[name] = 0.9 * squares[name] + 0.1 * g**2
            update = means[name] / (1 - 0.8**step) / ((squares[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            trust = 1.0
            if name in ("0.weight", "3.weight"):
                update = update + 0.02 * w
                trust = math.sqrt((w**2).sum()) / math.sqrt((update**2).sum())
            weights[name] = w - lr * trust * update
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-14)


def test_lamb_where_norms_are_zero() -> None:
    """Neither a weight nor an update of zeros divides by zero: trust is 1."""
    weight, still, absent = (nn.Parameter(value) for value in (torch.zeros(2, 3), torch.ones(2, 3), torch.ones(1)))
    optimizer = LAMB([{"params": [weight, still, absent]}], lr=0.5)
    weight.grad, still.grad = torch.ones(2, 3), torch.zeros(2, 3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 3), -0.5))
    assert torch.equal(still, torch.ones(2, 3))
    assert torch.equal(absent, torch.ones(1))
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)


def test_lamb_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network().double()
    optimizer = build_optimizer(net, OptimConfig(name="lamb"), lr=0.5)
    gradients(net, 0)

    def forbidden(*args: object) -> None:
        raise AssertionError("host sync in a step")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    optimizer.step()
