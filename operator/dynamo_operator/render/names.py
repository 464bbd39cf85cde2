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
MODEL_LABEL = "nvidia.com/dynamo-base-model-hash"
MODEL_ANNOTATION = "nvidia.com/dynamo-base-model"
GROUPS_LABEL = "leaderworkerset.sigs.k8s.io/name"
"""Put on pods of a LeaderWorkerSet by its controller: the set's name."""
NODE_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"
"""As above; "0" on the leader's."""
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "dynamo-operator"
"""Labels every rendered object, not the pods: the operator's informers select by it."""

ROLLBACK_ANNOTATION = "nvidia.com/auto-rollback"
SURGE_ANNOTATION = "nvidia.com/deployment-rolling-update-max-surge"
UNAVAILABLE_ANNOTATION = "nvidia.com/deployment-rolling-update-max-unavailable"
METRICS_ANNOTATION = "nvidia.com/enable-metrics"
EXECUTOR_ANNOTATION = "nvidia.com/vllm-distributed-executor-backend"
PULL_SECRETS_ANNOTATION = "nvidia.com/disable-image-pull-secret-discovery"
GATEWAY_ANNOTATION = "nvidia.com/gateway"
"""On a graph, `[<namespace>/]<name>`: the Gateway that sends it requests. Ours."""
NETWORK_POLICY_ANNOTATION = "nvidia.com/network-policy"
"""On a graph, "false": its workers may be reached from anywhere. Ours."""
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
TELEMETRY_PORT = 19090
"""Where NIXL exports its metrics in Dynamo's own workers."""

LEADER_WORKER_SET = "leaderworkerset.x-k8s.io/LeaderWorkerSet"
INFERENCE_POOL = "inference.networking.k8s.io/InferencePool"
MODEL_RULES = ("inferenceobjectives", "inferencemodelrewrites")
"""What people say of the models of an InferencePool…"""
MODEL_RULE_GROUPS = ("inference.networking.x-k8s.io", "llm-d.ai")
"""…in either of two API groups."""
HTTP_ROUTE = "gateway.networking.k8s.io/HTTPRoute"
POD_MONITOR = "monitoring.coreos.com/PodMonitor"
OPTIONAL_KINDS = frozenset({LEADER_WORKER_SET, INFERENCE_POOL, HTTP_ROUTE, POD_MONITOR})
"""Kinds that not every API server serves, as `group/Kind`."""

PAIRING_SECRET_KEY = "secret"
"""Key in the Secret that prefill, decode and pickers share."""

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


def pairing_secret(graph: str, uid: str) -> str:
    """Name of the Secret that a graph's pickers, prefill and decode workers share:
    `<graph>-prefill-decode[-<hash of uid>]`.

    Another graph of the same name, made while this one's objects are still being collected, must
    not meet its Secret. A graph that no API server has seen has no `uid` ("").
    """
    name = object_name(graph, "prefill-decode")
    return f"{name}-{short_hash(uid)}" if uid else name


def group_name(graph: str, component: str, generation: str) -> str:
    """Name of a component's LeaderWorkerSet: `<graph>-<component lower>-group[-<generation>]`.

    At most 48 characters, because the controllers behind it append indexes and a revision to it in
    labels; and other than the component's Service, because it makes a Service of its own name.
    """
    name = f"{bounded(service_name(graph, component), 48 - len('-group-') - HASH_LENGTH)}-group"
    return f"{name}-{generation}" if generation else name


def service_name(graph: str, component: str) -> str:
    """Name of a component's Service. Kubernetes wants a letter first (RFC 1035); a graph whose
    name starts with a digit gets `s-` before it."""
    name = object_name(graph, component)
    return name if name[:1].isalpha() else bounded(f"s-{name}", NAME_LIMIT)


def pool_name(graph: str) -> str:
    """Name of a graph's InferencePool."""
    return bounded(f"{graph}-pool")


def route_name(graph: str) -> str:
    """Name of a graph's HTTPRoute."""
    return bounded(f"{graph}-route")


def adapter_name(graph: str, component: str) -> str:
    """Name of a component's scaling adapter; autoscalers address it, so only Kubernetes' limit
    for any object's name (253) shortens it."""
    return bounded(f"{graph}-{component.lower()}", 253)


def dynamo_namespace(namespace: str, graph: str, shared: bool) -> str:
    """Dynamo's own namespace of a graph: `<kubernetes namespace>-<graph>`, or `dynamo`."""
    return "dynamo" if shared else f"{namespace}-{graph}"
