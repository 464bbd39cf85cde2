"""NetworkPolicies: a worker's engine is reached by what its graph has for that.

An engine's HTTP server has routes that load adapters, move weights and stop it, its stream tells
what others ask, and a prefill worker hands out the cache of any prompt. So each worker's component
admits pickers and the planner, which reads the engine's metrics; the other side of a KV transfer
(its connections take ports as they come, so all of them); the nodes of its own group; and, on the
status port only, everybody, for Prometheus.

The kubelet's probes come from the pod's own node, which network plugins always let through.
"""

from collections.abc import Sequence

from dynamo_operator.render import names
from dynamo_operator.render.merge import Json
from dynamo_operator.render.parts import Graph, Part
from dynamo_operator.render.runtimes import Family

_PICKERS = {"frontend", "epp"}
_ADMITTED = ["frontend", "epp", "planner"]
_OTHER_SIDE = {"prefill": "decode", "decode": "prefill"}


def policy(part: Part, parts: Sequence[Part], graph: Graph) -> Json | None:
    """The policy of a worker's component; None for others, in a graph that has no picker (its
    engines are asked directly), and where the author switched policies off."""
    if not part.is_worker or graph.setting(names.NETWORK_POLICY_ANNOTATION) == "false":
        return None
    pickers = {other.kind for other in parts} & _PICKERS
    if not pickers:
        return None
    rules: list[Json] = [{"from": [_admitted(part, graph)]}]
    if other_side := _OTHER_SIDE.get(part.role):
        rules.append(_from({**graph.label, names.TYPE_LABEL: other_side}))
    if part.nodes > 1:
        rules.append(_from(part.selector(graph)))
    open_ports = [part.system_port] if part.system_port is not None else []
    if part.family is Family.FOREIGN:
        # Dynamo's own processes call each other on ports that only they know.
        rules.append(_from(graph.label))
        open_ports.append(names.TELEMETRY_PORT)
    if "epp" in pickers:
        # The Gateway's proxy asks the engine, and may stand anywhere.
        open_ports.append(part.ports.get("http", names.HTTP_PORT))
    if open_ports:
        ports = [{"port": port, "protocol": "TCP"} for port in dict.fromkeys(open_ports)]
        rules.append({"ports": ports})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": graph.metadata(names.object_name(graph.name, part.spec.name), part.labels),
        "spec": {
            "podSelector": {"matchLabels": part.selector(graph)},
            "policyTypes": ["Ingress"],
            "ingress": rules,
        },
    }


def _from(labels: Json) -> Json:
    return {"from": [{"podSelector": {"matchLabels": labels}}]}


def _admitted(part: Part, graph: Graph) -> Json:
    """Pickers and planners of the graph; of every graph for a worker that all of them share."""
    selector: Json = {
        "matchExpressions": [{"key": names.TYPE_LABEL, "operator": "In", "values": _ADMITTED}]
    }
    if not part.spec.global_dynamo_namespace:
        selector["matchLabels"] = graph.label
    return {"podSelector": selector}
