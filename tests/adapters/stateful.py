"""Every module whose forward pass changes its state, as a function of two views, beside its formula in float64."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softplus

from sslfast.adapters import CMCAverage, CMCMem, MemoryBankModule, NCEAverage, NTXentLoss, RGBMem
from sslfast.models import MemoryBank
from sslfast.ops import negative_rows

N, D, B, K = 24, 16, 6, 32
ROWS = torch.tensor([3, 1, 14, 15, 9, 2])
Loss = Callable[[Any, Tensor, Tensor], Tensor]


def views(seed: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[Tensor]:
    """Two views ``[B, D]`` of unit length, leaves that require a gradient."""
    drawn = torch.randn(2, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [view.to(device, dtype).requires_grad_() for view in normalize(drawn, dim=2)]


def zeros(like: Tensor) -> Tensor:
    return torch.zeros(len(like), dtype=torch.int64, device=like.device)


def rows(like: Tensor) -> Tensor:
    return ROWS.to(like.device)


def simclr(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, equation 1."""
    z = normalize(torch.cat((a, b)), dim=1)
    scores = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return cross_entropy(scores, torch.arange(len(z), device=z.device).roll(len(a)))


def moco(a: Tensor, b: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """He et al. 2020, equation 1."""
    q, k = normalize(a, dim=1), normalize(b, dim=1)
    return cross_entropy(torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1) / temperature, zeros(q))


def drawn_scores(module: Any, x: Tensor, memory: Tensor) -> Tensor:
    """``[B, K + 1]``, column 0 the positive."""
    draw = {"num_negatives": K, "num_rows": N, "seed": module.seed, "exclude_self": module.exclude_self}
    y = rows(x)
    scored = torch.cat((y[:, None], negative_rows(y, step=int(module.step), **draw)), 1)
    return torch.einsum("bd,bkd->bk", x, memory[scored]) / module.T


def infonce(module: Any, x: Tensor, memory: Tensor) -> Tensor:
    return cross_entropy(drawn_scores(module, x, memory), zeros(x))


def nce(module: Any, x: Tensor, memory: Tensor, z: Tensor) -> Tensor:
    """Wu et al. 2018, equations 5 to 8: binary cross-entropy on ``s - log(z K / N)``; Z of this batch if unset."""
    s = drawn_scores(module, x, memory)
    u = s - ((N * s.detach().exp().mean() if z.isnan() else z) * K / N).log()
    return (softplus(-u[:, 0]) + softplus(u[:, 1:]).sum(1)).mean()


def queue_by_hand(module: Any, a: Tensor, b: Tensor) -> Tensor:
    keys, bank = module(normalize(b, dim=1), update=True)
    q = normalize(a, dim=1)
    return cross_entropy(torch.cat(((q * keys).sum(1, keepdim=True), q @ bank.to(q)), 1) / 0.2, zeros(q))


def bank_and_update(module: Any, a: Tensor, b: Tensor) -> Tensor:
    losses = module.score(torch.stack((a, b)), rows(a), temperature=0.1, negatives="full")[0]
    module.update_(rows(a), a)
    return losses.mean()


def whole_bank(bank: Any, a: Tensor, b: Tensor) -> Tensor:
    return sum((cross_entropy(view @ bank.vectors.T / 0.1, rows(a)) for view in (a, b)), start=a.new_zeros(())) / 2


def sum_of_logits(module: Any, a: Tensor, b: Tensor) -> Tensor:
    *logits, labels = module(a, b, rows(a)) if isinstance(module, CMCMem) else module(a, rows(a), b)
    return sum((cross_entropy(logit, labels) for logit in logits), start=a.new_zeros(()))


@dataclass
class Case:
    make: Callable[[], nn.Module]
    loss: Loss
    """Calls the module, which changes its state."""
    formula: Loss
    """The same of a copy of the module from before, in float64."""


def crossed(module: Any, a: Tensor, b: Tensor, part: Callable[..., Tensor]) -> Tensor:
    first, second = (getattr(module, name) for name in module._memories)
    return part(module, a, second) + part(module, b, first)


CASES = {
    "ntxent_queue": Case(
        lambda: NTXentLoss(0.2, (8, D)), lambda m, a, b: m(a, b), lambda m, a, b: moco(a, b, m.bank, 0.2)
    ),
    "queue_by_hand": Case(
        lambda: MemoryBankModule((8, D)), queue_by_hand, lambda m, a, b: moco(a, b, m.bank, 0.2)
    ),
    "nce_average_infonce": Case(
        lambda: NCEAverage(D, N, K, loss="infonce", weight=0.3),
        lambda m, a, b: m(a, rows(a), b),
        lambda m, a, b: 0.3 * infonce(m, b, m.memory) + 0.7 * infonce(m, a, m.memory),
    ),
    "nce_average_nce": Case(
        lambda: NCEAverage(D, N, K, T=0.2, Z=60.0, weight=0.3),
        lambda m, a, b: m(a, rows(a), b),
        lambda m, a, b: 0.3 * nce(m, b, m.memory, m.z) + 0.7 * nce(m, a, m.memory, m.z),
    ),
    "cmc_infonce": Case(
        lambda: CMCAverage(D, N, K, 0.07, 0.5, True),
        lambda m, a, b: sum(m(a, b, rows(a))),
        lambda m, a, b: crossed(m, a, b, infonce),
    ),
    "cmc_nce": Case(
        lambda: CMCAverage(D, N, K, 0.2),
        lambda m, a, b: sum(m(a, b, rows(a))),
        lambda m, a, b: nce(m, a, m.memory_ab, m.z_l) + nce(m, b, m.memory_l, m.z_ab),
    ),
    "rgb_mem": Case(
        lambda: RGBMem(n_dim=D, n_data=N, K=K, T=0.1, m=0.5),
        sum_of_logits,
        lambda m, a, b: infonce(m, a, m.memory) + infonce(m, b, m.memory),
    ),
    "cmc_mem": Case(lambda: CMCMem(D, N, K, 0.1, 0.5), sum_of_logits, lambda m, a, b: crossed(m, a, b, infonce)),
    "memory_bank": Case(lambda: MemoryBank(N, D, momentum=0.5, seed=0), bank_and_update, whole_bank),
}  # fmt: skip


def expected(case: Case, module: nn.Module, given: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients by the formula, in float64, from the state of the module as it is."""
    before = copy.deepcopy(module).double()
    exact = [view.detach().double().requires_grad_() for view in given]
    loss = case.formula(before, *exact)
    return loss.detach(), torch.autograd.grad(loss, exact)
