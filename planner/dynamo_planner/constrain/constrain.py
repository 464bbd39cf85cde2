"""The stage: a number for each role in, a number for each component out.

Limits in their order, the later ones win: ratio, bounds of the role, what is in hand, bounds of
components, the GPU budget. The budget keeps anything from growing beyond it; what runs is shrunk
to it only as far as what is in hand allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynamo_planner.config.model import ComponentLimits, PlannerConfig, Role
from dynamo_planner.fleet import Component, Fleet, desired, of_role

_NO_LIMITS = ComponentLimits()


@dataclass(frozen=True, slots=True)
class Allocation:
    """What each component should have."""

    replicas: Mapping[str, int]  # component -> replicas
    notes: tuple[str, ...] = ()  # which limit changed what, a sentence each


def constrain(
    wanted: Mapping[Role, int],
    carried: Mapping[Role, int],
    held: Sequence[Role],
    fleet: Fleet,
    config: PlannerConfig,
) -> Allocation:
    """What of ``wanted`` the limits allow.

    ``carried``: workers that what a role has in hand needs. A role in ``held`` is not moved by
    anything: nobody knows what moving it would do.
    """
    notes: list[str] = []
    targets = _in_ratio(dict(wanted), fleet, config, notes)
    replicas: dict[str, int] = {}
    for role, target in targets.items():
        components = of_role(fleet, role)
        if not components:
            continue
        if role in held:
            replicas |= {each.name: each.desired for each in components}
            continue
        low = max(config.fewest(role), carried.get(role, 0))
        high = config.most(role)
        bounded = _clamp(target, low, high, desired(components))
        if bounded != target:
            notes.append(f"{role}: {target} replicas are wanted, bounds leave {bounded}")
        replicas |= _split(bounded, components, config)
    _within_budget(replicas, carried, held, fleet, config, notes)
    return Allocation(replicas, tuple(notes))


def _clamp(target: int, low: int, high: int | None, now: int) -> int:
    """``low`` beats ``target``; ``high`` beats both, but what is in hand may keep what there is."""
    if high is None:
        return max(target, low)
    return min(max(target, low), max(high, min(low, now)))


def _in_ratio(
    targets: dict[Role, int], fleet: Fleet, config: PlannerConfig, notes: list[str]
) -> dict[Role, int]:
    """Prefill workers for each decode worker, kept within bounds.

    It stops a role from growing past the ratio, and from shrinking past it; it moves no role that
    does not want to move.
    """
    if not {"prefill", "decode"} <= targets.keys():
        return targets
    low, high = config.min_prefill_decode_ratio, config.max_prefill_decode_ratio
    prefill, decode = targets["prefill"], targets["decode"]
    p_now, d_now = (desired(of_role(fleet, role)) for role in ("prefill", "decode"))
    if low is not None:
        prefill = max(prefill, min(p_now, math.ceil(low * decode - 1e-9)))
        decode = min(decode, max(d_now, math.floor(prefill / low + 1e-9)))
    if high is not None:
        decode = max(decode, min(d_now, math.ceil(prefill / high - 1e-9)))
        prefill = min(prefill, max(p_now, math.floor(high * decode + 1e-9)))
    found: dict[Role, int] = {"prefill": prefill, "decode": decode}
    for role, value in found.items():
        if targets[role] != value:
            notes.append(f"{role}: the prefill:decode ratio makes {value} of {targets[role]}")
    return targets | found


def _limits(component: Component, config: PlannerConfig) -> ComponentLimits:
    return config.components.get(component.name, _NO_LIMITS)


def _split(target: int, components: Fleet, config: PlannerConfig) -> dict[str, int]:
    """``target`` over the components of one role, moving as few as possible from what there is.

    The cheapest grows first, the dearest shrinks first; of equals, by name.
    """
    replicas: dict[str, int] = {}
    for component in components:
        limits = _limits(component, config)
        low = limits.min_endpoint or 0
        high = limits.max_endpoint or max(low, component.desired, target)
        replicas[component.name] = min(max(component.desired, low), high)
    cheapest = sorted(components, key=lambda each: (_limits(each, config).cost, each.name))
    for component in cheapest:
        limits = _limits(component, config)
        room = (limits.max_endpoint or target) - replicas[component.name]
        more = min(target - sum(replicas.values()), room)
        replicas[component.name] += max(0, more)
    for component in reversed(cheapest):
        spare = replicas[component.name] - (_limits(component, config).min_endpoint or 0)
        fewer = min(sum(replicas.values()) - target, spare)
        replicas[component.name] -= max(0, fewer)
    return replicas


def _within_budget(
    replicas: dict[str, int],
    carried: Mapping[Role, int],
    held: Sequence[Role],
    fleet: Fleet,
    config: PlannerConfig,
    notes: list[str],
) -> None:
    """Hold all of ``replicas`` together within the GPU budget; changes them."""
    by_name = {component.name: component for component in fleet if component.name in replicas}

    def total() -> int:
        return sum(by_name[name].gpus * count for name, count in replicas.items())

    def role_total(role: Role) -> int:
        return sum(count for name, count in replicas.items() if by_name[name].role == role)

    def spare(name: str) -> bool:
        """Whether its role can do with one replica less of it."""
        role = by_name[name].role
        if role in held:
            return False
        least = max(config.fewest(role), carried.get(role, 0))
        return role_total(role) > least and replicas[name] > (
            _limits(by_name[name], config).min_endpoint or 0
        )

    def next_to_go() -> str | None:
        """Growth that can be spared, from whoever is to get the most; then what runs and can be
        spared, the dearest; then any growth."""
        grown = {n: (count - by_name[n].desired) * by_name[n].gpus for n, count in replicas.items()}
        growing = [n for n in replicas if grown[n] > 0]
        if sparing := [n for n in growing if spare(n)]:
            return max(sparing, key=lambda n: (grown[n], n))
        if running := [n for n in replicas if spare(n)]:
            return max(running, key=lambda n: (_limits(by_name[n], config).cost, n))
        return max(growing, key=lambda n: (grown[n], n), default=None)

    asked = total()
    budget = config.max_gpu_budget
    if budget >= 0 and asked > budget:
        while total() > budget and (name := next_to_go()) is not None:
            replicas[name] -= 1
        left = total()
        over = f"; {left} run, and can't be fewer now" if left > budget else ""
        notes.append(f"{asked} GPUs are wanted, max_gpu_budget is {budget}{over}")
    floor = config.min_gpu_budget if budget < 0 else min(config.min_gpu_budget, budget)
    if asked < floor:
        while total() < floor:
            room = [
                n
                for n, count in replicas.items()
                if by_name[n].role not in held
                and count < (_limits(by_name[n], config).max_endpoint or math.inf)
                and role_total(by_name[n].role) < (config.most(by_name[n].role) or math.inf)
                and (budget < 0 or total() + by_name[n].gpus <= budget)
            ]
            if not room:
                break
            name = min(room, key=lambda n: (replicas[n] * by_name[n].gpus, n))
            replicas[name] += 1
        notes.append(f"{asked} GPUs are wanted, min_gpu_budget is {floor}")
