"""From a graph to manifests: each component's parts, then the objects in the order to apply them.

Pure and total: equal graphs give equal manifests, and no accepted graph raises. Manifests share
data with each other and with the graph: read them, copy before changing them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dynamo_crds import v1alpha1
from dynamo_crds.conversion import SAID_IN_V1ALPHA1, said_in_v1alpha1
from dynamo_crds.v1beta1 import DynamoGraphDeployment

from dynamo_operator.render import (
    adapters,
    budgets,
    claims,
    configmaps,
    deployments,
    gateways,
    leaderworkersets,
    models,
    monitors,
    names,
    networkpolicies,
    pairing,
    pods,
    scaling,
    serviceaccounts,
    services,
    unrendered,
)
from dynamo_operator.render.merge import Json
from dynamo_operator.render.notes import Note, Notes
from dynamo_operator.render.overrides import Kept, Scale
from dynamo_operator.render.parts import Graph, Part
from dynamo_operator.render.platform import Platform
from dynamo_operator.render.runtimes import Family

Manifest = Json


@dataclass(frozen=True, slots=True)
class RenderedComponent:
    """What became of one component."""

    name: str
    kind: str
    """"frontend", "worker", "planner", "epp", or "" for a component of no known type."""
    role: str
    """As `kind`; for workers "worker", "prefill" or "decode"."""
    family: Family
    """What its program is to the platform."""
    workload_kind: str
    """"Deployment", "LeaderWorkerSet", or "" where nothing runs for it."""
    workload: str
    """Name of that workload; "" for none."""
    templates: Mapping[str, Json]
    """Its pod templates, {"pod": …} or {"leader": …, "worker": …}, as `Kept` takes them: without
    the label of the worker hash and without restart stamps."""
    replicas: int
    """The graph's number."""
    selector: Mapping[str, str]
    """Labels that pick the workload's pods."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Manifests in the order to apply them, and what there is to say about them."""

    manifests: list[Manifest]
    notes: list[Note]
    components: tuple[RenderedComponent, ...]
    worker_hash: str
    """Of the workers' templates, 8 hex digits: the kept one where templates are kept."""
    generation: str
    """`worker_hash` where it is part of all workers' names and selectors, else ""."""


def render(graph: DynamoGraphDeployment, platform: Platform) -> list[Manifest]:
    """The manifests of `graph` on `platform`, in the order to apply them."""
    return render_with_notes(graph, platform).manifests


def render_with_notes(
    graph: DynamoGraphDeployment,
    platform: Platform,
    *,
    kept: Kept | None = None,
    pairing_secret: str = "",
    scale: Mapping[str, Scale] = MappingProxyType({}),
    restarts: Mapping[str, str] = MappingProxyType({}),
) -> Rendered:
    """As `render`, with notes on what was changed, inferred or not rendered.

    `kept`: templates that take the place of those of this rendering. `pairing_secret`: the Secret
    of the graph's prefill and decode workers, if its pods know one already. `scale`: component →
    its replicas where they aren't the graph's. `restarts`: component → id of the restart that its
    pods are to have seen; they are replaced when it changes.
    """
    metadata = graph.metadata
    noted = Notes()
    whole = Graph(
        name=metadata.name or (metadata.generate_name or "graph").rstrip("-."),
        namespace=metadata.namespace or platform.namespace,
        spec=graph.spec,
        platform=platform,
        env=[entry.manifest() for entry in graph.spec.env],
        metadata_annotations=metadata.annotations,
        uid=metadata.uid or "",
        pairing_secret=pairing_secret,
    )
    unrendered.note_graph(graph.spec, noted)
    said = _said_in_v1alpha1(graph)
    unrendered.note_v1alpha1(said, noted)
    unrendered.note_discovery(whole.setting(names.DISCOVERY_ANNOTATION), noted)
    parts: list[Part] = []
    components: list[RenderedComponent] = []
    for component in graph.spec.components:
        if component.multinode is not None and not platform.serves(names.LEADER_WORKER_SET):
            unrendered.note_multinode(component, noted)
            components.append(_left_out(pods.part(component, whole, noted), whole))
            continue
        unrendered.note_component(component, noted)
        parts.append(pods.part(component, whole, noted))

    pairing.give_secret(parts, whole)
    scaling.tell_planners(parts, whole)
    worker_hash = kept.worker_hash if kept is not None else deployments.worker_hash(parts)
    workloads: list[Manifest] = []
    others: list[Manifest | None] = []
    for part in parts:
        name = part.spec.name
        part.templates = deployments.reused(part, kept)
        sized = scale.get(name, Scale(part.replicas))
        stamp = worker_hash if part.is_worker else ""
        generation = deployments.generation(part, parts, worker_hash, kept)
        stamped = {
            which: deployments.stamped(template, stamp, restarts.get(name))
            for which, template in part.templates.items()
        }
        workloads.append(
            deployments.deployment(part, whole, generation, stamped["pod"], sized)
            if part.workload_kind == "Deployment"
            else leaderworkersets.leader_worker_set(part, whole, generation, stamped, sized)
        )
        others.append(budgets.budget(part, whole, sized))
        others.append(networkpolicies.policy(part, parts, whole))
        seed = part.replicas if sized.replicas is None else sized.replicas
        others.append(adapters.adapter(part, whole, seed))
        components.append(
            RenderedComponent(
                name=name,
                kind=part.kind,
                role=part.role,
                family=part.family,
                workload_kind=part.workload_kind,
                workload=deployments.workload_name(part, whole, generation),
                templates=part.templates,
                replicas=part.replicas,
                selector=deployments.selector(part, whole, generation),
            )
        )

    manifests: list[Manifest | None] = []
    manifests += [serviceaccounts.account(part, whole) for part in parts]
    for part in parts:
        manifests += serviceaccounts.role(part, whole, parts, noted)
    manifests += pairing.secrets(parts, whole)
    manifests += [configmaps.picker_config(part, whole) for part in parts]
    manifests += claims.claims(said, whole)
    manifests += [services.service(part, whole, noted) for part in parts]
    manifests += models.services(parts, whole)
    manifests += workloads
    manifests += others
    manifests += [gateways.pool(part, parts, whole, noted) for part in parts]
    manifests.append(gateways.route(parts, whole, noted))
    manifests.append(monitors.monitor(parts, whole, noted))
    return Rendered(
        manifests=[manifest for manifest in manifests if manifest is not None],
        notes=noted.ordered(),
        components=tuple(components),
        worker_hash=worker_hash,
        generation=worker_hash if deployments.is_split(parts) else "",
    )


def _left_out(part: Part, graph: Graph) -> RenderedComponent:
    """A component for which nothing can run."""
    return RenderedComponent(
        name=part.spec.name,
        kind=part.kind,
        role=part.role,
        family=part.family,
        workload_kind="",
        workload="",
        templates={},
        replicas=part.replicas,
        selector=part.selector(graph),
    )


def _said_in_v1alpha1(graph: DynamoGraphDeployment) -> v1alpha1.GraphSpec:
    """What a graph written in v1alpha1 says beyond v1beta1; nothing where the record of it was
    changed to something that makes no sense."""
    if SAID_IN_V1ALPHA1 in graph.metadata.annotations:
        try:
            return said_in_v1alpha1(graph)
        except ValueError:
            pass
    return v1alpha1.GraphSpec()
