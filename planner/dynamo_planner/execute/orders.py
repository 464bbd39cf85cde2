"""The stage: allocation against fleet gives orders; fleet against past orders gives other writers.

A scale that is not what was last ordered was set by somebody else: a person, an autoscaler. It is
never fought: the role keeps it for a while, and it is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dynamo_planner.config.model import Role
from dynamo_planner.constrain import Allocation
from dynamo_planner.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Order:
    """Give a component another number of replicas."""

    component: str
    replicas: int
    before: int
    reason: str


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of an order."""

    component: str
    replicas: int
    problem: str = ""  # why it was not taken, "" if it was


def orders(
    allocation: Allocation, fleet: Fleet, reasons: Mapping[Role, str], *, advisory: bool
) -> tuple[Order, ...]:
    """What to order; nothing in advisory mode."""
    if advisory:
        return ()
    return tuple(
        Order(each.name, allocation.replicas[each.name], each.desired, reasons.get(each.role, ""))
        for each in fleet
        if allocation.replicas.get(each.name, each.desired) != each.desired
    )


def remembered(
    ordered: Mapping[str, int], applied: Iterable[Applied], fleet: Fleet
) -> dict[str, int]:
    """What each component's scale should be by now: the last order that was taken, or else what it
    was found to be. An order that failed may have been taken all the same."""
    expected = {each.name: ordered.get(each.name, each.desired) for each in fleet}
    found = {each.name: each.desired for each in fleet}
    for each in applied:
        if each.component in expected and (
            not each.problem or found[each.component] == each.replicas
        ):
            expected[each.component] = each.replicas
    return expected


def others(expected: Mapping[str, int], fleet: Fleet) -> dict[Role, str]:
    """Role -> who was found to have scaled it otherwise, in words."""
    found: dict[Role, str] = {}
    for each in fleet:
        want = expected.get(each.name, each.desired)
        if each.desired != want:
            found[each.role] = f"somebody else scaled {each.name} from {want} to {each.desired}"
    return found
