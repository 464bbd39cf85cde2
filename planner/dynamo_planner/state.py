"""All that a planner remembers between two looks, as one value.

Nothing else is remembered anywhere: the same state and the same inputs give the same decision, and
that is what a recording replays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynamo_planner.config.model import Role
from dynamo_planner.execute import Applied
from dynamo_planner.fleet import Fleet
from dynamo_planner.observe import Reading, Seen, Traffic
from dynamo_planner.performance import Point, Profiles
from dynamo_planner.predict import Sample
from dynamo_planner.propose import Proposal
from dynamo_planner.reconcile import RoleMemory


@dataclass(frozen=True, slots=True)
class Inputs:
    """What comes in at one look."""

    at: float  # seconds of a clock that need not start anywhere, and should not jump
    fleet: Fleet
    readings: tuple[Reading, ...]
    applied: tuple[Applied, ...] = ()  # what became of the last look's orders


@dataclass(frozen=True, slots=True)
class RoleState:
    """Of one role."""

    memory: RoleMemory = field(default_factory=RoleMemory)
    window: Traffic = field(default_factory=Traffic)  # since the last predictive decision
    history: tuple[Sample, ...] = ()  # past intervals, oldest first
    points: tuple[Point, ...] = ()  # what the live model learns from
    predicted: Proposal | None = None  # the predictive loop's last word


@dataclass(frozen=True, slots=True)
class State:
    """``State()`` is that of a planner that has seen nothing."""

    at: float | None = None  # of the last look
    predicted_at: float | None = None  # of the last predictive decision, or of the first look
    seen: Mapping[str, Seen] = field(default_factory=dict)  # worker -> its last reading
    ordered: Mapping[str, int] = field(default_factory=dict)  # component -> replicas it should have
    roles: Mapping[Role, RoleState] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    profiles: Profiles = field(default_factory=Profiles)  # measured before; they never change

    @classmethod
    def begin(
        cls, profiles: Profiles, history: Mapping[Role, tuple[Sample, ...]] | None = None
    ) -> State:
        """With measured profiles and, as a warm start, past intervals."""
        roles = {role: RoleState(history=past) for role, past in (history or {}).items()}
        return cls(profiles=profiles, roles=roles)
