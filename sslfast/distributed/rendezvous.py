"""Rendezvous of the processes of one attempt of ``torchrun``, without those of an earlier attempt.

``torchrun`` keeps one store across its restarts, and torch's process groups publish addresses in it under keys that do
not name the attempt: restarted processes would connect to stale ranks. The restart count does not name it either, since
the agents of different machines count their own. So the running processes agree on a key prefix of their own.
"""

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

_POLL_SECONDS = 0.02


def rendezvous(store: Store, *, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of ``store`` shared by exactly the processes that are calling this now.

    Every process publishes a nonce under its rank. The leader, rank 0, proposes a fresh prefix together with the nonces
    that it sees, and a new one whenever a nonce changes. A follower accepts a proposal that contains its own nonce.
    When all have accepted, the leader confirms, and all return the part of the store under that prefix. A proposal that
    contains the nonce of a stale rank is never accepted by all.

    Raises:
        TimeoutError: some processes did not take part.
    """
    nonce, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"sslfast/nonce/{rank}", nonce)
    member = _Leader(store, nonce, world_size) if rank == 0 else _Follower(store, nonce, rank)
    while True:
        prefix = member.poll()
        if prefix is not None:
            return PrefixStore(f"sslfast/{prefix}", store)
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
        self._prefix = ""

    def poll(self) -> str | None:
        """The prefix once all followers have accepted it, else None."""
        others = [f"sslfast/nonce/{rank}" for rank in range(1, self._world_size)]
        if others and not self._store.check(others):
            return None
        seen = [self._nonce, *(self._store.get(key).decode() for key in others)]
        if seen != self._seen:
            self._seen, self._prefix = seen, uuid.uuid4().hex
            self._store.set("sslfast/proposal", json.dumps({"prefix": self._prefix, "nonces": seen}))
        if self._store.add(f"sslfast/accepted/{self._prefix}", 0) < self._world_size - 1:
            return None
        self._store.set(f"sslfast/confirmed/{self._prefix}", "1")
        return self._prefix


class _Follower:
    """Any other rank."""

    def __init__(self, store: Store, nonce: str, rank: int) -> None:
        self._store, self._nonce, self._rank = store, nonce, rank
        self._accepted = ""

    def poll(self) -> str | None:
        """The prefix once the leader has confirmed it, else None."""
        if not self._store.check(["sslfast/proposal"]):
            return None
        proposal = json.loads(self._store.get("sslfast/proposal"))
        prefix, nonces = proposal["prefix"], proposal["nonces"]
        if len(nonces) <= self._rank or nonces[self._rank] != self._nonce:
            return None
        if prefix != self._accepted:
            self._accepted = prefix
            self._store.add(f"sslfast/accepted/{prefix}", 1)
        return prefix if self._store.check([f"sslfast/confirmed/{prefix}"]) else None
