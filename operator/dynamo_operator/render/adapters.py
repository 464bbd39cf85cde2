"""Scaling adapters: the object that HPA, KEDA and planners scale instead of the graph."""

from dynamo_operator.render import names
from dynamo_operator.render.merge import Json
from dynamo_operator.render.parts import Graph, Part


def adapter(part: Part, graph: Graph, replicas: int) -> Json | None:
    """The component's adapter with `replicas` to begin with; None if it has not opted in."""
    if part.spec.scaling_adapter is None:
        return None
    name = names.adapter_name(graph.name, part.spec.name)
    return {
        "apiVersion": f"{names.GROUP}/v1beta1",
        "kind": "DynamoGraphDeploymentScalingAdapter",
        "metadata": graph.metadata(name, part.labels),
        "spec": {
            "replicas": replicas,
            "dgdRef": {"name": graph.name, "componentName": part.spec.name},
        },
    }
