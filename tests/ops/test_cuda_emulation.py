"""Every CUDA kernel, run on the CPU (tests/cuda_emulation), against the CPU ops and float64 references."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sslfast.ops  # noqa: F401  (loads the CPU ops)
from tests.cuda_emulation import emulate, fence, load, source_of

ORDERS = [0, 1, 2, 3]  # of threads and blocks: as numbered, backwards, two draws
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPS = [
    "bank_enqueue_", "bank_nce", "bank_update_", "ema_update_", "jigsaw_patches", "negative_rows", "rgb_to_lab",
    "rotate90",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    load([source_of(name) for name in ["library", *OPS]])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fenced(*args: Any) -> list[Any]:
    """Copies of tensors for which the first access past the end is a fault."""
    return [fence(arg) if isinstance(arg, Tensor) else arg for arg in args]


def run_on_cpu(op: str, *args: Any) -> Any:
    return getattr(torch.ops.sslfast, op)(*args)


def assert_same_up_to_rounding(a: Tensor, b: Tensor) -> None:
    """Equal up to the last place of the stored type: sums in another order, products rounded before adding."""
    torch.testing.assert_close(
        a, b, rtol=2 * torch.finfo(b.dtype).eps, atol=2e-7 if b.dtype != torch.float64 else 1e-15
    )


def bank_nce_arguments(
    *, batch: int = 3, columns: int = 128, num_rows: int = 90, views: int = 2, num_negatives: int = 101,
    dtype: torch.dtype = torch.float32, rows: bool = False, binary: bool = False, exclude_self: bool = True,
    temperature: float = 0.07, step: Tensor | None = None, z: Tensor | None = None,
) -> list[Any]:  # fmt: skip
    query = normalize(draw(views, batch, columns, dtype=torch.float64, seed=columns), dim=-1)
    bank = normalize(draw(num_rows, columns, dtype=torch.float64, seed=batch), dim=1)
    generator = torch.Generator().manual_seed(num_negatives)
    index = torch.randint(num_rows, (batch,), generator=generator)
    given = torch.randint(num_rows, (batch, num_negatives), generator=generator) if rows else None
    query = query if dtype == torch.float64 else query.float()
    return [query, bank.to(dtype), index, given, step, 5, z, 900.0, num_negatives, temperature, binary,
            exclude_self, 11]  # fmt: skip


def assert_scores_agree(op: str, args: list[Any], **device: int) -> None:
    """Loss, log-sum-exp and gradient against the CPU op in float64 on the same stored numbers."""
    query, bank = args[:2]
    expected = run_on_cpu(op, query.double(), bank.double(), *args[2:])
    tolerance = 1e-12 if bank.dtype == torch.float64 else 3e-6  # fp32 sums of K terms
    for name, value, wanted in zip(
        ("loss", "lse", "grad"), emulate(op, *fenced(*args), **device), expected, strict=True
    ):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(
            value.double(), wanted, rtol=0, atol=scale * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("columns", [8, 100, 101, 128, 200, 512])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bank_nce_columns(dtype: torch.dtype, columns: int) -> None:
    for order, binary in ((0, False), (2, True)):
        assert_scores_agree(
            "bank_nce", bank_nce_arguments(dtype=dtype, columns=columns, binary=binary, batch=2), order=order
        )


@pytest.mark.parametrize("binary", [False, True], ids=["infonce", "nce"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("num_negatives", [1, 63, 65, 300])
def test_bank_nce_views_and_counts(num_negatives: int, views: int, binary: bool) -> None:
    args = bank_nce_arguments(views=views, num_negatives=num_negatives, binary=binary, batch=2)
    assert_scores_agree("bank_nce", args, order=views)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("multiprocessors", [1, 7])
def test_bank_nce_splits_and_orders(multiprocessors: int, order: int) -> None:
    # 1100 negatives are 18 draws of 64: up to 3 splits of 8 warps, the last of them nearly empty.
    args = bank_nce_arguments(batch=1, views=2, num_negatives=1100, binary=order % 2 == 1, num_rows=5000)
    assert_scores_agree("bank_nce", args, order=order, multiprocessors=multiprocessors)


@pytest.mark.parametrize("binary", [False, True], ids=["infonce", "nce"])
@pytest.mark.parametrize(("first", "held"), [(0, 700), (700, 60), (760, 140)])
def test_bank_nce_shards(first: int, held: int, binary: bool) -> None:
    # 1100 negatives of 900 rows: tiles fill up over several draws of 64; positives lie in every shard and outside.
    for columns, views, rows, dtype in ((128, 2, False, torch.bfloat16), (300, 1, True, torch.float32)):
        args = bank_nce_arguments(
            batch=4,
            columns=columns,
            views=views,
            num_negatives=1100,
            num_rows=900,
            binary=binary,
            rows=rows,
            dtype=dtype,
        )
        args[2] = torch.tensor([2, 730, 899, 730])
        args[1] = args[1][first : first + held]
        assert_scores_agree("bank_nce", [*args, first, 900], order=2, multiprocessors=3)


def test_bank_nce_shard_without_any_row() -> None:
    args = bank_nce_arguments(batch=2, num_negatives=65, num_rows=90, rows=True)
    args[1], args[2], args[3] = args[1][:8], torch.tensor([8, 3]), torch.full((2, 65), 89)
    loss, lse, grad = emulate("bank_nce", *fenced(*args), 0, 90)
    assert torch.equal(loss[:, 0], torch.full((2,), -torch.inf))
    assert torch.equal(loss, torch.where(lse > -torch.inf, 0.0, lse))  # its positive alone: certain of it
    assert torch.equal(grad[:, 0], torch.zeros(2, 128))
    for value, wanted in zip((loss, lse, grad), run_on_cpu("bank_nce", *args, 0, 90), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_bank_nce_is_the_same_in_every_order() -> None:
    args = bank_nce_arguments(num_negatives=600, views=3, dtype=torch.bfloat16)
    first, *rest = [emulate("bank_nce", *args, order=order, multiprocessors=5) for order in ORDERS]
    for other in rest:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("binary", [False, True], ids=["infonce", "nce"])
def test_bank_nce_options(binary: bool) -> None:
    z = torch.tensor(123.0, dtype=torch.float64)
    for args in (
        bank_nce_arguments(binary=binary, rows=True, num_negatives=77),
        bank_nce_arguments(binary=binary, step=torch.tensor(9), z=z),
        bank_nce_arguments(binary=binary, exclude_self=False, num_rows=1),
        bank_nce_arguments(binary=binary, temperature=0.01),
        bank_nce_arguments(binary=binary, num_rows=3, num_negatives=300),  # K > N, rows repeat
    ):
        assert_scores_agree("bank_nce", args, order=3)


def test_bank_nce_odd_addresses_and_strides() -> None:
    args = bank_nce_arguments(dtype=torch.bfloat16, columns=96)
    expected = run_on_cpu("bank_nce", *args)
    query, bank = args[:2]
    shifted = torch.empty(bank.numel() + 1, dtype=bank.dtype)[1:].view(bank.shape).copy_(bank)  # not 16-byte aligned
    strided = query.transpose(0, 2).contiguous().transpose(0, 2)
    for changed in ([strided, bank], [query, shifted], [query, bank.t().contiguous().t()]):
        for a, b in zip(emulate("bank_nce", *changed, *args[2:]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # gradients are up to 1 / 0.07 times larger


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_negatives", [1, 2, 101, 2000])
def test_negative_rows(num_negatives: int, order: int) -> None:
    index = torch.tensor([3, 0, 9, 9])
    for step in (None, torch.tensor(2**40 + 3)):
        args = [index, step, 5, num_negatives, 10, 2**62 + 7, True, False]
        assert torch.equal(emulate("negative_rows", *fenced(*args), order=order), run_on_cpu("negative_rows", *args))
    shared = [torch.zeros(2, dtype=torch.int64), None, 1, num_negatives, 7, 3, False, True]
    assert torch.equal(emulate("negative_rows", *fenced(*shared), order=order), run_on_cpu("negative_rows", *shared))


def test_more_samples_than_grid_rows() -> None:
    index = torch.arange(65_537) % 100  # a grid has 65,535 blocks along y
    args = [index, None, 0, 1, 100, 3, True, False]
    assert torch.equal(emulate("negative_rows", *args), run_on_cpu("negative_rows", *args))


@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("feature_dtype", FLOATS, ids=str)
def test_bank_update(bank_dtype: torch.dtype, feature_dtype: torch.dtype) -> None:
    index = torch.tensor([3, 0, 3, 12, 7, 3, 0, 1, 19])  # of repeated rows the last wins
    for columns, order in ((8, 0), (33, 1), (128, 2)):
        bank, features = draw(20, columns, dtype=bank_dtype), draw(len(index), columns, dtype=feature_dtype, seed=1)
        expected, updated = bank.clone(), fence(bank)
        run_on_cpu("bank_update_", expected, index, features, 0.3)
        emulate("bank_update_", updated, *fenced(index, features), 0.3, order=order)
        untouched = [row for row in range(20) if row not in index]
        assert torch.equal(updated[untouched], bank[untouched])
        assert_same_up_to_rounding(updated, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_bank_update_repeats_across_lanes_and_warps(order: int) -> None:
    index = torch.randint(9, (200,), generator=torch.Generator().manual_seed(order))
    bank, features = draw(9, 24), draw(200, 24, seed=1)
    last = {int(row): position for position, row in enumerate(index)}
    expected = bank.clone()
    for row, position in last.items():
        expected[row] = normalize(0.5 * bank[row] + 0.5 * features[position], dim=0)
    emulate("bank_update_", bank, index, features, 0.5, order=order)
    torch.testing.assert_close(bank, expected, rtol=0, atol=1e-6)


def test_bank_update_skips_minus_one() -> None:
    bank, features = draw(20, 16), draw(40, 16, seed=1)
    index = torch.full((40,), -1)
    index[[3, 38]] = torch.tensor([19, 0])
    expected = bank.clone()
    run_on_cpu("bank_update_", expected, index, features, 0.3)
    emulate("bank_update_", bank, *fenced(index, features), 0.3, order=2)
    assert_same_up_to_rounding(bank, expected)


def test_bank_update_of_zeros_and_strided_features() -> None:
    bank = torch.zeros(4, 16)
    emulate("bank_update_", bank, torch.tensor([2]), torch.zeros(1, 16), 0.5)
    assert torch.equal(bank, torch.zeros(4, 16))
    features = draw(16, 3).t()
    emulate("bank_update_", bank, torch.tensor([0, 1, 2]), features, 0.0)
    torch.testing.assert_close(bank[:3], normalize(features, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("key_dtype", FLOATS, ids=str)
def test_bank_enqueue(bank_dtype: torch.dtype, key_dtype: torch.dtype) -> None:
    for columns, batch, order in ((8, 5, 0), (130, 10, 1), (7, 25, 2), (128, 11, 3)):
        expected, start = draw(11, columns, dtype=bank_dtype), torch.tensor(8)
        keys, head = draw(batch, columns, dtype=key_dtype, seed=1), start.clone()
        bank, moved = fence(expected), fence(start)
        run_on_cpu("bank_enqueue_", expected, head, keys)
        emulate("bank_enqueue_", bank, moved, fence(keys), order=order)
        assert torch.equal(bank, expected)
        assert moved.item() == head.item() == (8 + batch) % 11


@pytest.mark.parametrize("order", ORDERS)
def test_bank_enqueue_reads_the_head_in_every_block_before_it_moves(order: int) -> None:
    # 300 keys: 38 blocks of 8; 8,200 keys: 1,024 blocks, some with two keys for a warp; 0 columns: the head alone.
    for columns, batch, num_rows in ((4, 300, 301), (1, 8_200, 8_199), (0, 300, 7)):
        expected, head = draw(num_rows, columns), torch.tensor(6)
        bank, moved, keys = expected.clone(), head.clone(), draw(batch, columns, seed=1)
        for _ in range(2):
            run_on_cpu("bank_enqueue_", expected, head, keys)
            emulate("bank_enqueue_", bank, moved, keys, order=order)
        assert torch.equal(bank, expected)
        assert moved.item() == head.item()


def test_bank_enqueue_strided_and_odd_addresses() -> None:
    for keys in (draw(8, 5).t(), draw(41)[1:].view(5, 8)):
        expected, bank = torch.zeros(6, 8), torch.zeros(49)[1:].view(6, 8)
        run_on_cpu("bank_enqueue_", expected, torch.tensor(4), keys)
        emulate("bank_enqueue_", bank, torch.tensor(4), keys)
        assert torch.equal(bank, expected)


@pytest.mark.parametrize("target_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
def test_ema_update(target_dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(4096,), (4097,), (3, 5), (1,), (0,), (8191,), ()]
    targets = [draw(*shape, dtype=target_dtype, seed=i) for i, shape in enumerate(shapes)]
    sources = [draw(*shape, dtype=source_dtype, seed=-i - 1) for i, shape in enumerate(shapes)]
    expected = [target.clone() for target in targets]
    run_on_cpu("ema_update_", expected, sources, None, 0.99)
    updated = [fence(target) for target in targets]
    emulate("ema_update_", updated, [fence(source) for source in sources], None, 0.99, order=2)
    for a, b in zip(updated, expected, strict=True):
        assert_same_up_to_rounding(a, b)


def test_ema_update_many_tensors_mixed_and_strided() -> None:
    targets = [draw(7 + i % 3, 3, dtype=FLOATS[i % 2], seed=i) for i in range(200)]  # over one launch's 168 entries
    sources = [draw(3, 7 + i % 3, dtype=FLOATS[i % 3], seed=-i - 1).t() for i in range(200)]
    targets[5] = torch.zeros(6000)[1:4098]  # whole chunks at an odd address
    sources[5] = draw(4097)
    momentum = torch.tensor(0.9)
    expected = [target.clone() for target in targets]
    run_on_cpu("ema_update_", expected, sources, momentum, 0.0)
    emulate("ema_update_", targets, sources, momentum, 0.0, order=3)
    for a, b in zip(targets, expected, strict=True):
        assert_same_up_to_rounding(a, b)


ELEMENTS = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_rotate90(dtype: torch.dtype, order: int) -> None:
    turns = torch.tensor([0, 1, 2, 3, -1])
    for side in (1, 4, 33, 132):
        images = (draw(5, 1, side, side, seed=side) * 50).to(dtype)
        expected = run_on_cpu("rotate90", images, turns)
        assert torch.equal(emulate("rotate90", *fenced(images, turns), order=order), expected)


def test_rotate90_channels_last_and_odd_addresses() -> None:
    turns = torch.tensor([1, 2])
    images = torch.arange(2 * 3 * 40 * 40, dtype=torch.uint8).view(2, 3, 40, 40)
    shifted = torch.zeros(images.numel() + 1, dtype=torch.uint8)[1:].view(images.shape).copy_(images)
    expected = run_on_cpu("rotate90", images, turns)
    for same in (images.contiguous(memory_format=torch.channels_last), shifted):
        assert torch.equal(emulate("rotate90", same, turns, order=2), expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rgb_to_lab(dtype: torch.dtype, channels_last: bool) -> None:
    for order, (images, height, width) in enumerate([(1, 1, 1), (2, 3, 11), (2, 32, 32), (1, 25, 41)]):
        pixels = draw(images, height, width, 3, seed=order).sigmoid().to(dtype)
        pixels = pixels if channels_last else pixels.permute(0, 3, 1, 2).contiguous()
        expected = run_on_cpu("rgb_to_lab", pixels, channels_last)
        result = emulate("rgb_to_lab", *fenced(pixels, channels_last), order=order)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("patch", [1, 5, 8, 20])
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_jigsaw_patches(dtype: torch.dtype, patch: int) -> None:
    generator = torch.Generator().manual_seed(patch)
    images = (draw(2, 3, 75, 78, seed=patch) * 50).to(dtype)
    permutation = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    offsets = torch.randint(25 - patch + 1, (2, 9, 2), generator=generator)
    for order in ORDERS[:3]:
        for same in (images, images.contiguous(memory_format=torch.channels_last)):
            args = [same, permutation, offsets, 3, patch]
            fence_first = [images, permutation, offsets, 3, patch] if same is images else args
            result = emulate("jigsaw_patches", *fenced(*fence_first), order=order)
            assert torch.equal(result, run_on_cpu("jigsaw_patches", *args))


def test_empty() -> None:
    index = torch.empty(0, dtype=torch.int64)
    nce = bank_nce_arguments()
    nce[0], nce[2] = torch.empty(2, 0, 128), index
    assert emulate("bank_nce", *nce)[2].shape == (2, 0, 128)
    assert emulate("negative_rows", index, None, 0, 5, 10, 1, True, False).shape == (0, 5)
    assert emulate("rotate90", torch.empty(0, 3, 4, 4), index).shape == (0, 3, 4, 4)
    assert emulate("rotate90", torch.empty(2, 3, 0, 0), torch.zeros(2, dtype=torch.int64)).shape == (2, 3, 0, 0)
    empty = torch.empty(0, 9, 2, dtype=torch.int64)
    patches = emulate("jigsaw_patches", torch.empty(0, 3, 9, 9), empty[..., 0], empty, 3, 2)
    assert patches.shape == (0, 9, 3, 2, 2)
    bank, head = torch.ones(4, 8), torch.tensor(2)
    emulate("bank_update_", bank, index, torch.empty(0, 8), 0.5)
    emulate("bank_enqueue_", bank, head, torch.empty(0, 8))
    emulate("ema_update_", [torch.empty(0)], [torch.empty(0)], None, 0.5)
    assert torch.equal(bank, torch.ones(4, 8))
    assert head.item() == 2


@pytest.mark.parametrize("z", [0.0, -1.0, float("nan"), float("-inf")])
def test_a_normaliser_that_is_not_positive(z: float) -> None:
    """A number is refused; a tensor, which the host does not read, makes every loss NaN."""
    arguments = bank_nce_arguments(binary=True)
    arguments[7] = z
    dense = [*arguments[:3], None, None, z, 0.07, True, False]
    for op, args, place in (("bank_nce", arguments, 6), ("bank_nce_dense", dense, 4)):
        if z <= 0:
            with pytest.raises(RuntimeError, match=f"{op}: z must be positive, got {z:g}"):
                emulate(op, *args)
        args[place] = torch.tensor(z, dtype=torch.float64)
        assert emulate(op, *args)[0].isnan().all()


def _out_of_range() -> list[Any]:
    nce = bank_nce_arguments()
    nce[2] = torch.tensor([0, 90, 1])
    given = bank_nce_arguments(rows=True)
    given[3][1, 100] = -1
    jigsaw = [torch.zeros(1, 3, 9, 9), torch.arange(9)[None], torch.zeros(1, 9, 2, dtype=torch.int64), 3, 2]
    permutation, offset = jigsaw[1].clone(), jigsaw[2].clone()
    permutation[0, 4], offset[0, 8, 1] = 9, 2
    bank, feature = torch.zeros(4, 8), torch.ones(1, 8)
    return [
        ("bank_nce", nce),
        ("bank_nce", given),
        ("negative_rows", [torch.tensor([10]), None, 0, 5, 10, 1, True, False]),
        ("bank_update_", [bank, torch.tensor([-2]), feature, 0.5]),
        ("bank_enqueue_", [bank, torch.tensor(4), feature]),
        ("bank_enqueue_", [bank, torch.tensor(-1), feature]),
        ("bank_enqueue_", [bank, torch.tensor(2**48), feature]),
        ("jigsaw_patches", [jigsaw[0], permutation, *jigsaw[2:]]),
        ("jigsaw_patches", [*jigsaw[:2], offset, *jigsaw[3:]]),
        *(
            ("ema_update_", [[torch.zeros(3)], [torch.ones(3)], torch.tensor(momentum), 0.0])
            for momentum in (1.5, -0.1, float("nan"))
        ),
    ]


@pytest.mark.parametrize(("op", "args"), _out_of_range(), ids=lambda value: value if isinstance(value, str) else "")
def test_rows_out_of_range_trap(op: str, args: list[Any]) -> None:
    with pytest.raises(RuntimeError, match=rf"{op}: device trap in .*thread \(.*of block"):
        emulate(op, *args)
