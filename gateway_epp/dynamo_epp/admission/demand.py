"""Requests that found no endpoint, as a figure that outlives them.

A component that is scaled to zero has no load that anybody could measure. What asks for it is known
only here, and perhaps for a moment only; so it is remembered until whoever scales has seen it and a
worker had time to start.
"""

from __future__ import annotations

from collections import deque

MAX_REMEMBERED = 10_000


class Demand:
    """Of one model. Pure: every call brings the time (seconds)."""

    def __init__(self, lasts_s: float) -> None:
        self._lasts_s = lasts_s
        self._held = 0
        self._given_up: deque[float] = deque(maxlen=MAX_REMEMBERED)

    def held(self) -> None:
        """A request begins to wait for an endpoint."""
        self._held += 1

    def served(self) -> None:
        """An endpoint came; what asked before it did is satisfied."""
        self._held -= 1
        self._given_up.clear()

    def given_up(self, now: float) -> None:
        """A request that waited was refused, or its client left."""
        self._held -= 1
        self._given_up.append(now)

    def requests(self, now: float) -> int:
        """Those that wait, and those given up in the last ``lasts_s`` seconds."""
        while self._given_up and now - self._given_up[0] >= self._lasts_s:
            self._given_up.popleft()
        return self._held + len(self._given_up)
