"""Restarts that a graph asks for: `spec.restart`, one component after the other or all at once.

The pods' templates carry the id of the last restart. Stamping a new one makes Kubernetes replace
the pods; the stamp on the workload tells how far a restart is, so that nothing else has to be
remembered. The annotation and the strategies are Dynamo's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynamo_crds.parts import Restart

from dynamo_operator.reconcile import groups
from dynamo_operator.reconcile.observed import Json
from dynamo_operator.reconcile.plan import RestartPlan
from dynamo_operator.render import names

COMPLETED = "Completed"


def stamp(workload: Mapping[str, Any]) -> str:
    """The restart id on a workload's pods; "" if there is none."""
    spec = workload.get("spec") or {}
    template = spec.get("template") or (spec.get("leaderWorkerTemplate") or {}).get(
        "workerTemplate"
    )
    metadata = (template or {}).get("metadata") or {}
    return str((metadata.get("annotations") or {}).get(names.RESTART_ANNOTATION, ""))


def settled(workload: Mapping[str, Any], pods: Iterable[Json]) -> bool:
    """Whether all of a workload's pods run its template and are available, and no others exist.
    `pods` are all of the graph's."""
    wanted = int((workload.get("spec") or {}).get("replicas", 1))
    status = workload.get("status") or {}
    generation = int(workload["metadata"].get("generation", 1))
    if "leaderWorkerTemplate" in (workload.get("spec") or {}):
        if groups.is_updating(workload) or not groups.is_current(workload, pods):
            return False
        counts = (status.get("updatedReplicas", 0), status.get("readyReplicas", 0))
    elif int(status.get("observedGeneration", 0)) < generation:
        return False
    else:
        counts = (status.get("updatedReplicas", 0), status.get("availableReplicas", 0))
    return all(int(count) == wanted for count in (*counts, status.get("replicas", 0)))


def plan(
    wanted: Restart | None,
    components: Sequence[str],
    workloads: Mapping[str, Json],
    pods: Sequence[Json],
    completed: str = "",
) -> RestartPlan | None:
    """How far the wanted restart is and which stamps the components' pods are to carry.

    `components` in the order of the graph; `workloads`: component -> the live workload of the
    current generation, where there is one; `pods` of the graph; `completed`: id of a restart that
    is over, whatever happens to pods later. Without a wanted restart the stamps stay as they are:
    taking one away would restart the pods once more.
    """
    stamps = {name: stamp(workload) for name, workload in workloads.items() if stamp(workload)}
    if wanted is None:
        return RestartPlan("", "", (), stamps) if stamps else None
    if wanted.id == completed:
        return RestartPlan(wanted.id, COMPLETED, (), stamps)
    parallel = wanted.strategy is not None and wanted.strategy.type == "Parallel"
    order = list(wanted.strategy.order) if wanted.strategy and wanted.strategy.order else []
    order = [name for name in order if name in components]
    order += [name for name in components if name not in order]
    in_progress: list[str] = []
    for name in order:
        workload = workloads.get(name)
        if workload is None:
            stamps[name] = wanted.id  # its pods will be new anyway
            continue
        if stamps.get(name) == wanted.id and settled(workload, pods):
            continue
        if in_progress and not parallel:
            continue
        stamps[name] = wanted.id
        in_progress.append(name)
    phase = "Restarting" if in_progress else COMPLETED
    return RestartPlan(wanted.id, phase, tuple(in_progress), stamps)
