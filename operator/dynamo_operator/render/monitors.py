"""A PodMonitor for each graph, so that Prometheus' operator scrapes what its pods measure."""

from collections.abc import Sequence

from dynamo_operator.render import names, notes
from dynamo_operator.render.merge import Json
from dynamo_operator.render.notes import Notes
from dynamo_operator.render.parts import Graph, Part


def monitor(parts: Sequence[Part], graph: Graph, noted: Notes) -> Json | None:
    """The graph's PodMonitor; None if metrics are switched off or nothing reads PodMonitors."""
    ports = [name for name in ("system", "metrics") if any(name in part.ports for part in parts)]
    if not ports or not graph.wants_metrics:
        return None
    if not graph.platform.serves(names.POD_MONITOR):
        if graph.setting(names.METRICS_ANNOTATION):
            message = "metrics are asked for, but PodMonitors need the Prometheus operator"
            noted.add("", notes.MONITOR_NEEDS_API, message)
        return None
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": graph.metadata(names.bounded(graph.name), {}),
        "spec": {
            "selector": {"matchLabels": {**graph.label, names.METRICS_LABEL: "true"}},
            "podMetricsEndpoints": [{"port": port, "path": "/metrics"} for port in ports],
        },
    }
