"""ConfigMaps: the configuration of a picker that is written into the graph."""

from dynamo_operator.render import names
from dynamo_operator.render.canonical import canonical
from dynamo_operator.render.defaults.epp import CONFIG_FILE
from dynamo_operator.render.merge import Json
from dynamo_operator.render.parts import Graph, Part

_HEAD = {"apiVersion": "inference.networking.x-k8s.io/v1alpha1", "kind": "EndpointPickerConfig"}
"""What a graph leaves out of the object that it holds."""


def picker_config(part: Part, graph: Graph) -> Json | None:
    """The ConfigMap of an inline `eppConfig.config` (as JSON, which is YAML too), else None."""
    config = part.spec.epp_config
    if config is None or config.config is None:
        return None
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": graph.metadata(names.object_name(graph.name, part.spec.name), part.labels),
        "data": {CONFIG_FILE: canonical({**_HEAD, **config.config}).decode()},
    }
