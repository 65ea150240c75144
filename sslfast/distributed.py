"""Who this process is among the processes of a run (so far a run is one process), and what it computes on."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProcessGroup:
    """Place of this process, as ``torchrun`` states it in the environment."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True in the process that writes logs and checkpoints."""
        return self.rank == 0


def process_group(environment: Mapping[str, str] | None = None) -> ProcessGroup:
    """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` (defaults 0, 1, 0).

    Raises:
        ValueError: a value is not a number in its range, or there is more than one process.
    """
    environment = os.environ if environment is None else environment
    world_size = _number(environment, "WORLD_SIZE", 1)
    rank, local_rank = _number(environment, "RANK", 0), _number(environment, "LOCAL_RANK", 0)
    if world_size != 1:
        raise ValueError(
            f"training in several processes is not supported, got WORLD_SIZE={world_size}; "
            "start one process without torchrun, or unset WORLD_SIZE"
        )
    if rank != 0:
        raise ValueError(f"RANK must be below WORLD_SIZE={world_size}, got RANK={rank}")
    return ProcessGroup(rank=rank, world_size=world_size, local_rank=local_rank)


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use device cpu")
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Data type of the autocast region: bfloat16 or float32 (no autocast).

    ``auto`` is bfloat16 where the device computes in it: CUDA devices from 8.0 on, CPUs with AVX512-BF16 or AMX.
    """
    if precision == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # torch has no public question for this; without an answer the CPU counts as one that cannot.
            questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            has_bf16 = any(getattr(torch.cpu, name, bool)() for name in questions)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number of at least 0, got {name}={text!r}; correct or unset it")
    return int(text)
