"""PodDisruptionBudgets: a drained node takes one pod of a component at a time."""

from dynamo_operator.render import names
from dynamo_operator.render.merge import Json
from dynamo_operator.render.overrides import Scale
from dynamo_operator.render.parts import Graph, Part

_KINDS = ("worker", "frontend", "epp")


def budget(part: Part, graph: Graph, scale: Scale) -> Json | None:
    """The component's budget, over the pods of all its generations; None for a single pod, which
    a budget could only either not protect or tie to its node."""
    meant = scale.replicas if scale.meant is None else scale.meant
    if part.kind not in _KINDS or meant in (0, 1):
        return None
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": graph.metadata(names.object_name(graph.name, part.spec.name), part.labels),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": part.selector(graph)}},
    }
