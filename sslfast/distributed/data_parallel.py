"""Data parallelism: DDP around a method, gradient synchronisation, a check that replicas are equal."""

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslfast.distributed.collectives import max_over_ranks
from sslfast.distributed.process_group import world_size


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` wrapped in DDP, whose backward averages gradients over ranks; itself in a single process.

    BatchNorm normalises each rank's own part of the batch (PIRL section 4), and buffers are not synchronised. Every
    backward sums each gradient over ranks in the same order, the first one of a process too, so that a resumed run does
    as an uninterrupted one. Compile the module afterwards: it is called once here, with another ``forward``.
    """
    if world_size() == 1:
        return module
    devices = [device] if device.type == "cuda" else None
    options = {"device_ids": devices, "broadcast_buffers": False, "gradient_as_bucket_view": True}
    with warnings.catch_warnings():  # torch 2.13 deprecates broadcast_buffers, and what replaces it copies them once
        warnings.simplefilter("ignore", FutureWarning)
        replica = DistributedDataParallel(module, **options)  # type: ignore[arg-type]
    _settle_buckets(replica, module, device)
    return replica


@torch.enable_grad()
def _settle_buckets(replica: nn.Module, module: nn.Module, device: torch.device) -> None:
    """A backward pass of the parameters alone, after which DDP keeps its buckets.

    DDP puts all gradients into one bucket at first, and arranges them anew once, after the first backward, in the order
    in which they came (torch 2.10 to 2.13: ``Reducer::rebuild_buckets``). Where three or more ranks take part, the
    place in a bucket decides in which order they are summed. Here gradients come from the last parameter to the first,
    about as in a network. ``find_unused_parameters=True`` would keep the first buckets, but walks the graph in every
    step and warns that it does.
    """
    own = vars(module).pop("forward", None)  # of the instance, as where a module compiles its own
    module.forward = lambda _: sum(p.sum() for p in module.parameters() if p.requires_grad)
    try:
        replica(torch.zeros((), device=device)).backward()
    finally:
        del module.forward
        if own is not None:
            module.forward = own
    module.zero_grad()


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Context of a forward and backward that accumulates gradients locally, until the next synchronised backward."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def ignore_in_ddp(module: nn.Module, buffers: list[str]) -> None:
    """Exclude buffers of ``module`` that differ between ranks from :func:`replicate`."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)


@torch.no_grad()
def broadcast_statistics(module: nn.Module) -> None:
    """Give every rank the running statistics of rank 0's BatchNorm layers, which are those of checkpoints.

    Ranks keep their own while they train. What is computed in evaluation mode for all of them together must not depend
    on which rank has an image, nor on whether the run was resumed.
    """
    if world_size() == 1:
        return
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for buffer in layer.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def check_replicas(tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError unless every rank holds the same values, by a checksum of their bit patterns.

    One pass over the tensors and one small all-reduce; waits for the device.
    """
    if world_size() == 1:
        return
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack(
        [t.detach().contiguous().view(integers[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    ).cpu()  # host sync: once per checkpoint
    if not torch.equal(max_over_ranks(sums), -max_over_ranks(-sums)):
        raise RuntimeError(
            "weights or bank differ between ranks, so they no longer train one model; resume from the last checkpoint, "
            "and report this with the versions of the run"
        )
