import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from sslfast.methods.shared.momentum import rising_momentum
from sslfast.methods.shared.views import encode_crops, swapped_cross_entropy


@pytest.mark.parametrize("views", [2, 3, 6])
def test_swapped_cross_entropy_is_the_double_sum(views: int) -> None:
    generator = torch.Generator().manual_seed(views)
    logits = 3 * torch.randn(views, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64).softmax(dim=2)
    logits.requires_grad_()
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(2):
        for v in range(views):
            if v != i:
                expected = expected - (targets[i] * log_softmax(logits[v], dim=1)).sum(dim=1)
    expected = expected / (2 * (views - 1))
    result = swapped_cross_entropy(logits, targets)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)
    own, wanted = (torch.autograd.grad(x.sum(), logits)[0] for x in (result, expected))
    torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-13)


def test_swapped_cross_entropy_in_closed_form() -> None:
    """Uniform predictions cost log K; the right ones nothing, the wrong ones the difference of the scores."""
    targets = torch.eye(3)[torch.tensor([[0, 1], [0, 1]])]  # two images, the same target in both views
    uniform = torch.zeros(4, 2, 3)
    torch.testing.assert_close(swapped_cross_entropy(uniform, targets), torch.full((2,), math.log(3)))
    right = 100 * targets[:1].expand(4, -1, -1)
    torch.testing.assert_close(swapped_cross_entropy(right, targets), torch.zeros(2))
    torch.testing.assert_close(swapped_cross_entropy(right.roll(1, 2), targets), torch.full((2,), 100.0))


def test_crops_of_one_size_are_one_batch() -> None:
    seen: list[int] = []

    class Trunk(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x.mean(dim=(2, 3))

    crops = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((8, 8, 4, 4, 4))]
    features = encode_crops(Trunk(), crops)
    assert seen == [4, 6]
    assert torch.equal(features, torch.arange(5.0).repeat_interleave(2)[:, None].expand(10, 3))


def test_momentum_rises_from_its_base_to_1() -> None:
    device = torch.device("cpu")
    for step in (0, 3, torch.tensor(7), 10):
        expected = 1 - 0.1 * (math.cos(math.pi * int(step) / 10) + 1) / 2
        assert rising_momentum(0.9, step, 10, device=device).item() == pytest.approx(expected, rel=1e-14)
    assert rising_momentum(0.9, 0, 10, device=device) == pytest.approx(0.9)
    assert rising_momentum(0.9, 10, 10, device=device) == 1
