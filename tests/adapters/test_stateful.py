"""Loss and gradient of every module whose forward pass changes its state, however it is run."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sslfast.adapters import NTXentLoss
from tests.adapters.stateful import CASES, Case, expected, simclr, views

NAMES = list(CASES)
CASTS = (torch.float16, torch.bfloat16, torch.float64)


def check(case: Case, module: nn.Module, given: list[Tensor], loss: Any, *, tolerance: float = 1e-5) -> None:
    """Loss and gradients of one call beside the formula."""
    want, gradients = expected(case, module, given)
    got = loss(module, *given)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for ours, exact in zip(torch.autograd.grad(got, given), gradients, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * 10 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_eager_over_steps(name: str, device: torch.device) -> None:
    case = CASES[name]
    module = case.make().to(device)
    for seed in range(3):
        check(case, module, views(seed, device=device), case.loss)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_with_the_state_changed_in_the_same_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    module = case.make()
    compiled = torch.compile(case.loss, backend=backend, fullgraph=True)
    for seed in range(3):
        check(case, module, views(seed), compiled)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "where"),
    [(name, "eager") for name in NAMES]
    + [
        (name, where)
        for name in ("ntxent_queue", "queue_by_hand", "nce_average_infonce", "memory_bank")
        for where in ("compiled inside", "compiled around")
    ],
)
def test_recomputation_is_refused_before_it_gives_a_gradient(name: str, use_reentrant: bool, where: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    module, given = case.make(), views(0)

    def recomputed(a: Tensor, b: Tensor) -> Tensor:
        function = torch.compile(case.loss, backend="aot_eager") if where == "compiled inside" else case.loss
        return checkpoint(function, module, a, b, use_reentrant=use_reentrant)

    run = torch.compile(recomputed, backend="aot_eager", fullgraph=True) if where == "compiled around" else recomputed
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint"):
        run(*given).backward()
    assert all(view.grad is None for view in given)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("queue_by_hand", "memory_bank", "ntxent_queue")]
)
def test_recomputation_in_eval_mode_is_right(name: str, use_reentrant: bool) -> None:
    case = CASES[name]
    module = case.make().eval()
    before = copy.deepcopy(module.state_dict())
    given = views(0)
    want, gradients = expected(case, module, given)
    loss = checkpoint(case.loss, module, *given, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for view, exact in zip(given, gradients, strict=True):
        torch.testing.assert_close(view.grad, exact.float(), rtol=1e-4, atol=1e-6)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("name", NAMES)
def test_module_and_views_cast(name: str, dtype: torch.dtype) -> None:
    """Sums are fp32 (fp64 for fp64), so the loss is exact for the rounded state and views."""
    case = CASES[name]
    module = case.make().to(dtype)
    integers = {key: value.dtype for key, value in case.make().state_dict().items() if not value.is_floating_point()}
    for seed in range(2):
        loss, gradients = expected(case, module, given := views(seed, dtype=dtype))
        got = case.loss(module, *given)
        half = dtype.itemsize == 2
        torch.testing.assert_close(got.double(), loss, rtol=1e-2 if half else 1e-12, atol=1e-12)
        for ours, exact in zip(torch.autograd.grad(got, given), gradients, strict=True):
            assert (ours.double() - exact).norm() <= (2e-2 if half else 1e-10) * exact.norm()
    assert {key: value.dtype for key, value in module.state_dict().items() if key in integers} == integers


@pytest.mark.parametrize("name", NAMES)
def test_double_module_takes_float_views(name: str) -> None:
    case = CASES[name]
    check(case, case.make().double(), views(0), case.loss)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "queue_by_hand"])
def test_float64_views_for_a_float32_state_are_an_error(name: str) -> None:
    case = CASES[name]
    with pytest.raises((TypeError, RuntimeError), match=r"float64|must be fp32"):
        case.loss(case.make(), *views(0, dtype=torch.float64))


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "queue_by_hand"])
def test_autocast_rounds_nothing(name: str, backward_inside: bool) -> None:
    case = CASES[name]
    module, given = case.make(), views(0)
    want, gradients = expected(case, module, given)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.loss(module, *given)
        if backward_inside:
            got.backward()
    if not backward_inside:
        got.backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for view, exact in zip(given, gradients, strict=True):
        assert view.grad is not None
        assert (view.grad.double() - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_no_grad_gives_the_same_loss(name: str) -> None:
    case = CASES[name]
    module = case.make()
    want, _ = expected(case, module, given := views(0))
    with torch.no_grad():
        got = case.loss(module, *given)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_checkpoints_continue_alike(name: str) -> None:
    case = CASES[name]
    module = case.make()
    case.loss(module, *views(0))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    resumed = case.make()
    resumed.load_state_dict(torch.load(file), strict=True)
    copied = copy.deepcopy(module)
    for seed in (1, 2):
        losses = [case.loss(each, *views(seed)) for each in (module, resumed, copied)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])
    for key, value in module.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["nce_average_nce", "cmc_nce"])
@pytest.mark.parametrize("dtype", CASTS)
def test_the_normaliser_keeps_its_range(name: str, dtype: torch.dtype) -> None:
    module: Any = CASES[name].make()
    normalisers = module._normalisers
    for normaliser in normalisers:
        getattr(module, normaliser).fill_(1e30)
    module.to(dtype)
    assert all(getattr(module, normaliser) == 1e30 for normaliser in normalisers)
    assert all(getattr(module, memory).dtype == dtype for memory in module._memories)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "queue_by_hand"])
def test_derivatives_that_are_not_computed_are_errors(name: str) -> None:
    case = CASES[name]
    given = views(0)
    gradients = torch.autograd.grad(case.loss(case.make(), *given), given, create_graph=True)
    for ours, exact in zip(gradients, expected(case, case.make(), given)[1], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    penalty = sum((gradient**2).sum() for gradient in gradients)
    for inputs in (given, given[:1]):
        with pytest.raises(RuntimeError, match=r"only first derivatives in reverse mode.*bank_nce_reference"):
            torch.autograd.grad(penalty, inputs, retain_graph=True)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(view.detach(), torch.ones_like(view)) for view in given]
        with pytest.raises(RuntimeError, match=r"only first derivatives in reverse mode"):
            case.loss(case.make(), *dual)
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(
            RuntimeError, match=r"only first derivatives in reverse mode.*not under torch\.func; for oth"
        ):
            transform(lambda a: case.loss(case.make(), a, given[1].detach()))(given[0].detach())
    with pytest.raises(RuntimeError, match=r"only first derivatives in reverse mode.*not under torch\.func; for oth"):
        torch.vmap(lambda a: case.loss(case.make().eval(), a, given[1]), randomness="different")(given[0][None])


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_changes_the_state_that_it_is_given(name: str) -> None:
    case, given = CASES[name], views(0)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.make()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return case.loss(self.inner, a, b)

    module = Called()
    own = {key: value.clone() for key, value in module.state_dict().items()}
    value, gradients = expected(case, module.inner, given)
    for _ in range(2):  # of the untouched module, each time the same
        state = {key: value.clone() for key, value in own.items()}
        loss = torch.func.functional_call(module, state, tuple(given))
        torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-6)
        for ours, exact in zip(torch.autograd.grad(loss, given), gradients, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor.nan_to_num(), own[key].nan_to_num()) for key, tensor in module.state_dict().items())
    case.loss(module.inner, *given)
    after = module.state_dict()
    assert all(torch.equal(state[key].nan_to_num(), tensor.nan_to_num()) for key, tensor in after.items())


def test_the_queue_itself_has_every_derivative() -> None:
    case, given = CASES["queue_by_hand"], tuple(views(0, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda a, b: case.loss(case.make().double(), a, b), given, check_forward_ad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(lambda a, b: case.loss(case.make().double(), a, b), given, fast_mode=True)


class TestLossWithoutState:
    """NTXentLoss without a memory bank: every derivative, everywhere."""

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        loss: Tensor = NTXentLoss(0.3)(a, b)
        return loss

    @pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
    @pytest.mark.parametrize("use_reentrant", [False, True, None])
    def test_gradient(self, backend: str, use_reentrant: bool | None) -> None:
        torch._dynamo.reset()

        def run(a: Tensor, b: Tensor) -> Tensor:
            return (
                self.loss(a, b) if use_reentrant is None else checkpoint(self.loss, a, b, use_reentrant=use_reentrant)
            )

        given = views(0)
        exact = [view.detach().double().requires_grad_() for view in given]
        gradients = torch.autograd.grad(simclr(*exact, 0.3), exact)
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(run, backend=backend, fullgraph=True)(*given).backward()
        for view, gradient in zip(given, gradients, strict=True):
            torch.testing.assert_close(view.grad, gradient.float(), rtol=1e-4, atol=1e-6)

    def test_second_and_forward_derivatives(self) -> None:
        given = tuple(views(0, dtype=torch.float64))
        assert torch.autograd.gradcheck(self.loss, given, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(self.loss, given)
        for transform in (torch.func.grad, torch.func.hessian):
            torch.testing.assert_close(transform(self.loss)(*given), transform(lambda a, b: simclr(a, b, 0.3))(*given))
