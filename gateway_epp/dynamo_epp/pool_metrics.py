"""The pool as a whole, under the names of llm-d's endpoint picker.

Dashboards and autoscalers of the Gateway API Inference Extension ask for these; they are means over
the endpoints that are ready. An endpoint that does not tell a figure is not in its mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from prometheus_client import CollectorRegistry, Gauge

from dynamo_epp.endpoints.worker import Worker


class PoolMetrics:
    """The gauges of one pool, called ``name``."""

    def __init__(self, registry: CollectorRegistry, name: str) -> None:
        def gauge(metric: str, text: str) -> Gauge:
            return Gauge(f"llm_d_epp_{metric}", text, ("name",), registry=registry).labels(name)

        self._ready = gauge("ready_endpoints", "Endpoints that are ready.")
        self._queue = gauge("average_queue_size", "Requests that wait in an engine, on average.")
        self._running = gauge(
            "average_running_requests", "Requests in an engine's hands, on average."
        )
        self._kv = gauge(
            "average_kv_cache_utilization",
            "Share (0 to 1) of an engine's KV cache blocks in use, on average.",
        )

    def observe(self, workers: Iterable[Worker]) -> None:
        """Set the gauges to what is known of ``workers`` now."""
        ready = [w.load for w in workers if w.endpoint.ready and not w.endpoint.terminating]
        told = [load for load in ready if load.kv_blocks_total > 0]
        self._ready.set(len(ready))
        self._queue.set(_mean(load.waiting for load in ready))
        self._running.set(_mean(load.active_requests() for load in ready))
        self._kv.set(_mean(load.kv_blocks_used / load.kv_blocks_total for load in told))


def _mean(values: Iterable[float]) -> float:
    """0 of nothing, as llm-d has it."""
    all_of_them = list(values)
    return fmean(all_of_them) if all_of_them else 0.0
