"""One component with all that is decided about it, and the graph it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_crds.v1beta1 import Component, GraphSpec

from dynamo_operator.render import names
from dynamo_operator.render.merge import Json, mapping
from dynamo_operator.render.platform import Platform
from dynamo_operator.render.runtimes import Family

WORKER_ROLES = ("worker", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Graph:
    """What all components of a graph share."""

    name: str
    namespace: str
    spec: GraphSpec
    platform: Platform
    env: Sequence[Mapping[str, Any]]
    """The graph's `env`, as in a container."""
    metadata_annotations: Mapping[str, str]
    """Annotations of the graph object itself: settings for the operator, not passed on."""
    uid: str = ""
    """The graph object's, "" for one that no API server has seen."""
    pairing_secret: str = ""
    """The Secret that its pods know already; "" for none yet."""

    def setting(self, annotation: str, component: Component | None = None) -> str:
        """The annotation's value, the nearest winning: the component's pod template's, the
        graph's for all objects, the graph object's own; "" if nobody set it."""
        template = mapping(component.pod_template) if component is not None else {}
        for source in (
            mapping(mapping(template.get("metadata")).get("annotations")),
            self.spec.annotations,
            self.metadata_annotations,
        ):
            value = source.get(annotation)
            if isinstance(value, str) and value:
                return value
        return ""

    @property
    def wants_metrics(self) -> bool:
        return self.setting(names.METRICS_ANNOTATION) != "false"

    @property
    def label(self) -> Json:
        """The label that all of the graph's objects and pods have."""
        return {names.GRAPH_LABEL: names.bounded(self.name)}

    def metadata(self, name: str, labels: Mapping[str, str]) -> Json:
        """Metadata of a rendered object: the graph's `labels` and `annotations`, ours on top."""
        metadata: Json = {
            "name": name,
            "namespace": self.namespace,
            "labels": {
                **self.spec.labels,
                **labels,
                **self.label,
                names.MANAGED_BY_LABEL: names.MANAGED_BY,
            },
        }
        if self.spec.annotations:
            metadata["annotations"] = dict(self.spec.annotations)
        return metadata


@dataclass(slots=True)
class Part:
    """A component, its pods rendered."""

    spec: Component
    kind: str
    """"frontend", "worker", "planner", "epp", or "" for a component of no known type."""
    role: str
    """What the component-type label says: `kind`, for workers "worker"|"prefill"|"decode"."""
    family: Family
    templates: Mapping[str, Json]
    """Pod templates: {"pod": …} for a Deployment, {"leader": …, "worker": …} for a
    LeaderWorkerSet; without the worker hash."""
    labels: Mapping[str, str]
    """Labels of the component's objects."""
    ports: Mapping[str, int]
    """Named ports on which its main container listens."""
    service_ports: Sequence[tuple[str, str | int, int]]
    """Ports of its Service: name, target (name or number), number."""
    service_account: str
    """Service account of its pods; "" for the namespace's default."""
    own_account: bool
    """Whether that service account is rendered (not one that the author named)."""

    every_node_serves: bool = True
    """Whether each pod has a server of its own; False where a group's leader has the only one."""

    @property
    def workload_kind(self) -> str:
        return "Deployment" if self.spec.multinode is None else "LeaderWorkerSet"

    @property
    def nodes(self) -> int:
        """Pods of one engine."""
        return 1 if self.spec.multinode is None else self.spec.multinode.node_count

    @property
    def system_port(self) -> int | None:
        """Where the status server listens; None for an engine without one."""
        return self.ports.get("system")

    @property
    def is_worker(self) -> bool:
        return self.kind == "worker"

    @property
    def replicas(self) -> int:
        return 1 if self.spec.replicas is None else self.spec.replicas

    def selector(self, graph: Graph) -> Json:
        """Labels that pick this component's pods, of every generation."""
        return {**graph.label, names.COMPONENT_LABEL: self.spec.name}
