"""A whole loss step on the ops: score two views, backward, update the bank; in one graph, and replayed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.ops import bank_enqueue_, bank_nce, bank_update_, ema_update_

BATCH, ROWS, COLUMNS = 6, 200, 64


class Step:
    """State of a PIRL-like step, all on the device: bank, a linear head, step counter."""

    def __init__(self, device: torch.device, negatives: Any, loss: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bank = normalize(torch.randn(ROWS, COLUMNS, generator=generator), dim=1).to(device)
        self.weight = torch.randn(32, COLUMNS, generator=generator).to(device).requires_grad_()
        self.slow = self.weight.detach().clone()
        self.queue = self.bank[:40].clone()
        self.head = torch.zeros((), dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.options = {"negatives": negatives, "num_negatives": 50, "loss": loss, "z": 500.0, "seed": 3}

    def forward(self, inputs: Tensor, index: Tensor) -> Tensor:
        query = normalize(inputs @ self.weight, dim=-1)  # [2, B, D]
        losses = bank_nce(query, self.bank, index, step=self.step, **self.options)
        assert isinstance(losses, Tensor)
        with torch.no_grad():
            bank_update_(self.bank, index, query[1].detach(), momentum=0.5)
            bank_enqueue_(self.queue, self.head, query[0].detach())
            self.step += 1
        return losses.mean()

    def __call__(self, inputs: Tensor, index: Tensor) -> Tensor:
        loss = self.forward(inputs, index)
        (gradient,) = torch.autograd.grad(loss, self.weight)
        with torch.no_grad():
            self.weight -= 0.1 * gradient
            ema_update_([self.slow], [self.weight.detach()], momentum=0.9)
        return loss.detach()

    def state(self) -> list[Tensor]:
        return [self.bank, self.weight.detach(), self.slow, self.queue, self.head, self.step]


def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, BATCH, 32, generator=generator).to(device),
            torch.randint(ROWS, (BATCH,), generator=generator).to(device),
        )
        for _ in range(4)
    ]


def captured(step: Step, inputs: Tensor, index: Tensor) -> Any:
    """The step with forward and backward compiled without a graph break on a CPU, and as one CUDA graph on a GPU."""
    if inputs.device.type == "cpu":
        step.forward = torch.compile(step.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
        return step
    before = [value.clone() for value in step.state()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, index)  # warm-up, undone below
    torch.cuda.current_stream().wait_stream(side)
    static_inputs, static_index, graph = inputs.clone(), index.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static_inputs, static_index)
    with torch.no_grad():
        for value, old in zip(step.state(), before, strict=True):
            value.copy_(old)

    def replay(inputs: Tensor, index: Tensor) -> Tensor:
        static_inputs.copy_(inputs)
        static_index.copy_(index)
        graph.replay()
        return loss.clone()

    return replay


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("negatives", ["sampled", "shared", "full"])
def test_one_graph_equals_eager(device: torch.device, negatives: str, loss: str) -> None:
    eager, other = Step(device, negatives, loss), Step(device, negatives, loss)
    data = batches(device)
    graph = captured(other, *data[0])
    for inputs, index in data:
        torch.testing.assert_close(graph(inputs, index), eager(inputs, index), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(other.state(), eager.state(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert int(other.step) == len(data)
