"""Admission's metrics: llm-d's names behind our prefix, with bounded labels.

Models come from workers or settings, tenants and priorities from somebody trusted, and still their
number is capped: beyond it they are ``other``.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

MAX_TENANTS = 1000
MAX_PRIORITIES = 32
OTHER = "other"
_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Capped:
    """The first ``limit`` values of a label; the others are ``other``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(value)
        return value


class AdmissionMetrics:
    """All of them, on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tenant = Capped(MAX_TENANTS)
        self.priority = Capped(MAX_PRIORITIES)
        self.requests = Counter(
            "dynamo_epp_flow_control_requests",
            "Requests by what admission did with them: dispatched, or the reason of the refusal.",
            ("fairness_id", "priority", "outcome"),
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "dynamo_epp_flow_control_request_queue_duration_seconds",
            "How long requests waited, those that did.",
            ("priority", "outcome"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_size = Gauge(
            "dynamo_epp_flow_control_queue_size",
            "Requests that wait.",
            ("priority",),
            registry=registry,
        )
        self.queue_bytes = Gauge(
            "dynamo_epp_flow_control_queue_bytes",
            "Bytes of the bodies of requests that wait.",
            ("priority",),
            registry=registry,
        )
        self.saturation = Gauge(
            "dynamo_epp_flow_control_pool_saturation",
            "How full the model's endpoints are: 0 idle, 1 full, or none there.",
            ("model",),
            registry=registry,
        )
        self.demand = Gauge(
            "dynamo_epp_flow_control_demand_requests",
            "Requests for a model that has no endpoint: those held now, and those given up  "
            "lately. Above 0 for a model that is scaled to zero, one worker is wanted.",
            ("model",),
            registry=registry,
        )
