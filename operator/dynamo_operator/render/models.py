"""Models that components name (`modelRef`): how a DynamoModel finds the workers that serve its base
model.

Its controller looks for endpoints by the label of the model's hash, wherever they belong. So each
graph has a headless Service of its own for each model, and two graphs never fight over one.
"""

import hashlib
from collections.abc import Sequence

from dynamo_crds.v1beta1 import Component

from dynamo_operator.render import names
from dynamo_operator.render.merge import Json
from dynamo_operator.render.parts import Graph, Part


def model_hash(model: str) -> str:
    """Dynamo's hash of a model's name: the first 8 hex digits of its SHA-256."""
    return hashlib.sha256(model.encode()).hexdigest()[:8]


def labels(component: Component) -> dict[str, str]:
    """Labels of a component's pods that tell its model."""
    ref = component.model_ref
    return {} if ref is None else {names.MODEL_LABEL: model_hash(ref.name)}


def annotations(component: Component) -> dict[str, str]:
    """Annotations of a component's pods that tell its model: the label's hash, in plain text."""
    ref = component.model_ref
    return {} if ref is None else {names.MODEL_ANNOTATION: ref.name}


def services(parts: Sequence[Part], graph: Graph) -> list[Json]:
    """One headless Service for each model."""
    found: dict[str, Json] = {}
    for part in parts:
        ref = part.spec.model_ref
        if ref is None or ref.name in found or not part.service_ports:
            continue
        name, target, number = part.service_ports[-1]
        digest = model_hash(ref.name)
        metadata = graph.metadata(
            names.service_name(graph.name, f"model-{digest}"), {names.MODEL_LABEL: digest}
        )
        metadata["annotations"] = {
            **metadata.get("annotations", {}),
            names.MODEL_ANNOTATION: ref.name,
        }
        port = {"name": name, "port": number, "protocol": "TCP", "targetPort": target}
        found[ref.name] = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "clusterIP": "None",
                "selector": {**graph.label, names.MODEL_LABEL: digest},
                "ports": [port],
            },
        }
    return list(found.values())
