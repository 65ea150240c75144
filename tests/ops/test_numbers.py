"""Options that are numbers: another type, or a derivative that would be left out, is an error that names the op."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from sslfast import ops
from sslfast.models import info_nce

BANK, INDEX = normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), dim=1), torch.arange(4)
QUERY = BANK[5:9]
MODES = ["sampled", "shared", "full", torch.tensor([1, 2]), torch.tensor([[1, 2]] * 4)]
IMAGES = torch.zeros(1, 3, 4, 4)
CELLS, OFFSETS = torch.arange(4)[None], torch.zeros(1, 4, 2, dtype=torch.int64)
PARAMETERS = torch.tensor(ops.neutral_parameters()).expand(1, 1, -1).contiguous()


def scored(query: torch.Tensor = QUERY, **options: Any) -> torch.Tensor:
    loss = ops.bank_nce(query, BANK, INDEX, **({"num_negatives": 5} | options))
    assert isinstance(loss, torch.Tensor)
    return loss


def viewed(**options: Any) -> torch.Tensor:
    return ops.render_views(IMAGES.byte(), PARAMETERS, **options)


NUMBERS: dict[str, Callable[[Any], Any]] = {
    **{f"bank_nce: temperature {i}": (lambda x, m=m: scored(temperature=x, negatives=m)) for i, m in enumerate(MODES)},
    "bank_nce_dense: temperature": lambda x: ops.bank_nce_dense(QUERY[None], BANK, INDEX, temperature=x),
    "bank_update_: momentum": lambda x: ops.bank_update_(BANK.clone(), INDEX, QUERY, momentum=x),
}
REAL = NUMBERS | {
    "bank_nce: z": lambda x: scored(loss="nce", z=["bad"] if x is None else x),
    "bank_nce_dense: z": lambda x: ops.bank_nce_dense(QUERY[None], BANK, INDEX, loss="nce", z=x),
    "ema_update_: momentum": lambda x: ops.ema_update_([torch.zeros(2)], [torch.ones(2)], momentum=x),
    "render_views: std[1]": lambda x: viewed(std=(1.0, x, 1.0)),
    "render_views: mean[0]": lambda x: viewed(mean=(x, 0.5, 0.5)),
}
INTEGERS: dict[str, Callable[[Any], Any]] = {
    "bank_nce: num_negatives": lambda x: scored(num_negatives=x),
    "bank_nce: seed": lambda x: scored(seed=x),
    "bank_nce: step": lambda x: scored(step=x),
    "bank_nce: the first row of shard": lambda x: scored(shard=(x, 40)),
    "bank_nce: the rows of shard": lambda x: scored(shard=(0, x)),
    "negative_rows: num_negatives": lambda x: ops.negative_rows(INDEX, num_negatives=x, num_rows=20, seed=0, step=0),
    "negative_rows: num_rows": lambda x: ops.negative_rows(INDEX, num_negatives=2, num_rows=x, seed=0, step=0),
    "negative_rows: seed": lambda x: ops.negative_rows(INDEX, num_negatives=2, num_rows=20, seed=x, step=0),
    "negative_rows: step": lambda x: ops.negative_rows(INDEX, num_negatives=2, num_rows=20, seed=0, step=x),
    "jigsaw_patches: grid": lambda x: ops.jigsaw_patches(IMAGES, CELLS, OFFSETS, grid=x, patch_size=2),
    "jigsaw_patches: patch_size": lambda x: ops.jigsaw_patches(IMAGES, CELLS, OFFSETS, grid=2, patch_size=x),
    "render_views: grid": lambda x: viewed(grid=x),
    "max_hamming_permutations: count": lambda x: ops.permutations.max_hamming_permutations(x, 4),
    "max_hamming_permutations: seed": lambda x: ops.permutations.max_hamming_permutations(2, 4, x),
}


@pytest.mark.parametrize("value", ["0.5", None, 1j], ids=str)
@pytest.mark.parametrize("name", REAL)
def test_what_is_no_number_is_an_error(name: str, value: Any) -> None:
    text = name.rstrip("0123456789 ").replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(TypeError, match=rf"^{text} must be a number, got "):
        REAL[name](value)


@pytest.mark.parametrize("value", ["2", None, 2.0], ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be an integer, got {value!r}$"):
        INTEGERS[name](value)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_derivative_by_a_number_is_an_error(name: str) -> None:
    """The registered op takes the value of a 0-d tensor, without its gradient or tangent."""
    op, argument = name.rstrip("0123456789 ").split(": ")
    learned = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{op}: {argument} requires a gradient, which the op does not compute"):
        NUMBERS[name](learned)
    with torch.no_grad():
        NUMBERS[name](learned)
    with pytest.raises(ValueError, match=f"^{op}: {argument} has a tangent"):
        torch.func.jvp(NUMBERS[name], (learned.detach(),), (torch.tensor(1.0),))
    with pytest.raises(TypeError, match=f"^{op}: {argument} must be a number, got a tensor torch.float32 \\[2\\]"):
        NUMBERS[name](torch.ones(2))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_a_learned_temperature_divides_the_query(mode: Any, loss: Any) -> None:
    """The way that the docstring names gives the derivative of the reference."""
    found, expected = (torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options: dict[str, Any] = {"negatives": mode, "num_negatives": 5, "loss": loss, "z": 30.0}
    scored(QUERY / found, temperature=1.0, **options).sum().backward()
    double = ops.bank_nce_reference(QUERY.double(), BANK.double(), INDEX, temperature=expected, **options)  # type: ignore[arg-type]
    assert isinstance(double, torch.Tensor)
    double.sum().backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, -1.0])
@pytest.mark.parametrize("name", [name for name in REAL if "temperature" in name or ": z" in name])
def test_numbers_that_leave_no_loss(name: str, value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name.rstrip('0123456789 ')} must be (positive|in \[1e-30, 1e\+30\]), got "
    ):
        REAL[name](value)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_permutations_whatever_the_default_device(device: str) -> None:
    permutations = ops.permutations
    expected = permutations.max_hamming_permutations(6, 4, 3)
    with torch.device(device):
        assert torch.equal(permutations.max_hamming_permutations(6, 4, 3), expected)
        assert torch.equal(permutations.max_hamming_permutations_reference(6, 4, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_results_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    crops = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parameters = torch.tensor(ops.neutral_parameters()).expand(2, 1, -1).clone()
    parameters[:, :, ops.ViewParameter.JITTER], parameters[:, :, ops.ViewParameter.CONTRAST] = 1.0, 1.3
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: ops.render_views_reference(crops, parameters),
        lambda: ops.render_views(crops, parameters),
        lambda: ops.rgb_to_lab(crops.float() / 255),
        lambda: ops.rgb_to_lab_reference(crops.float() / 255),
        lambda: scored(loss="nce"),
        lambda: scored(loss="nce", negatives="full"),
    ]
    expected = [call() for call in calls]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [call() for call in calls]
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


FP32_RANGES: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    **{name: (call, [1e-300, 1e-31, 0.0, -1.0, 1e31, 1e300, float("nan")]) for name, call in NUMBERS.items()
       if "temperature" in name},
    "render_views: std": (lambda x: viewed(std=(1.0, x, 1.0)), [1e-300, 1e-7, 0.0, 1e7, 1e300, float("nan")]),
    "render_views: mean": (lambda x: viewed(mean=(x, 0.5, 0.5)), [1e7, -1e300, float("nan"), float("inf")]),
    "bank_nce: z": (lambda x: scored(loss="nce", z=x), [0.0, -1.0, float("inf"), float("nan")]),
    "bank_nce_dense: z": (
        lambda x: ops.bank_nce_dense(QUERY[None], BANK, INDEX, loss="nce", z=x), [0.0, -1.0, float("inf")],
    ),
    "info_nce: temperature": (
        lambda x: info_nce(QUERY, BANK, INDEX, temperature=x), [1e-300, 0.0, 1e300, float("nan"), float("inf")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in FP32_RANGES.items() for value in values]
)
def test_numbers_beyond_fp32_are_refused(name: str, value: float) -> None:
    """They would become 0 or infinite there: NaN, or a loss without a gradient."""
    expected = re.escape(name.rstrip(" 0123456789")) + r" must be .*(\[|positive).* got .*" + re.escape(str(value))
    with pytest.raises(ValueError, match=expected):
        FP32_RANGES[name][0](value)


@pytest.mark.parametrize("negatives", MODES, ids=str)
@pytest.mark.parametrize("z", [0.0, -1.0, -1e300])
def test_a_tensor_z_is_looked_at(negatives: Any, z: float) -> None:
    with pytest.raises(RuntimeError, match=f"z must be positive, got a tensor of {z:g}".replace("+", r"\+")):
        scored(loss="nce", z=torch.tensor(z, dtype=torch.float64), negatives=negatives)


@pytest.mark.parametrize("negatives", MODES, ids=str)
@pytest.mark.parametrize("temperature", [2e-30, 1e-20, 1e20, 9e29])
@pytest.mark.parametrize("loss", ["nce", "infonce"])
def test_temperatures_in_the_range_give_finite_losses(negatives: Any, temperature: float, loss: str) -> None:
    query = QUERY.clone().requires_grad_()
    options: dict[str, Any] = {"z": 1.0} if loss == "nce" else {}
    losses = scored(query, temperature=temperature, negatives=negatives, loss=loss, **options)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    assert bool(losses.isfinite().all() and query.grad.isfinite().all())


@pytest.mark.parametrize("negatives", MODES, ids=str)
@pytest.mark.parametrize("z", [1e-300, 1e-40, 1e40, 1e300])
def test_a_normaliser_beyond_fp32_is_taken(negatives: Any, z: float) -> None:
    """exp(1 / τ) leaves fp32 below τ = 0.0113; only log z is used."""
    options: dict[str, Any] = {"num_negatives": 5, "negatives": negatives, "loss": "nce"}
    expected = ops.bank_nce_reference(QUERY.double(), BANK.double(), INDEX, z=z, **options)
    for given in (z, torch.tensor(z, dtype=torch.float64)):
        torch.testing.assert_close(scored(z=given, **options).double(), expected, rtol=1e-5, atol=1e-5)
        reference = ops.bank_nce_reference(QUERY, BANK, INDEX, z=given, **options)
        torch.testing.assert_close(reference.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"negatives": "full"},
        {"negatives": "full", "loss": "nce"},
        {"negatives": "sampled", "exclude_self": False},
        {"negatives": "shared", "exclude_self": False},
    ],
    ids=str,
)
def test_a_bank_of_one_row_is_refused_where_the_loss_would_be_constant(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 (bank )?rows, got 1: .*(gives no gradient|whatever the query)"):
        ops.bank_nce(QUERY, BANK[:1], torch.zeros(4, dtype=torch.int64), num_negatives=3, **options)
