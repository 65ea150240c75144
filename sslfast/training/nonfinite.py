"""Losses and gradients that are NaN or infinite: detected on the device, rolled back there if so configured, reported
with the samples of the step."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.distributed import gather_objects, max_over_ranks
from sslfast.training.metrics import DeviceMeans

_FINITE = "finite"
_NAMED = 4  # samples in a message


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


class NonFiniteGuard:
    """Detects steps that are not finite; what it has seen stays on the device until a log record reads it.

    :meth:`snapshot`, the step with :meth:`observe` once per micro-batch, :meth:`restore`. With ``skip`` a step in which
    a loss or a gradient of any rank is not finite is rolled back: parameters, buffers (bank, BatchNorm) and momentum
    are then what they were, to the bit. The decision is made on the device, which costs a second copy of this state and
    one pass over it per step; the host never waits. Without ``skip``, ``snapshot`` and ``restore`` do nothing.

    Args:
        skip: roll such steps back.
        limit: maximum number of them in a row.
        method, optimizer: whose state it is.
        device: of the state.
    """

    def __init__(
        self, *, skip: bool, limit: int, method: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.skip, self.limit = skip, limit
        self._method, self._optimizer, self._device = method, optimizer, device
        self._kept: list[Tensor] = []
        self._is_bad = torch.zeros((), dtype=torch.bool, device=device)
        self._sample_ids: Tensor | None = None
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # skipped, in a row now, most in a row

    @torch.no_grad()
    def snapshot(self) -> None:
        """Copy the state before the step."""
        if not self.skip:
            return
        state = self._state()
        if [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in self._kept]:
            self._kept = [torch.empty_like(tensor) for tensor in state]
        torch._foreach_copy_(self._kept, state)

    def observe(self, loss: Tensor, sample_ids: Tensor) -> None:
        """Record a micro-batch: its 0-d loss and the ids ``[b]`` of its samples."""
        is_bad = ~torch.isfinite(loss.detach())
        known = torch.full_like(sample_ids, -1) if self._sample_ids is None else self._sample_ids
        self._sample_ids = torch.where(is_bad & (known[0] < 0), sample_ids, known)
        self._is_bad = self._is_bad | is_bad

    @torch.no_grad()
    def restore(self) -> None:
        """Roll the step back to the snapshot if it was not finite; its gradients must still be there."""
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
        if self._sample_ids is not None:  # bad steps within the limit that are over: their samples need no report
            is_over = (in_a_row == 0) & (longest <= self.limit)
            self._sample_ids = torch.where(is_over, -1, self._sample_ids)
        self._is_bad = torch.zeros_like(self._is_bad)

    def check(
        self,
        bad_step: int | None,
        *,
        step: int,
        paths: Sequence[str] | None,
        last_checkpoint: Callable[[], Path | None],
    ) -> int:
        """Steps skipped in the whole run. Waits for the device; every rank calls it.

        Args:
            bad_step: first step (0-based) with a loss that is not finite, as the means know it; None: none.
            step: steps done.
            paths: of the images, by sample id; None: they have none.
            last_checkpoint: the newest one.

        Raises:
            NonFiniteLossError: there is a ``bad_step``, or more than ``limit`` in a row were skipped.
        """
        skipped, _, longest = self._counts.tolist() if self.skip else (0, 0, 0)  # host sync: once per log record
        if longest > self.limit:
            what = f"more than nonfinite_limit={self.limit} steps in a row, up to step {step}"
            what += ", had a loss or gradient that is not finite"
        elif bad_step is not None:
            what = f"the loss of step {bad_step + 1} is not finite"
        else:
            return skipped
        found = [f"row {i}" + ("" if paths is None else f" ({paths[i]})") for i in self.sample_ids()]
        samples = f"; first samples of that batch: {', '.join(found)}" if found else ""
        last = last_checkpoint()
        good = "no checkpoint was saved before it" if last is None else f"the last good checkpoint is {last}"
        raise NonFiniteLossError(
            f"{what}{samples}; {good}; "
            "lower optim.lr_per_256_images or set optim.warmup_epochs, and train into another output directory"
        )

    def sample_ids(self) -> list[int]:
        """A few samples of the first micro-batch of any rank whose loss was not finite; with ``skip`` of the last such
        steps in a row. Every rank calls it."""
        own = [] if self._sample_ids is None else [number for number in self._sample_ids.tolist() if number >= 0]
        return next((found for found in gather_objects(own) if found), [])[:_NAMED]

    def state_dict(self) -> dict[str, Any]:
        """Counts for a checkpoint."""
        return {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        self._counts = state["counts"].to(self._device)

    def _state(self) -> list[Tensor]:
        momenta = [v for values in self._optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        state = [t.detach() for t in (*self._method.parameters(), *self._method.buffers(), *momenta)]
        if any(tensor.device.type != self._device.type for tensor in state):
            raise ValueError("on_nonfinite=skip needs all state on the device; use on_nonfinite=error")
        return state


class FiniteMeans(DeviceMeans):
    """:class:`DeviceMeans` that, with ``leave_out``, averages the finite losses alone and reports no bad step."""

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
