"""Requests that found no endpoint, as a figure that outlives them.

A component that is scaled to zero has no load that anybody could measure. What asks for it is known
only here, and perhaps for a moment only; so it is remembered until whoever scales has seen it and a
worker had time to start.
"""

from __future__ import annotations

from collections import deque

MAX_REMEMBERED = 10_000


class GivenUp:
    """Requests for one model that waited for an endpoint in vain. Pure: every call brings the time
    (seconds); each is forgotten after ``lasts_s``."""

    def __init__(self, lasts_s: float) -> None:
        self._lasts_s = lasts_s
        self._times: deque[float] = deque(maxlen=MAX_REMEMBERED)

    def add(self, now: float) -> None:
        self._times.append(now)

    def satisfied(self) -> None:
        """An endpoint is there: what asked for one before is answered."""
        self._times.clear()

    def count(self, now: float) -> int:
        while self._times and now - self._times[0] >= self._lasts_s:
            self._times.popleft()
        return len(self._times)
