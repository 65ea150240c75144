"""Optimizer state that exists from the start, and that moves between devices.

State of zeros before the first step is what torch's optimizers begin with lazily. Allocating it at once lets a step be
rolled back, a CUDA graph be captured and the size of a checkpoint be known before training.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KERNELS = ("foreach", "fused")


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a momentum of zeros; SGD's first step is then the same as without one."""
    for parameter in parameters_of(optimizer):
        optimizer.state[parameter]["momentum_buffer"] = zeros_like(parameter)


def zero_moments(optimizer: torch.optim.Optimizer, *, step_on_device: bool) -> None:
    """Give every parameter the first and second moment of zeros and the step count that Adam starts with.

    Args:
        optimizer: whose state it becomes.
        step_on_device: fused kernels keep the count on the device, others on the host.
    """
    for parameter in parameters_of(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if step_on_device else "cpu"),
            "exp_avg": zeros_like(parameter),
            "exp_avg_sq": zeros_like(parameter),
        }


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` that keeps this device's kernels: fused on CUDA, foreach elsewhere.

    Options of a group that did not exist when the state was saved are this optimizer's."""
    groups = [
        {**{k: v for k, v in own.items() if k != "params"}, **saved, **{k: own[k] for k in _KERNELS if k in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Saved under another memory format: the fused kernel requires the momentum to have its parameter's strides.
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def zeros_like(parameter: Tensor) -> Tensor:
    """Zeros in the parameter's shape, dtype, device and memory format."""
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)
