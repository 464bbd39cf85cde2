"""When a graph is due: a queue of keys that coalesces, spaces failures and keeps graphs apart.

An event only says that a key is due; however many arrive, the key is worked on once, never by two
workers at a time, and again if something happened meanwhile. A key that failed waits longer each
time, alone: the others don't notice. Events shorten that wait, but not to nothing: a pod that
crashes over and over is no reason to try again each time what is refused or hangs. Keys belong to
shares (namespaces), which take turns and none of which may have all workers: where writes hang,
behind a dead webhook, only that share waits.
After controller-runtime's work queue, which knows no shares.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 300.0
SHORTEST_REST_S = 5.0
REST_FACTOR = 10.0


def backoff(failures: int, rng: random.Random) -> float:
    """Seconds to wait after so many failures in a row: doubling, at most `LONGEST_BACKOFF_S`, and
    up to a fifth less, so that graphs that failed together do not come back together."""
    longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 20))
    return longest * rng.uniform(0.8, 1.0)


def rest(took: float) -> float:
    """Seconds after a failed attempt that took so many before an event may lead to the next one:
    many times as long, so that what hangs leaves the workers to others."""
    return max(SHORTEST_REST_S, REST_FACTOR * took)


class Closed(Exception):
    """The queue gives out no more keys."""


class WorkQueue(Generic[K]):
    """Keys that are due. `get` and `done` come in pairs; a key between them is being worked on.

    Invariants: a key is in at most one of `_ready` and `_working`; one that becomes due while it is
    worked on is in `_again`; `_when` holds the earliest time for which it is put off. One that
    failed and is not in `_ready` or `_working` is in `_when`.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        share: Callable[[K], Hashable] = lambda key: None,
        most: int | None = None,
    ) -> None:
        """Of the keys of one share at most `most` are worked on at a time; None: any number."""
        self._clock = clock
        self._rng = rng
        self._share = share
        self._most = most
        self._ready: dict[Hashable, dict[K, None]] = {}  # by share; none is empty
        self._working: dict[K, float] = {}  # since when
        self._busy: Counter[Hashable] = Counter()  # share -> how many of `_working`
        self._again: set[K] = set()
        self._urgent: set[K] = set()  # of `_again`
        self._closed = False
        self._failures: dict[K, int] = {}
        self._rests: dict[K, float] = {}  # of those: until when no event brings it back
        self._when: dict[K, float] = {}
        self._later: list[tuple[float, int, K]] = []
        self._count = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due now."""
        self._wake()
        return sum(len(keys) for keys in self._ready.values())

    @property
    def failing(self) -> int:
        """Keys whose last attempt failed."""
        return len(self._failures)

    def add(self, key: K, urgent: bool = False) -> None:
        """`key` is due: something has changed. One that failed and waits is due once it has rested,
        and at once if that is `urgent`, also where it comes during the attempt that fails."""
        if key in self._failures and key not in self._working and not urgent:
            self._put_off(key, max(self._rests[key], self._clock()))
            return
        self._when.pop(key, None)
        self._due(key)
        if urgent and key in self._working:
            self._urgent.add(key)
        self._changed.set()

    def close(self) -> None:
        """Nothing is begun any more: `get` raises `Closed`."""
        self._closed = True
        self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """`key` is due in so many seconds, unless it is earlier anyway."""
        self._put_off(key, self._clock() + max(0.0, seconds))

    def _put_off(self, key: K, when: float) -> None:
        if key in self._ready.get(self._share(key), ()) or self._when.get(key, when + 1) <= when:
            return
        self._when[key] = when
        heapq.heappush(self._later, (when, next(self._count), key))
        self._changed.set()

    async def get(self) -> K:
        """The key of the next share that has been due for longest; it is worked on until `done`."""
        while True:
            if self._closed:
                raise Closed
            self._wake()
            for share, keys in self._ready.items():
                if self._most is None or self._busy[share] < self._most:
                    key = next(iter(keys))
                    del keys[key], self._ready[share]
                    if keys:
                        self._ready[share] = keys  # behind the others now
                    self._working[key] = self._clock()
                    self._busy[share] += 1
                    return key
            self._changed.clear()
            wait = self._later[0][0] - self._clock() if self._later else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K, *, failed: bool = False, again_after: float | None = None) -> None:
        """The work on `key` ended; it comes back after its backoff if it failed (after its rest if
        it became due meanwhile), after `again_after` seconds if that is given, at once if it
        became due meanwhile and has not failed."""
        now = self._clock()
        took = now - self._working.pop(key)
        share = self._share(key)
        self._busy[share] -= 1
        if not self._busy[share]:
            del self._busy[share]
        self._changed.set()
        if failed:
            self._failures[key] = self._failures.get(key, 0) + 1
            self._rests[key] = now + rest(took)
            self._put_off(key, now + backoff(self._failures[key], self._rng))
        else:
            self._failures.pop(key, None)
            self._rests.pop(key, None)
            if again_after is not None:
                self.add_after(key, again_after)
        urgent = key in self._urgent
        self._urgent.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key, urgent)

    def _wake(self) -> None:
        """Move what has become due to the ready ones."""
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            when, _, key = heapq.heappop(self._later)
            if self._when.get(key) != when:
                continue  # put off anew, or not at all any more
            del self._when[key]
            self._due(key)

    def _due(self, key: K) -> None:
        if key in self._working:
            self._again.add(key)
        else:
            self._ready.setdefault(self._share(key), {})[key] = None
