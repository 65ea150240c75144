"""Checks of arguments that the adapters share."""

import numbers
from typing import Any

import torch
from torch import Tensor


def check_temperature(module: str, temperature: Any) -> None:
    """Raise ValueError unless the temperature is a number in [1e-8, 1e30]; RuntimeError for a 0-d tensor."""
    if isinstance(temperature, Tensor) and temperature.dim() == 0:
        in_range = (temperature >= 1e-8) & (temperature <= 1e30)
        torch._assert_async(in_range, f"{module}: temperature must be in [1e-8, 1e30]")  # no host sync
        return
    if not isinstance(temperature, float | numbers.Real):
        raise TypeError(f"{module}: temperature must be a number, got {temperature!r}")
    if not 1e-8 <= float(temperature) <= 1e30:  # also catches NaN
        raise ValueError(f"{module}: temperature must be in [1e-8, 1e30], got {temperature!r}; papers use 0.05 to 0.5")


def check_counts(module: str, least: int, **counts: Any) -> None:
    """Raise ValueError unless every count is an integer and at least ``least``."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{module}: {name} must be an integer, at least {least}, got {count!r}")


def check_features(module: str, columns: int | None, device: torch.device | None = None, **features: Any) -> None:
    """Raise unless all features are floating ``[B, columns]`` of the same B, at least 1, on one device.

    Args:
        module: name for the message.
        columns: what the state has. None: at least 1.
        device: where the state is. None: that of the first.
        features: by the name of the argument.

    Raises:
        TypeError: not a tensor, not floating.
        ValueError: a shape or a device.
        RuntimeError: a state on the meta device.
    """
    shape = None
    for name, x in features.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{module}: {name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{module}: {name} must be features, floating [B, columns], got {x.dtype} {list(x.shape)}")
        wanted = "columns" if columns is None else columns
        if x.dim() != 2 or 0 in x.shape or (columns is not None and x.shape[1] != columns):
            raise ValueError(f"{module}: {name} must be [B, {wanted}], none of them 0, got {list(x.shape)}")
        if shape is not None and x.shape != shape:
            raise ValueError(f"{module}: {name} must be {list(shape)} like {next(iter(features))}, got {list(x.shape)}")
        shape, device = x.shape, x.device if device is None else device
        if device.type == "meta" and not x.is_meta:
            raise RuntimeError(
                f"{module}: its state is on the meta device and has no values; build the module again outside of "
                'torch.device("meta"), then load its state'
            )
        if x.device != device:
            raise ValueError(f"{module}: {name} is on {x.device} and not on {device}; move one with .to(device)")


def check_precision(module: str, state: Tensor, *features: Tensor) -> None:
    """Raise TypeError where fp64 features meet state of less precision, which would round them."""
    if state.dtype != torch.float64 and any(x.dtype == torch.float64 for x in features):
        raise TypeError(
            f"{module}: features are float64 and the state is {state.dtype}; call .double() on the module, "
            "or .float() on the features"
        )
