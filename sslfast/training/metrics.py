"""Means of losses and other values over a log interval, kept on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sslfast.distributed import max_over_ranks, mean_over_ranks, world_size


class DeviceMeans:
    """Means of 0-d tensors over many steps, kept on the device and read in one transfer.

    Sums are float64. The first step whose ``loss`` was not finite is kept too, so the check needs no sync of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, values: Mapping[str, Tensor], *, step: Tensor) -> None:
        """Add one step's values; ``step``: 0-d int64 on the device. No host sync."""
        for name, value in values.items():
            value = value.detach().to(
                torch.float64, copy=True
            )  # a CUDA graph overwrites its outputs at the next replay
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        is_first_bad = (self._bad_step < 0) & ~torch.isfinite(values["loss"].detach())
        self._bad_step = torch.where(is_first_bad, step, self._bad_step)
        self.count += 1

    def read(self) -> tuple[dict[str, float], int | None]:
        """``(means, first step with a loss that is not finite or None)`` of all ranks since the last :meth:`reset`."""
        self._merge_ranks()
        names = list(self.sums)
        packed = torch.stack([self._bad_step.to(torch.float64), *(self.sums[name] for name in names)])
        bad_step, *sums = packed.tolist()  # host sync: the only one of a log interval
        means = {name: total / max(self.count, 1) for name, total in zip(names, sums, strict=True)}
        return means, None if bad_step < 0 else int(bad_step)

    def _merge_ranks(self) -> None:
        """Replace the sums by their means over ranks, from which the interval continues on every rank."""
        if world_size() == 1 or not self.sums:
            return
        merged = mean_over_ranks(torch.stack(list(self.sums.values())))
        self.sums = dict(zip(self.sums, merged.unbind(), strict=True))
        self._bad_step = max_over_ranks(self._bad_step)

    def reset(self) -> None:
        """Start the next interval."""
        self.sums, self.count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Sums of the current interval, for a checkpoint inside of it."""
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the interval of a checkpoint."""
        self.count = int(state["count"])
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
