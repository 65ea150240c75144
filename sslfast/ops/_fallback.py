"""The registered ops by their references, for an installation without the compiled core.

Everything around them stays: the public functions' checks, fakes, autograd formulas and torch.compile. What the kernels
check beside that is checked here, in their words, where torch would compute something else than asked or name no op:
dtypes, shapes that would be broadcast, rows and parameters out of range, shared memory. References hold whole tensors
(``[B, K, D]`` for sampled negatives), and some wait for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast.ops import _core, _library
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
from sslfast.ops.view_parameters import ViewParameter

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_floating(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        torch._check(
            tensor.dtype in _FLOATING,
            lambda name=name, tensor=tensor: f"{op}: {name} must be fp32, fp64, bf16 or fp16, got {tensor.dtype}",
        )


def _check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    torch._check(
        list(tensor.shape) == list(shape),
        lambda: f"{op}: {name} must have shape {meaning} = {[*shape]}, got {[*tensor.shape]}",
    )


def _check_scalar(op: str, name: str, tensor: Tensor | None, dtypes: Sequence[torch.dtype], wanted: str) -> None:
    torch._check(
        tensor is None or (tensor.dim() == 0 and tensor.dtype in dtypes),
        lambda: f"{op}: {name} must be {wanted}, got {None if tensor is None else (tensor.dtype, [*tensor.shape])}",
    )


def _check_step(op: str, step_tensor: Tensor | None) -> None:
    _check_scalar(op, "step", step_tensor, [torch.int64], "an int or a 0-d int64 tensor")


def _check_scoring(
    op: str, query: Tensor, bank: Tensor, z_tensor: Tensor | None, z: float, temperature: float, binary: bool
) -> None:
    torch._check(bank.dim() == 2, lambda: f"{op}: bank must have shape [N, D], got {[*bank.shape]}")
    _check_floating(op, bank=bank)
    torch._check(query.dim() == 3, lambda: f"{op}: query must have shape [V, B, D], got {[*query.shape]}")
    torch._check(
        query.shape[2] == bank.shape[1],
        lambda: f"{op}: query must have D={bank.shape[1]} columns like bank, got {query.shape[2]}",
    )
    double = bank.dtype == torch.float64
    wanted = "fp64 like bank" if double else "fp32; convert it with .float()"
    torch._check(
        query.dtype == (torch.float64 if double else torch.float32),
        lambda: f"{op}: query must be {wanted}, got {query.dtype}",
    )
    _check_scalar(op, "z", z_tensor, [torch.float64], "a float or a 0-d fp64 tensor")
    lowest, highest = _library.TEMPERATURES
    torch._check(
        lowest <= temperature <= highest,
        lambda: f"{op}: temperature must be in [{lowest:g}, {highest:g}], got {temperature}",
    )
    if binary and z_tensor is not None:
        torch._assert_async(~(z_tensor <= 0), f"{op}: z must be positive")  # NaN passes, as in the kernels
    torch._check(not binary or not z <= 0, lambda: f"{op}: z must be positive, got {z}")


def _check_written(op: str, bank: Tensor, **read: Tensor) -> None:
    torch._check(bank.dim() == 2, lambda: f"{op}: bank must have shape [N, D], got {[*bank.shape]}")
    torch._check(
        bank.is_contiguous(),
        lambda: (
            f"{op}: bank must be contiguous, it is updated in place; build it with .contiguous(), got {[*bank.shape]} "
            f"with strides {[*bank.stride()]}"
        ),
    )
    _check_floating(op, bank=bank)
    for name, tensor in read.items():
        torch._check(not _may_share(bank, tensor), lambda name=name: f"{op}: {name} must not share memory with bank")


def _may_share(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of two tensors meets."""
    if a.is_meta or b.is_meta or 0 in (a.numel(), b.numel()) or a.device != b.device:
        return False

    def ends(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize

    (first, end), (other_first, other_end) = ends(a), ends(b)
    return first < other_end and other_first < end


def _check_rows(op: str, name: str, rows: Tensor, low: int, high: int, shape: Sequence[int] | None = None) -> None:
    torch._check(
        rows.dtype == torch.int64, lambda: f"{op}: {name} must be int64; convert it with .long(), got {rows.dtype}"
    )
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
    _check_rows("negative_rows", "index", index, 0, num_rows, (index.numel(),))
    _check_step("negative_rows", step_tensor)
    options: dict[str, Any] = {"num_negatives": num_negatives, "num_rows": num_rows, "seed": seed}
    options["step"] = step if step_tensor is None else step_tensor
    rows = negative_rows_reference(index, **options, exclude_self=exclude_self, shared=shared)
    return rows.expand(len(index), -1).clone() if shared else rows


def _bank_nce(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor | None, step_tensor: Tensor | None, step: int,
    z_tensor: Tensor | None, z: float, num_negatives: int, temperature: float, binary: bool, exclude_self: bool,
    seed: int, first_row: int = 0, num_rows: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_scoring("bank_nce", query, bank, z_tensor, z, temperature, binary)
    _check_step("bank_nce", step_tensor)
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
    op = "bank_nce_dense"
    _check_scoring(op, query, bank, z_tensor, z, temperature, binary)
    torch._check(len(bank) >= 1, lambda: f"{op}: bank must hold at least one row, got {[*bank.shape]}")
    torch._check(
        negatives is None or len(negatives) >= 1, lambda: f"{op}: negatives must name at least one row, got [0]"
    )
    torch._check(
        negatives is not None or not binary or len(bank) >= 2,
        lambda: f"{op}: NCE against the whole bank needs at least 2 rows, got 1",
    )
    _check_rows("bank_nce_dense", "index", index, -1, len(bank), query.shape[1:2])
    if negatives is not None:
        _check_rows("bank_nce_dense", "negatives", negatives, 0, len(bank), (negatives.numel(),))
    options: dict[str, Any] = {"negatives": negatives, "temperature": temperature, "exclude_self": exclude_self}
    options |= {"loss": "nce" if binary else "infonce", "z": z if z_tensor is None else z_tensor}
    return _with_gradient(query, lambda leaf: bank_nce_dense_reference(leaf, bank, index, **options))


def _bank_update_(bank: Tensor, index: Tensor, features: Tensor, momentum: float) -> None:
    _check_written("bank_update_", bank, features=features, index=index)
    _check_floating("bank_update_", features=features)
    _check_rows("bank_update_", "index", index, -1, len(bank), features.shape[:1])
    _check_shape("bank_update_", "features", features, (len(index), bank.shape[1]), "[B, D]")
    bank_update_reference(bank, index, features, momentum=momentum)


def _bank_enqueue_(bank: Tensor, head: Tensor, keys: Tensor) -> None:
    _check_written("bank_enqueue_", bank, keys=keys, head=head)
    _check_floating("bank_enqueue_", keys=keys)
    _check_rows("bank_enqueue_", "head", head, 0, len(bank), ())
    torch._check(
        keys.dim() == 2 and keys.shape[1] == bank.shape[1],
        lambda: f"bank_enqueue_: keys must have shape [B, D] = [B, {bank.shape[1]}], got {[*keys.shape]}",
    )
    bank_enqueue_reference(bank, head, keys)


def _ema_update_(targets: list[Tensor], sources: list[Tensor], momentum_tensor: Tensor | None, momentum: float) -> None:
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        torch._check(
            target.shape == source.shape,
            lambda i=i: f"ema_update_: sources[{i}] must have the shape of targets[{i}]",
        )
        _check_floating("ema_update_", **{f"targets[{i}]": target, f"sources[{i}]": source})
    memory = [target.data_ptr() for target in targets if target.numel() and not target.is_meta]
    torch._check(
        len(set(memory)) == len(memory), lambda: "ema_update_: two targets share memory; pass tied weights once"
    )
    dtypes = [torch.float32, torch.float64]
    _check_scalar("ema_update_", "momentum", momentum_tensor, dtypes, "a float or a 0-d fp32 or fp64 tensor")
    if momentum_tensor is not None:
        inside = (momentum_tensor >= 0) & (momentum_tensor <= 1)
        torch._assert_async(inside, "ema_update_: momentum must be in [0, 1]")
    ema_update_reference(targets, sources, momentum=momentum if momentum_tensor is None else momentum_tensor)


def _rotate90(images: Tensor, quarter_turns: Tensor) -> Tensor:
    torch._check(
        images.dim() == 4 and images.shape[2] == images.shape[3],
        lambda: f"rotate90: images must be square (H == W), got {[*images.shape]}; crop them first",
    )
    _check_turns("rotate90", quarter_turns, len(images))
    return rotate90_reference(images, quarter_turns)


def _check_turns(op: str, quarter_turns: Tensor, batch: int) -> None:
    torch._check(
        quarter_turns.dtype == torch.int64, lambda: f"{op}: quarter_turns must be int64; convert it with .long()"
    )
    _check_shape(op, "quarter_turns", quarter_turns, (batch,), "[N]")


def _check_cells(op: str, permutation: Tensor, offsets: Tensor, batch: int, grid: int, room: Sequence[int]) -> None:
    _check_rows(op, "permutation", permutation, 0, grid**2, (batch, grid**2))
    _check_shape(op, "offsets", offsets, (batch, grid**2, 2), "[N, grid**2, 2]")
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
    torch._check(crops.dtype == torch.uint8, lambda: "render_views: crops must be uint8")
    torch._check(
        crops.dim() == 4 and crops.shape[1] == 3 and crops.shape[2] == crops.shape[3],
        lambda: f"render_views: crops must have shape [B, 3, S, S], got {[*crops.shape]}",
    )
    if quarter_turns is not None:
        _check_turns("render_views", quarter_turns, batch)
    if permutation is not None and offsets is not None:
        room = [side // grid - patch_size for side in crops.shape[2:]]
        _check_cells("render_views", permutation, offsets, batch, grid, room)
    expected = [batch, max(grid, 1) ** 2, len(ViewParameter)]
    torch._check(
        parameters.dtype == torch.float32 and list(parameters.shape) == expected,
        lambda: (
            f"render_views: parameters must be fp32 [B, M, {len(ViewParameter)}] = {expected}, got "
            f"{parameters.dtype} {[*parameters.shape]}"
        ),
    )
    for parameter in ViewParameter:
        values = parameters[..., parameter]
        inside = ((values >= parameter.lowest) & (values <= parameter.highest)).all()
        allowed = f"in [{parameter.lowest:g}, {parameter.highest:g}]"
        torch._assert_async(inside, f"render_views: {parameter.name.lower()} must be {allowed}")
    options: dict[str, Any] = {"grid": max(grid, 1), "patch_size": patch_size, "dtype": dtype, "blur": blur}
    options |= {"quarter_turns": quarter_turns, "permutation": permutation, "offsets": offsets}
    options |= {"mean": (mean_r, mean_g, mean_b), "std": (std_r, std_g, std_b), "photometric": photometric}
    views = render_views_reference(crops, parameters, **options, channels_last=channels_last)
    return views.permute(0, 2, 3, 1) if channels_last else views


def _rgb_to_lab(pixels: Tensor, channels_last: bool) -> Tensor:
    torch._check(
        pixels.dim() == 4 and pixels.shape[3 if channels_last else 1] == 3,
        lambda: f"rgb_to_lab: pixels must have shape [N, 3, H, W], got {[*pixels.shape]}",
    )
    _check_floating("rgb_to_lab", pixels=pixels)
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
