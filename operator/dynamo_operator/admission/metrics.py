"""What dashboards see of admission; names as Dynamo's operator has them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ALLOWED, DENIED, FAILED = "allowed", "denied", "error"


class WebhookMetrics:
    """One process's counters. `operation` is the request's, or CONVERT."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("resource_type", "operation")
        self.duration = Histogram(
            "dynamo_operator_webhook_duration_seconds",
            "Time from a review's arrival to its answer",
            labels,
            registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.requests = Counter(
            "dynamo_operator_webhook_requests",
            "Reviews by result: allowed, denied, error",
            (*labels, "result"),
            registry=registry,
        )
        self.denials = Counter(
            "dynamo_operator_webhook_denials",
            "Denied reviews by reason: invalid, immutable, dry_run",
            (*labels, "reason"),
            registry=registry,
        )
        self.certificate_expiry = Gauge(
            "dynamo_operator_webhook_certificate_expiry_seconds",
            "When the serving certificate expires, in seconds since 1970",
            registry=registry,
        )
