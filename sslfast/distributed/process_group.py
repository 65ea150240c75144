"""The process group: rank and world size from torchrun's environment, initialisation and destruction."""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as torchrun_store

from sslfast.device import resolve_device
from sslfast.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class ProcessGroup:
    """Rank of this process, from the environment that ``torchrun`` sets."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes logs."""
        return self.rank == 0


def process_group(environment: Mapping[str, str] | None = None) -> ProcessGroup:
    """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` (defaults 0, 1, 0).

    Raises:
        ValueError: a value is not a number in its range, or MASTER_ADDR is missing for several processes.
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


_TIMEOUT_SECONDS = 1800.0  # rank 0 may scan and hash a large folder while the others wait


class LostRankError(RuntimeError):
    """Another process of the run is gone or does not answer."""

    exit_code = 4


def init_process_group(group: ProcessGroup, device: torch.device, *, timeout: float = _TIMEOUT_SECONDS) -> None:
    """Initialise the process group; does nothing for a single process, or if there is one already.

    Args:
        group: this process in it.
        device: of the tensors.
        timeout: seconds that collectives wait for a rank.

    CUDA tensors are exchanged by NCCL, CPU tensors by gloo; small host values always by gloo, so that they never wait
    for a device.
    """
    if group.world_size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        dist.init_process_group(backend, timeout=limit)
        return
    store, rank, world_size = next(torchrun_store("env://", timeout=limit))
    store = rendezvous(store, rank=rank, world_size=world_size, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


def destroy_process_group() -> None:
    """Destroy the process group; does nothing in a single process. Delete DDP modules first."""
    if dist.is_available() and dist.is_initialized():
        # Otherwise the garbage collector may destroy the group later, and wait for a thread that waits for the GIL.
        gc.collect()
        dist.destroy_process_group()


def world_size() -> int:
    """Ranks in the process group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the group; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_world_size() -> int:
    """Ranks on this machine, as torchrun says; 1 without it."""
    return max(1, _number(os.environ, "LOCAL_WORLD_SIZE", 1))


def is_restart() -> bool:
    """Whether torchrun has restarted the processes after one of them failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number of at least 0, got {name}={text!r}; correct or unset it")
    return int(text)


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Context in which what torch raises because another rank is gone becomes a :class:`LostRankError` in one line,
    also while the process group is being initialised."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        here, ranks = rank(), world_size()
        if ranks == 1:
            here, ranks = process_group().rank, process_group().world_size
        if ranks == 1 or not (isinstance(error, dist.DistError) or "gloo" in text.lower()):
            raise
        late = "timed out" in text.lower()
        raise LostRankError(
            f"rank {here} of {ranks}: another process of the run "
            f"{'did not answer in time' if late else 'has ended'}; what it printed says why, and the same command "
            "resumes from the last checkpoint"
        ) from None


@contextmanager
def distributed_device(name: str) -> Iterator[torch.device]:
    """The device of this process, with a process group of all ranks of ``torchrun`` while the block runs."""
    group = process_group()
    device = resolve_device(name, local_rank=group.local_rank if group.world_size > 1 else None)
    own = world_size() == 1
    init_process_group(group, device)
    try:
        with lost_ranks_named():
            yield device
    finally:
        if own:
            destroy_process_group()
