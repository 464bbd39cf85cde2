"""The operator's metrics. Names are those that Dynamo's operator has, where we know the same."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterable

from dynamo_runtime.kubernetes.client import Json
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

GRAPH = "dynamographdeployment"
ADAPTER = "dynamographdeploymentscalingadapter"


class OperatorMetrics:
    """All metrics of one operator process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reconciles = Counter(
            "controller_runtime_reconcile_total",
            "Reconciles of a graph, by result: success, requeue, error, yielded (to another "
            "operator that came meanwhile).",
            ["controller", "result"],
            registry=registry,
        )
        self.seconds = Histogram(
            "controller_runtime_reconcile_time_seconds",
            "Time that one reconcile took, by result.",
            ["controller", "result"],
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=registry,
        )
        self.depth = Gauge(
            "workqueue_depth", "Graphs that are due now.", ["name"], registry=registry
        )
        self.failing = Gauge(
            "dynamo_operator_graphs_failing",
            "Graphs whose last reconcile failed; they are tried again, less and less often.",
            registry=registry,
        )
        self.leader = Gauge(
            "leader_election_master_status",
            "1 while this process is the one that reconciles.",
            ["name"],
            registry=registry,
        )
        self.resources = Gauge(
            "dynamo_operator_resources_total",
            "Objects that this process takes care of as the leader, by state: of graphs their"
            " status.state; an adapter is ready once it has a status, and pending until then.",
            ["resource_type", "namespace", "status"],
            registry=registry,
        )
        self.requests = Counter(
            "dynamo_operator_api_requests_total",
            "Requests to the API server, watches included; code 0: no answer.",
            ["method", "resource", "code"],
            registry=registry,
        )
        self.writes = Counter(
            "dynamo_operator_writes_total",
            "Requests that changed an object of a graph.",
            registry=registry,
        )
        self.relists = Gauge(
            "dynamo_operator_informer_relists",
            "How often a cache was listed anew, since the start.",
            registry=registry,
        )
        self.silence = Gauge(
            "dynamo_operator_informer_silence_seconds",
            "Time since the cache that is silent for longest was last heard of.",
            registry=registry,
        )

    def on_request(self, method: str, resource: str, status: int, seconds: float) -> None:
        self.requests.labels(method, resource, str(status)).inc()

    def count_resources(self, graphs: Iterable[Json], adapters: Iterable[Json]) -> None:
        """Set the gauges of objects anew."""
        counts: Count[tuple[str, str, str]] = Count()
        for graph in graphs:
            state = (graph.get("status") or {}).get("state", "initializing")
            counts[GRAPH, graph["metadata"]["namespace"], state] += 1
        for adapter in adapters:
            seen = "ready" if "status" in adapter else "pending"
            counts[ADAPTER, adapter["metadata"]["namespace"], seen] += 1
        self.resources.clear()
        for labels, count in counts.items():
            self.resources.labels(*labels).set(count)
