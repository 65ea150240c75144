"""Checks shared by the ops."""

import math
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from sslfast.ops import _core  # noqa: F401, defines the ops that the modules of the ops take at import

TEMPERATURES = (1e-30, 1e30)
"""Lowest and highest temperature: beyond, its inverse or a score leaves fp32, and losses would be NaN or constant."""
_OPTIONAL = {"negatives", "step", "z"}  # arguments of ops that may be None
_INTEGRAL = (numbers.Integral, torch.SymInt)
_REAL = (numbers.Real, torch.SymInt, torch.SymFloat)


def step_arguments(op: str, step: int | torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Split a public ``step`` into the schema's ``(step_tensor, step)``; draws use a step modulo 2**32."""
    if isinstance(step, torch.Tensor):
        return step, 0
    check_integers(op, step=step)
    return None, step % 2**32


def check_numbers(op: str, **given: Any) -> None:
    """Raise TypeError unless each is a number, ValueError for a 0-d tensor by which a derivative is asked for.

    The registered ops take the value of such a tensor; its derivative would be left out.
    """
    for name, value in given.items():
        if type(value) is float or type(value) is int:
            continue
        if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex():
            check_each(op, {name: value})
        elif not isinstance(value, _REAL):
            raise TypeError(f"{op}: {name} must be a number, got {_shown(value)}")


def check_integers(op: str, **given: Any) -> None:
    """Raise TypeError unless each is an integer, or a 0-d tensor of one."""
    for name, value in given.items():
        if type(value) is int:
            continue
        if isinstance(value, torch.Tensor):
            is_integer = value.dim() == 0 and not value.is_floating_point() and not value.is_complex()
        else:
            is_integer = isinstance(value, _INTEGRAL)
        if not is_integer:
            raise TypeError(f"{op}: {name} must be an integer, got {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype} {list(value.shape)}"
    return f"{value!r}"


def check_temperature(op: str, temperature: Any) -> None:
    """Raise unless the temperature is a number in :data:`TEMPERATURES`."""
    check_numbers(op, temperature=temperature)
    lowest, highest = TEMPERATURES
    if not lowest <= temperature <= highest:
        raise ValueError(f"{op}: temperature must be in [{lowest:g}, {highest:g}], got {temperature=}")


def check_z(op: str, z: Any) -> None:
    """Raise unless the normaliser, where it is no tensor, is a positive finite number. The op looks at a tensor."""
    if not isinstance(z, torch.Tensor):
        check_numbers(op, z=z)
        if not 0 < z < math.inf:
            raise ValueError(f"{op}: z must be positive, got {z=}")


def check_momentum(op: str, momentum: Any) -> None:
    """Raise unless the weight of the old values is a number in [0, 1]."""
    check_numbers(op, momentum=momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum must be in [0, 1], got {momentum=}")


def check_seed(op: str, seed: int) -> None:
    """Raise unless the seed is an integer, ``0 <= seed < 2**63``."""
    check_integers(op, seed=seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed must be in [0, 2**63), got {seed=}")


def check_arguments(
    op: str,
    tensors: Mapping[str, torch.Tensor | None],
    *,
    gradient: Collection[str] = (),
    written: Collection[str] = (),
) -> None:
    """Raise TypeError or ValueError for a tensor that the op cannot take, or whose derivative it would leave out.

    Args:
        op: name of the op.
        tensors: arguments by name; one of ``_OPTIONAL`` may be None.
        gradient: those whose gradient the op computes, or is documented to stop.
        written: those that the op writes.
    """
    if not _are_ordinary(tensors, gradient, written):
        check_same_device(op, **tensors)
        check_each(op, tensors, gradient=gradient, written=written)


def _are_ordinary(
    tensors: Mapping[str, torch.Tensor | None], gradient: Collection[str], written: Collection[str]
) -> bool:
    """True only where no check of :func:`check_arguments` can fail; the quick answer of nearly every call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    with_gradients, device = torch.is_grad_enabled(), None
    for name, tensor in tensors.items():
        if tensor is None:
            if name not in _OPTIONAL:
                return False
            continue
        if not isinstance(tensor, torch.Tensor):
            return False
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            return False
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            return False
        if name in written:
            if tensor.is_neg() or tensor._is_zerotensor() or (with_gradients and tensor.requires_grad):
                return False
        elif with_gradients and tensor.requires_grad and name not in gradient:
            return False
    return True


def check_each(
    op: str,
    tensors: Mapping[str, torch.Tensor | None],
    *,
    gradient: Collection[str] = (),
    written: Collection[str] = (),
) -> None:
    """:func:`check_arguments` without the devices."""
    with_gradients, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
    functions = torch._C._are_functorch_transforms_active() and not compiling
    forward_mode = forward_ad._current_level >= 0
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
            raise ValueError(f"{op}: {name} must be an ordinary dense tensor, got a {kind} one")
        if name in written and not compiling and (tensor.is_neg() or tensor._is_zerotensor()):
            raise ValueError(
                f"{op}: {name} is lazily negated or zero, without memory of its own to write; pass a .clone()"
            )
        requires_grad = with_gradients and tensor.requires_grad
        if requires_grad and name in written and not tensor.is_leaf:
            raise ValueError(
                f"{op}: {name} was computed from tensors that require a gradient, and the op writes it without one; "
                f"pass {name}.detach()"
            )
        if requires_grad and name not in gradient:
            raise ValueError(f"{op}: {name} requires a gradient, which the op does not compute; pass {name}.detach()")
        if functions:
            tensor = _check_functions(op, name, tensor, is_differentiated=requires_grad and name not in written)
        if forward_mode and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{op}: {name} has a tangent, and the op has no forward-mode derivative (jvp); use backward() or "
                "torch.autograd.grad"
            )


def _check_functions(op: str, name: str, tensor: torch.Tensor, *, is_differentiated: bool) -> torch.Tensor:
    """The tensor below torch.vmap's wrappers; ValueError where torch.func differentiates it."""
    below = tensor
    while torch._C._functorch.is_batchedtensor(below):
        below = torch._C._functorch.get_unwrapped(below)
    if torch._C._functorch.is_gradtrackingtensor(below) and (below is not tensor or is_differentiated):
        raise ValueError(
            f"{op}: {name} is differentiated by torch.func, which the op does not support; use backward() or "
            "torch.autograd.grad"
        )
    return below


def check_no_gradient(op: str, **tensors: torch.Tensor | None) -> None:
    """The same for the registered op, whose other tensor arguments have no gradient."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} requires a gradient, which the op does not compute; pass {name}.detach()")


class _FirstDerivative(torch.autograd.Function):
    """The identity of a derivative that was computed in the forward pass; differentiating it again is an error."""

    @staticmethod
    def forward(ctx: Any, derivative: torch.Tensor, argument: torch.Tensor, op: str) -> torch.Tensor:
        ctx.op = op
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: a second derivative is not computed (gradient penalties need one); use {ctx.op}_reference"
        )


def first_derivative(op: str, derivative: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """``derivative`` by ``argument``, for a backward pass: an error where ``create_graph`` differentiates it again."""
    return _FirstDerivative.apply(derivative, argument, op) if torch.is_grad_enabled() else derivative


class _Loss(torch.autograd.Function):
    """The loss of an op that computes the derivative by its first argument in the forward pass.

    What ``torch.library.register_autograd`` does for the op in general, without what the general form costs: it takes
    several times as long as the kernels of a small batch.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor], name: str) -> torch.Tensor:
        losses, derivative = found
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(derivative)
        ctx.given = query, name  # of the query's values nothing is needed: it may change before the backward
        return losses

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor | None) -> Any:
        if grad_loss is None:
            return None, None, None
        (derivative,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            query, name = ctx.given
            derivative = first_derivative(name, derivative, query)
        return grad_loss.unsqueeze(-1) * derivative, None, None


# Of the class in C: torch.autograd.Function.apply prepares for torch.func before it, which scored() has left to the
# registered op by then.
_apply_loss = super(torch.autograd.Function, _Loss).apply


def scored(
    name: str, op: Callable[..., Any], query: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, detached log-sum-exp) of a scoring op, whose arguments were checked, differentiable in ``query``."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        losses, lse, _ = op(query, *arguments)
        return losses, lse.detach()
    with torch._C._AutoDispatchBelowAutograd():
        losses, lse, derivative = op(query, *arguments)
    if query.requires_grad and torch.is_grad_enabled():
        losses = _apply_loss(query, (losses, derivative), name)
    return losses, lse


def check_runs_once(op: str) -> None:
    """Raise RuntimeError where activation checkpointing would run an update twice.

    The second run would also read a state that the first one changed: gradients would be wrong without a word.
    """
    if torch.compiler.is_compiling():
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    in_checkpoint = hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
    if in_checkpoint or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{op}: updates a state inside a function that activation checkpointing runs again in the backward pass; "
            "call it outside of torch.utils.checkpoint, and not in a backward pass"
        )


def check_memory(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError for a tensor whose storage was resized to less than its sizes say.

    The ops do this for everything that they read; this is for tensors that torch reads before.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_meta:
            continue
        if tensor.is_contiguous():
            steps = tensor.numel() - 1
        else:
            steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + steps + 1) * tensor.itemsize
        if tensor.untyped_storage().nbytes() < needed and tensor.numel():
            raise ValueError(
                f"{op}: {name} needs {needed} bytes of its storage, which was resized; pass another tensor"
            )


def resolved(op: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, written out where it is lazily negated."""
    if torch.compiler.is_compiling() or not tensor.is_neg():
        return tensor
    check_memory(op, **{name: tensor})
    return tensor.resolve_neg()


def detached(op: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """:func:`resolved` and without history."""
    tensor = resolved(op, name, tensor)
    return tensor.detach() if tensor.requires_grad else tensor


def mark_updated(*tensors: torch.Tensor) -> None:
    """Tell autograd that tensors changed in place, so that a backward pass that saved one of them raises an error.

    Custom ops do not do this by themselves. Traced code does not need it: there the schema says what an op mutates.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless all arguments are tensors, ValueError unless they are on the device of the first."""
    first, device, others = "", None, []
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            if tensor is not None or name not in _OPTIONAL:
                raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        elif device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            others.append((name, tensor.device))
    for name, other in others:  # once all are known to be tensors
        raise ValueError(f"{op}: {name} is on {other} and {first} on {device}; move one with .to(device)")
