"""jigsaw_patches: cut every image into a grid of cells and take one patch per cell, in permuted order."""

import torch
from torch import Tensor

from sslfast.ops import _library


def jigsaw_patches(
    images: Tensor, permutation: Tensor, offsets: Tensor, *, grid: int = 3, patch_size: int = 64
) -> Tensor:
    """Patches of the cells of each image, in the order of its permutation.

    Slot ``j`` of sample ``n`` shows cell ``c = permutation[n, j]`` (row-major), from pixel
    ``(c // grid * (H // grid) + offsets[n, c, 0], c % grid * (W // grid) + offsets[n, c, 1])`` on. Offsets belong to
    cells, so the permutation moves patches but does not change them. One launch, no host sync. Differentiable in
    floating ``images``. Source: Noroozi and Favaro, ECCV 2016, section 3; PIRL section 3.1 (255-pixel crop, 3 x 3
    cells of 85 pixels, patches of 64).

    Args:
        images: ``[N, C, H, W]``, any dtype of 1, 2, 4 or 8 bytes per element. Non-contiguous memory is copied
            first. If ``grid`` does not divide a side, the remainder at the lower right is never shown.
        permutation: ``[N, grid**2]`` int64 cell indices in ``[0, grid**2)``; a cell may be repeated.
        offsets: ``[N, grid**2, 2]`` int64 (y, x), by cell, in ``[0, H // grid - patch_size]`` and
            ``[0, W // grid - patch_size]``.
        grid: cells per side.
        patch_size: p, side of a patch in pixels, at most the cell side.

    Returns:
        ``[N, grid**2, C, p, p]`` of the dtype of ``images``, contiguous.

    Raises:
        ValueError: grid or patch_size out of range, tensors on different devices.
        RuntimeError: wrong dtype or shape; on CPU also a permutation or offset out of range, naming the sample
            (CUDA: a device trap).
    """
    tensors = {"images": images, "permutation": permutation, "offsets": offsets}
    _library.check_arguments("jigsaw_patches", tensors, gradient=("images",))
    _check(images, grid, patch_size)
    return torch.ops.sslfast.jigsaw_patches(images, permutation, offsets, grid, patch_size)


def jigsaw_patches_reference(
    images: Tensor, permutation: Tensor, offsets: Tensor, *, grid: int = 3, patch_size: int = 64
) -> Tensor:
    """The same in torch: the specification of :func:`jigsaw_patches`, equal to the last bit."""
    _check(images, grid, patch_size)
    batch, channels = images.shape[:2]
    pixels = _pixels(permutation, offsets, images.shape[2], images.shape[3], grid, patch_size)  # [N, P, p, p]
    index = pixels.flatten(1)[:, None].expand(batch, channels, -1)  # [N, C, P * p * p]
    patches = images.flatten(2).gather(2, index).unflatten(2, (grid**2, patch_size, patch_size))
    return patches.transpose(1, 2).contiguous()


def _check(images: Tensor, grid: int, patch_size: int) -> None:
    _library.check_integers("jigsaw_patches", grid=grid, patch_size=patch_size)
    if not 1 <= grid <= 1024:
        raise ValueError(f"jigsaw_patches: grid must be in [1, 1024], got {grid=}")
    if images.dim() == 4:
        cell = min(images.shape[2] // grid, images.shape[3] // grid)
        if not 1 <= patch_size <= cell:
            raise ValueError(
                f"jigsaw_patches: patch_size must be in [1, {cell}], the cell side of images {list(images.shape)} in a "
                f"grid of {grid}, got {patch_size=}"
            )


def _pixels(permutation: Tensor, offsets: Tensor, height: int, width: int, grid: int, patch_size: int) -> Tensor:
    """``[N, P, p, p]`` int64: the pixel ``y * W + x`` that each position of each slot shows."""
    offset = offsets.gather(1, permutation[:, :, None].expand(-1, -1, 2))  # [N, P, 2], by slot
    y = permutation // grid * (height // grid) + offset[:, :, 0]
    x = permutation % grid * (width // grid) + offset[:, :, 1]
    steps = torch.arange(patch_size, device=permutation.device)
    return (y[:, :, None, None] + steps[:, None]) * width + x[:, :, None, None] + steps


@torch.library.register_fake("sslfast::jigsaw_patches")
def _(images: Tensor, permutation: Tensor, offsets: Tensor, grid: int, patch_size: int) -> Tensor:
    _library.check_same_device("jigsaw_patches", images=images, permutation=permutation, offsets=offsets)
    torch._check(
        images.dim() == 4, lambda: f"jigsaw_patches: images must have shape [N, C, H, W], got {list(images.shape)}"
    )
    _check(images, grid, patch_size)
    return images.new_empty((images.shape[0], grid**2, images.shape[1], patch_size, patch_size))


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor
) -> None:
    images, permutation, offsets, grid, patch_size = inputs
    ctx.save_for_backward(permutation, offsets)
    ctx.sizes = (images.shape[2], images.shape[3], grid, patch_size)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    permutation, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    height, width, grid, patch_size = ctx.sizes  # type: ignore[attr-defined]
    batch, _, channels = grad.shape[:3]
    pixels = _pixels(permutation, offsets, height, width, grid, patch_size)
    index = pixels.flatten(1)[:, None].expand(batch, channels, -1)  # [N, C, P * p * p]
    zeros = grad.new_zeros((batch, channels, height * width))
    images = zeros.scatter_add(2, index, grad.transpose(1, 2).reshape(batch, channels, -1))
    return images.unflatten(2, (height, width)), None, None, None, None


torch.library.register_autograd("sslfast::jigsaw_patches", _backward, setup_context=_setup_context)
