"""Limits that no fleet can keep, told before anything is scaled."""

from __future__ import annotations

from collections.abc import Iterator

from dynamo_crds.problem import nearest

from dynamo_planner.config.model import PlannerConfig
from dynamo_planner.fleet import Fleet, of_role


def infeasible(fleet: Fleet, config: PlannerConfig) -> Iterator[str]:
    """What of ``config`` can't be kept by the components there are, a sentence each."""
    names = sorted(component.name for component in fleet)
    for name in sorted(config.components.keys() - set(names)):
        guess = nearest(name, names)
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(names) or 'none'}"
        yield f"components.{name}: the graph has no such component with a scalingAdapter; {hint}"
    least = 0
    for role in config.roles:
        components = of_role(fleet, role)
        if not components:
            continue
        own = {c.name: config.components.get(c.name) for c in components}
        low = {n: (limits and limits.min_endpoint) or 0 for n, limits in own.items()}
        high = [limits.max_endpoint if limits else None for limits in own.values()]
        most = config.most(role)
        given = sum(low.values())
        if most is not None and given > most:
            yield f"{role}: its components must have {given} replicas, and may have {most}"
        bounds = [bound for bound in high if bound is not None]
        if len(bounds) == len(high) and sum(bounds) < config.fewest(role):
            yield (
                f"{role}: its components may have {sum(bounds)} replicas, and must have "
                f"{config.fewest(role)}"
            )
        rest = max(0, config.fewest(role) - given)
        least += sum(low[c.name] * c.gpus for c in components)
        least += rest * min(c.gpus for c in components)
    if 0 <= config.max_gpu_budget < least:
        yield (
            f"max_gpu_budget is {config.max_gpu_budget}, and the fewest replicas allowed need "
            f"{least} GPUs"
        )
