"""What there is to scale: the graph's worker components, as whoever scales them tells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dynamo_planner.config.model import Role


@dataclass(frozen=True, slots=True)
class Component:
    """A set of equal workers with one number of replicas."""

    name: str
    role: Role
    desired: int  # replicas that its scale asks for, whoever set it
    ready: int = 0  # of them, those that may get requests
    terminating: int = 0  # on their way out, beside the desired ones
    gpus: int = 1  # of one replica

    @property
    def settled(self) -> bool:
        """Whether no change is in progress."""
        return self.ready == self.desired and not self.terminating


Fleet = tuple[Component, ...]


def of_role(fleet: Iterable[Component], role: Role) -> Fleet:
    """The components of ``role``, in the fleet's order."""
    return tuple(component for component in fleet if component.role == role)


def desired(fleet: Iterable[Component]) -> int:
    """Replicas that all of ``fleet`` asks for."""
    return sum(component.desired for component in fleet)
