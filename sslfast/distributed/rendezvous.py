"""Rendezvous of the ranks of one ``torchrun`` attempt, excluding stale ranks of earlier attempts.

``torchrun`` keeps one store for all its restarts, and torch's process groups store addresses under keys that do not
contain the attempt, so restarted ranks would connect to addresses of ranks that have died. The restart count does not
tell attempts apart either: the agents of different machines count for themselves. So the ranks agree on a new key
prefix.
"""

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

_POLL_SECONDS = 0.02


def rendezvous(store: Store, *, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A view of ``store`` that is shared by exactly the ranks that call this now.

    Every rank stores a nonce under its number. The leader (rank 0) publishes the nonces that it sees together with a
    new name, and again whenever one changes; a follower that finds its own nonce in the list acknowledges the name.
    When all have, the leader confirms it, and the name becomes the key prefix. Nonces of stale ranks are never
    acknowledged.

    Raises:
        TimeoutError: not all ranks arrived.
    """
    nonce, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"sslfast/nonce/{rank}", nonce)
    party = _Leader(store, nonce, world_size) if rank == 0 else _Follower(store, nonce, rank)
    while True:
        name = party.agreed()
        if name is not None:
            return PrefixStore(f"sslfast/{name}", store)
        if time.monotonic() > end:
            raise TimeoutError(
                f"rank {rank} waited {timeout} for the other processes of {world_size}; see their output"
            )
        time.sleep(_POLL_SECONDS)


class _Leader:
    """Rank 0."""

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
            self._store.set("sslfast/rendezvous", json.dumps({"name": self._name, "nonces": seen}))
        if self._store.add(f"sslfast/agreed/{self._name}", 0) < self._world_size - 1:
            return None
        self._store.set(f"sslfast/begin/{self._name}", "1")
        return self._name


class _Follower:
    """Any other rank."""

    def __init__(self, store: Store, nonce: str, rank: int) -> None:
        self._store, self._nonce, self._rank = store, nonce, rank
        self._agreed_to = ""

    def agreed(self) -> str | None:
        if not self._store.check(["sslfast/rendezvous"]):
            return None
        published = json.loads(self._store.get("sslfast/rendezvous"))
        name, nonces = published["name"], published["nonces"]
        if len(nonces) <= self._rank or nonces[self._rank] != self._nonce:
            return None
        if name != self._agreed_to:
            self._agreed_to = name
            self._store.add(f"sslfast/agreed/{name}", 1)
        return name if self._store.check([f"sslfast/begin/{name}"]) else None
