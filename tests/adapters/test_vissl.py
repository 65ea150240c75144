"""NCELossWithMemory against VISSL's formulas, written out in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from sslfast.adapters import NCELossWithMemory
from sslfast.distributed import check_replicas, destroy_process_group, init_process_group, process_group
from sslfast.ops import negative_rows
from tests.distributed.test_training import enter, run

N, D, B, K, T = 60, 16, 6, 24, 0.2
TARGET = torch.tensor([3, 50, -1, 7, 11, 30])
KEPT = TARGET != -1


def config(**changes: Any) -> dict[str, Any]:
    """VISSL's ``LOSS.nce_loss_with_memory``; a change of a nested entry by its dotted name with ``__``."""
    whole: dict[str, Any] = {
        "name": "nce_loss_with_memory",
        "loss_type": "nce",
        "norm_embedding": True,
        "temperature": T,
        "loss_weights": [0.3, 0.7],
        "norm_constant": -1,
        "update_mem_with_emb_index": 1,
        "ignore_index": -1,
        "num_train_samples": N,
        "negative_sampling_params": {"num_negatives": K, "type": "random"},
        "memory_params": {
            "memory_size": -1,
            "embedding_dim": D,
            "momentum": 0.25,
            "norm_init": True,
            "update_mem_on_forward": False,
        },
    }
    for name, value in changes.items():
        table, _, key = name.rpartition("__")
        (whole[table] if table else whole)[key] = value
    return whole


def outputs(seed: int, *, batch: int = B) -> list[Tensor]:
    drawn = torch.randn(2, batch, D, generator=torch.Generator().manual_seed(seed))
    return [view.requires_grad_() for view in drawn.unbind()]


class Plain:
    """VISSL's class, in float64, with the negatives of sslfast."""

    def __init__(self, module: NCELossWithMemory) -> None:
        self.module, self.memory, self.z = module, module.nce_average.memory.double(), math.nan

    def __call__(self, views: list[Tensor], target: Tensor, step: int) -> Tensor:
        config, loss = self.module.loss_config, torch.zeros((), dtype=torch.float64)
        on_forward = config["memory_params"]["update_mem_on_forward"]
        y = target[target != -1]
        for place, view in enumerate(views):
            x = normalize(view.double()[target != -1], dim=1)
            drawn = {"num_negatives": K, "num_rows": N, "exclude_self": False}
            rows = torch.cat((y[:, None], negative_rows(y, seed=place, step=step, **drawn)), dim=1)  # type: ignore[arg-type]
            scores = torch.einsum("bd,bkd->bk", x, self.memory[rows]) / T
            if math.isnan(self.z):
                self.z = float(scores.detach().exp().mean() * N)
            if config["loss_type"] == "nce":
                p, noise = scores.exp() / self.z, K / N
                each = (p[:, 0] / (p[:, 0] + noise)).log().sum() + (noise / (p[:, 1:] + noise)).log().sum()
                loss = loss - config["loss_weights"][place] * each / len(y)
            else:
                zeros = torch.zeros(len(y), dtype=torch.int64)
                loss = loss + config["loss_weights"][place] * cross_entropy(scores, zeros)
            if on_forward or config["update_mem_with_emb_index"] == place:
                m = config["memory_params"]["momentum"]
                self.memory = self.memory.clone()
                self.memory[y] = normalize(m * self.memory[y] + (1 - m) * x.detach(), dim=1)
        return loss


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("on_forward", [False, True])
@pytest.mark.parametrize("loss_type", ["nce", "cross_entropy"])
def test_steps_are_those_of_vissl(loss_type: str, on_forward: bool, place: int) -> None:
    module = NCELossWithMemory.from_config(
        config(loss_type=loss_type, memory_params__update_mem_on_forward=on_forward, update_mem_with_emb_index=place)
    )
    plain = Plain(module)
    for step in range(3):
        views = outputs(step)
        expected = plain(views, TARGET, step)
        gradients = torch.autograd.grad(expected, views)
        loss = module(views, TARGET)
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(loss, views), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(module.nce_average.memory.double(), plain.memory, rtol=1e-5, atol=1e-6)
    if loss_type == "nce":
        assert math.isclose(float(module.nce_average.z), plain.z, rel_tol=1e-5)


def test_one_tensor_and_targets_in_a_column() -> None:
    """NPID: one view, as the trainer gives it."""
    changes = {"loss_weights": [1.0], "memory_params__update_mem_on_forward": True, "update_mem_with_emb_index": -100}
    module, view = NCELossWithMemory(config(**changes)), outputs(1)[0]
    same = copy.deepcopy(module)
    assert torch.equal(module(view, TARGET[:, None]), same([view], TARGET))
    assert torch.equal(module.nce_average.memory, same.nce_average.memory)


def test_a_checkpoint_of_vissl_loads_and_an_own_one_resumes() -> None:
    memory = normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(1)), dim=1)
    theirs = {
        "nce_average.memory": memory,
        "nce_average.params": torch.tensor([K, T, 321.5, 0.25]),
        "nce_average.multinomial.prob": torch.ones(N),
        "nce_average.multinomial.alias": torch.zeros(N, dtype=torch.long),
    }
    module = NCELossWithMemory(config())
    module.load_state_dict(theirs)
    assert torch.equal(module.nce_average.memory, memory)
    assert module.nce_average.z == 321.5
    module(outputs(1), TARGET)
    assert module.nce_average.z == 321.5
    resumed = NCELossWithMemory(config())
    resumed.load_state_dict(module.state_dict())
    assert torch.equal(resumed(outputs(2), TARGET), module(outputs(2), TARGET))


def test_update_by_hand_and_eval_mode() -> None:
    module = NCELossWithMemory(config()).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(outputs(1), TARGET)
    assert all(torch.equal(value, before[name]) or value.isnan() for name, value in module.state_dict().items())
    x, y = outputs(1)[1].detach(), torch.arange(B)
    module.update_memory(x, y)
    memory = before["nce_average.memory"]
    torch.testing.assert_close(
        module.nce_average.memory[y], normalize(0.25 * memory[y] + 0.75 * normalize(x, dim=1), dim=1)
    )


def test_it_stands_in_for_a_loss_that_is_a_class_of_its_own() -> None:
    """As classy_vision's: a base without arguments, whose from_config is abstract."""

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = True

        @classmethod
        def from_config(cls, loss_config: Any) -> Any:
            raise AssertionError

    class Loss(NCELossWithMemory, Base):  # type: ignore[misc]
        pass

    loss = Loss.from_config(config())
    assert isinstance(loss, Base)
    assert loss.made
    assert loss(outputs(1), TARGET).isfinite()


def ranks_in_turn(rank: int, ranks: int, port: int) -> None:
    enter(rank, ranks, port)
    whole = NCELossWithMemory(config(norm_constant=90.0))
    views, y = outputs(1), torch.arange(B) * 3
    expected = whole(views, y).detach()
    init_process_group(process_group(), torch.device("cpu"))
    own = slice(B // ranks * rank, B // ranks * (rank + 1))
    module = NCELossWithMemory(config(norm_constant=90.0))
    loss = module([view[own] for view in views], y[own]).detach()
    torch.distributed.all_reduce(loss)
    torch.testing.assert_close(loss / ranks, expected)
    torch.testing.assert_close(module.nce_average.memory, whole.nce_average.memory)
    check_replicas([module.nce_average.memory])
    destroy_process_group()


def test_the_memory_takes_the_batches_of_all_ranks() -> None:
    run(ranks_in_turn, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss_type": "mse"}, r"loss_config\.loss_type must be nce or cross_entropy, got 'mse'"),
        ({"negative_sampling_params__type": "hard"}, r"negative_sampling_params\.type must be random or debug, got"),
        ({"memory_params__norm_init": False}, r"memory_params\.norm_init must be True, got False"),
        ({"update_mem_with_emb_index": -100}, r"update_mem_with_emb_index must name one of the 2 views .*got -100"),
        ({"num_train_samples": -1}, r"loss_config\.num_train_samples must be an integer, at least 2, got -1"),
        ({"memory_params": None}, r"loss_config\.memory_params must be a mapping, got NoneType"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="NCELossWithMemory: .*" + text):
        NCELossWithMemory(config(**changes))


def test_a_missing_entry_and_bad_batches() -> None:
    whole = config()
    del whole["temperature"]
    with pytest.raises(ValueError, match=r"NCELossWithMemory: loss_config\.temperature is missing; give it"):
        NCELossWithMemory(whole)
    module = NCELossWithMemory(config())
    with pytest.raises(ValueError, match=r"output must be 2 to 2 views, as loss_weights .*, got 1"):
        module(outputs(1)[0], TARGET)
    with pytest.raises(ValueError, match=r"none of them 0"):
        module(outputs(1), torch.full((B,), -1))
