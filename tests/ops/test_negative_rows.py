import pytest
import torch

from sslfast.ops import negative_rows, negative_rows_reference
from sslfast.ops.philox import philox4x32, random_integers, random_uint32, random_uniform

DRAW = {"num_negatives": 37, "num_rows": 1000, "seed": 5, "step": 3}


def test_philox_known_answers() -> None:
    # Known-answer vectors published with Random123 (kat_vectors, philox4x32 10).
    zeros = philox4x32(torch.zeros(1, 4, dtype=torch.int64), 0)
    assert [f"{int(x):08x}" for x in zeros[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    digits = torch.tensor([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    out = philox4x32(digits, 0x299F31D0A4093822)
    assert [f"{int(x):08x}" for x in out[0]] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("num_negatives", [1, 2, 37, 4096])
@pytest.mark.parametrize("num_rows", [2, 1000, 2**31 + 11, 2**32])
def test_equals_reference_bit_for_bit(
    device: torch.device, num_rows: int, num_negatives: int, exclude_self: bool
) -> None:
    index = torch.tensor([0, 1, num_rows - 1, num_rows // 2], device=device)
    arguments = {"num_negatives": num_negatives, "num_rows": num_rows, "seed": 2**62 + 9, "step": 2**31 + 5}
    rows = negative_rows(index, **arguments, exclude_self=exclude_self)
    expected = negative_rows_reference(index, **arguments, exclude_self=exclude_self)
    assert torch.equal(rows, expected)
    assert rows.min() >= 0
    assert rows.max() < num_rows
    if exclude_self:
        assert not (rows == index[:, None]).any()


def test_uniform_over_all_other_rows(device: torch.device) -> None:
    index = torch.arange(10, device=device)
    rows = negative_rows(index, num_negatives=90_000, num_rows=10, seed=0, step=0)
    counts = torch.stack([torch.bincount(row, minlength=10) for row in rows])
    assert (counts.diagonal() == 0).all()
    off_diagonal = counts[~torch.eye(10, dtype=torch.bool, device=device)].double()
    # 10,000 expected in each of 90 cells; standard deviation 94, so 5 of them hold 90 cells with p > 0.9999.
    assert (off_diagonal - 10_000).abs().max() < 5 * 94.3


def test_function_of_seed_step_row_alone(device: torch.device) -> None:
    index = torch.tensor([7, 3, 7, 999], device=device)
    rows = negative_rows(index, **DRAW)
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(negative_rows(index.flip(0), **DRAW), rows.flip(0))
    assert torch.equal(negative_rows(index[1:2], **DRAW), rows[1:2])
    for change in ({"seed": 6}, {"step": 4}):
        assert not torch.equal(negative_rows(index, **(DRAW | change)), rows)
    longer = negative_rows(index, **(DRAW | {"num_negatives": 50}))
    assert torch.equal(longer[:, :37], rows)


@pytest.mark.parametrize("num_rows", [1, 2, 1000, 2**32])
def test_shared_draw(device: torch.device, num_rows: int) -> None:
    draw = DRAW | {"num_rows": num_rows}
    index = torch.tensor([7, 3], device=device)
    rows = negative_rows(index, **draw, shared=True)
    assert rows.shape == (37,)
    assert torch.equal(rows, negative_rows_reference(index, **draw, shared=True))
    assert torch.equal(rows, negative_rows(index[:1], **draw, shared=True))
    if num_rows == 1000:  # a stream of its own
        assert not torch.equal(rows, negative_rows(index.new_zeros(1), **draw, exclude_self=False)[0])


def test_step_tensor_equals_step_number(device: torch.device) -> None:
    index = torch.arange(5, device=device)
    step = torch.tensor(3, device=device)
    assert torch.equal(negative_rows(index, **(DRAW | {"step": step})), negative_rows(index, **DRAW))


def test_non_contiguous_and_empty(device: torch.device) -> None:
    index = torch.arange(10, device=device)
    assert torch.equal(negative_rows(index[::3], **DRAW), negative_rows(index[::3].contiguous(), **DRAW))
    assert negative_rows(index[:0], **DRAW).shape == (0, 37)


def test_opcheck_and_compile(device: torch.device) -> None:
    index = torch.arange(6, device=device)
    step = torch.tensor(3, device=device)
    for step_tensor, number in ((None, 3), (step, 0)):
        for exclude_self, shared in ((True, False), (False, True)):
            arguments = (index, step_tensor, number, 37, 1000, 5, exclude_self, shared)
            torch.library.opcheck(torch.ops.sslfast.negative_rows.default, arguments)
    compiled = torch.compile(negative_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index, **(DRAW | {"step": step})), negative_rows(index, **DRAW))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1"),
        ({"num_rows": 1}, r"num_rows must be in \[2, 2\*\*32\]"),
        ({"num_rows": 2**32 + 1}, r"num_rows must be in \[2, 2\*\*32\]"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got seed=-1"),
    ],
)
def test_bad_numbers(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        negative_rows(torch.arange(3), **(DRAW | change))


def test_bad_tensors() -> None:
    with pytest.raises(RuntimeError, match="negative_rows: index must be int64"):
        negative_rows(torch.arange(3, dtype=torch.int32), **DRAW)
    with pytest.raises(RuntimeError, match=r"index must have shape \[B\], got \[1, 3\]"):
        negative_rows(torch.arange(3)[None], **DRAW)
    with pytest.raises(RuntimeError, match=r"index must be in \[0, 1000\), got 1000 at flat position 1"):
        negative_rows(torch.tensor([0, 1000]), **DRAW)
    with pytest.raises(RuntimeError, match="step must be an int or a 0-d int64 tensor"):
        negative_rows(torch.arange(3), **(DRAW | {"step": torch.zeros(2, dtype=torch.int64)}))


def test_shared_draw_of_the_raw_op_excludes_no_row() -> None:
    with pytest.raises(RuntimeError, match="a shared draw is for the whole batch and excludes no row"):
        torch.ops.sslfast.negative_rows(torch.zeros(1, dtype=torch.int64), None, 0, 4, 10, 0, True, True)


def test_random_helpers_have_the_right_range() -> None:
    rows = torch.arange(5000)
    uniform = random_uniform(rows, 3, seed=1, stream=40, step=0)
    assert uniform.shape == (5000, 3)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 5 * (1 / 12 / 15000) ** 0.5
    integers = random_integers(rows, 1, 3, seed=1, stream=40, step=0)
    assert set(integers.flatten().tolist()) == {0, 1, 2}
    bits = random_uint32(rows, 1, seed=1, stream=40, step=0)
    assert torch.equal(bits, random_uint32(rows, 6, seed=1, stream=40, step=0)[:, :1])
    assert bits.unique().numel() > 4990
