"""Numbers that are known of an endpoint, by the names that configurations use for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from dynamo_kv_router.choice import Candidate

Attribute = Literal[
    "WaitingQueueSize", "RunningRequestsSize", "KVCacheUsagePercent", "ActiveRequests"
]
"""The first three are the engine's own (the third is a share, 0..1, whatever its name says); the
last is the picker's count of requests in hand."""

_READ: Mapping[Attribute, Callable[[Candidate], float]] = {
    "WaitingQueueSize": lambda candidate: candidate.waiting,
    "RunningRequestsSize": lambda candidate: candidate.running,
    "KVCacheUsagePercent": lambda candidate: candidate.kv_usage,
    "ActiveRequests": lambda candidate: candidate.active_requests,
}


def value(attribute: Attribute, candidate: Candidate) -> float | None:
    """None where the engine told none, or long ago."""
    if not candidate.figures_known and attribute != "ActiveRequests":
        return None
    return _READ[attribute](candidate)
