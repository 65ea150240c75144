"""Memory: what an op writes is apart from what it reads, every tensor has its bytes, and odd tensors are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast import ops

INDEX = torch.arange(4)


def bank_update(**tensors: Tensor) -> dict[str, Tensor]:
    call = {"bank": torch.randn(8, 4), "index": INDEX.clone(), "features": torch.randn(4, 4)} | tensors
    ops.bank_update_(**call)
    return call


def bank_enqueue(**tensors: Tensor) -> dict[str, Tensor]:
    call = {"bank": torch.randn(8, 4), "head": torch.tensor(3), "keys": torch.randn(4, 4)} | tensors
    ops.bank_enqueue_(**call)
    return call


WIDE = torch.zeros(8, 4, dtype=torch.float64)  # as int64: rows 0


def update_pair(target: Tensor, source: Tensor) -> None:
    ops.ema_update_([target], [source], momentum=0.5)


ALIASED: dict[str, tuple[Callable[..., Any], dict[str, Tensor], str]] = {
    "index in the bank": (bank_update, {"bank": WIDE, "index": WIDE.view(torch.int64)[2]}, "index .* with bank"),
    "strided index": (bank_update, {"bank": WIDE, "index": WIDE.view(torch.int64)[::2, 1]}, "index .* with bank"),
    "features": (bank_update, {"bank": WIDE, "features": WIDE[2:6]}, "features .* with bank"),
    "features of another type": (bank_update, {"bank": WIDE, "features": WIDE.view(torch.float32)[:4, :4]}, "features"),
    "expanded features": (bank_update, {"bank": WIDE, "features": WIDE[:1].expand(4, 4)}, "features .* with bank"),
    "head in the bank": (bank_enqueue, {"bank": WIDE, "head": WIDE.view(torch.int64)[0, 0]}, "head .* with bank"),
    "keys": (bank_enqueue, {"bank": WIDE, "keys": WIDE[4:]}, "keys .* with bank"),
    "transposed keys": (bank_enqueue, {"bank": WIDE, "keys": WIDE[:4].t()}, "keys .* with bank"),
    "keys over the head": (
        bank_enqueue,
        {"head": WIDE.view(torch.int64)[1, 1], "keys": WIDE[:4]},
        "keys must not share memory with head",
    ),
}


@pytest.mark.parametrize("name", ALIASED)
def test_inputs_in_the_memory_of_outputs(name: str) -> None:
    function, tensors, message = ALIASED[name]
    WIDE.zero_()
    with pytest.raises(RuntimeError, match=message):
        function(**tensors)
    assert WIDE.eq(0).all()


def test_ema_update_finds_shared_elements_between_gaps() -> None:
    """Slices along columns lie between each other: apart where no element is shared, refused where one is."""
    for step, count in ((1, 6), (2, 3)):
        matrix = torch.zeros(6, 12)
        parts = [matrix[:, :6:step], matrix[:, 6::step]] if step == 1 else [matrix[:, ::2], matrix[:, 1::2]]
        ops.ema_update_(parts, [torch.ones_like(part) for part in parts], momentum=0.5)
        assert matrix.eq(0.5).all(), count
    matrix = torch.zeros(6, 12)
    kernels = torch.zeros(4, 6, 3, 3)
    ops.ema_update_([kernels[:, :2], kernels[:, 2:]], [torch.ones(4, 2, 3, 3), torch.ones(4, 4, 3, 3)], momentum=0.5)
    assert kernels.eq(0.5).all()
    for pair in ((matrix[:, :7], matrix[:, 6:]), (matrix[:, ::2], matrix[:, ::3]), (matrix[2:4], matrix[:, 3:5])):
        ones = [torch.ones_like(part) for part in pair]
        with pytest.raises(RuntimeError, match=r"targets\[0\] and targets\[1\] share memory"):
            ops.ema_update_(pair, ones, momentum=0.5)
    with pytest.raises(RuntimeError, match=r"sources\[0\] and targets\[0\] share memory"):
        update_pair(matrix[:, :4], matrix[:, 2:6])
    with pytest.raises(RuntimeError, match=r"momentum must not share memory with targets\[0\]"):
        ops.ema_update_([matrix], [torch.ones(6, 12)], momentum=matrix[2, 2])
    own = torch.rand(6, 12)
    expected = own.clone()
    update_pair(own[:, :5], own[:, :5])
    assert torch.equal(own, expected)


@pytest.mark.parametrize("call", [bank_update, bank_enqueue])
def test_banks_that_overlap_themselves(call: Any) -> None:
    for bank in (torch.zeros(1, 4).expand(8, 4), torch.zeros(11).unfold(0, 4, 1)):
        with pytest.raises(RuntimeError, match="bank must be contiguous"):
            call(bank=bank)


@pytest.mark.parametrize("of_complex", [False, True])
@pytest.mark.parametrize("call", [bank_update, bank_enqueue])
def test_lazily_negated_tensors(call: Any, of_complex: bool) -> None:
    """torch's z.conj().imag: refused where it is written, its values where it is read."""
    for _ in range(20):  # wrote outside of its memory, which not every run shows
        values = torch.randn(8, 4)
        negated = torch.complex(torch.zeros(8, 4), values).conj().imag if of_complex else torch._neg_view(values)
        assert negated.is_neg()
        with pytest.raises(ValueError, match="bank is lazily negated"):
            call(bank=negated)
    name = "features" if call is bank_update else "keys"
    bank = torch.randn(8, 4)
    expected = call(bank=bank.clone(), **{name: -values[:4]})["bank"]
    assert torch.equal(call(bank=bank.clone(), **{name: negated[:4]})["bank"], expected)
    for op, arguments in (
        ("bank_update_", (negated, INDEX, values[:4], 0.5)),
        ("bank_enqueue_", (negated, torch.tensor(0), values[:4])),
        ("ema_update_", ([negated], [values], None, 0.5)),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: a tensor is lazily negated"):
            getattr(torch.ops.sslfast, op)(*arguments)
    target = torch.zeros(8, 4)
    update_pair(target, negated)
    assert torch.equal(target, -values / 2)


def neutral() -> Tensor:
    return torch.tensor(ops.neutral_parameters()).expand(2, 1, -1).contiguous()


def images() -> Tensor:
    return torch.rand(2, 3, 4, 4)


READERS: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], Tensor]]]] = {
    "bank_update_": (
        ops.bank_update_,
        {"bank": lambda: torch.rand(8, 4), "index": INDEX.clone, "features": lambda: torch.rand(4, 4)},
    ),
    "bank_enqueue_": (
        ops.bank_enqueue_,
        {"bank": lambda: torch.rand(8, 4), "head": lambda: torch.tensor(3), "keys": lambda: torch.rand(4, 4)},
    ),
    **{
        f"bank_nce {mode}": (
            lambda mode=mode, **tensors: ops.bank_nce(**tensors, negatives=mode, num_negatives=4, loss="nce"),
            {
                "query": lambda: torch.rand(4, 4),
                "bank": lambda: torch.rand(8, 4),
                "index": INDEX.clone,
                "z": lambda: torch.tensor(3.0),
                "step": lambda: torch.tensor(3),
            },
        )
        for mode in ("sampled", "shared", "full")
    },
    "negative_rows": (
        lambda **tensors: ops.negative_rows(**tensors, num_negatives=4, num_rows=8, seed=0),
        {"index": INDEX.clone, "step": lambda: torch.tensor(3)},
    ),
    "rotate90": (ops.rotate90, {"images": images, "quarter_turns": lambda: torch.arange(2)}),
    "jigsaw_patches": (
        lambda **tensors: ops.jigsaw_patches(**tensors, grid=2, patch_size=2),
        {
            "images": images,
            "permutation": lambda: torch.zeros(2, 4, dtype=torch.int64),
            "offsets": lambda: torch.zeros(2, 4, 2, dtype=torch.int64),
        },
    ),
    "rgb_to_lab": (ops.rgb_to_lab, {"pixels": images}),
    "render_views": (
        ops.render_views,
        {"crops": lambda: images().byte(), "parameters": neutral, "quarter_turns": lambda: torch.arange(2)},
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_storage_smaller_than_the_sizes(name: str) -> None:
    """As FSDP and others leave parameters: sizes of before, a storage of nothing."""
    function, makers = READERS[name]
    for victim in makers:
        if name.endswith("full") and victim == "step":
            continue  # not read
        for held in ("none", "half"):
            tensors = {argument: make() for argument, make in makers.items()}
            function(**tensors)
            storage = tensors[victim].untyped_storage()
            storage.resize_(0 if held == "none" else storage.nbytes() // 2)
            with pytest.raises(
                (ValueError, RuntimeError), match=rf"{name.split()[0]}\w*: {victim} .* bytes of its storage"
            ):
                function(**tensors)
    target, source = torch.zeros(8), torch.zeros(8)
    source.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"ema_update_: sources\[0\] has shape \[8\] and needs 32 bytes"):
        update_pair(target, source)
    with pytest.raises(RuntimeError, match=r"ema_update_: targets\[0\] has shape \[8\] and needs 32 bytes"):
        update_pair(source, target)


def test_a_result_that_does_not_fit_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    huge = 2**36
    calls: list[Callable[[], Any]] = [
        lambda: ops.negative_rows(
            torch.zeros(10**6, dtype=torch.int64), num_negatives=2**32, num_rows=9, seed=0, step=0
        ),
        lambda: ops.rotate90(torch.zeros(1).expand(2**20, 3, 10**4, 10**4), torch.zeros(2**20, dtype=torch.int64)),
        lambda: ops.bank_nce_dense(
            torch.zeros(1).expand(1, huge, 4), torch.zeros(9, 4), torch.zeros(1, dtype=torch.int64).expand(huge)
        ),
    ]
    for call, op in zip(calls, ("negative_rows", "rotate90", "bank_nce_dense"), strict=True):
        with pytest.raises(
            RuntimeError, match=rf"{op}: out of memory, the op needs \d+ bytes for one tensor"
        ) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_other_kinds(kind: str) -> None:
    odd = ODD[kind]
    query, bank = torch.rand(4, 4), torch.rand(8, 4)
    message = r"{}: {} must be an ordinary dense tensor, got a .*{} one"
    with pytest.raises(ValueError, match=message.format("bank_nce", "query", kind)):
        ops.bank_nce(odd(query), bank, INDEX, num_negatives=3)
    with pytest.raises(ValueError, match=message.format("bank_nce", "bank", kind)):
        ops.bank_nce(query, odd(bank), INDEX, num_negatives=3)
    with pytest.raises(ValueError, match=message.format("bank_update_", "features", kind)):
        bank_update(features=odd(query))
    with pytest.raises(ValueError, match=message.format("bank_enqueue_", "bank", kind)):
        bank_enqueue(bank=odd(bank))
    with pytest.raises(ValueError, match=message.format("ema_update_", r"sources\[0\]", kind)):
        update_pair(query, odd(query))


def test_complex_integer_and_lazily_zero_tensors() -> None:
    query, bank = torch.rand(4, 4), torch.rand(8, 4)
    for wrong in (query.to(torch.complex64), query.long()):
        with pytest.raises(ValueError, match=r"bank_nce: query and z must be floating, got query.dtype="):
            ops.bank_nce(wrong, bank, INDEX, num_negatives=3)
    with pytest.raises(ValueError, match="bank_nce: query and z must be floating"):
        ops.bank_nce(query, bank, INDEX, num_negatives=3, loss="nce", z=torch.tensor(3j))
    zero = torch._efficientzerotensor((8, 4))
    with pytest.raises(ValueError, match="bank_update_: bank is lazily negated or zero"):
        bank_update(bank=zero)
    found = ops.bank_nce(zero[:4], bank, INDEX, num_negatives=3)
    assert torch.equal(found, ops.bank_nce(torch.zeros(4, 4), bank, INDEX, num_negatives=3))
    turned = ops.rotate90(torch.complex(query, query)[None, None].conj(), torch.tensor([1]))
    assert torch.equal(turned, torch.rot90(torch.complex(query, -query)[None, None], 1, (-2, -1)))
