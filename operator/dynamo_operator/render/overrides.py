"""What the caller decides about a graph's workloads: replicas, restarts, templates to use again.

Rendering knows only the graph. Who scales a component, which restart its pods have seen and
whether an earlier rendering still counts depends on what is observed, so it comes in as data.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dynamo_operator.render.merge import Json


@dataclass(frozen=True, slots=True)
class Kept:
    """Pod templates of an earlier rendering that are to be used again, so that a newer operator
    restarts nothing and a rollback brings back exactly what ran."""

    worker_hash: str
    """The hash that the workers' templates had; 8 hex digits."""
    templates: Mapping[str, Mapping[str, Json]]
    """Component → its templates as in `RenderedComponent.templates`. A component that is not in
    it, or whose workload is of another kind by now, is rendered afresh."""
    groups_apart: bool = True
    """Whether the LeaderWorkerSets of workers had the hash in their names in any graph, not only
    where prefill and decode are apart."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The replicas of one workload."""

    replicas: int | None
    """None leaves the field out: another writer owns it."""
    marker: str = ""
    """Value of the workload's annotation `nvidia.com/dynamo-kept-replicas`; "" for none."""
    meant: int | None = None
    """What it is to have in the end, where a rollout by generations has it at fewer for now; None:
    `replicas`."""
