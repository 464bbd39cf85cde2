"""The launcher's own metrics.

The engine's are on the engine's port, and passed on with these on the status port: the engine's own
port is closed to all but pickers.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class WorkerMetrics:
    """``dynamo_worker_*``"""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"dynamo_worker_{name}", text, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"dynamo_worker_{name}", text, registry=registry)

        self.engine_healthy = gauge("engine_healthy", "1 while the engine answers its health check")
        self.ready_without_picker = gauge(
            "ready_without_picker", "1 if the worker is ready although no picker ever subscribed"
        )
        self.draining = gauge("draining", "1 once a stop was requested")
        self.pickers = gauge("pickers", "Pickers subscribed to this worker's stream")
        self.in_flight = gauge("requests_in_flight", "Requests in the engine")
        self.requests = counter("requests", "Requests that have left the engine")
        self.prefill_tokens = gauge(
            "active_prefill_tokens", "Prompt tokens still to be computed, as far as is known"
        )
        self.decode_blocks = gauge("active_decode_blocks", "KV blocks of requests in the engine")
        self.blocks_cached = gauge("blocks_cached", "Distinct blocks announced as cached")
        self.events = counter("engine_events", "KV events of the engine that were applied")
        self.unchained = counter(
            "engine_events_unchained", "Stored events whose parent block was never announced"
        )
        self.missed = counter("engine_batches_missed", "Event batches of the engine lost for good")
        self.reports_dropped = gauge(
            "engine_reports_dropped", "Reports that the middleware in the engine could not send"
        )
        self.remote_prefills = Counter(
            "dynamo_worker_remote_prefills",
            "Requests that came with prefill workers to ask: remote, local (none could), refused "
            "(none could, and nothing else was allowed), rejected (the request itself was wrong), "
            "invalid-grant (asking was not validly allowed).",
            ("outcome",),
            registry=registry,
        )
        self.prefiller_failures = counter(
            "prefiller_failures", "Prefill workers that were asked in vain"
        )
        self.orphans = counter("orphans_reaped", "Processes the engine left behind")
        self.exact = gauge("exact_events", "1 while every cached block is known by its key")
