"""Losses and gradients that are not finite: noticed on the device, undone there if so configured, told with a name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.distributed import gather_objects, max_over_ranks
from sslfast.training.metrics import DeviceMeans

_FINITE = "finite"
_NAMED = 4  # rows in a message


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


class NonFinite:
    """What is known of steps that were not finite, kept on the device until a log record reads it.

    ``begin``, the step with ``watch`` once per micro-batch, ``end``. With ``skip`` the step that follows ``begin`` is
    undone by ``end`` where a loss or a gradient of any rank is not finite: parameters, buffers (bank, BatchNorm) and
    momentum are then what they were, to the bit. The decision is made on the device, which costs a second copy of this
    state and one pass over it per step; the host never waits. Without ``skip``, ``begin`` and ``end`` do nothing.

    Args:
        skip: undo such steps.
        limit: most of them in a row.
        method, optimizer: whose state it is.
        device: where it lies.
    """

    def __init__(
        self, *, skip: bool, limit: int, method: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.skip, self.limit = skip, limit
        self._method, self._optimizer, self._device = method, optimizer, device
        self._kept: list[Tensor] = []
        self._is_bad = torch.zeros((), dtype=torch.bool, device=device)
        self._rows: Tensor | None = None
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # skipped, in a row now, longest row

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the state before the step."""
        if not self.skip:
            return
        state = self._state()
        if [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in self._kept]:
            self._kept = [torch.empty_like(tensor) for tensor in state]
        torch._foreach_copy_(self._kept, state)

    def watch(self, loss: Tensor, rows: Tensor) -> None:
        """Take note of a micro-batch: its 0-d loss and its rows ``[b]``."""
        is_bad = ~torch.isfinite(loss.detach())
        known = torch.full_like(rows, -1) if self._rows is None else self._rows
        self._rows = torch.where(is_bad & (known[0] < 0), rows, known)
        self._is_bad = self._is_bad | is_bad

    @torch.no_grad()
    def end(self) -> None:
        """Undo the step if it was not finite; its gradients must still be there."""
        if not self.skip:
            return
        gradients = [p.grad for p in self._method.parameters() if p.grad is not None]
        finite = torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()
        is_bad = max_over_ranks((self._is_bad | ~finite).to(torch.int64))
        for tensor, kept in zip(self._state(), self._kept, strict=True):
            torch.where(is_bad > 0, kept, tensor, out=tensor)
        skipped, in_a_row, longest = self._counts.unbind()
        in_a_row = (in_a_row + 1) * is_bad
        longest = torch.maximum(longest, in_a_row)
        self._counts = torch.stack([skipped + is_bad, in_a_row, longest])
        if self._rows is not None:  # a row of bad steps that is over, and was short enough, needs no name
            self._rows = torch.where((in_a_row == 0) & (longest <= self.limit), -1, self._rows)
        self._is_bad = torch.zeros_like(self._is_bad)

    def read(self) -> tuple[int, bool]:
        """``(steps skipped in the whole run, more than the limit in a row)``; waits for the device."""
        if not self.skip:
            return 0, False
        skipped, _, longest = self._counts.tolist()  # host sync: once per log record
        return skipped, longest > self.limit

    def rows(self) -> list[int]:
        """A few rows of the first micro-batch of any rank whose loss was not finite; with ``skip`` of the last such
        steps in a row. Every rank calls it."""
        own = [] if self._rows is None else [row for row in self._rows.tolist() if row >= 0]
        return next((rows for rows in gather_objects(own) if rows), [])[:_NAMED]

    def state_dict(self) -> dict[str, Any]:
        """Counts for a checkpoint."""
        return {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._counts = state["counts"].to(self._device)

    def _state(self) -> list[Tensor]:
        momenta = [v for values in self._optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        state = [t.detach() for t in (*self._method.parameters(), *self._method.buffers(), *momenta)]
        if any(tensor.device.type != self._device.type for tensor in state):
            raise ValueError("on_nonfinite=skip needs all state on the device; use on_nonfinite=error")
        return state


class FiniteMeans(DeviceMeans):
    """:class:`DeviceMeans` that, with ``leave_out``, is of the finite losses alone and names no bad step."""

    def __init__(self, device: torch.device, *, leave_out: bool) -> None:
        super().__init__(device)
        self.leave_out = leave_out

    def add(self, values: Mapping[str, Tensor], *, step: Tensor) -> None:
        if self.leave_out:
            finite = torch.isfinite(values["loss"].detach())
            values = {name: value.detach().to(torch.float64) for name, value in values.items()}
            values = {name: torch.where(finite, value, torch.zeros_like(value)) for name, value in values.items()}
            values[_FINITE] = finite
        super().add(values, step=step)

    def read(self) -> tuple[dict[str, float], int | None]:
        means, bad_step = super().read()
        share = means.pop(_FINITE, 1.0)
        return {name: value / share if share else float("nan") for name, value in means.items()}, bad_step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an interval, also one that was begun with the other ``leave_out``."""
        super().load_state_dict(state)
        known = self.sums.pop(_FINITE, torch.tensor(float(self.count), dtype=torch.float64, device=self.device))
        if self.leave_out and self.count:
            self.sums[_FINITE] = known


def describe_rows(rows: list[int], paths: Any) -> str:
    """``; its samples: row 7 (a/b.jpg), ...``; empty where nothing is known. ``paths``: row -> path, or None."""
    if not rows:
        return ""
    named = [f"row {row}" + (f" ({paths[row]})" if paths is not None else "") for row in rows]
    return f"; first samples of that batch: {', '.join(named)}"
