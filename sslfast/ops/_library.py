"""Loads the compiled core ``sslfast._C``, which registers ``torch.ops.sslfast.*``, and checks shared by the ops."""

from typing import Any

import torch

try:
    import sslfast._C as _C
except ImportError as error:
    raise ImportError(
        f"sslfast's compiled core does not load with torch {torch.__version__}: {error}. "
        "Build it in this environment: `pip install --no-build-isolation -e .` in a checkout, "
        "or `pip install --force-reinstall --no-deps sslfast`"
    ) from error


_OPTIONAL = {"negatives", "step", "z"}  # arguments of ops that may be None


def build_info() -> dict[str, Any]:
    """Facts about the compiled core: version, note, cuda_architectures, compiler."""
    return dict(_C.build_info())


def step_arguments(step: int | torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Split a public ``step`` into the schema's ``(step_tensor, step)``; draws use a step modulo 2**32."""
    if isinstance(step, torch.Tensor):
        return step, 0
    return None, step % 2**32 if isinstance(step, int | torch.SymInt) else step


def check_seed(op: str, seed: int) -> None:
    """Raise ValueError unless ``0 <= seed < 2**63``."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed must be in [0, 2**63), got {seed=}")


def mark_updated(*tensors: torch.Tensor) -> None:
    """Tell autograd that tensors changed in place, so that a backward pass that saved one of them raises an error.

    Custom ops do not do this by themselves. Traced code does not need it: there the schema says what an op mutates.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless all arguments are tensors, ValueError unless they are on the device of the first."""
    given: list[tuple[str, Any]] = [
        (name, tensor) for name, tensor in tensors.items() if tensor is not None or name not in _OPTIONAL
    ]
    for name, tensor in given:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    (first, head), *rest = given
    for name, tensor in rest:
        if tensor.device != head.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and {first} on {head.device}; move one with .to(device)"
            )
