"""How many requests a second one replica can take and still hold the targets.

Prefill: a queue with Poisson arrivals and a fixed time for each (M/D/1), whose mean wait is
``ρ s / (2 (1 - ρ))`` at the load ρ for the time s (Pollaczek and Khinchine). Decode: the largest
batch whose step is fast enough and whose sequences fit into the cache; by Little's law it turns
over ``batch / (osl × step)`` requests a second. Whole workers do both in turn, so that a step takes
``1 / (1 - ρ)`` as long, ρ being the share of time that prefills take.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_planner.config.model import PlannerConfig, Role
from dynamo_planner.performance.model import Model

MOST_BATCH = 1_024
BUSIEST, IDLEST = 0.95, 0.3
"""Bounds of ρ. Above, waits grow without bound; below, more replicas change little: a target under
the bare time of a prompt can't be held by any number, and must not ask for all there are."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of one replica."""

    rps: float  # requests a second
    ttft_s: float | None  # expected at that rate; None: the role gives no first token
    itl_s: float | None
    batch: float = 0.0
    reachable: bool = True  # whether the targets can be held at all


def busy_share(service_s: float, target_s: float) -> float:
    """ρ at which the mean of wait and service is ``target_s``, within bounds."""
    wait = max(0.0, target_s - service_s)
    return min(BUSIEST, max(IDLEST, 2 * wait / (2 * wait + service_s)))


def waited(service_s: float, busy: float) -> float:
    """Mean wait and service at the load ``busy``."""
    return service_s + busy * service_s / (2 * (1 - busy))


def capacity(
    role: Role,
    model: Model,
    *,
    isl: float,
    osl: float,
    computed: float,
    kv_tokens: float | None,
    config: PlannerConfig,
) -> Capacity:
    """What one replica of ``role`` can take of requests with these mean lengths, in tokens."""
    ttft, itl = config.ttft_ms / 1000, config.itl_ms / 1000
    prefill = max(1e-6, model.prefill_s(max(1.0, computed)))
    if role == "prefill":
        busy = busy_share(prefill, ttft)
        return Capacity(busy / prefill, waited(prefill, busy), None, reachable=prefill < ttft)
    tokens = max(1.0, osl)
    context = max(1.0, isl + osl / 2)
    most = float(MOST_BATCH) if kv_tokens is None else max(1.0, kv_tokens // context)
    whole = role == "worker"

    def at(batch: float) -> Capacity:
        step = max(1e-6, model.step_s(batch, context))
        turned_over = batch / (tokens * step)
        if not whole:
            return Capacity(turned_over, None, step, batch, step <= itl)
        # The time that is left by prefills is for steps: λ = (1 - λ s) × batch / (osl × step).
        rps = turned_over / (1 + turned_over * prefill)
        busy = min(BUSIEST, rps * prefill)
        first, gap = waited(prefill, busy) + step, step / (1 - busy)
        return Capacity(rps, first, gap, batch, first <= ttft and gap <= itl)

    low, high = 1, int(min(most, MOST_BATCH))
    if not at(low).reachable:
        return at(low)
    while low < high:  # the times rise with the batch
        middle = (low + high + 1) // 2
        if at(middle).reachable:
            low = middle
        else:
            high = middle - 1
    return at(low)
