"""Who this process is among the processes of a run, what it computes on, and what the processes tell one another.

Every exchange is the identity in a run of one process, so callers do not ask how many there are.
"""

import gc
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from sslfast.meeting import meet

T = TypeVar("T")


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
        ValueError: a value is not a number in its range, or there are several processes that cannot find one another.
    """
    environment = os.environ if environment is None else environment
    world_size = _number(environment, "WORLD_SIZE", 1)
    rank, local_rank = _number(environment, "RANK", 0), _number(environment, "LOCAL_RANK", 0)
    if world_size > 1 and not environment.get("MASTER_ADDR"):
        raise ValueError(
            f"WORLD_SIZE={world_size}, but MASTER_ADDR is not set; start several processes with torchrun, "
            "or unset WORLD_SIZE for one"
        )
    if rank >= max(world_size, 1):
        raise ValueError(f"RANK must be below WORLD_SIZE={world_size}, got RANK={rank}")
    return ProcessGroup(rank=rank, world_size=max(world_size, 1), local_rank=local_rank)


_TIMEOUT = timedelta(minutes=30)  # the first rank may list and hash a large folder while the others wait


def join(group: ProcessGroup, device: torch.device) -> None:
    """Meet the other processes of a run; nothing to do for one process, or a second time.

    Tensors travel by NCCL between CUDA devices and by gloo between CPUs; small host values always by gloo, so that
    they never wait for a device.
    """
    if group.world_size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
        return
    store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
    store = meet(store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)


def leave() -> None:
    """End what :func:`join` began; does nothing in a single process. Replicas must be let go of before."""
    if dist.is_available() and dist.is_initialized():
        # A group that dies with the last object that holds it can wait for a thread that waits for Python's lock.
        gc.collect()
        dist.destroy_process_group()


def world_size() -> int:
    """Processes that have joined; 1 where none has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Place of this process among those that have joined; 0 where none has."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """The module whose backward averages gradients over ranks; the module itself in a single process.

    BatchNorm normalises by each rank's own part of the batch (PIRL section 4), and buffers stay each rank's business.
    """
    if world_size() == 1:
        return module
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Context of a forward and backward whose gradients stay this rank's and wait for the next exchange."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` whose BatchNorm layers normalise by the samples of all ranks; parameters and names stay.

    On CUDA torch's SyncBatchNorm, elsewhere :class:`~sslfast.models.norm.GlobalBatchNorm`.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    from sslfast.models.norm import globalise  # which imports this module

    globalise(module)
    return module


def gather_rows(x: Tensor) -> Tensor:
    """``[B, ...]`` of every rank, one after the other in the order of ranks: ``[world_size * B, ...]``."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]


def gather_rows_with_gradient(x: Tensor) -> Tensor:
    """:func:`gather_rows` whose backward sums every rank's gradient for this rank's rows.

    With gradients averaged over ranks afterwards (:func:`replicate`), the mean of the ranks' losses is differentiated.
    """
    if world_size() == 1:
        return x
    return cast(Tensor, _GatherWithGradient.apply(x))


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over ranks, the same bits on each."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def sum_to_owners(x: Tensor) -> Tensor:
    """``[world_size * B, ...]`` of every rank, summed over ranks, of which each rank gets its own ``[B, ...]``.

    The way back from :func:`gather_rows`: rank r gets what all ranks hold for the rows that it gave.
    """
    if world_size() == 1:
        return x
    own = x.new_empty(len(x) // world_size(), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous())
    return own


def shard_bounds(num_rows: int, ranks: int) -> list[int]:
    """Where the shards of ``num_rows`` rows begin, and ``num_rows``: rank r holds rows ``bounds[r]`` up to
    ``bounds[r + 1]``. Sizes differ by one at most."""
    return [num_rows * r // ranks for r in range(ranks + 1)]


def shards_on_main(rows: Tensor, bounds: list[int], *, chunk_rows: int = 1 << 18) -> Tensor | None:
    """The whole of what is split over ranks by rows, on the host of the first rank; None on the others.

    Sent ``chunk_rows`` rows at a time, one rank after the other, so the first rank's device holds one chunk more.
    """
    if rank():
        for chunk in rows.split(chunk_rows):
            dist.send(chunk.contiguous(), 0)
        return None
    whole = torch.empty(bounds[-1], *rows.shape[1:], dtype=rows.dtype)
    whole[: len(rows)] = rows.cpu()
    for source in range(1, len(bounds) - 1):
        for start in range(bounds[source], bounds[source + 1], chunk_rows):
            chunk = rows.new_empty(min(chunk_rows, bounds[source + 1] - start), *rows.shape[1:])
            dist.recv(chunk, source)
            whole[start : start + len(chunk)] = chunk.cpu()
    return whole


def keep_apart(module: nn.Module, buffers: list[str]) -> None:
    """:func:`replicate` leaves these buffers of ``module`` alone, which differ between ranks."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a floating tensor over ranks, the same bits on each."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(x: Tensor) -> Tensor:
    """The largest value of each entry over ranks."""
    if world_size() == 1:
        return x
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def from_main(value: T) -> T:
    """The first rank's value on every rank; others pass anything. Host objects only."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The values of all ranks in their order, on every rank. Host objects only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return when every rank has come here."""
    max_over_ranks(torch.zeros(1))


def check_replicas(tensors: Iterable[Tensor]) -> None:
    """Raises RuntimeError unless every rank holds the same values: sums of their bit patterns are compared.

    One pass over the tensors and one small exchange; waits for the device.
    """
    if world_size() == 1:
        return
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack(
        [t.detach().contiguous().view(words[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    ).cpu()  # host sync: once per checkpoint
    if not torch.equal(max_over_ranks(sums), -max_over_ranks(-sums)):
        raise RuntimeError(
            "weights or bank differ between ranks, so they no longer train one model; go on from the last checkpoint, "
            "and report this with the versions of the run"
        )


def resolve_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device; ``auto`` and ``cuda`` mean the local rank's, if given.

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
    """Returns once the device has done all work given to it, so that a clock sees it; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def is_restart() -> bool:
    """Whether torchrun has started the processes again after one of them failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number of at least 0, got {name}={text!r}; correct or unset it")
    return int(text)
