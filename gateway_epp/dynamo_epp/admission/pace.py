"""How fast a queue drains, as observed, for `Retry-After`."""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""Time constant: what happened so long ago weighs 1/e."""
LONGEST_S = 300
UNKNOWN_S = 5
"""Said while nothing was served that a rate could be told from."""


class Pace:
    """Requests served a second, exponentially weighted. Pure: every call brings the time."""

    def __init__(self) -> None:
        self._weight = 0.0  # requests, decayed
        self._at = -math.inf
        self._since = math.inf

    def _decay(self, now: float) -> None:
        if self._at > -math.inf:
            self._weight *= math.exp(-max(0.0, now - self._at) / MEMORY_S)
        self._at = now

    def served(self, now: float) -> None:
        self._decay(now)
        self._weight += 1.0
        self._since = min(self._since, now)

    def rate(self, now: float) -> float:
        """Requests a second."""
        self._decay(now)
        # Before the memory is full, what it could hold by now is what the weight is out of.
        seen = 1.0 - math.exp(-max(0.0, now - self._since) / MEMORY_S)
        return self._weight / (MEMORY_S * max(seen, 0.1)) if self._since < math.inf else 0.0

    def retry_after(self, ahead: int, now: float) -> int:
        """Whole seconds, at least 1, until ``ahead`` requests and one more are served."""
        rate = self.rate(now)
        if rate < (ahead + 1) / LONGEST_S:
            return LONGEST_S if rate > 0 and self._weight > 0.01 else UNKNOWN_S
        return max(1, math.ceil((ahead + 1) / rate))
