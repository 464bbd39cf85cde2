"""What is remembered of a role from one look to the next."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_planner.propose import Proposal


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """All times are of the planner's clock."""

    desired: int | None = None  # replicas at the last look
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, replicas) that were found right, oldest first; no older than the stabilization."""
    watched_since: float | None = None  # since when no look is missing from ``wanted``
    up_at: float | None = None  # last step up
    changing_since: float | None = None  # a change is in progress since then
    blind_since: float | None = None
    yielding_until: float | None = None  # somebody else scaled: keep still until then
    looks: int = 0  # in which the workers were seen
    floor: Proposal | None = None  # the predictive loop's last word
