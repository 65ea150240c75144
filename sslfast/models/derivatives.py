"""A derivative that a kernel does not compute is an error, not 0."""

from typing import Any, cast

import torch
from torch import Tensor


def first_derivative_only(x: Tensor, module: str) -> Tensor:
    """``x`` itself, for an op whose gradient is a constant to autograd: it is computed in the forward pass.

    Differentiating the gradient of ``x`` again (gradient penalty, Hessian), or ``x`` in forward mode, raises
    RuntimeError, where autograd would take the op's gradient for a constant and the tangent for 0; so does any call
    under torch.func (grad, vmap, jvp, ...). Compiled code needs no guard: torch refuses second derivatives there.
    """
    if torch.compiler.is_compiling():
        return x
    if torch._C._are_functorch_transforms_active():
        raise _refusal(module, ", with backward() or torch.autograd.grad, not under torch.func")
    return cast(Tensor, _FirstDerivativeOnly.apply(x, module))


def _refusal(module: str, how: str = "") -> RuntimeError:
    return RuntimeError(
        f"{module}: only first derivatives in reverse mode are computed{how}; for others write the loss in plain "
        "torch, one over a bank with sslfast.ops.bank_nce_reference"
    )


class _FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        if torch.is_grad_enabled():  # create_graph
            gradient = cast(Tensor, _Constant.apply(gradient, *ctx.saved_tensors, ctx.module))
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, *_tangents: Any) -> Tensor:
        raise _refusal(ctx.module)


class _Constant(torch.autograd.Function):
    """The gradient of x. It depends on x: autograd comes here on every way from it to what x was computed from."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, module: str) -> Tensor:
        ctx.module = module
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, None, None]:
        raise _refusal(ctx.module)
