"""One Service for each component, so that it has a stable name whatever its pods do."""

from dynamo_operator.render import names, notes
from dynamo_operator.render.merge import Json
from dynamo_operator.render.notes import Notes
from dynamo_operator.render.parts import Graph, Part

HTTP2 = "http2"


def service(part: Part, graph: Graph, noted: Notes) -> Json | None:
    """The component's Service; None if it has no known port."""
    if not part.service_ports:
        return None
    plain = names.object_name(graph.name, part.spec.name)
    name = names.service_name(graph.name, part.spec.name)
    if name != plain:
        message = f"Service {plain} is called {name}: a Service's name starts with a letter"
        noted.add(part.spec.name, notes.SERVICE_RENAMED, message)
    ports: list[Json] = []
    for port_name, target, number in part.service_ports:
        port: Json = {
            "name": port_name,
            "port": number,
            "protocol": "TCP",
            "targetPort": target,
        }
        if port_name == "grpc":
            port["appProtocol"] = HTTP2
        ports.append(port)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": graph.metadata(name, part.labels),
        "spec": {"type": "ClusterIP", "selector": _selector(part, graph), "ports": ports},
    }


def _selector(part: Part, graph: Graph) -> Json:
    """Labels of the component's pods that answer."""
    selector = part.selector(graph)
    return selector if part.every_node_serves else {**selector, names.NODE_LABEL: "0"}
