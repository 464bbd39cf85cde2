"""One component with all that is decided about it, and the graph it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_crds.v1beta1 import Component, GraphSpec

from dynamo_operator.render import names
from dynamo_operator.render.merge import Json
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

    def metadata(self, name: str, labels: Mapping[str, str]) -> Json:
        """Metadata of a rendered object: the graph's `labels` and `annotations`, ours on top."""
        metadata: Json = {
            "name": name,
            "namespace": self.namespace,
            "labels": {
                **self.spec.labels,
                **labels,
                names.GRAPH_LABEL: names.bounded(self.name),
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
    service_ports: Sequence[tuple[str, str | int, int]]
    """Ports of its Service: name, target (name or number), number."""
    service_account: str
    """Service account of its pods; "" for the namespace's default."""
    own_account: bool
    """Whether that service account is rendered (not one that the author named)."""

    @property
    def workload_kind(self) -> str:
        return "Deployment"

    @property
    def is_worker(self) -> bool:
        return self.kind == "worker"

    @property
    def replicas(self) -> int:
        return 1 if self.spec.replicas is None else self.spec.replicas

    def selector(self, graph: Graph) -> Json:
        """Labels that pick this component's pods, of every generation."""
        return {
            names.GRAPH_LABEL: names.bounded(graph.name),
            names.COMPONENT_LABEL: self.spec.name,
        }
