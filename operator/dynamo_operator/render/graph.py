"""From a graph to manifests: each component's parts, then the objects in the order to apply them.

Pure and total: equal graphs give equal manifests, and no accepted graph raises. Manifests share
data with each other and with the graph: read them, copy before changing them.
"""

from dataclasses import dataclass

from dynamo_crds.v1beta1 import DynamoGraphDeployment

from dynamo_operator.render import (
    adapters,
    configmaps,
    deployments,
    names,
    pods,
    serviceaccounts,
    services,
    unrendered,
)
from dynamo_operator.render.merge import Json
from dynamo_operator.render.notes import Note, Notes
from dynamo_operator.render.parts import Graph, Part
from dynamo_operator.render.platform import Platform

Manifest = Json


@dataclass(frozen=True, slots=True)
class Rendered:
    """Manifests in the order to apply them, and what there is to say about them."""

    manifests: list[Manifest]
    notes: list[Note]


def render(graph: DynamoGraphDeployment, platform: Platform) -> list[Manifest]:
    """The manifests of `graph` on `platform`, in the order to apply them."""
    return render_with_notes(graph, platform).manifests


def render_with_notes(graph: DynamoGraphDeployment, platform: Platform) -> Rendered:
    """As `render`, with notes on what was changed, inferred or not rendered."""
    metadata = graph.metadata
    noted = Notes()
    whole = Graph(
        name=metadata.name or (metadata.generate_name or "graph").rstrip("-."),
        namespace=metadata.namespace or platform.namespace,
        spec=graph.spec,
        platform=platform,
        env=[entry.manifest() for entry in graph.spec.env],
        metadata_annotations=metadata.annotations,
    )
    unrendered.note_graph(graph.spec, noted)
    unrendered.note_v1alpha1(metadata.annotations, noted)
    unrendered.note_discovery(_discovery(whole), noted)
    parts: list[Part] = []
    for component in graph.spec.components:
        if component.multinode is not None:
            unrendered.note_multinode(component, noted)
            continue
        unrendered.note_component(component, noted)
        parts.append(pods.part(component, whole, noted))

    unrendered.note_pairing([part.role for part in parts], noted)
    generation = deployments.worker_hash(parts)
    deployments.stamp(parts, generation)
    if not deployments.generations_apart(parts):
        generation = ""
    manifests: list[Manifest | None] = []
    manifests += [serviceaccounts.account(part, whole) for part in parts]
    for part in parts:
        manifests += serviceaccounts.role(part, whole, parts, noted)
    manifests += [configmaps.picker_config(part, whole) for part in parts]
    manifests += [services.service(part, whole, noted) for part in parts]
    manifests += [deployments.deployment(part, whole, generation) for part in parts]
    manifests += [adapters.adapter(part, whole) for part in parts]
    return Rendered([manifest for manifest in manifests if manifest is not None], noted.items)


def _discovery(graph: Graph) -> str | None:
    return graph.spec.annotations.get(
        names.DISCOVERY_ANNOTATION, graph.metadata_annotations.get(names.DISCOVERY_ANNOTATION)
    )
