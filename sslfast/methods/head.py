"""The projection head of a trained method, from its configuration and state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.config import decode
from sslfast.methods.base import BaseConfig, MethodContext
from sslfast.methods.registry import MethodConfig
from sslfast.models import read_trunk_config

_ROWS = 1 << 20  # of a memory bank that takes no memory


def read_head(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The module that the method's ``evaluation_head`` or ``embedding_head`` names, with its trained weights: features
    ``[B, C]`` to embeddings ``[B, D]``.

    Args:
        config: of the run, as its checkpoints hold it.
        state: the method's state there.

    Raises:
        ValueError: the method has no such head, or the state does not fit it.
    """
    settings: BaseConfig = decode(MethodConfig, config["method"], where="method")
    context = MethodContext(
        model=read_trunk_config(config["model"]), num_rows=_ROWS, seed=0, steps_per_epoch=1, total_steps=1
    )
    with torch.device("meta"):  # no memory, no time: the head alone is needed
        method = settings.build(context)
    where = method.evaluation_head or method.embedding_head
    head = dict(method.named_modules()).get(where)
    if not isinstance(head, nn.Module):
        raise ValueError(f"method {settings.name} has no projection head; take the trunk's features: leave head out")
    prefix = f"{where}."
    own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    head = head.to_empty(device="cpu")
    try:
        head.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the checkpoint does not hold the head of method {settings.name}: {reason}") from None
    return head
