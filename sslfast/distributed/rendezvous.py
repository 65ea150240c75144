"""How the processes of one attempt of ``torchrun`` find one another, and not those of the attempt before.

``torchrun`` keeps one store for all its restarts, and torch's process groups put addresses into it under names that do
not say which attempt they are of: processes that were started again would call the dead. Nor does the restart count
say it, which the agents of different machines count each for itself. So the living agree on a name of their own.
"""

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

_POLL_SECONDS = 0.02


def rendezvous(store: Store, *, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of ``store`` that exactly the processes that call this now share.

    Every process leaves a nonce under its rank. The first one publishes the nonces that it sees with a fresh name, and
    again whenever one changes; whoever finds its own nonce in the list agrees to the name. Once all have agreed, the
    first one says so, and the name is the prefix of what they share. Nonces of the dead never agree to anything.

    Raises:
        TimeoutError: not all processes came.
    """
    nonce, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"sslfast/nonce/{rank}", nonce)
    meeting = _Leader(store, nonce, world_size) if rank == 0 else _Follower(store, nonce, rank)
    while True:
        name = meeting.agreed()
        if name is not None:
            return PrefixStore(f"sslfast/{name}", store)
        if time.monotonic() > end:
            raise TimeoutError(
                f"rank {rank} waited {timeout} for the other processes of {world_size}; see their output"
            )
        time.sleep(_POLL_SECONDS)


class _Leader:
    """The first process."""

    def __init__(self, store: Store, nonce: str, world_size: int) -> None:
        self._store, self._nonce, self._world_size = store, nonce, world_size
        self._seen: list[str] = []
        self._name = ""

    def agreed(self) -> str | None:
        others = [f"sslfast/nonce/{rank}" for rank in range(1, self._world_size)]
        if others and not self._store.check(others):
            return None
        seen = [self._nonce, *(self._store.get(key).decode() for key in others)]
        if seen != self._seen:
            self._seen, self._name = seen, uuid.uuid4().hex
            self._store.set("sslfast/meeting", json.dumps({"name": self._name, "nonces": seen}))
        if self._store.add(f"sslfast/agreed/{self._name}", 0) < self._world_size - 1:
            return None
        self._store.set(f"sslfast/begin/{self._name}", "1")
        return self._name


class _Follower:
    """Any other process."""

    def __init__(self, store: Store, nonce: str, rank: int) -> None:
        self._store, self._nonce, self._rank = store, nonce, rank
        self._agreed_to = ""

    def agreed(self) -> str | None:
        if not self._store.check(["sslfast/meeting"]):
            return None
        meeting = json.loads(self._store.get("sslfast/meeting"))
        name, nonces = meeting["name"], meeting["nonces"]
        if len(nonces) <= self._rank or nonces[self._rank] != self._nonce:
            return None
        if name != self._agreed_to:
            self._agreed_to = name
            self._store.add(f"sslfast/agreed/{name}", 1)
        return name if self._store.check([f"sslfast/begin/{name}"]) else None
