"""What a run will need of its device's memory, before anything is computed."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast.distributed import world_size
from sslfast.loaders.batch import View, ViewConfig
from sslfast.trainer import Trainer


def estimate_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes on one device by what they are for.

    Parameters, gradients, momentum and the other state (bank, queues, BatchNorm) are counted; so are the views of a
    micro-batch and, on CUDA, those of the next. Activations are what autograd keeps of one forward on the ``meta``
    device, where nothing is computed; half of it under bf16. The key "activations" is absent where a method's forward
    cannot run there. Not counted: workspaces of kernels, the allocator's slack and CUDA's own memory, together about a
    fifth more. ``trainer`` cannot be used for training afterwards.
    """
    method, config = trainer.method, trainer.config
    parameters = [p for p in method.parameters() if p.requires_grad]
    momenta = [v for values in trainer.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    needs = {
        "parameters": _bytes(list(method.parameters())),
        "gradients": _bytes(parameters),
        "momentum": _bytes(momenta),
        "bank and other state": _bytes(list(method.buffers())),
    }
    if config.on_nonfinite == "skip":
        needs["copy for on_nonfinite=skip"] = needs["parameters"] + needs["momentum"] + needs["bank and other state"]
    samples = config.batch_size // world_size() // config.accumulate_steps
    views = {name: _meta_view(view, samples, trainer.dtype) for name, view in trainer.stage.views.items()}
    pixels = sum(view.pixels.nbytes for view in views.values())
    needs["views"] = pixels * (2 if trainer.device.type == "cuda" else 1)
    kept = _saved_bytes(trainer, views, samples)
    if kept is not None:
        needs["activations"] = kept * trainer.dtype.itemsize // torch.float32.itemsize
    return needs


def device_bytes(device: torch.device) -> int:
    """All memory of a device; of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(trainer: Trainer) -> str:
    """The estimate as a line. Raises ValueError where the device has less memory than that."""
    needs, there = estimate_memory(trainer), device_bytes(trainer.device)
    total = sum(needs.values())
    words = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in needs.items())
    if "activations" not in needs:
        words += ", activations not known"
    line = f"about {total / 1e9:.2f} GB of {there / 1e9:.1f} GB ({words})"
    if total > there:
        raise ValueError(
            f"a step needs {line} on {trainer.device}; raise accumulate_steps, lower batch_size, or use more processes"
        )
    return line


def _saved_bytes(trainer: Trainer, views: dict[str, View], samples: int) -> int | None:
    """Bytes of distinct storages, parameters and buffers apart, that autograd keeps of a forward."""
    method = trainer.method.train()
    state = {name: value.to("meta") for name, value in (*method.named_parameters(), *method.named_buffers())}
    for name, parameter in method.named_parameters():
        state[name].requires_grad_(parameter.requires_grad)
    own = {_storage(value) for value in state.values()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    inputs = {
        name: View(pixels=v.pixels.float(), permutation=v.permutation, quarter_turns=v.quarter_turns)
        for name, v in views.items()
    }
    rows = torch.zeros(samples, dtype=torch.int64, device="meta")
    step = torch.zeros((), dtype=torch.int64, device="meta")
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            torch.func.functional_call(method, state, (inputs, rows), {"step": step})
    except Exception:  # whatever a method asks of a tensor that has no values
        return None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _meta_view(view: ViewConfig, samples: int, dtype: torch.dtype) -> View:
    options: dict[str, Any] = {"device": "meta"}
    size, jigsaw = view.crop.size, view.jigsaw
    shape = [samples, 3, size, size]
    if jigsaw is not None:
        shape = [samples, jigsaw.grid**2, 3, jigsaw.patch_size, jigsaw.patch_size]
    cells = torch.zeros(shape[:2], dtype=torch.int64, **options) if jigsaw is not None else None
    turns = torch.zeros(samples, dtype=torch.int64, **options) if view.rotation else None
    return View(pixels=torch.empty(shape, dtype=dtype, **options), permutation=cells, quarter_turns=turns)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
