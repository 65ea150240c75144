"""Devices and precision: names to torch objects, and waiting for a device."""

import torch


def resolve_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device; ``auto`` and ``cuda`` mean the local rank's one, if given.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use device cpu")
    return device


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work, as a measurement of time requires; no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Data type of the autocast region: bfloat16 or float32 (no autocast).

    ``auto`` is bfloat16 on devices with native support: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX.
    """
    if precision == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # torch has no public query for this; if these are missing, the CPU counts as one without bf16.
            queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            has_bf16 = any(getattr(torch.cpu, name, bool)() for name in queries)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
