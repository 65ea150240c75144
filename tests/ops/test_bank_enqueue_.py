import pytest
import torch
from torch import Tensor

from sslfast.ops import bank_enqueue_, bank_enqueue_reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make(
    device: torch.device, columns: int = 128, rows: int = 50, batch: int = 16, head: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns + batch)
    bank = torch.randn(rows, columns, generator=generator)
    keys = torch.randn(batch, columns, generator=generator, dtype=torch.float64)
    return bank.to(device), torch.tensor(head, device=device), keys.to(device)


@pytest.mark.parametrize("columns", [1, 7, 128, 332, 333])
@pytest.mark.parametrize("key_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
def test_equals_reference(device: torch.device, bank_dtype: torch.dtype, key_dtype: torch.dtype, columns: int) -> None:
    bank, head, keys = make(device, columns, head=41)  # 16 keys from row 41 of 50: wraps
    bank, keys = bank.to(bank_dtype), keys.to(key_dtype)
    expected, expected_head = bank.clone(), head.clone()
    bank_enqueue_reference(expected, expected_head, keys)
    before = bank.clone()
    bank_enqueue_(bank, head, keys)
    assert torch.equal(bank, expected)
    assert torch.equal(bank[41:], keys[:9].to(bank_dtype))
    assert torch.equal(bank[:7], keys[9:].to(bank_dtype))
    assert torch.equal(bank[7:41], before[7:41])
    assert head.item() == expected_head.item() == 7


@pytest.mark.parametrize("sizes", [(53,), (16, 16, 16, 5), (1,) * 53, (50, 3), (3, 50), (20, 33)], ids=str)
def test_known_answer_after_n_plus_three_keys(device: torch.device, sizes: tuple[int, ...]) -> None:
    bank = torch.full((50, 2), -1.0, device=device)
    head = torch.tensor(0, device=device)
    keys = torch.arange(53.0, device=device)[:, None].expand(53, 2)
    for part in keys.split(list(sizes)):
        bank_enqueue_(bank, head, part)
    assert head.item() == 3
    assert bank[:, 0].tolist() == [50.0, 51.0, 52.0, *range(3, 50)]
    assert torch.equal(bank[:, 0], bank[:, 1])


@pytest.mark.parametrize("batch", [1, 10, 11, 12, 22, 23, 100])
def test_many_keys_equal_single_enqueues(device: torch.device, batch: int) -> None:
    bank, head, keys = make(device, 5, rows=11, batch=batch, head=8)
    single, single_head = bank.clone(), head.clone()
    for key in keys:
        bank_enqueue_(single, single_head, key[None])
    bank_enqueue_(bank, head, keys)
    assert torch.equal(bank, single)
    assert head.item() == single_head.item() == (8 + batch) % 11


def test_ring_of_one_row(device: torch.device) -> None:
    bank, head, keys = make(device, rows=1)
    bank_enqueue_(bank, head, keys)
    assert torch.equal(bank[0], keys[-1].float())
    assert head.item() == 0


def test_non_contiguous_and_misaligned_keys(device: torch.device) -> None:
    bank, head, keys = make(device, head=45)
    keys = keys.float()
    expected, expected_head = bank.clone(), head.clone()
    bank_enqueue_(expected, expected_head, keys)
    strided = keys.t().contiguous().t()
    assert not strided.is_contiguous()
    shifted = torch.cat((keys.new_zeros(1), keys.flatten()))[1:].view_as(keys)  # not at a multiple of 16 bytes
    own = torch.cat((bank.new_zeros(1), bank.flatten()))[1:].view_as(bank)
    for given, target in ((strided, bank.clone()), (shifted, bank.clone()), (keys, own)):
        moved = head.clone()
        bank_enqueue_(target, moved, given)
        assert torch.equal(target, expected)
        assert torch.equal(moved, expected_head)


def test_empty(device: torch.device) -> None:
    bank, head, keys = make(device, head=4)
    before = bank.clone()
    bank_enqueue_(bank, head, keys[:0])
    bank_enqueue_(bank, head, bank[3:3])
    assert torch.equal(bank, before)
    assert head.item() == 4
    bank_enqueue_(bank[:, :0].contiguous(), head, keys[:, :0])
    assert head.item() == 20


def test_no_gradient_flows(device: torch.device) -> None:
    bank, head, keys = make(device)
    bank_enqueue_(bank, head, keys.requires_grad_())
    assert not bank.requires_grad


def test_captured_graph_replays_the_head(device: torch.device) -> None:
    bank, head, keys = make(device, rows=50, batch=16)
    keys = keys.float()
    if device.type == "cuda":
        bank_enqueue_(bank.clone(), head.clone(), keys)  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bank_enqueue_(bank, head, keys)
        step = graph.replay
    else:

        def step() -> None:
            bank_enqueue_(bank, head, keys)

    for count in range(1, 8):
        step()
        assert head.item() == 16 * count % 50
        assert torch.equal(bank[(head - 1) % 50], keys[-1])


def test_opcheck_and_compile(device: torch.device) -> None:
    bank, head, keys = make(device, head=49)
    torch.library.opcheck(torch.ops.sslfast.bank_enqueue_.default, (bank.clone(), head.clone(), keys))
    expected, expected_head = bank.clone(), head.clone()
    bank_enqueue_(expected, expected_head, keys)
    torch.compile(bank_enqueue_, fullgraph=True, backend="aot_eager")(bank, head, keys)
    assert torch.equal(bank, expected)
    assert torch.equal(head, expected_head)


def test_bad_arguments() -> None:
    bank, head, keys = make(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"bank_enqueue_: head must be in \[0, 50\), got 50"):
        bank_enqueue_(bank, head + 50, keys)
    with pytest.raises(RuntimeError, match=r"head must be in \[0, 50\), got -1"):
        bank_enqueue_(bank, head - 1, keys)
    with pytest.raises(RuntimeError, match=r"head must be 0-d, got shape \[1\]"):
        bank_enqueue_(bank, head[None], keys)
    with pytest.raises(RuntimeError, match="head must be int64"):
        bank_enqueue_(bank, head.int(), keys)
    with pytest.raises(RuntimeError, match=r"keys must have shape \[B, D\] = \[B, 128\], got \[16, 127\]"):
        bank_enqueue_(bank, head, keys[:, 1:])
    with pytest.raises(RuntimeError, match="bank must be contiguous"):
        bank_enqueue_(bank.t().contiguous().t(), head, keys)
    with pytest.raises(RuntimeError, match=r"bank must have shape \[N, D\] with N >= 1, got \[0, 128\]"):
        bank_enqueue_(bank[:0], head, keys)
    with pytest.raises(RuntimeError, match="bank must be fp32, fp64, bf16 or fp16"):
        bank_enqueue_(bank.to(torch.int32), head, keys)
    with pytest.raises(RuntimeError, match="keys must be fp32, fp64, bf16 or fp16"):
        bank_enqueue_(bank, head, keys.to(torch.int32))
    with pytest.raises(RuntimeError, match=r"keys must not share memory with bank; pass keys.clone\(\)"):
        bank_enqueue_(bank, head, bank[3:6])


def test_bad_arguments_change_nothing() -> None:
    bank, head, keys = make(torch.device("cpu"), head=7)
    before = bank.clone()
    with pytest.raises(RuntimeError):
        bank_enqueue_(bank, head, keys[:, 1:])
    assert torch.equal(bank, before)
    assert head.item() == 7


def test_wrong_device() -> None:
    bank, head, keys = make(torch.device("cpu"))
    with pytest.raises(ValueError, match="bank_enqueue_: head is on meta and bank on cpu"):
        bank_enqueue_(bank, head.to("meta"), keys)
