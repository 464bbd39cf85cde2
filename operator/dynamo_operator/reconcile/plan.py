"""What was decided for one graph: the common language of planning, applying and telling.

`planning` makes a `Plan` from an `Observed`; `apply` carries it out and adds what was refused;
`status` tells people. All of it is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynamo_operator.reconcile.observed import Json, Key
from dynamo_operator.render.notes import Note


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """What one component is meant to be."""

    name: str
    kind: str
    """"frontend", "worker", "planner", "epp" or ""."""
    role: str
    """As `kind`; for workers "worker", "prefill" or "decode"."""
    workload_kind: str
    """"Deployment", "LeaderWorkerSet", or "" if nothing runs for it."""
    workload: str
    """Name of the workload object that runs the current template."""
    replicas: int
    """Wanted replicas: the adapter's while one rules, else the graph's."""
    scaled_by: str = "graph"
    """Whose number that is: "graph", "adapter", "kept" (an adapter was removed and what ran stays),
    "outlived" (an autoscaler's, on a Deployment of an earlier generation), or the field manager of
    a foreign writer such as an autoscaler on the Deployment."""
    ignored_replicas: int | None = None
    """The graph's number, where an adapter or another writer rules and the numbers differ."""
    renumbered: bool = False
    """Whether the author has changed that number since the last plan."""
    old_workloads: tuple[str, ...] = ()
    """Workloads of earlier generations that still run."""


@dataclass(frozen=True, slots=True)
class Rollback:
    """The graph's workers run an earlier template because the wanted one failed."""

    failed_hash: str
    good_hash: str
    message: str
    """Why the wanted one failed, in one sentence."""


@dataclass(frozen=True, slots=True)
class RestartPlan:
    """A restart that was asked for. `phase` as in the status: Pending, Restarting, Completed, …"""

    id: str
    phase: str
    in_progress: tuple[str, ...] = ()
    stamps: Mapping[str, str] = field(default_factory=dict)
    """Component -> the restart id that its pods are to carry."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A write that the API server refused, in its own words."""

    object: str
    """`Deployment/vllm-worker`."""
    message: str
    component: str = ""
    transient: bool = False
    """Whether trying again may help (conflict, timeout, server error)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is to be true of one graph."""

    manifests: tuple[Json, ...] = ()
    """Objects to apply, in order."""
    seeds: Mapping[Key, int] = field(default_factory=dict)
    """Scaling adapters -> the replicas that they begin with, should they not exist yet."""
    scale: Mapping[Key, int] = field(default_factory=dict)
    """Workloads of earlier generations -> replicas they are to have."""
    delete: tuple[Key, ...] = ()
    """Children that are not wanted any more."""
    components: tuple[ComponentPlan, ...] = ()
    notes: tuple[Note, ...] = ()
    worker_hash: str = ""
    """Of the workers' templates that are rolled out."""
    rollback: Rollback | None = None
    restart: RestartPlan | None = None
    look_again_s: float | None = None
    """The graph is due in so many seconds even if nothing changes."""
    refused: tuple[Refused, ...] = ()
    """Filled by applying."""
