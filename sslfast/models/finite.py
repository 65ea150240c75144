"""Tensors that hold NaN or infinite values, found in one pass without temporaries of their size."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_NORMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def are_finite(tensors: Sequence[Tensor], *, device: torch.device | str = "cpu") -> Tensor:
    """``[len(tensors)]`` bool on ``device``: whether all values of each are finite; of integer, sparse and
    empty ones, True.

    Nothing waits for the device, but for tensors that lie on another one.
    """
    finite = torch.ones(len(tensors), dtype=torch.bool, device=device)
    places = [place for place, x in enumerate(tensors) if x.is_floating_point() and x.numel() and not x.is_sparse]
    if not places:
        return finite
    values = [tensors[place].detach() for place in places]
    values = [value if value.dtype in _NORMED else value.float() for value in values]
    largest = torch._foreach_norm(values, math.inf)  # unlike a sum of squares, it does not overflow
    finite[torch.tensor(places, device=device)] = torch.stack([x.to(device).isfinite() for x in largest])
    return finite


def first_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a NaN or an infinite value, None where there is none. Waits for the device."""
    pairs = list(named)
    finite = are_finite([tensor for _, tensor in pairs]).tolist()
    return next((name for (name, _), is_finite in zip(pairs, finite, strict=True) if not is_finite), None)
