"""Hostile arguments for every op: an error that names the op, or the right answer; never a crash, never a wrong number.

A valid call is drawn, then up to three of its arguments are corrupted: shape, dtype, strides, device, layout, values,
range. Everything runs in one child process, so that a crash is a failed test that shows the call. The same file is the
child: ``python -X faulthandler -m tests.ops.test_fuzz TRACE`` prints one line for each op that held.
"""

import math
import os
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from sslfast import ops
from sslfast.ops import ViewParameter
from tests.ops.test_render_views import stacked

ROOT = Path(__file__).resolve().parents[2]
# Of each op, through its public function and through the raw op. A number in SSLFAST_FUZZ: another, longer search.
SEARCH = os.environ.get("SSLFAST_FUZZ")
EXAMPLES = int(SEARCH or 40)
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
DTYPES += [torch.complex64]
INTEGERS = [0, 1, 2, 3, 7, -1, 2**33, 2**62, 2**63 - 1, -(2**63)]
FLOATS = [0.0, 1.0, 0.5, -1.0, float("nan"), float("inf"), 1e300, 1e-3]
ALLOWED = (ValueError, RuntimeError, TypeError, NotImplementedError)

Arguments = dict[str, Any]


def unit(draw: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit rows, so that scores stay moderate unless the values are corrupted."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randint(0, 9)), dtype=torch.float64)
    return normalize(drawn, dim=-1).to(dtype)


def integers(draw: random.Random, bound: int, *shape: int) -> Tensor:
    """int64 in [0, bound)."""
    return torch.randint(bound, shape, generator=torch.Generator().manual_seed(draw.randint(0, 9)))


def floating(draw: random.Random) -> torch.dtype:
    return draw.choice(DTYPES[:4])


# What bends a tensor. Each takes it and a draw; None where it does not apply.


def other_dtype(t: Tensor, draw: random.Random) -> Tensor:
    return t.to(draw.choice(DTYPES))


def other_rank(t: Tensor, draw: random.Random) -> Tensor | None:
    how = draw.choice(["more", "fewer", "flat"])
    if how == "more":
        return t[None]
    if how == "flat":
        return t.reshape(-1)
    return t[0] if t.dim() > 0 and t.shape[0] > 0 else None


def other_size(t: Tensor, draw: random.Random) -> Tensor | None:
    if t.dim() == 0:
        return None
    dim = draw.randint(0, t.dim() - 1)
    how = draw.choice(["none", "one fewer", "twice"])
    if how == "twice":
        return torch.cat((t, t), dim=dim)
    return t.narrow(dim, 0, 0 if how == "none" else max(0, t.shape[dim] - 1))


def other_strides(t: Tensor, draw: random.Random) -> Tensor | None:
    """The same values in other memory: transposed, every second element, behind an offset, negated lazily."""
    how = draw.choice(["transposed", "every second", "offset", "lazily negated"])
    if how == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else None
    if how == "every second":
        return torch.stack((t, t), dim=-1)[..., 0]
    if how == "offset":
        return torch.cat((t.reshape(-1)[:1], t.reshape(-1)))[min(1, t.numel()) :].view(t.shape)
    return torch._neg_view(-t) if t.is_floating_point() else None


def expanded(t: Tensor, draw: random.Random) -> Tensor | None:
    return t[:1].expand(t.shape) if t.dim() > 0 and t.shape[0] > 0 else None


def overlapping(t: Tensor, draw: random.Random) -> Tensor | None:
    return t.as_strided(t.shape, (1,) * t.dim()) if t.dim() > 1 and t.numel() > 0 else None


def on_meta(t: Tensor, draw: random.Random) -> Tensor:
    return t.to("meta")


def sparse(t: Tensor, draw: random.Random) -> Tensor | None:
    return t.to_sparse() if t.dim() > 0 else None


def other_value(t: Tensor, draw: random.Random) -> Tensor | None:
    if t.numel() == 0 or t.dtype == torch.bool or t.is_complex():
        return None
    t = t.clone(memory_format=torch.contiguous_format)
    position = draw.randint(0, t.numel() - 1)
    if t.is_floating_point():
        t.view(-1)[position] = draw.choice([float("nan"), 1e4, -1e4, 0.0])
    elif t.dtype == torch.int64:
        t.view(-1)[position] = draw.choice([-1, 10**6, 2**62, -(2**63), 0])
    return t


BENDS: list[Callable[[Tensor, random.Random], Tensor | None]] = [
    other_dtype, other_rank, other_size, other_strides, other_strides, expanded, overlapping, on_meta, sparse,
    other_value, other_value,
]  # fmt: skip


def corrupt(value: Any, draw: random.Random) -> Any:
    """Replaces an argument by another value."""
    if isinstance(value, Tensor):
        how = draw.randint(0, len(BENDS))
        if value.device.type == "meta" or value.layout != torch.strided:
            return value  # bent before, nothing to take values from
        if how == len(BENDS):
            return draw.choice([None, value.tolist(), "tensor", 3])
        bent = BENDS[how](value, draw)
        return value if bent is None else bent
    if isinstance(value, list) and value:
        value = list(value)
        at = draw.randint(0, len(value) - 1)
        value[at] = corrupt(value[at], draw)
        return value[:-1] if draw.randint(0, 7) == 0 else value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice(FLOATS)
    return value


def copy(value: Any) -> Any:
    """A copy with the same strides; arguments that were the same tensor stay the same."""
    if isinstance(value, list):
        return [copy(item) for item in value]
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
        return value
    if value.is_neg():
        return torch._neg_view(-value)
    if not value.numel():
        return value.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.as_strided((extent,), (1,)).clone().as_strided(value.shape, value.stride())


def entangle(call: Arguments, draw: random.Random) -> bool:
    """Now and then one tensor in the memory of another, or in a storage smaller than its sizes; True for the latter."""
    names = [
        name
        for name, value in call.items()
        if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and value.numel()
    ]
    how = draw.randint(0, 9)
    if len(names) < 2 or how > 1:
        return False
    name, other = draw.sample(names, 2)
    tensor, storage = call[name], call[other].untyped_storage()
    if tensor.is_neg():
        return False  # torch writes it out before the op sees it
    if how == 0:
        if storage.nbytes() < tensor.numel() * tensor.element_size():
            return False
        offset = draw.randint(0, storage.nbytes() // tensor.element_size() - tensor.numel())
        call[name] = torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.shape)
        return False
    own = tensor.untyped_storage()
    own.resize_(draw.choice([0, own.nbytes() - 1]))
    return True


def exact(value: Any) -> Any:
    """Floating tensors contiguous in float64, everything else unchanged: arguments of the references."""
    if isinstance(value, list):
        return [exact(item) for item in value]
    return value.double().contiguous() if isinstance(value, Tensor) and value.is_floating_point() else value


# One generator of valid calls and one check of an answer for each op.


def negative_rows_call(draw: random.Random) -> Arguments:
    num_rows = draw.choice([2, 5, 2**32])
    return {
        "index": integers(draw, min(num_rows, 5), draw.randint(0, 4)),
        "num_negatives": draw.randint(1, 9),
        "num_rows": num_rows,
        "seed": draw.choice([0, 2**63 - 1]),
        "step": draw.choice([0, 2**32 + 1, 2**63, -1, torch.tensor(3)]),
        "exclude_self": draw.choice([False, True]),
    }


def negative_rows_check(call: Arguments, answer: Tensor, _before: Arguments) -> None:
    step = call["step"] if isinstance(call["step"], Tensor) else call["step"] % 2**32
    assert torch.equal(answer, ops.negative_rows_reference(**(call | {"step": step})))


def bank_nce_call(draw: random.Random) -> Arguments:
    batch, columns, num_rows, count = (draw.randint(low, 5) for low in (0, 1, 2, 1))
    dtype = floating(draw)
    views = draw.choice([(), (1,), (2,), (0,), (2, 1)])
    query = unit(draw, *views, batch, columns, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return {
        "query": query,
        "bank": unit(draw, num_rows, columns, dtype=dtype),
        "index": integers(draw, num_rows, batch),
        "negatives": draw.choice(
            ["sampled", "shared", "full", integers(draw, num_rows, batch, count), integers(draw, num_rows, count)]
        ),
        "num_negatives": draw.randint(1, 40),
        "temperature": draw.choice([0.07, 1.0]),
        "loss": draw.choice(["infonce", "nce"]),
        "z": draw.choice([30.0, torch.tensor(30.0), torch.tensor(30.0, dtype=torch.float64)]),
        "exclude_self": draw.choice([False, True]),
        "seed": 3,
        "step": draw.choice([0, torch.tensor(3)]),
    }


def assert_known(ours: Tensor, expected: Tensor, lse: Tensor) -> None:
    """NaN and overflow stay with the queries that they belong to; a loss is a difference of scores of size lse."""
    assert ours.shape == expected.shape
    known = expected.isfinite() & (expected.abs() < 1e6)
    error, size = (ours.double() - expected.double()).abs(), 1 + expected.double().abs()
    assert (error <= 1e-4 * size + 1e-6 * lse.double().abs())[known].all(), f"{ours} {expected}"
    assert not (expected.isnan() & ours.isfinite()).any()


def bank_nce_check(call: Arguments, answer: Tensor, _before: Arguments) -> None:
    expected, lse = ops.bank_nce_reference(**{name: exact(value) for name, value in call.items()}, return_lse=True)
    assert_known(answer, expected, lse)


def bank_nce_dense_call(draw: random.Random) -> Arguments:
    call = bank_nce_call(draw)
    query, index = call["query"], call["index"]
    negatives = draw.choice([None, integers(draw, len(call["bank"]), draw.randint(1, 5))])
    return {
        "query": query.reshape(math.prod(query.shape[:-2]), *query.shape[-2:]),
        "index": torch.where(integers(draw, 4, len(index)) == 0, -1, index),  # some positives lie in another shard
        "negatives": negatives,
        "exclude_self": call["exclude_self"] and negatives is not None,
        **{name: call[name] for name in ("bank", "temperature", "loss", "z")},
    }


def bank_nce_dense_check(call: Arguments, answer: tuple[Tensor, Tensor], _before: Arguments) -> None:
    loss, lse = ops.bank_nce_dense_reference(**{name: exact(value) for name, value in call.items()})
    assert_known(answer[0], loss, lse)
    assert_known(answer[1], lse, lse)


def bank_update_call(draw: random.Random) -> Arguments:
    batch, columns, num_rows = (draw.randint(low, 5) for low in (0, 1, 1))
    return {
        "bank": unit(draw, num_rows, columns, dtype=floating(draw)),
        "index": integers(draw, num_rows, batch),
        "features": unit(draw, batch, columns, dtype=floating(draw)),
        "momentum": draw.choice([0.0, 0.5, 1.0]),
    }


def bank_update_check(call: Arguments, _answer: None, before: Arguments) -> None:
    expected = exact(before["bank"]).clone()
    ops.bank_update_reference(expected, before["index"], exact(before["features"]), momentum=call["momentum"])
    rounding = 2 * torch.finfo(call["bank"].dtype).eps
    tolerance = max(rounding, 1e-12 if call["features"].dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(call["bank"].double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def bank_enqueue_call(draw: random.Random) -> Arguments:
    batch, columns, num_rows = (draw.randint(low, 5) for low in (0, 1, 1))
    return {
        "bank": unit(draw, num_rows, columns, dtype=floating(draw)),
        "head": integers(draw, num_rows),
        "keys": unit(draw, batch, columns, dtype=floating(draw)),
    }


def bank_enqueue_check(call: Arguments, _answer: None, before: Arguments) -> None:
    bank, head = before["bank"].clone(), before["head"].clone()
    ops.bank_enqueue_reference(bank, head, before["keys"])
    torch.testing.assert_close(call["bank"], bank, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(call["head"], head)


def ema_update_call(draw: random.Random) -> Arguments:
    shapes = draw.choices([(), (3,), (2, 4), (0, 3), (2, 3, 2, 2)], k=draw.randint(0, 3))
    sources = [unit(draw, *shape, 1, dtype=floating(draw))[..., 0] for shape in shapes]
    return {
        "targets": [unit(draw, *shape, 2, dtype=floating(draw))[..., 1].contiguous() for shape in shapes],
        "sources": sources,
        "momentum": draw.choice([0.0, 0.9, 1.0, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)]),
    }


def ema_update_check(call: Arguments, _answer: None, before: Arguments) -> None:
    expected = [exact(target).clone() for target in before["targets"]]
    ops.ema_update_reference(expected, exact(before["sources"]), momentum=before["momentum"])
    operands = zip(before["targets"], before["sources"], strict=True)
    for target, wanted, pair in zip(call["targets"], expected, operands, strict=True):
        tolerance = max(2 * torch.finfo(target.dtype).eps, 1e-6)
        size = max([1.0, *(t.double().abs().nan_to_num(1.0).max().item() for t in pair if t.numel())])  # may cancel
        torch.testing.assert_close(target.double(), wanted, rtol=tolerance, atol=size * tolerance, equal_nan=True)


def rotate90_call(draw: random.Random) -> Arguments:
    batch, channels, side = (draw.randint(0, high) for high in (3, 3, 18))
    return {
        "images": integers(draw, 256, batch, channels, side, side).to(draw.choice(DTYPES)),
        "quarter_turns": integers(draw, 9, batch) - 4,
    }


def rotate90_check(call: Arguments, answer: Tensor, _before: Arguments) -> None:
    expected = ops.rotate90_reference(call["images"], call["quarter_turns"])
    torch.testing.assert_close(answer, expected, rtol=0, atol=0, equal_nan=True)


def jigsaw_patches_call(draw: random.Random) -> Arguments:
    batch, channels, grid, patch = (draw.randint(low, high) for low, high in ((0, 3), (0, 3), (1, 3), (1, 4)))
    height, width = (grid * patch + draw.randint(0, 5) for _ in range(2))
    slack = [side // grid - patch + 1 for side in (height, width)]
    cells = grid**2
    return {
        "images": integers(draw, 256, batch, channels, height, width).to(draw.choice(DTYPES)),
        "permutation": integers(draw, cells, batch, cells),
        "offsets": torch.stack([integers(draw, most, batch, cells) for most in slack], dim=-1),
        "grid": grid,
        "patch_size": patch,
    }


def jigsaw_patches_check(call: Arguments, answer: Tensor, _before: Arguments) -> None:
    expected = ops.jigsaw_patches_reference(**call)
    torch.testing.assert_close(answer, expected, rtol=0, atol=0, equal_nan=True)


def rgb_to_lab_call(draw: random.Random) -> Arguments:
    batch, height, width = (draw.randint(low, high) for low, high in ((0, 3), (0, 5), (0, 7)))
    pixels = integers(draw, 256, batch, 3, height, width) / 255
    if draw.choice([False, True]):
        pixels = pixels.to(memory_format=torch.channels_last)
    return {"pixels": pixels.to(draw.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16]))}


def rgb_to_lab_check(call: Arguments, answer: Tensor, _before: Arguments) -> None:
    """Within the scale; corrupted calls may hold numbers whose cube float32 cannot hold."""
    pixels = call["pixels"].double()
    inside = ((pixels >= 0) & (pixels <= 1)).all(dim=1, keepdim=True).expand(pixels.shape)
    expected = ops.rgb_to_lab_reference(pixels)
    torch.testing.assert_close(answer[inside].double(), expected[inside], rtol=0, atol=1e-3)


def render_views_call(draw: random.Random) -> Arguments:
    batch, grid, patch = (draw.randint(low, high) for low, high in ((0, 3), (0, 3), (1, 4)))
    side, pictures = max(1, grid) * patch + draw.randint(0, 4), max(1, grid**2)
    columns = {
        ViewParameter.FLIP: integers(draw, 2, batch, pictures),
        ViewParameter.JITTER: integers(draw, 2, batch, pictures),
        ViewParameter.JITTER_ORDER: integers(draw, 24, batch, pictures),
        ViewParameter.BRIGHTNESS: integers(draw, 200, batch, pictures) / 100,
        ViewParameter.CONTRAST: integers(draw, 200, batch, pictures) / 100,
        ViewParameter.SATURATION: integers(draw, 200, batch, pictures) / 100,
        ViewParameter.HUE: integers(draw, 100, batch, pictures) / 100 - 0.5,
        ViewParameter.PHOTOMETRIC: torch.zeros(batch, pictures),
        ViewParameter.POSTERIZE_BITS: integers(draw, 9, batch, pictures),
        ViewParameter.SHARPNESS: integers(draw, 200, batch, pictures) / 100,
        ViewParameter.SOLARIZE_THRESHOLD: integers(draw, 257, batch, pictures),
        ViewParameter.GRAYSCALE: integers(draw, 2, batch, pictures),
        ViewParameter.BLUR_SIGMA: integers(draw, 501, batch, pictures) / 100,
        ViewParameter.LAST_SOLARIZE_THRESHOLD: integers(draw, 257, batch, pictures) + 0.3737,
    }
    call: Arguments = {
        "crops": integers(draw, 256, batch, 3, side, side).to(torch.uint8),
        "parameters": stacked(columns),
        "dtype": draw.choice([torch.float32, torch.bfloat16, torch.float16]),
        "channels_last": draw.choice([False, True]),
    }
    if grid:
        free = side // grid - patch + 1
        call |= {
            "permutation": integers(draw, pictures, batch, pictures),
            "offsets": torch.stack([integers(draw, free, batch, pictures) for _ in range(2)], dim=-1),
            "grid": grid,
            "patch_size": patch,
        }
    if draw.choice([False, True]):
        call["quarter_turns"] = integers(draw, 9, batch) - 4
    return call


def render_views_check(call: Arguments, answer: Tensor, _before: Arguments) -> None:
    """Levels of the photometric set may move by one, so its gate is closed above; corrupted calls may open it."""
    expected = ops.render_views_reference(**call)
    assert answer.shape == expected.shape
    assert answer.dtype == expected.dtype
    closed = (call["parameters"][..., ViewParameter.PHOTOMETRIC] == 0).flatten()
    tolerance = 1e-3 if answer.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(answer[closed], expected[closed], rtol=tolerance, atol=tolerance)


CASES: dict[str, tuple[Callable[..., Any], Callable[[Any], Arguments], Callable[..., None]]] = {
    "negative_rows": (ops.negative_rows, negative_rows_call, negative_rows_check),
    "bank_nce": (ops.bank_nce, bank_nce_call, bank_nce_check),
    "bank_nce_dense": (ops.bank_nce_dense, bank_nce_dense_call, bank_nce_dense_check),
    "bank_update_": (ops.bank_update_, bank_update_call, bank_update_check),
    "bank_enqueue_": (ops.bank_enqueue_, bank_enqueue_call, bank_enqueue_check),
    "ema_update_": (ops.ema_update_, ema_update_call, ema_update_check),
    "rotate90": (ops.rotate90, rotate90_call, rotate90_check),
    "jigsaw_patches": (ops.jigsaw_patches, jigsaw_patches_call, jigsaw_patches_check),
    "rgb_to_lab": (ops.rgb_to_lab, rgb_to_lab_call, rgb_to_lab_check),
    "render_views": (ops.render_views, render_views_call, render_views_check),
}


def tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
    return [
        t
        for item in items
        for t in ([item] if isinstance(item, Tensor) else tensors(item) if isinstance(item, list) else [])
    ]


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = f"strides {value.stride()}" if value.layout == torch.strided else value.layout
        return f"{value.dtype}{list(value.shape)} {layout} on {value.device}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(describe(item) for item in value)}]"
    if isinstance(value, dict):
        return ", ".join(f"{name}={describe(item)}" for name, item in value.items())
    return repr(value)


def clear(error: BaseException, op: str) -> bool:
    """Names the op (bank_nce draws through negative_rows), or is Python's or torch's own message for a foreign type."""
    names = {op.rstrip("_"), "negative_rows"} if op == "bank_nce" else {op.rstrip("_")}
    return any(
        word in str(error) for word in {*names, "unsupported operand", "not supported between", "sparse tensors"}
    )


class Recorder(TorchDispatchMode):
    """Records the calls of sslfast's ops that a public function makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sslfast":
            self.calls.append((func, list(args)))
        return func(*args, **(kwargs or {}))


def search(op: str, run: Callable[[random.Random], None]) -> None:
    """Example n is always the same; a longer search goes on where a shorter one ends."""
    for n in range(EXAMPLES):
        try:
            run(random.Random(f"{op} {n}"))
        except Exception as error:
            raise AssertionError(f"example {n} of {op}") from error


def fuzz_public(op: str, trace: Any) -> None:
    """The public function: an error of the allowed kinds that names the op, or the result of the reference."""
    function, draw_call, check = CASES[op]

    def run(draw: random.Random) -> None:
        call = draw_call(draw)
        for _ in range(draw.randint(0, 3)):
            name = draw.choice(sorted(call))
            call[name] = corrupt(call[name], draw)
        call = {name: copy(value) for name, value in call.items()}
        before = {name: copy(value) for name, value in call.items()}
        is_short = entangle(call, draw)
        if not is_short:
            before = {name: copy(value) for name, value in call.items()}
        text = f"{op}({describe(call)})"
        trace(text)
        try:
            answer = function(**call)
        except ALLOWED as error:
            if not clear(error, op):
                raise AssertionError(f"{text}: the error does not name the op") from error
            return
        if is_short:
            return  # not read
        if any(t.device.type == "meta" for t in tensors(call)):
            assert all(t.device.type == "meta" for t in tensors(call)), f"{text} mixed devices"
            return
        try:
            check(call, answer, before)
        except Exception as error:
            raise AssertionError(f"{text} gave another answer than the reference") from error

    search(op, run)


def fuzz_raw(op: str, trace: Any) -> None:
    """The registered op itself: an error or any answer, all on one device; no crash."""
    function, draw_call, _ = CASES[op]

    def run(draw: random.Random) -> None:
        with Recorder() as recorder:
            function(**draw_call(draw))
        for func, arguments in recorder.calls:
            arguments = list(arguments)
            for _ in range(draw.randint(1, 3)):
                at = draw.randint(0, len(arguments) - 1)
                arguments[at] = corrupt(arguments[at], draw)
            named = {str(i): copy(value) for i, value in enumerate(arguments)}
            entangle(named, draw)
            arguments = list(named.values())
            text = f"{func}({describe(arguments)})"
            trace(text)
            try:
                func(*arguments)
            except ALLOWED:  # also of the dispatcher, which names no op where it converts arguments
                pass
            else:
                devices = {t.device.type for t in tensors(arguments)}
                assert len(devices) <= 1, f"{text} mixed devices"

    search(op, run)


def child(path: str) -> int:
    """Runs all searches in this process; the current call is in the file, so that a crash can be traced to it."""
    torch.set_num_threads(2)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def trace(text: str) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)

    failed = 0
    for op in CASES:
        for what in (fuzz_public, fuzz_raw):
            try:
                what(op, trace)
                print(f"held {what.__name__} {op}", flush=True)
            except Exception:
                failed = 1
                print(f"failed {what.__name__} {op}\n{traceback.format_exc()}", flush=True)
    return failed


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(output of the child, its errors and how it crashed)."""
    path = tmp_path_factory.mktemp("fuzz") / "call"
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.ops.test_fuzz", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300 + EXAMPLES)
    crashed = done.returncode not in (0, 1)
    note = (
        f"crashed with status {done.returncode} in {path.read_text()}\n{done.stderr[-3000:]}"
        if crashed
        else done.stderr
    )
    return done.stdout, note


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("what", ["fuzz_public", "fuzz_raw"])
def test_held(outcome: tuple[str, str], what: str, op: str) -> None:
    printed, note = outcome
    assert f"held {what} {op}\n" in printed, f"{printed}\n{note}"


def test_every_op_is_fuzzed() -> None:
    schemas = set(re.findall(r'"(\w+)\(Tensor', (ROOT / "csrc" / "library.cpp").read_text()))
    assert set(CASES) == schemas, f"give {schemas - set(CASES)} a generator of valid calls and a check in CASES"


if __name__ == "__main__":
    raise SystemExit(child(sys.argv[1]))
