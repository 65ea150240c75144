"""rotate90: rotate every image of a batch by its own number of quarter turns."""

import torch
from torch import Tensor

from sslfast.ops import _library


def rotate90(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """Rotate each image counter-clockwise by its own quarter turns.

    ``result[n] = torch.rot90(images[n], quarter_turns[n], (-2, -1))``, exactly, in one launch and without a host
    sync. Differentiable in floating ``images``. Source: the rotation task of RotNet (Gidaris et al., ICLR 2018,
    section 2.1) and of PIRL (appendix A.2).

    Args:
        images: ``[N, C, S, S]``, any dtype of 1, 2, 4 or 8 bytes per element; square. Non-contiguous memory is
            copied first.
        quarter_turns: ``[N]`` int64, any integers; 4 is 0 and -1 is 3.

    Returns:
        ``[N, C, S, S]`` of the dtype of ``images``, contiguous.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: wrong dtype or shape, images that are not square.
    """
    tensors = {"images": images, "quarter_turns": quarter_turns}
    _library.check_arguments("rotate90", tensors, gradient=("images",))
    return torch.ops.sslfast.rotate90(images, quarter_turns)


def rotate90_reference(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """The same in torch: the specification of :func:`rotate90`, equal to the last bit."""
    turns = (quarter_turns % 4)[:, None, None, None]
    result = images
    for k in (1, 2, 3):
        result = torch.where(turns == k, torch.rot90(images, k, (-2, -1)), result)
    return result.contiguous()


@torch.library.register_fake("sslfast::rotate90")
def _(images: Tensor, quarter_turns: Tensor) -> Tensor:
    _library.check_same_device("rotate90", images=images, quarter_turns=quarter_turns)
    torch._check(images.dim() == 4, lambda: f"rotate90: images must have shape [N, C, H, W], got {list(images.shape)}")
    torch._check(
        images.shape[2] == images.shape[3],
        lambda: f"rotate90: images must be square (H == W), got {list(images.shape)}; crop them first",
    )
    return images.new_empty(images.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    (quarter_turns,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.sslfast.rotate90(grad, -quarter_turns), None


torch.library.register_autograd("sslfast::rotate90", _backward, setup_context=_setup_context)
