"""How long a container that ended waits before it is started again.

Kubernetes' rule (doubling, at most five minutes, forgotten after ten minutes of running well) with
a first wait of one second instead of ten: on a laptop somebody is watching.
"""

from __future__ import annotations

FIRST_S = 1.0
LONGEST_S = 300.0
FORGET_AFTER_S = 600.0


class Backoff:
    """The waits of one container."""

    def __init__(self) -> None:
        self._next = FIRST_S

    def after(self, ran_s: float) -> float:
        """Seconds to wait after a run of ``ran_s`` seconds."""
        if ran_s >= FORGET_AFTER_S:
            self._next = FIRST_S
        wait = self._next
        self._next = min(LONGEST_S, wait * 2)
        return wait
