"""Names, labels and ports of everything that is rendered, in one place.

Names follow Dynamo's operator (`<graph>-<component in lower case>`), so that autoscalers,
dashboards and scripts written for it find the same objects. Kubernetes limits a Service's name
and a label's value to 63 characters; a longer one keeps its beginning and ends in a hash of
the whole, so that it stays unique and stable.
"""

from dynamo_operator.render.canonical import short_hash

GROUP = "nvidia.com"

GRAPH_LABEL = "nvidia.com/dynamo-graph-deployment-name"
COMPONENT_LABEL = "nvidia.com/dynamo-component"
TYPE_LABEL = "nvidia.com/dynamo-component-type"
SUB_TYPE_LABEL = "nvidia.com/dynamo-sub-component-type"
CLASS_LABEL = "nvidia.com/dynamo-component-class"
NAMESPACE_LABEL = "nvidia.com/dynamo-namespace"
WORKER_HASH_LABEL = "nvidia.com/dynamo-worker-hash"
METRICS_LABEL = "nvidia.com/metrics-enabled"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "dynamo-operator"
"""Labels every rendered object, not the pods: the operator's informers select by it."""

SURGE_ANNOTATION = "nvidia.com/deployment-rolling-update-max-surge"
UNAVAILABLE_ANNOTATION = "nvidia.com/deployment-rolling-update-max-unavailable"
METRICS_ANNOTATION = "nvidia.com/enable-metrics"
DISCOVERY_ANNOTATION = "nvidia.com/dynamo-discovery-backend"
RESTART_ANNOTATION = "nvidia.com/restartAt"
"""On pod templates: the id of the last restart that was asked for."""
ADOPT_ANNOTATION = "nvidia.com/adopt-rendering"
"""On a graph, any new value: take over what a newer operator renders, pods are replaced."""
KEPT_REPLICAS_ANNOTATION = "nvidia.com/dynamo-kept-replicas"
"""On a workload: why it runs another number of replicas than its graph says."""

HTTP_PORT = 8000
EXT_PROC_PORT = 9002
GRPC_HEALTH_PORT = 9003
SYSTEM_PORT = 9090
PLANNER_METRICS_PORT = 9085
STREAM_PORT = 5557

LABEL_LIMIT = 63
HASH_LENGTH = 8
NAME_LIMIT = LABEL_LIMIT - HASH_LENGTH - 1
"""Longest object name; leaves room for `-<worker hash>`."""


def bounded(name: str, limit: int = LABEL_LIMIT) -> str:
    """`name`, or, where it is longer than `limit`, its beginning and a hash of the whole."""
    if len(name) <= limit:
        return name
    return f"{name[: limit - HASH_LENGTH - 1].rstrip('-_.')}-{short_hash(name)}"


def object_name(graph: str, component: str) -> str:
    """Name of a component's objects: `<graph>-<component lower>`, dots as hyphens, ≤ 54 chars."""
    return bounded(f"{graph}-{component}".lower().replace(".", "-"), NAME_LIMIT)


def service_name(graph: str, component: str) -> str:
    """Name of a component's Service. Kubernetes wants a letter first (RFC 1035); a graph whose
    name starts with a digit gets `s-` before it."""
    name = object_name(graph, component)
    return name if name[:1].isalpha() else bounded(f"s-{name}", NAME_LIMIT)


def adapter_name(graph: str, component: str) -> str:
    """Name of a component's scaling adapter; autoscalers address it, so only Kubernetes' limit
    for any object's name (253) shortens it."""
    return bounded(f"{graph}-{component.lower()}", 253)


def dynamo_namespace(namespace: str, graph: str, shared: bool) -> str:
    """Dynamo's own namespace of a graph: `<kubernetes namespace>-<graph>`, or `dynamo`."""
    return "dynamo" if shared else f"{namespace}-{graph}"
