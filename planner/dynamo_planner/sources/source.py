"""The seam: what workers tell, and where it was learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dynamo_planner.observe import Reading


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods of one component."""

    ready: int = 0  # may get requests
    terminating: int = 0


class MetricsSource(Protocol):
    """Readings of all workers there are, those that can't be asked included."""

    async def readings(self) -> tuple[Reading, ...]:
        """Ask, within bounded time. Never raises: who does not answer has a reading that says how
        old its figures are."""
        ...
