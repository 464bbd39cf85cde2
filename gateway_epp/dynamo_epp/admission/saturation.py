"""How full the engines are: 0 idle, 1 full.

Figures of engines are a second old, and a second is long: a queue that was released all at once
would be in the engines before the first of them could say so. So what an endpoint was sent since
its figures were taken is counted in (``Endpoint.in_hand`` against ``in_hand_then``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo_kv_router.load import WorkerLoad

from dynamo_epp.admission.settings import SaturationSettings


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What is known of one endpoint's load."""

    age_s: float | None
    """Of the three figures below; ``None``: it never gave any."""
    waiting: int = 0  # requests in the engine's queue
    kv_used: float = 0.0  # share of the KV cache, 0–1
    in_hand_then: float = 0.0  # requests in hand when the figures were taken
    in_hand: float = 0.0  # and now


def occupancy(load: WorkerLoad, now: float) -> Occupancy:
    return Occupancy(
        age_s=None if load.observed_at is None else now - load.observed_at,
        waiting=load.waiting,
        kv_used=load.figures.cache_usage,
        in_hand_then=load.in_hand_then,
        in_hand=load.active_requests(),
    )


def queue_estimate(endpoint: Occupancy, more: float = 0.0) -> float:
    """Requests that wait in the engine, ``more`` just sent ones included.

    An engine that queues is full: what it got since waits as well, and what it finished made room.
    One that does not queue may take as many again as it runs before it tells anew, so the rate at
    which an idle pool is filled doubles with each look at it, and never jumps.
    """
    growth = endpoint.in_hand + more - endpoint.in_hand_then
    if endpoint.waiting > 0:
        return max(0.0, endpoint.waiting + growth)
    return max(0.0, growth - endpoint.in_hand_then)


def endpoint_saturation(
    endpoint: Occupancy, settings: SaturationSettings, more: float = 0.0
) -> float:
    """The highest of its measures against their thresholds, 0–1.

    An endpoint that never gave figures is judged by its concurrency alone; one whose figures are
    older than ``metrics_staleness_s`` counts as full.
    """
    measures = [0.0]
    if settings.max_concurrency:
        measures.append((endpoint.in_hand + more) / settings.max_concurrency)
    if endpoint.age_s is not None:
        if _stale(endpoint, settings):
            return 1.0
        if settings.queue_depth_threshold:
            measures.append(queue_estimate(endpoint, more) / settings.queue_depth_threshold)
        if settings.kv_cache_util_threshold:
            measures.append(endpoint.kv_used / settings.kv_cache_util_threshold)
    return min(1.0, max(measures))


def _stale(endpoint: Occupancy, settings: SaturationSettings) -> bool:
    return endpoint.age_s is not None and endpoint.age_s > settings.metrics_staleness_s


def has_room(endpoints: Iterable[Occupancy], settings: SaturationSettings, share: float) -> bool:
    """Whether ``pool_saturation`` is below 1, with ``share`` requests on their way to each.

    Looks at no more endpoints than it must: as a rule the first one has room.
    """
    looked_at = []
    for endpoint in endpoints:
        if endpoint_saturation(endpoint, settings, share) < 1.0:
            return True
        looked_at.append(endpoint)
    return pool_saturation(looked_at, settings, share * len(looked_at)) < 1.0


def pool_saturation(
    endpoints: Sequence[Occupancy], settings: SaturationSettings, more: float = 0.0
) -> float:
    """The mean over ``endpoints``, with ``more`` requests on their way to them; 1 without any.

    Source: llm-d's ``utilization-detector``, ``mean(max(queue / threshold, kv / threshold))``.
    Unlike there no endpoint counts for more than 1: one with a long queue would else close a pool
    whose others are idle. So the mean is 1 exactly if all of them are full.

    If the figures of all of them are stale it is the picker that is blind; that says nothing of the
    engines, and they are judged by concurrency alone.
    """
    if not endpoints:
        return 1.0
    if all(_stale(endpoint, settings) for endpoint in endpoints):
        endpoints = [Occupancy(None, in_hand=endpoint.in_hand) for endpoint in endpoints]
    share = more / len(endpoints)
    return sum(endpoint_saturation(e, settings, share) for e in endpoints) / len(endpoints)
