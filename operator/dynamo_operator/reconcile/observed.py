"""What the operator sees of one graph at one moment: the only input of everything that decides.

A reconcile gathers this once from the informers' caches and then computes; nothing that decides
asks the API server. Objects are raw JSON as the API server gave them, without what the informers
cut off to save memory (other managers' `managedFields`). Read them, never change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dynamo_crds.v1beta1 import DynamoGraphDeployment

Json = dict[str, Any]

Key = tuple[str, str]
"""kind, name: of an object in the graph's namespace."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One graph and everything of it that exists."""

    graph: DynamoGraphDeployment
    raw: Json
    """The graph as the API server has it: spec, status, metadata."""
    children: Mapping[Key, Json] = field(default_factory=dict)
    """Objects that the graph owns, and those with its label that an orphaning deletion of a graph
    of its name has left: Deployments, LeaderWorkerSets, Services, adapters, ControllerRevisions, …
    """
    pods: tuple[Json, ...] = ()
    """Pods with the graph's label."""
    apis: frozenset[str] = frozenset()
    """Kinds that the API server serves, as `group/Kind`: `gateway.networking.k8s.io/HTTPRoute`."""

    at: datetime | None = None
    """When that was, in UTC; None where time does not matter."""

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.raw["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"]["uid"])

    @property
    def generation(self) -> int:
        return int(self.raw["metadata"].get("generation", 1))

    @property
    def status(self) -> Mapping[str, Any]:
        """The status as it was last written; empty for a graph that was never reconciled."""
        return self.raw.get("status") or {}

    @property
    def annotations(self) -> Mapping[str, str]:
        """The graph object's own annotations: settings for the operator."""
        return self.raw["metadata"].get("annotations") or {}

    def of_kind(self, kind: str) -> Iterator[Json]:
        """The children of one kind, by name."""
        for (child_kind, _), child in sorted(self.children.items()):
            if child_kind == kind:
                yield child
