"""Empty, 0-d, expanded and strided tensors at every tensor argument of every adapter: what contiguous ones give, or one
line that names module, argument and value; a call that is refused changes no state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslfast import adapters
from sslfast.ops import estimate_z
from tests.ops.test_edges import below, bends, clear_of_torch, places, unit

B, N, D, K = 3, 6, 5, 4
CONFIG = {
    "loss_type": "nce", "norm_embedding": True, "temperature": 0.2, "loss_weights": [1.0, 0.5], "norm_constant": -1,
    "update_mem_with_emb_index": 0, "num_train_samples": N,
    "negative_sampling_params": {"num_negatives": K, "type": "random"},
    "memory_params": {"embedding_dim": D, "momentum": 0.5, "norm_init": True, "update_mem_on_forward": False},
}  # fmt: skip


def rows() -> Tensor:
    return torch.tensor([0, 4, 2])


def features(key: int) -> Tensor:
    return unit(B, D).roll(key, 0).clone()


def with_gradient(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def several(module: nn.Module, output: list[Tensor], target: Tensor) -> Tensor:
    result: Tensor = module(output, target)
    return result


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, Any]]] = {
    "NCEAverage": (
        lambda: adapters.NCEAverage(D, N, K),
        lambda module, **call: module(**call),
        {"x": features(0), "y": rows(), "x_jig": features(1), "idx": below(N, B, K + 1)},
    ),
    "NCEAverage of all ranks": (
        lambda: adapters.NCEAverage(D, N, K),
        lambda module, **call: module(**call),
        {"x": features(0), "y": rows(), "all_x": features(2), "all_y": rows() + 1},
    ),
    "NCEAverage.update_memory": (
        lambda: adapters.NCEAverage(D, N, K),
        lambda module, **call: module.update_memory(**call),
        {"embedding": features(0), "y": rows()},
    ),
    "CMCAverage": (
        lambda: adapters.CMCAverage(D, N, K),
        lambda module, **call: module(**call),
        {"l": features(0), "ab": features(1), "y": rows(), "idx": below(N, B, K + 1)},
    ),
    "RGBMem": (
        lambda: adapters.RGBMem(D, N, K),
        lambda module, **call: module(**call),
        {"x": features(0), "y": rows(), "x_jig": features(1), "all_x": features(2), "all_y": rows() + 1},
    ),
    "CMCMem": (
        lambda: adapters.CMCMem(D, N, K),
        lambda module, **call: module(**call),
        {
            "x1": features(0), "x2": features(1), "y": rows(), "x1_jig": features(2), "x2_jig": features(0),
            "all_x1": features(1), "all_x2": features(2), "all_y": rows() + 1,
        },
    ),
    "NCELossWithMemory": (
        lambda: adapters.NCELossWithMemory(CONFIG),
        several,
        {"output": [features(0), features(1)], "target": rows()},
    ),
    "NCELossWithMemory.update_memory": (
        lambda: adapters.NCELossWithMemory(CONFIG),
        lambda module, **call: module.update_memory(**call),
        {"embedding": features(0), "y": rows()},
    ),
    "MemoryBankModule": (
        lambda: adapters.MemoryBankModule((N, D)),
        lambda module, **call: module(**call, update=True),
        {"output": features(0)},
    ),
    "MemoryBankModule.enqueue": (
        lambda: adapters.MemoryBankModule((N, D)),
        lambda module, **call: module.enqueue(**call),
        {"keys": features(0)},
    ),
    "NTXentLoss": (
        lambda: adapters.NTXentLoss(),
        lambda module, **call: module(**call),
        {"out0": features(0), "out1": features(1)},
    ),
    "NTXentLoss with a bank": (
        lambda: adapters.NTXentLoss(memory_bank_size=(N, D)),
        lambda module, out0, out1: module(with_gradient(out0), out1),
        {"out0": features(0), "out1": features(1)},
    ),
}  # fmt: skip


def outcome(case: str, call: dict[str, Any]) -> tuple[Any, dict[str, Tensor], Exception | None]:
    """(result, state behind it, error)."""
    make, run, _ = CASES[case]
    module = make()
    try:
        found, error = run(module, **call), None
    except Exception as raised:
        found, error = None, raised
    return found, {name: value.clone() for name, value in module.state_dict().items()}, error


def contiguous(value: Any) -> Any:
    if isinstance(value, list):
        return [contiguous(item) for item in value]
    return value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def held(case: str, call: dict[str, Any], argument: str) -> str:
    module = case.split(" ")[0].split(".")[0].replace("CMCAverage", "NCEAverage")
    found, state, error = outcome(case, call)
    if error is None:
        expected, wanted, refused = outcome(case, {name: contiguous(value) for name, value in call.items()})
        if refused is not None:
            return f"contiguous ones are refused: {refused}"
        try:
            torch.testing.assert_close((found, state), (expected, wanted), equal_nan=True)
            for value in found if isinstance(found, tuple) else [found]:
                assert value is None or value.isfinite().all(), f"{value}"
        except AssertionError as wrong:
            return str(wrong)
        return ""
    text = str(error)
    if type(error) not in (ValueError, TypeError, RuntimeError) or not clear_of_torch(text):
        return f"{type(error).__name__}: {text[:300]}"
    if not text.startswith(f"{module}: ") or argument.split("[")[0] not in text:
        return f"names not {module} and {argument}: {text}"
    _, before, _ = outcome(case, {})
    if not all(torch.equal(state[name].nan_to_num(), before[name].nan_to_num()) for name in before):
        return f"state changed before: {text}"
    return ""


@pytest.mark.parametrize("case", CASES)
def test_every_argument(case: str) -> None:
    call = CASES[case][2]
    assert held(case, call, "") == ""
    wrong = [
        f"{name} {how}: {fault}"
        for name, put, tensor in places(call)
        for how, bent in bends(tensor)
        if (fault := held(case, put(bent), name))
    ]
    wrong += [
        f"{name} {other!r}: {fault}"
        for name, put, _ in places(call)
        for other in (3, [1.0, 2.0], "tensor")
        if (fault := held(case, put(other), name))  # type: ignore[arg-type]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_adapter_is_here() -> None:
    assert {case.split(" ")[0].split(".")[0] for case in CASES} == set(adapters.__all__)


def test_estimate_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"estimate_z: lse must hold at least one number, got shape \[2, 0\]"):
        estimate_z(torch.empty(2, 0), num_negatives=3, num_rows=4)
