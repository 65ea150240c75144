"""Derivatives of every op: right, or an error that says what is not computed. Nothing is left out without a word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from sslfast import ops

MODES = ["sampled", "shared", "full", "list", "lists"]
SECOND = "a second derivative is not computed"


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def scored(
    query: Tensor, bank: Tensor, *, mode: str = "sampled", function: Any = ops.bank_nce, **options: Any
) -> Tensor:
    index = torch.arange(query.shape[-2], device=query.device)
    rows = torch.tensor([3, 7, 9], device=query.device)
    given = {"list": rows, "lists": rows.expand(len(index), -1)}
    return function(query, bank, index, negatives=given.get(mode, mode), num_negatives=8, **options)


def dense(query: Tensor, bank: Tensor, *, function: Any = ops.bank_nce_dense, **options: Any) -> Tensor:
    index = torch.arange(query.shape[-2], device=query.device)
    return function(query[None], bank, index, **options)[0][0]


BANK, QUERY = unit(20, 6), unit(4, 6, seed=1)
TURNS = torch.tensor([1, 2])
CELLS = torch.tensor([[3, 1, 1, 0], [0, 1, 2, 3]])
OFFSETS = torch.zeros(2, 4, 2, dtype=torch.int64)
PARAMETERS = torch.tensor(ops.neutral_parameters()).expand(2, 1, -1).contiguous()


IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def cut(x: Tensor) -> Tensor:
    return ops.jigsaw_patches(x, CELLS, OFFSETS, grid=2, patch_size=2)


# Differentiable calls of one argument, and a value of it.
DIFFERENTIABLE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    **{f"bank_nce {mode}": ((lambda x, m=mode: scored(x, BANK, mode=m)), QUERY) for mode in MODES},
    "bank_nce nce": (lambda x: scored(x, BANK, loss="nce"), QUERY),
    "bank_nce_dense": (lambda x: dense(x, BANK), QUERY),
    "rotate90": (lambda x: ops.rotate90(x, TURNS), IMAGES),
    "jigsaw_patches": (cut, IMAGES),
}


def updated(x: Tensor) -> Tensor:
    bank = BANK.clone()
    ops.bank_update_(bank, torch.arange(4), x)
    return bank


def enqueued(x: Tensor) -> Tensor:
    bank = BANK.clone()
    ops.bank_enqueue_(bank, torch.tensor(3), x)
    return bank


def averaged(x: Tensor) -> Tensor:
    target = torch.zeros_like(x)
    ops.ema_update_([target], [x], momentum=0.5)
    return target


# Calls of an argument whose derivative no op computes.
WITHOUT: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    **{f"bank_nce {mode} bank": ((lambda x, m=mode: scored(QUERY, x, mode=m)), BANK) for mode in MODES},
    "bank_nce z": (lambda x: scored(QUERY, BANK, loss="nce", z=x), torch.tensor(30.0)),
    "bank_nce_dense bank": (lambda x: dense(QUERY, x), BANK),
    "bank_nce_dense z": (lambda x: dense(QUERY, BANK, loss="nce", z=x), torch.tensor(30.0)),
    "rgb_to_lab": (ops.rgb_to_lab, IMAGES),
    "render_views parameters": (lambda x: ops.render_views((IMAGES * 255).byte(), x), PARAMETERS),
    "bank_update_ bank": (lambda x: ops.bank_update_(x, torch.arange(4), QUERY), BANK),
    "bank_enqueue_ bank": (lambda x: ops.bank_enqueue_(x, torch.tensor(0), QUERY), BANK),
    "ema_update_ momentum": (
        lambda x: ops.ema_update_([torch.zeros(3)], [torch.ones(3)], momentum=x),
        torch.tensor(0.5),
    ),
}
# Their gradient is documented to stop, that of forward mode is not.
STOPPED = {
    "bank_update_ features": (updated, QUERY),
    "bank_enqueue_ keys": (enqueued, QUERY),
    "ema_update_ sources": (averaged, QUERY),
}


def op_of(name: str) -> str:
    return name.split(" ")[0]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_gradient_that_is_not_computed_is_an_error(name: str) -> None:
    function, value = WITHOUT[name]
    argument = name.split(" ")[-1] if " " in name else "pixels"
    expected = (
        rf"{op_of(name)}: {argument} requires a gradient, which the op does not compute; pass {argument}.detach\(\)"
    )
    with pytest.raises(ValueError, match=expected):
        function(value.clone().requires_grad_())
    with torch.no_grad():
        function(value.clone().requires_grad_())


@pytest.mark.parametrize("op", ["bank_nce", "bank_nce_dense"])
@pytest.mark.parametrize("argument", ["bank", "z"])
def test_the_registered_op_refuses_too(op: str, argument: str) -> None:
    tensors = {"bank": unit(20, 6), "z": torch.tensor(3.0, dtype=torch.float64)}
    tensors[argument].requires_grad_()
    middle = (None, None, 0) if op == "bank_nce" else (None,)
    behind = (1.0, 8, 0.1, True, True, 0) if op == "bank_nce" else (1.0, 0.1, True, False)
    with pytest.raises(ValueError, match=f"{op}: {argument} requires a gradient"):
        getattr(torch.ops.sslfast, op)(unit(1, 4, 6), tensors["bank"], torch.arange(4), *middle, tensors["z"], *behind)


@pytest.mark.parametrize("update", [WITHOUT["bank_update_ bank"][0], WITHOUT["bank_enqueue_ bank"][0]])
def test_updates_of_tensors_inside_a_graph(update: Any) -> None:
    """Written values would keep the derivative of the values before."""
    bank = unit(20, 6).requires_grad_() * 2
    with pytest.raises(ValueError, match="bank was computed from tensors that require a gradient"):
        update(bank)
    with pytest.raises(ValueError, match=r"ema_update_: targets\[0\] was computed from tensors"):
        ops.ema_update_([bank], [unit(20, 6)], momentum=0.5)
    leaf = unit(20, 6).requires_grad_()
    ops.ema_update_([leaf], [unit(20, 6).requires_grad_()], momentum=0.5)  # a momentum encoder's parameters


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *WITHOUT, *STOPPED])
def test_forward_mode_is_an_error(name: str) -> None:
    function, value = (DIFFERENTIABLE | WITHOUT | STOPPED)[name]
    expected = f"{op_of(name)}: .* has a tangent, and the op has no forward-mode derivative"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value.clone(), torch.ones_like(value))
        with pytest.raises(ValueError, match=expected):
            function(dual)
    with pytest.raises(ValueError, match=expected):
        torch.func.jvp(function, (value.clone(),), (torch.ones_like(value),))
    batch = torch.stack([value, value])
    with pytest.raises(ValueError, match=f"{op_of(name)}: "):
        torch.func.jvp(torch.func.vmap(function), (batch,), (torch.ones_like(batch),))
    with pytest.raises(ValueError, match=f"{op_of(name)}: "):
        torch.func.vmap(lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),)))(batch)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_function_transforms_are_right_or_an_error(name: str) -> None:
    function, value = DIFFERENTIABLE[name]
    batch = torch.stack([value, value.flip(0)])
    torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(x) for x in batch]))
    with pytest.raises(ValueError, match=f"{op_of(name)}: .* is differentiated by torch.func"):
        torch.func.grad(lambda x: function(x).sum())(value)
    with pytest.raises(ValueError, match=f"{op_of(name)}: "):
        torch.func.vjp(lambda x: function(x).sum(), value)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(ValueError, match=f"{op_of(name)}: "):
            transform(lambda x: function(x).sum())(value)
    with pytest.raises(ValueError, match=f"{op_of(name)}: "):
        torch.func.grad(lambda x: torch.func.vmap(function)(x).sum())(batch)
    with pytest.raises(ValueError, match=f"{op_of(name)}: "):
        torch.func.vmap(torch.func.grad(lambda x: function(x).sum()))(batch)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if "nce" in name])
def test_second_derivative_of_a_loss_is_an_error(device: torch.device, name: str) -> None:
    function, value = DIFFERENTIABLE[name]
    linear = torch.nn.Linear(6, 6)
    inputs = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(linear(inputs)).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op_of(name).removesuffix('_dense')}.*: {SECOND}"):
        gradient.square().sum().backward()
    (gradient,) = torch.autograd.grad(function(linear(inputs)).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(gradient.sum(), linear.weight)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.functional.hessian(lambda x: function(x).sum(), value)
    # By the weights of the losses it is the first derivative, and right.
    weights = torch.rand(4, requires_grad=True)
    (gradient,) = torch.autograd.grad((function(inputs) * weights).sum(), inputs, create_graph=True)
    (found,) = torch.autograd.grad(gradient.sum(), weights)
    rows = [torch.autograd.grad(function(inputs)[i], inputs)[0].sum() for i in range(4)]
    torch.testing.assert_close(found, torch.stack(rows))


@pytest.mark.parametrize("name", ["rotate90", "jigsaw_patches"])
def test_second_derivatives_of_moves_are_right(name: str) -> None:
    function, value = DIFFERENTIABLE[name]
    leaf = value.double().requires_grad_()
    torch.autograd.gradcheck(function, (leaf,))
    torch.autograd.gradgradcheck(lambda x: function(x) ** 3, (leaf,))


def test_values_may_change_before_the_backward_pass() -> None:
    """The gradient is computed in the forward pass: neither bank nor query need to stay as they were."""
    bank, leaf = unit(20, 6), unit(4, 6, seed=1).requires_grad_()
    expected = torch.autograd.grad(scored(leaf * 1, bank).sum(), leaf)[0]
    query = leaf * 1
    loss = scored(query, bank).sum()
    ops.bank_update_(bank, torch.arange(4), query)
    with torch.no_grad():
        query.zero_()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


def step_of(mode: str, update: str) -> Callable[..., Tensor]:
    """Scores, then changes the bank, in one function."""

    def step(inputs: Tensor, weight: Tensor, bank: Tensor, head: Tensor) -> Tensor:
        query = normalize(inputs @ weight, dim=-1)
        loss = scored(query, bank, mode=mode).mean()
        with torch.no_grad():
            if update == "enqueue":
                ops.bank_enqueue_(bank, head, query)
            else:
                ops.bank_update_(bank, torch.arange(len(query), device=bank.device), query, momentum=0.3)
        return loss

    return step


@pytest.mark.parametrize("update", ["enqueue", "update"])
@pytest.mark.parametrize(
    ("backend", "mode"), [*(("aot_eager", mode) for mode in MODES), ("inductor", "sampled"), ("inductor", "full")]
)
def test_gradients_where_the_compiled_graph_changes_the_bank(
    device: torch.device, backend: str, mode: str, update: str
) -> None:
    torch._dynamo.reset()
    step = step_of(mode, update)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    states = [(unit(20, 6).to(device), torch.tensor(3, device=device)) for _ in range(2)]
    for i in range(3):
        inputs = unit(4, 6, seed=i).to(device)
        results = []
        for function, state in zip((step, compiled), states, strict=True):
            weight = unit(6, 6, seed=9).to(device).requires_grad_()
            loss = function(inputs, weight, *state)
            loss.backward()
            results.append((loss.detach(), weight.grad, *state))
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_loss_is_right_and_an_update_is_an_error(mode: str, reentrant: bool) -> None:
    bank, weight = unit(20, 6), unit(6, 6, seed=9).requires_grad_()

    def loss(inputs: Tensor, bank: Tensor) -> Tensor:
        return scored(normalize(inputs @ weight, dim=-1), bank, mode=mode).mean()

    inputs = unit(4, 6, seed=1).requires_grad_()
    (expected,) = torch.autograd.grad(loss(inputs, bank), weight)
    checkpoint(loss, inputs, bank, use_reentrant=reentrant).backward()
    torch.testing.assert_close(weight.grad, expected)
    for update in ("enqueue", "update"):
        step = step_of(mode, update)
        with pytest.raises(RuntimeError, match="updates a state inside a function that activation checkpointing runs"):
            checkpoint(step, inputs, weight, bank, torch.tensor(0), use_reentrant=reentrant).backward()
    with pytest.raises(RuntimeError, match="ema_update_: updates a state"):
        checkpoint(averaged, inputs * 1, use_reentrant=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_gradients_after_a_cast(device: torch.device, cast: str, mode: str) -> None:
    """Query and bank as a module's cast leaves them, against the reference in float64 on the same numbers."""
    query, bank = (getattr(t.to(device), cast)() for t in (unit(4, 16, seed=1), unit(20, 16)))
    found, expected = query.clone().requires_grad_(), query.double().requires_grad_()
    scored(found, bank, mode=mode, temperature=0.5).sum().backward()
    scored(expected, bank.double(), mode=mode, temperature=0.5, function=ops.bank_nce_reference).sum().backward()
    assert found.grad is not None
    assert found.grad.dtype == query.dtype
    tolerance = 1e-12 if cast == "double" else 4 * torch.finfo(query.dtype).eps
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *WITHOUT])
def test_compiled_errors(name: str) -> None:
    """A compiled function does not leave out a derivative that the plain one refuses."""
    function, value = (DIFFERENTIABLE | WITHOUT)[name]
    torch._dynamo.reset()
    tangent = torch.ones_like(value)
    with pytest.raises((ValueError, RuntimeError)):
        torch.compile(lambda x: torch.func.jvp(function, (x,), (tangent,))[1], backend="aot_eager")(value.clone())
    if name in WITHOUT:
        with pytest.raises((ValueError, RuntimeError)):
            torch.compile(function, backend="aot_eager")(value.clone().requires_grad_())
    elif "nce" in name:
        linear = torch.nn.Linear(6, 6)
        leaf = value.clone().requires_grad_()
        loss = torch.compile(lambda x: function(linear(x)), backend="aot_eager", fullgraph=True)(leaf).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            gradient.sum().backward()
