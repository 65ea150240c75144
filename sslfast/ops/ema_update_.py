"""ema_update_: exponential moving average of a list of tensors, in place and in one pass."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sslfast.ops import _library


def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], *, momentum: float | Tensor) -> None:
    """Move every target toward its source: the momentum encoder of MoCo, BYOL and DINO.

    ``target = momentum * target + (1 - momentum) * source`` (He et al. 2020, section 3.2, equation 2), computed as
    ``target + (1 - momentum) * (source - target)`` in fp32 (fp64 where one of the two is), so that momentum 0, momentum
    1 and equal tensors are exact. One launch per pair of dtypes and 168 tensors on CUDA (ResNet-50's 161 parameters are
    one), threads over all elements on the CPU; no gradient flows, no host sync. Pairs that are dense with equal strides
    (contiguous, channels_last) are updated in place, others through contiguous copies.

    Args:
        targets: tensors of any shape, fp32, fp64, bf16 or fp16, updated in place; they must not share memory.
            Steps of ``1 - momentum`` below half a unit in the last place are lost: keep targets in fp32 for momentum
            near 1.
        sources: as many tensors of the same shapes on the same device, fp32, fp64, bf16 or fp16. A source may be its
            own target; otherwise the lists must not share memory.
        momentum: weight of the old target in [0, 1]; or a 0-d fp32 or fp64 tensor on the same device, read when the
            kernel runs, so that a schedule advances inside a captured graph (out of range on CUDA: a device trap).

    Raises:
        ValueError: momentum out of range, lists of different length, tensors on different devices.
        RuntimeError: different shapes, a dtype that is not floating (leave out integer buffers such as BatchNorm's
            ``num_batches_tracked`` and copy them), a target that is expanded or overlaps itself, tensors that share
            memory; called under activation checkpointing, which would run the update twice.
    """
    targets, sources = list(targets), list(sources)
    momentum_tensor, number = (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)
    _library.check_momentum("ema_update_", number)
    if len(targets) != len(sources):
        raise ValueError(f"ema_update_: as many sources as targets are needed, got {len(targets)=}, {len(sources)=}")
    if not targets:
        if momentum_tensor is not None and momentum_tensor.dim() != 0:
            raise ValueError(f"ema_update_: momentum must be 0-d, got shape {list(momentum_tensor.shape)}")
        return
    _check_tensors(targets, sources, momentum_tensor)
    given = {f"targets[{i}]": target for i, target in enumerate(targets)}
    read = {f"sources[{i}]": source for i, source in enumerate(sources)}
    _library.check_each("ema_update_", given | read, gradient=given | read, written=given)
    if momentum_tensor is not None:
        _library.check_each("ema_update_", {"momentum": momentum_tensor})
        momentum_tensor = _library.resolved("ema_update_", "momentum", momentum_tensor)
    _library.check_runs_once("ema_update_")
    sources = [_library.resolved("ema_update_", name, source) for name, source in read.items()]
    with torch.no_grad():  # targets are usually leaves that require grad
        torch.ops.sslfast.ema_update_(targets, sources, momentum_tensor, number)
    _library.mark_updated(*targets)


def ema_update_reference(targets: Iterable[Tensor], sources: Iterable[Tensor], *, momentum: float | Tensor) -> None:
    """The same update in torch, one tensor after the other, in the wider dtype and at least fp32: the specification."""
    weight = 1 - float(momentum)
    for target, source in zip(targets, sources, strict=True):
        accumulate = torch.float64 if torch.float64 in (target.dtype, source.dtype) else torch.float32
        moved = torch.lerp(target.detach().to(accumulate), source.detach().to(accumulate), weight)
        target.detach().copy_(moved)


def _check_tensors(targets: list[Tensor], sources: list[Tensor], momentum_tensor: Tensor | None) -> None:
    device = getattr(targets[0], "device", None)
    for name, tensors in (("targets", targets), ("sources", sources)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"ema_update_: {name}[{i}] must be a tensor, got {type(tensor).__name__}")
            if tensor.device != device:
                raise ValueError(
                    f"ema_update_: {name}[{i}] is on {tensor.device} and targets[0] on {device}; "
                    "move one with .to(device)"
                )
    if momentum_tensor is not None and momentum_tensor.device != device:
        raise ValueError(
            f"ema_update_: momentum is on {momentum_tensor.device} and targets[0] on {device}; move it with .to(device)"
        )


@torch.library.register_fake("sslfast::ema_update_")
def _(targets: list[Tensor], sources: list[Tensor], momentum_tensor: Tensor | None, momentum: float) -> None:
    torch._check(
        len(targets) == len(sources),
        lambda: f"ema_update_: as many sources as targets are needed, got {len(targets)} and {len(sources)}",
    )
    if targets:
        _check_tensors(targets, sources, momentum_tensor)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        torch._check(
            target.shape == source.shape,
            lambda i=i, target=target, source=source: (
                f"ema_update_: sources[{i}] must have shape {list(target.shape)} as targets[{i}], "
                f"got {list(source.shape)}"
            ),
        )
