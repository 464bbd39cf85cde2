"""A graph behind a Gateway: the InferencePool that its picker serves, and the route to either that
or its frontend.

The route lets through what clients of a model need and nothing else: an engine's own server has
routes that load adapters and stop it.
"""

from collections.abc import Sequence

from dynamo_operator.render import names, notes
from dynamo_operator.render.merge import Json
from dynamo_operator.render.notes import Notes
from dynamo_operator.render.parts import Graph, Part

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/models",
)
MOST_PORTS = 8
"""Ports that an InferencePool can have."""
_POOL_GROUP, _, _POOL_KIND = names.INFERENCE_POOL.partition("/")
_GATEWAY_GROUP = names.HTTP_ROUTE.partition("/")[0]


def pool(part: Part, parts: Sequence[Part], graph: Graph, noted: Notes) -> Json | None:
    """The InferencePool of a picker's component, of all workers of its graph; else None."""
    if part.kind != "epp":
        return None
    if not graph.platform.serves(names.INFERENCE_POOL):
        message = (
            "InferencePools are not installed, so no Gateway can ask the picker; install the"
            " Gateway API Inference Extension"
        )
        noted.add(part.spec.name, notes.POOL_NEEDS_API, message)
        return None
    ports = _pool_ports(parts)
    if len(ports) > 1:
        message = (
            f"the graph's workers listen on different ports ({', '.join(map(str, ports))}); an"
            f" InferencePool has each of its ports on every pod, and at most {MOST_PORTS} of them"
        )
        noted.add(part.spec.name, notes.POOL_PORTS_DIFFER, message)
    picker = names.service_name(graph.name, part.spec.name)
    return {
        "apiVersion": f"{_POOL_GROUP}/v1",
        "kind": _POOL_KIND,
        "metadata": graph.metadata(names.pool_name(graph.name), part.labels),
        "spec": {
            "selector": {"matchLabels": {**graph.label, names.CLASS_LABEL: "worker"}},
            "targetPorts": [{"number": number} for number in ports[:MOST_PORTS]],
            "endpointPickerRef": {
                "kind": "Service",
                "name": picker,
                "port": {"number": names.EXT_PROC_PORT},
                "failureMode": "FailClose",
            },
        },
    }


def _pool_ports(parts: Sequence[Part]) -> list[int]:
    """Where the graph's workers take requests, without repetitions; at least one. The picker names
    an address and a port, and a Gateway sends to what the pool has."""
    found = [part.ports.get("http", names.HTTP_PORT) for part in parts if part.is_worker]
    return list(dict.fromkeys(found)) or [names.HTTP_PORT]


def route(parts: Sequence[Part], graph: Graph, noted: Notes) -> Json | None:
    """The HTTPRoute from the Gateway that the graph names; None if it names none."""
    wanted = graph.setting(names.GATEWAY_ANNOTATION)
    if not wanted:
        return None
    namespace, slash, name = wanted.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        message = f"{names.GATEWAY_ANNOTATION}: {wanted!r} is not [<namespace>/]<name> of a Gateway"
        noted.add("", notes.GATEWAY_UNREADABLE, message)
        return None
    if not graph.platform.serves(names.HTTP_ROUTE):
        message = f"Gateway {wanted} is asked for, but the Gateway API is not installed"
        noted.add("", notes.ROUTE_NEEDS_API, message)
        return None
    backend = _backend(parts, graph)
    if backend is None:
        message = f"Gateway {wanted} is asked for, but the graph has no frontend and no picker"
        noted.add("", notes.NOTHING_TO_ROUTE_TO, message)
        return None
    parent = {"group": _GATEWAY_GROUP, "kind": "Gateway", "name": name}
    if namespace:
        parent["namespace"] = namespace
    matches = [{"path": {"type": "Exact", "value": path}} for path in PATHS]
    return {
        "apiVersion": f"{_GATEWAY_GROUP}/v1",
        "kind": "HTTPRoute",
        "metadata": graph.metadata(names.route_name(graph.name), {}),
        "spec": {
            "parentRefs": [parent],
            "rules": [{"matches": matches, "backendRefs": [backend]}],
        },
    }


def _backend(parts: Sequence[Part], graph: Graph) -> Json | None:
    if any(part.kind == "epp" for part in parts):
        if not graph.platform.serves(names.INFERENCE_POOL):
            return None
        return {
            "group": _POOL_GROUP,
            "kind": _POOL_KIND,
            "name": names.pool_name(graph.name),
            "port": _pool_ports(parts)[0],
        }
    for part in parts:
        if part.kind == "frontend":
            service = names.service_name(graph.name, part.spec.name)
            return {"group": "", "kind": "Service", "name": service, "port": names.HTTP_PORT}
    return None
