"""Empty, 0-d, expanded and strided tensors at every tensor argument of every op: the reference's answer, or one line
that names op, argument and value."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast import ops
from tests.ops.test_fuzz import CASES, Arguments, copy

SIZES = {"V": 2, "B": 3, "N": 4, "D": 5, "K": 3, "C": 2}
"""Views, batch, bank rows, columns, negatives, channels of a call."""
TORCHS_OWN = re.compile(
    r"INTERNAL ASSERT|aten::|Expected|expected|size mismatch|not implemented for|out of bounds|Traceback|\n|dimension "
)


def unit(*shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    return normalize(drawn, dim=-1).float()


def below(bound: int, *shape: int) -> Tensor:
    return torch.randint(max(bound, 1), shape, generator=torch.Generator().manual_seed(7))


def bank_nce(**more: Any) -> Callable[..., Arguments]:
    def call(V: int, B: int, N: int, D: int, K: int, **_: int) -> Arguments:
        given = more | {name: make(N, B, K) for name, make in more.items() if callable(make)}
        return {
            "query": unit(V, B, D), "bank": unit(N, D), "index": below(N, B), "num_negatives": 4, "seed": 3,
            "step": torch.tensor(3), "z": torch.tensor(9.0), **given,
        }  # fmt: skip

    return call


def jigsaw(B: int, C: int, **_: int) -> Arguments:
    return {
        "images": below(256, B, C, 7, 6).float(), "permutation": below(4, B, 4), "offsets": below(2, B, 4, 2),
        "grid": 2, "patch_size": 2,
    }  # fmt: skip


def views(B: int, **_: int) -> Arguments:
    return {
        "crops": below(256, B, 3, 6, 6).byte(), "grid": 2, "patch_size": 2,
        "parameters": torch.tensor(ops.neutral_parameters()).expand(B, 4, -1).clone(),
        "quarter_turns": below(4, B), "permutation": below(4, B, 4), "offsets": below(2, B, 4, 2),
    }  # fmt: skip


CALLS: dict[str, tuple[str, Callable[..., Arguments], str]] = {
    "negative_rows": (
        "negative_rows",
        lambda B, **_: {"index": below(4, B), "num_negatives": 3, "num_rows": 4, "seed": 1, "step": torch.tensor(2)},
        "B",
    ),
    "bank_nce sampled": ("bank_nce", bank_nce(), "VBND"),
    "bank_nce sampled nce": ("bank_nce", bank_nce(loss="nce"), "VBND"),
    "bank_nce sampled nce of the batch": ("bank_nce", bank_nce(loss="nce", z=None), "VBND"),
    "bank_nce shared": ("bank_nce", bank_nce(negatives="shared"), "VBND"),
    "bank_nce full": ("bank_nce", bank_nce(negatives="full"), "VBND"),
    "bank_nce full nce of the batch": ("bank_nce", bank_nce(negatives="full", loss="nce", z=None), "VBND"),
    "bank_nce of rows": ("bank_nce", bank_nce(negatives=lambda N, B, K: below(N, B, K)), "VBNDK"),
    "bank_nce of shared rows": ("bank_nce", bank_nce(negatives=lambda N, B, K: below(N, K), loss="nce"), "VBNDK"),
    "bank_nce_dense": (
        "bank_nce_dense",
        lambda V, B, N, D, K, **_: {
            "query": unit(V, B, D), "bank": unit(N, D), "index": below(N, B), "negatives": below(N, K), "loss": "nce",
            "z": torch.tensor(9.0),
        },
        "VBNDK",
    ),
    "bank_update_": (
        "bank_update_",
        lambda B, N, D, **_: {"bank": unit(N, D), "index": below(N, B), "features": unit(B, D), "momentum": 0.5},
        "BND",
    ),
    "bank_enqueue_": (
        "bank_enqueue_",
        lambda B, N, D, **_: {"bank": unit(N, D), "head": torch.tensor(1), "keys": unit(B, D)},
        "BND",
    ),
    "ema_update_": (
        "ema_update_",
        lambda B, D, **_: {
            "targets": [unit(B, D), unit(3)], "sources": [unit(B, D) * 2, unit(3) * 3], "momentum": torch.tensor(0.5),
        },
        "BD",
    ),
    "rotate90": (
        "rotate90",
        lambda B, C, D, **_: {"images": below(256, B, C, D, D).float(), "quarter_turns": below(9, B) - 4},
        "BCD",
    ),
    "jigsaw_patches": ("jigsaw_patches", jigsaw, "BC"),
    "render_views": ("render_views", views, "B"),
    "rgb_to_lab": ("rgb_to_lab", lambda B, D, **_: {"pixels": below(256, B, 3, D, 4) / 255}, "BD"),
}  # fmt: skip


def bends(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What an argument may be in place of a contiguous tensor of the right sizes."""
    if t.dim():
        yield "0-d", t.flatten()[0].clone()
        yield "one more dimension", t[None]
    else:
        yield "1-d", t[None]
    for d in range(t.dim()):
        yield f"none along {d}", t.narrow(d, 0, 0)
        yield f"one fewer along {d}", t.narrow(d, 0, t.shape[d] - 1)
        yield f"one along {d}", t.narrow(d, 0, 1)
        yield f"expanded along {d}", t.narrow(d, 0, 1).expand(t.shape)
        yield f"every second along {d}", t.repeat_interleave(2, dim=d)[(*[slice(None)] * d, slice(None, None, 2))]
    if t.dim():
        yield "expanded from one number", t.flatten()[0].expand(t.shape)
        yield "of other columns", torch.cat((t, t), dim=-1)[..., : t.shape[-1]]
    if t.dim() > 1:
        yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
        yield "windows", t.flatten().as_strided(t.shape, (1,) * t.dim())
    if t.is_floating_point():
        yield "lazily negated", torch._neg_view(-t)


def places(call: Arguments) -> Iterator[tuple[str, Callable[[Tensor], Arguments], Tensor]]:
    """Name of every tensor argument, the call with another tensor there, and the tensor."""
    for name, value in call.items():
        if isinstance(value, Tensor):
            yield name, (lambda t, name=name: call | {name: t}), value
        elif isinstance(value, list):
            for i, item in enumerate(value):
                put = lambda t, name=name, value=value, i=i: call | {name: [*value[:i], t, *value[i + 1 :]]}  # noqa: E731
                yield f"{name}[{i}]", put, item


def clear_of_torch(text: str) -> bool:
    """Whether an error is one line, and none of torch about a call inside."""
    return TORCHS_OWN.search(text) is None


def held(op: str, given: Arguments, argument: str, what: str) -> str:
    """What is wrong with how an op takes a call; empty where nothing is."""
    function, _, check = CASES[op]
    call = {name: copy(value) for name, value in given.items()}
    before = {name: copy(value) for name, value in call.items()}
    try:
        answer = function(**call)
    except (ValueError, RuntimeError, TypeError) as error:
        text = str(error)
        if not (text.startswith(f"{op}: ") and clear_of_torch(text) and argument.split("[")[0] in text):
            return f"{what}: {type(error).__name__}: {text[:300]}"
        if not re.search(r"\[|got|\d|lazily", text):
            return f"{what}: no value in {text}"
        for name, value in call.items():
            for now, then in zip(*(x if isinstance(x, list) else [x] for x in (value, before[name])), strict=True):
                if isinstance(now, Tensor) and not torch.equal(now, then):
                    return f"{what}: {name} was changed before {text}"
        return ""
    try:
        check(call | {"z": call["z"]} if "z" in call else call, answer, before)
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:300]}"
    return ""


@pytest.mark.parametrize("case", CALLS)
def test_every_argument(case: str) -> None:
    op, make, _ = CALLS[case]
    call = make(**SIZES)
    assert held(op, call, "", "as it should be") == ""
    wrong = [
        fault
        for name, put, tensor in places(call)
        for how, bent in bends(tensor)
        if (fault := held(op, put(bent), name, f"{name} {how}"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("case", CALLS)
def test_every_size(case: str, size: int) -> None:
    op, make, dimensions = CALLS[case]
    wrong = [
        fault
        for dimension in dimensions
        if (fault := held(op, make(**SIZES | {dimension: size}), "", f"{dimension} = {size}"))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_op_is_here() -> None:
    assert {op for op, _, _ in CALLS.values()} == set(CASES)
