"""When a graph is due: a queue of keys that coalesces, spaces failures and keeps graphs apart.

An event only says that a key is due; however many arrive, the key is worked on once, never by two
workers at a time, and again if something happened meanwhile. A key that failed waits longer each
time, alone: the others don't notice. After controller-runtime's work queue.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 300.0


def backoff(failures: int, rng: random.Random) -> float:
    """Seconds to wait after so many failures in a row: doubling, at most `LONGEST_BACKOFF_S`, and
    up to a fifth less, so that graphs that failed together do not come back together."""
    longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 20))
    return longest * rng.uniform(0.8, 1.0)


class WorkQueue(Generic[K]):
    """Keys that are due. `get` and `done` come in pairs; a key between them is being worked on.

    Invariants: a key is in at most one of `_ready` and `_working`; one that becomes due while it is
    worked on is in `_again`; `_when` holds the earliest time for which it is put off.
    """

    def __init__(self, *, clock: Callable[[], float], rng: random.Random) -> None:
        self._clock = clock
        self._rng = rng
        self._ready: dict[K, None] = {}
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._failures: dict[K, int] = {}
        self._when: dict[K, float] = {}
        self._later: list[tuple[float, int, K]] = []
        self._count = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due now."""
        self._wake()
        return len(self._ready)

    @property
    def failing(self) -> int:
        """Keys whose last attempt failed."""
        return len(self._failures)

    def add(self, key: K) -> None:
        """`key` is due, also if it failed and waits: something has changed."""
        self._when.pop(key, None)
        if key in self._working:
            self._again.add(key)
        else:
            self._ready[key] = None
        self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """`key` is due in so many seconds, unless it is earlier anyway."""
        when = self._clock() + max(0.0, seconds)
        if key in self._ready or self._when.get(key, when + 1) <= when:
            return
        self._when[key] = when
        heapq.heappush(self._later, (when, next(self._count), key))
        self._changed.set()

    def forget(self, key: K) -> None:
        """Nothing is due for `key` any more, and its failures don't count."""
        self._ready.pop(key, None)
        self._again.discard(key)
        self._when.pop(key, None)
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The key that has been due for longest; it is worked on until `done`."""
        while True:
            self._wake()
            if self._ready:
                key = next(iter(self._ready))
                del self._ready[key]
                self._working.add(key)
                return key
            self._changed.clear()
            wait = self._later[0][0] - self._clock() if self._later else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K, *, failed: bool = False, again_after: float | None = None) -> None:
        """The work on `key` ended; it comes back after its backoff if it failed, after
        `again_after` seconds if that is given, at once if it became due meanwhile."""
        self._working.discard(key)
        if failed:
            self._failures[key] = self._failures.get(key, 0) + 1
        else:
            self._failures.pop(key, None)
        if key in self._again:
            # What changes during an outage is no reason to hurry back into it.
            self._again.discard(key)
            if not failed:
                self.add(key)
                return
        if failed:
            self.add_after(key, backoff(self._failures[key], self._rng))
        elif again_after is not None:
            self.add_after(key, again_after)

    def _wake(self) -> None:
        """Move what has become due to the ready ones."""
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            when, _, key = heapq.heappop(self._later)
            if self._when.get(key) != when:
                continue  # put off anew, or not at all any more
            del self._when[key]
            if key in self._working:
                self._again.add(key)
            else:
                self._ready[key] = None
