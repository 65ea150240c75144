"""Losses, gradients and states that are NaN or infinite: detected on the device, rolled back there if so configured,
reported with the samples of the step; no checkpoint is made of them, and none is resumed from."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslfast.distributed import gather_objects, max_over_ranks
from sslfast.methods import Method
from sslfast.models import are_finite, first_nonfinite
from sslfast.runs import CorruptCheckpointError, TensorTable
from sslfast.training.metrics import DeviceMeans

_FINITE = "finite"
_NAMED = 4  # samples in a message


class NonFiniteLossError(RuntimeError):
    """The loss, or the state of the run, became infinite or not a number."""


class NonFiniteGuard:
    """Detects steps that are not finite; what it has seen stays on the device until a log record reads it.

    :meth:`snapshot`, the step with :meth:`observe` once per micro-batch, :meth:`restore`. With ``skip`` a step is
    rolled back in which a loss or a gradient of any rank is not finite, or the state after it: parameters, buffers
    (bank, BatchNorm) and momentum are then what they were, to the bit. The decision is made on the device, which costs
    a second copy of this state and two passes over it per step; the host never waits. Without ``skip``, ``snapshot``
    and ``restore`` do nothing. :meth:`check_state` comes before every checkpoint, since a loss can be finite where the
    weights no longer are: BatchNorm hides infinite running statistics in training.

    Args:
        skip: roll such steps back.
        limit: maximum number of them in a row.
        method, optimizer: whose state it is.
        device: of the state.
    """

    def __init__(
        self, *, skip: bool, limit: int, method: Method, optimizer: torch.optim.Optimizer, device: torch.device
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
        finite = are_finite([tensor for _, tensor in self._named_state(with_gradients=True)], device=self._device).all()
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
        raise self._error(f"{what}{samples}", last_checkpoint)

    def check_state(self, step: int, last_checkpoint: Callable[[], Path | None]) -> None:
        """Check everything that a checkpoint of ``step`` would hold, and the gradients that led to it.

        Waits for the device; every rank calls it.

        Raises:
            NonFiniteLossError: on every rank, where a tensor of any rank is not finite; names the first one.
        """
        pairs = self._named_state(with_gradients=not self.skip)  # those of a step that was rolled back are still there
        finite = are_finite([tensor for _, tensor in pairs], device=self._device)
        bad = max_over_ranks((~finite).to(torch.int64)).tolist()  # host sync: once per checkpoint
        name = next((name for (name, _), is_bad in zip(pairs, bad, strict=True) if is_bad), None)
        if name is not None:
            raise self._error(f"after step {step} values of {name} are NaN or infinite", last_checkpoint)

    def check_saved(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raises CorruptCheckpointError where a checkpoint that was read holds a NaN or an infinite value. Not of a
        sharded one, which is not in memory: :meth:`check_state` came before it, and its checksums were compared."""
        if isinstance(state["method"], TensorTable):
            return
        saved = [(name, value) for name, value in state["method"].items() if name not in self._method.nan_until_set]
        for number, values in state["optimizer"].get("state", {}).items():
            saved += [(f"optimizer.{number}.{key}", value) for key, value in values.items()]
        name = first_nonfinite((name, value) for name, value in saved if isinstance(value, Tensor))
        if name is not None:
            raise CorruptCheckpointError(
                f"values of {name} in {path} are NaN or infinite: no run can go on from it; resume from an earlier one"
            )

    @staticmethod
    def _error(what: str, last_checkpoint: Callable[[], Path | None]) -> NonFiniteLossError:
        last = last_checkpoint()
        good = "no checkpoint was saved before it" if last is None else f"the last good checkpoint is {last}"
        return NonFiniteLossError(
            f"{what}; {good}; "
            "lower optim.lr_per_256_images or set optim.warmup_epochs, and train into another output directory"
        )

    def _named_state(self, *, with_gradients: bool) -> list[tuple[str, Tensor]]:
        """What a step must leave finite, in the order of computation: gradients, parameters, buffers, momenta. The same
        names on every rank."""
        parameters = list(self._method.named_parameters())
        names = {id(parameter): name for name, parameter in parameters}
        found: list[tuple[str, Tensor]] = []
        for name, parameter in parameters if with_gradients else ():
            found.append(
                (f"the gradient of {name}", parameter.new_zeros(()) if parameter.grad is None else parameter.grad)
            )
        found += parameters
        found += [pair for pair in self._method.named_buffers() if pair[0] not in self._method.nan_until_set]
        for owner, values in self._optimizer.state.items():
            found += [(f"{key} of {names[id(owner)]}", v) for key, v in values.items() if isinstance(v, Tensor)]
        return found

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
