"""State that changes between a forward pass and its second run, or within one compiled graph.

Activation checkpointing (``torch.utils.checkpoint``) runs a forward pass again inside the backward pass. Where the
state that it reads has changed since the first run, what it saves for backward belongs to another loss: the loss is
right, the gradient is not. A compiler may likewise copy a buffer again after the graph has written to it.
"""

import torch
from torch import Tensor


def snapshot(x: Tensor, module: str, *, once: bool) -> Tensor:
    """A detached copy of ``x``, which compiled code never takes again from an ``x`` that has changed since.

    Args:
        x: state, or an index into state, on which everything that is saved for backward depends.
        module: name for the message.
        once: the state changes before the backward pass, so what depends on this copy must not run a second time.

    Raises:
        TypeError: ``x`` is no tensor.
        RuntimeError: ``once``, and this runs inside a backward pass; also in compiled code.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{module}: needs a tensor, got {type(x).__name__}")
    copied: Tensor = torch.ops.sslfast_state.snapshot(x.detach(), module, once)
    return copied


@torch.library.custom_op("sslfast_state::snapshot", mutates_args=())
def _snapshot(x: Tensor, module: str, once: bool) -> Tensor:
    if once and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{module}: activation checkpointing runs it a second time, inside the backward pass, after its state was "
            "updated: the gradient would be that of another loss. Call it outside of what torch.utils.checkpoint "
            "recomputes"
        )
    return x.clone()


@_snapshot.register_fake
def _(x: Tensor, module: str, once: bool) -> Tensor:
    return x.clone()
