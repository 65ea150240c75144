"""Detect NaN and Inf in losses and gradients on the device, roll the step back if configured, report the samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.distributed import gather_objects, max_over_ranks
from sslfast.training.metrics import DeviceMeans

_FINITE = "finite"
_MAX_REPORTED = 4  # sample ids in a message


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


class NonFinite:
    """Tracks steps with a non-finite loss or gradient, on the device until a log record reads it.

    Call ``begin``, then the step with ``watch`` once per micro-batch, then ``end``. With ``skip``, ``end`` rolls the
    step back if a loss or a gradient of any rank is not finite: parameters, buffers (bank, BatchNorm) and momentum are
    bit-equal to those before ``begin``. The decision is made on the device, at the cost of a second copy of this state
    and one pass over it per step; the host never waits. Without ``skip``, ``begin`` and ``end`` do nothing.

    Args:
        skip: roll such steps back.
        limit: largest number of consecutive steps that are skipped.
        method, optimizer: their state is rolled back.
        device: of that state.
    """

    def __init__(
        self, *, skip: bool, limit: int, method: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.skip, self.limit = skip, limit
        self._method, self._optimizer, self._device = method, optimizer, device
        self._kept: list[Tensor] = []
        self._is_bad = torch.zeros((), dtype=torch.bool, device=device)
        self._sample_ids: Tensor | None = None
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # skipped, consecutive now, most consecutive

    @torch.no_grad()
    def begin(self) -> None:
        """Keep a copy of the state before the step."""
        if not self.skip:
            return
        state = self._state()
        if [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in self._kept]:
            self._kept = [torch.empty_like(tensor) for tensor in state]
        torch._foreach_copy_(self._kept, state)

    def watch(self, loss: Tensor, sample_ids: Tensor) -> None:
        """Record a micro-batch: its 0-d loss and its sample ids ``[b]``."""
        is_bad = ~torch.isfinite(loss.detach())
        known = torch.full_like(sample_ids, -1) if self._sample_ids is None else self._sample_ids
        self._sample_ids = torch.where(is_bad & (known[0] < 0), sample_ids, known)
        self._is_bad = self._is_bad | is_bad

    @torch.no_grad()
    def end(self) -> None:
        """Roll the step back if it was not finite; its gradients must not have been cleared yet."""
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
        if self._sample_ids is not None:  # a finished series of bad steps within the limit is not reported
            self._sample_ids = torch.where((in_a_row == 0) & (longest <= self.limit), -1, self._sample_ids)
        self._is_bad = torch.zeros_like(self._is_bad)

    def read(self) -> tuple[int, bool]:
        """``(steps skipped in the whole run, whether more than the limit were consecutive)``; waits for the device."""
        if not self.skip:
            return 0, False
        skipped, _, longest = self._counts.tolist()  # host sync: once per log record
        return skipped, longest > self.limit

    def sample_ids(self) -> list[int]:
        """A few samples of the first micro-batch of any rank whose loss was not finite; with ``skip``, of the latest
        series of such steps. Every rank calls it."""
        own = [] if self._sample_ids is None else [row for row in self._sample_ids.tolist() if row >= 0]
        return next((ids for ids in gather_objects(own) if ids), [])[:_MAX_REPORTED]

    def state_dict(self) -> dict[str, Any]:
        """Counts for a checkpoint."""
        return {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self._counts = state["counts"].to(self._device)

    def _state(self) -> list[Tensor]:
        momenta = [v for values in self._optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        state = [t.detach() for t in (*self._method.parameters(), *self._method.buffers(), *momenta)]
        if any(tensor.device.type != self._device.type for tensor in state):
            raise ValueError("on_nonfinite=skip needs all state on the device; use on_nonfinite=error")
        return state


class FiniteMeans(DeviceMeans):
    """:class:`DeviceMeans` that, with ``leave_out``, averages finite losses only and reports no bad step."""

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
        """Continue an interval, also one that began with the other setting of ``leave_out``."""
        super().load_state_dict(state)
        known = self.sums.pop(_FINITE, torch.tensor(float(self.count), dtype=torch.float64, device=self.device))
        if self.leave_out and self.count:
            self.sums[_FINITE] = known


def describe_samples(sample_ids: list[int], paths: Any) -> str:
    """``; first samples of that batch: row 7 (a/b.jpg), ...``; empty if there are none.

    ``paths``: row -> path, or None.
    """
    if not sample_ids:
        return ""
    named = [f"row {row}" + (f" ({paths[row]})" if paths is not None else "") for row in sample_ids]
    return f"; first samples of that batch: {', '.join(named)}"
