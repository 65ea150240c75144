"""Writes that training does not wait for: one that fails is kept and tried again."""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from sslfast.files import reason_of, what_helps

Action = Callable[[], Any]


class Outbox:
    """What a run writes besides its checkpoints: logs, configuration, lists.

    A write that the system refuses (full disk, quota, read-only, I/O error) stays in memory and is tried again before
    the next write of the same target and at every :meth:`retry`, in order. A write that fails otherwise (a logger's own
    mistake) is given up. Either way training goes on, with one line for as long as the same reason lasts.

    Args:
        report: takes that line.
        limit: of writes of one target that wait; the oldest are lost, and counted.
    """

    def __init__(self, report: Callable[[str], None], *, limit: int = 10_000) -> None:
        self._report, self._limit = report, limit
        self._waiting: dict[str, deque[Action]] = {}
        self._lost: dict[str, int] = {}
        self._failing: dict[tuple[str, str], str] = {}

    def write(self, actions: Mapping[str, Action]) -> None:
        """Do what is named here by its target, after what waits for the same target."""
        for target, action in actions.items():
            waiting = self._waiting.setdefault(target, deque())
            waiting.append(action)
            if len(waiting) > self._limit:
                waiting.popleft()
                self._count_lost(target)
        self._tell("write", {target: self._try(target) for target in actions})

    def retry(self) -> None:
        """Try again what waits."""
        targets = [target for target, waiting in self._waiting.items() if waiting]
        self._tell("write", {target: self._try(target) for target in targets})

    def attempt(self, verb: str, actions: Mapping[str, Action]) -> None:
        """Do each once: what fails is said and not kept."""
        self._tell(verb, {target: _error_of(action) for target, action in actions.items()})

    def close(self, actions: Mapping[str, Action]) -> None:
        """Try again what waits, do ``actions`` once, and say what is lost."""
        self.retry()
        self.attempt("close", actions)
        for target, waiting in self._waiting.items():
            if waiting:
                self._count_lost(target, len(waiting))
        if self._lost:
            counts = ", ".join(f"{count} of {target}" for target, count in self._lost.items())
            self._report(f"lost, because they could not be written: {counts}")
        self._waiting, self._lost = {}, {}

    def _count_lost(self, target: str, count: int = 1) -> None:
        self._lost[target] = self._lost.get(target, 0) + count

    def _try(self, target: str) -> Exception | None:
        """Do what waits for a target, up to the first that the system refuses; the last error."""
        last = None
        waiting = self._waiting[target]
        while waiting:
            error = _error_of(waiting[0])
            if isinstance(error, OSError):
                return error
            waiting.popleft()
            if error is not None:
                self._count_lost(target)
                last = error
        return last

    def _tell(self, verb: str, results: Mapping[str, Exception | None]) -> None:
        before = set(self._failing.values())
        new: dict[str, list[str]] = {}
        advice: dict[str, str] = {}
        for target, error in results.items():
            self._failing.pop((verb, target), None)
            if error is None:
                continue
            reason = self._failing[verb, target] = reason_of(error)
            if reason not in before:
                new.setdefault(reason, []).append(target)
                is_kept = isinstance(error, OSError) and verb == "write"
                remedy = what_helps(error.errno) if isinstance(error, OSError) else ""
                words = ("training continues", "this is kept and tried again" if is_kept else "", remedy)
                advice[reason] = "; ".join(filter(None, words))
        for reason, targets in new.items():
            self._report(f"cannot {verb} {', '.join(targets)} ({reason}); {advice[reason]}")


def surviving(report: Callable[[str], None]) -> Callable[[str], None]:
    """``report``, which then neither ends a run (the screen is a file on the full disk, or is closed) nor stumbles over
    a name that the screen's encoding lacks."""

    def say(line: str) -> None:
        try:
            report(line)
        except UnicodeError:
            with suppress(OSError, ValueError):
                report(line.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            pass

    return say


def _error_of(action: Action) -> Exception | None:
    try:
        action()
    except Exception as error:  # a logger may be anyone's
        return error
    return None
