"""One loop's opinion on one role."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_planner.config.model import Role


@dataclass(frozen=True, slots=True)
class Proposal:
    """How many replicas, and why."""

    role: Role
    replicas: int
    state: str
    """How it came about, in Dynamo's words: one of the states of `dynamo_planner_*_decision`."""
    reason: str
    """The same as a sentence."""
