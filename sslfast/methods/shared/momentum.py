"""The momentum of a moving average of weights over a run."""

import math

import torch
from torch import Tensor


def rising_momentum(base: float, step: int | Tensor, total_steps: int, *, device: torch.device) -> Tensor:
    """``1 - (1 - base) (1 + cos(π k / K)) / 2`` at step k of K: from ``base`` to 1.

    BYOL section 3.3, DINO section 3.1, MoCo v3 section 4.1.

    Returns:
        0-d fp64 on ``device``; nothing is read from it.
    """
    step = torch.as_tensor(step, dtype=torch.float64, device=device)
    return 1 - (1 - base) * ((math.pi * step / total_steps).cos() + 1) / 2
