"""Parameter groups: which parameters decay, and options of the parameters below a name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sslfast.optim.optimizers import OptimConfig

Groups = list[dict[str, Any]]
"""Parameter groups of an optimizer."""

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class ParameterOptions:
    """What the optimizer does differently with some parameters of a module."""

    lr_factor: float = 1.0
    """Factor of their learning rate."""
    constant_lr: bool = False
    """Their rate is the peak rate at every step, without warm-up and schedule."""
    weight_decay: float | None = None
    """Their weight decay, constant; None: that of the run. Biases and normalisation layers follow the run's rule."""
    momentum: float | None = None
    """Their momentum in SGD and LARS; None: that of the run."""
    adapt: bool | None = None
    """Whether LARS and LAMB adapt their rate; None: where they decay."""
    frozen_steps: int = 0
    """Steps from the beginning of the run that leave them as they are: no update, decay or momentum."""


def parameter_groups(
    module: nn.Module, config: "OptimConfig", options: Mapping[str, ParameterOptions] | None = None
) -> Groups:
    """Two groups, decayed and not decayed, each in the order of ``module.named_parameters()``; then two for each name
    in ``options``, in their order.

    Parameters of normalisation layers belong to ``decay_norm``, the ``bias`` of every other layer to
    ``decay_bias``; what requires no gradient is left out. All groups always exist, so that the layout of the
    optimizer's state does not depend on the settings.

    Args:
        module: whose parameters are grouped.
        config: its weight decay and the rules above.
        options: by the name of a parameter or of a module that holds some; the first that fits counts.

    Raises:
        ValueError: nothing requires a gradient, or nothing is below a name.
    """
    norm = {id(p) for m in module.modules() if isinstance(m, _NORM_LAYERS) for p in m.parameters(recurse=False)}
    named: dict[str, ParameterOptions] = {"": ParameterOptions(), **(options or {})}
    found: dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]] = {name: ([], []) for name in named}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in norm:
            decays = config.decay_norm
        elif name.rpartition(".")[2] == "bias":
            decays = config.decay_bias
        else:
            decays = True
        owner = next((prefix for prefix in options or () if f"{name}.".startswith(f"{prefix}.")), "")
        found[owner][0 if decays else 1].append(parameter)
    if not any(decayed or free for decayed, free in found.values()):
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to train")
    for name in options or ():
        if not any(found[name]):
            raise ValueError(f"{type(module).__name__} has no trained parameter below {name!r}, which has options")
    return [
        _group(parameters, config, named[name], decays=decays)
        for name, pair in found.items()
        for parameters, decays in zip(pair, (True, False), strict=True)
    ]


def _group(
    parameters: list[nn.Parameter], config: "OptimConfig", options: ParameterOptions, *, decays: bool
) -> dict[str, Any]:
    weight_decay = config.weight_decay if options.weight_decay is None else options.weight_decay
    momentum = {} if options.momentum is None else {"momentum": options.momentum}
    return {
        "params": parameters,
        "weight_decay": weight_decay if decays else 0.0,
        "scheduled_decay": decays and options.weight_decay is None,
        "adapt": decays if options.adapt is None else options.adapt,
        "lr_factor": options.lr_factor * (1.0 if decays else config.bias_norm_lr_factor),
        "constant_lr": options.constant_lr,
        "frozen_steps": options.frozen_steps,
        **momentum,
    }


def prepare_gradients(optimizer: torch.optim.Optimizer, config: "OptimConfig", step: int) -> None:
    """What happens to the gradients before the optimizer's step: clipping, then those of frozen groups are dropped.

    Nothing is read from the device. A gradient that is not finite stays so. Under several processes every rank clips
    the averaged gradients, which are the same.

    Args:
        optimizer: of :func:`~sslfast.optim.build_optimizer`.
        config: its clipping.
        step: of the run, counted from 0.
    """
    if config.clip_grad_norm > 0:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        if not config.clip_each:
            norms = torch.linalg.vector_norm(norms).expand(len(gradients))
        # As torch.nn.utils.clip_grad_norm_: a norm of NaN makes every gradient NaN, and so the step is reported.
        factors = (config.clip_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    for group in optimizer.param_groups:
        if step < group["frozen_steps"]:
            for parameter in group["params"]:
                parameter.grad = None
