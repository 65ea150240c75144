"""The registered ops by their references, for an installation without the compiled core.

Everything around them stays: the public functions' checks, fakes, autograd formulas and torch.compile. What the kernels
check beside that is checked here where torch would compute something else than asked: rows out of range and shapes that
would be broadcast. References hold whole tensors (``[B, K, D]`` for sampled negatives), and some wait for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast.ops import _core
from sslfast.ops.bank_enqueue_ import bank_enqueue_reference
from sslfast.ops.bank_nce import bank_nce_reference
from sslfast.ops.bank_nce_dense import bank_nce_dense_reference
from sslfast.ops.bank_update_ import bank_update_reference
from sslfast.ops.ema_update_ import ema_update_reference
from sslfast.ops.jigsaw_patches import jigsaw_patches_reference
from sslfast.ops.negative_rows import negative_rows_reference
from sslfast.ops.render_views import render_views_reference
from sslfast.ops.rgb_to_lab import rgb_to_lab_reference
from sslfast.ops.rotate90 import rotate90_reference


def _check_rows(op: str, name: str, rows: Tensor, low: int, high: int, shape: Sequence[int] | None = None) -> None:
    torch._check(rows.dtype == torch.int64, lambda: f"{op}: {name} must be int64; convert it with .long()")
    if shape is not None:
        torch._check(
            list(rows.shape) == list(shape), lambda: f"{op}: {name} must have shape {[*shape]}, got {[*rows.shape]}"
        )
    if rows.numel():
        inside = ((rows >= low) & (rows < high)).all()
        torch._assert_async(inside, f"{op}: {name} must be in [{low}, {high})")


def _with_gradient(
    query: Tensor, reference: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, log-sum-exp, d loss / d query). An op runs below autograd, which the reference needs again."""
    above = [
        torch._C._SetExcludeDispatchKeyGuard(key, False)
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    ]
    with above[0], above[1], torch.enable_grad():
        leaf = query.detach().clone().requires_grad_()
        losses, lse = reference(leaf)
        gradient = torch.autograd.grad(losses.sum(), leaf)[0] if losses.requires_grad else torch.zeros_like(leaf)
        return losses.detach().contiguous(), lse.detach().clone(), gradient.contiguous()


def _negative_rows(
    index: Tensor, step_tensor: Tensor | None, step: int, num_negatives: int, num_rows: int, seed: int,
    exclude_self: bool, shared: bool,
) -> Tensor:  # fmt: skip
    _check_rows("negative_rows", "index", index, 0, num_rows)
    options: dict[str, Any] = {"num_negatives": num_negatives, "num_rows": num_rows, "seed": seed}
    options["step"] = step if step_tensor is None else step_tensor
    rows = negative_rows_reference(index, **options, exclude_self=exclude_self, shared=shared)
    return rows.expand(len(index), -1).clone() if shared else rows


def _bank_nce(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor | None, step_tensor: Tensor | None, step: int,
    z_tensor: Tensor | None, z: float, num_negatives: int, temperature: float, binary: bool, exclude_self: bool,
    seed: int, first_row: int = 0, num_rows: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shard = None if num_rows == -1 or num_rows == len(bank) else (first_row, num_rows)
    every = len(bank) if shard is None else num_rows
    _check_rows("bank_nce", "index", index, 0, every, query.shape[1:2])
    if negatives is not None:
        _check_rows("bank_nce", "negatives", negatives, 0, every, (query.shape[1], negatives.shape[-1]))
    options: dict[str, Any] = {"temperature": temperature, "loss": "nce" if binary else "infonce"}
    options |= {"negatives": "sampled" if negatives is None else negatives, "num_negatives": num_negatives}
    options |= {"z": z if z_tensor is None else z_tensor, "step": step if step_tensor is None else step_tensor}
    options |= {"exclude_self": exclude_self, "seed": seed, "shard": shard, "return_lse": True}
    return _with_gradient(query, lambda leaf: bank_nce_reference(leaf, bank, index, **options))  # type: ignore[arg-type, return-value]


def _bank_nce_dense(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor | None, z_tensor: Tensor | None, z: float,
    temperature: float, binary: bool, exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_rows("bank_nce_dense", "index", index, -1, len(bank), query.shape[1:2])
    if negatives is not None:
        _check_rows("bank_nce_dense", "negatives", negatives, 0, len(bank), (negatives.numel(),))
    options: dict[str, Any] = {"negatives": negatives, "temperature": temperature, "exclude_self": exclude_self}
    options |= {"loss": "nce" if binary else "infonce", "z": z if z_tensor is None else z_tensor}
    return _with_gradient(query, lambda leaf: bank_nce_dense_reference(leaf, bank, index, **options))


def _bank_update_(bank: Tensor, index: Tensor, features: Tensor, momentum: float) -> None:
    _check_rows("bank_update_", "index", index, -1, len(bank), features.shape[:1])
    bank_update_reference(bank, index, features, momentum=momentum)


def _bank_enqueue_(bank: Tensor, head: Tensor, keys: Tensor) -> None:
    _check_rows("bank_enqueue_", "head", head, 0, len(bank), ())
    bank_enqueue_reference(bank, head, keys)


def _ema_update_(targets: list[Tensor], sources: list[Tensor], momentum_tensor: Tensor | None, momentum: float) -> None:
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        torch._check(
            target.shape == source.shape,
            lambda i=i: f"ema_update_: sources[{i}] must have the shape of targets[{i}]",
        )
    ema_update_reference(targets, sources, momentum=momentum if momentum_tensor is None else momentum_tensor)


def _rotate90(images: Tensor, quarter_turns: Tensor) -> Tensor:
    _check_rows("rotate90", "quarter_turns", quarter_turns, -(2**63), 2**63 - 1, images.shape[:1])
    return rotate90_reference(images, quarter_turns)


def _check_cells(op: str, permutation: Tensor, offsets: Tensor, batch: int, grid: int, room: Sequence[int]) -> None:
    _check_rows(op, "permutation", permutation, 0, grid**2, (batch, grid**2))
    for axis, free in enumerate(room):
        _check_rows(op, "offsets", offsets[..., axis], 0, free + 1, (batch, grid**2))


def _jigsaw_patches(images: Tensor, permutation: Tensor, offsets: Tensor, grid: int, patch_size: int) -> Tensor:
    room = [side // grid - patch_size for side in images.shape[2:]]
    _check_cells("jigsaw_patches", permutation, offsets, len(images), grid, room)
    return jigsaw_patches_reference(images, permutation, offsets, grid=grid, patch_size=patch_size)


def _render_views(
    crops: Tensor, parameters: Tensor, quarter_turns: Tensor | None, permutation: Tensor | None,
    offsets: Tensor | None, grid: int, patch_size: int, mean_r: float, mean_g: float, mean_b: float, std_r: float,
    std_g: float, std_b: float, dtype: torch.dtype, channels_last: bool, photometric: bool, blur: bool,
) -> Tensor:  # fmt: skip
    batch = len(crops)
    if quarter_turns is not None:
        _check_rows("render_views", "quarter_turns", quarter_turns, -(2**63), 2**63 - 1, (batch,))
    if permutation is not None and offsets is not None:
        room = [side // grid - patch_size for side in crops.shape[2:]]
        _check_cells("render_views", permutation, offsets, batch, grid, room)
    expected = [batch, max(grid, 1) ** 2]
    torch._check(
        list(parameters.shape[:2]) == expected,
        lambda: f"render_views: parameters must have shape {[*expected, '...']}, got {list(parameters.shape)}",
    )
    options: dict[str, Any] = {"grid": max(grid, 1), "patch_size": patch_size, "dtype": dtype, "blur": blur}
    options |= {"quarter_turns": quarter_turns, "permutation": permutation, "offsets": offsets}
    options |= {"mean": (mean_r, mean_g, mean_b), "std": (std_r, std_g, std_b), "photometric": photometric}
    views = render_views_reference(crops, parameters, **options, channels_last=channels_last)
    return views.permute(0, 2, 3, 1) if channels_last else views


def _rgb_to_lab(pixels: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return rgb_to_lab_reference(pixels).float()
    return rgb_to_lab_reference(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).float().contiguous()


def _refuse_negated(op: str) -> Callable[..., None]:
    """torch's own fallback takes the results of an op for the tensors that it wrote, and these have no results."""

    def refuse(*_arguments: Any) -> None:
        raise RuntimeError(f"{op}: a tensor is lazily negated; pass a copy, tensor.resolve_neg()")

    return refuse


for _schema in _core.SCHEMAS:
    _name = _schema.split("(")[0]
    assert _core.definitions is not None
    _core.definitions.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")
    if _name in ("bank_update_", "bank_enqueue_", "ema_update_"):
        _core.definitions.impl(_name, _refuse_negated(_name), "Negative")
