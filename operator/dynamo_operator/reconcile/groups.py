"""Whether what a LeaderWorkerSet says of itself is about its latest templates.

Its status names no generation that it is about, as a Deployment's does. So for a while after a
change all its groups still count as updated and ready. Their pods tell whether they are: each
carries the worker hash and the restart id of the template it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dynamo_operator.diagnosis.fields import at, condition, count, label, text
from dynamo_operator.diagnosis.pods import is_ready
from dynamo_operator.reconcile.observed import Json
from dynamo_operator.render import names


def is_updating(workload: Mapping[str, Any]) -> bool:
    """Whether groups are being replaced. Until they all have been, counts may be of old ones."""
    return condition(workload, "UpdateInProgress").get("status") == "True"


def is_current(workload: Mapping[str, Any], pods: Iterable[Json]) -> bool:
    """Whether the status of a LeaderWorkerSet, some of whose pods may be among `pods`, has to do
    with its templates as they are: an update is under way, or all groups that count are of them,
    and there are as many ready pods as it speaks of."""
    if is_updating(workload):
        return True
    group = at(workload, "spec", "leaderWorkerTemplate")
    wanted = count(workload, "spec", "replicas", default=1)
    name = text(workload, "metadata", "name")
    mine = [
        pod
        for pod in pods
        if label(pod, names.GROUPS_LABEL) == name and not at(pod, "metadata", "deletionTimestamp")
    ]
    leaders = sum(label(pod, names.NODE_LABEL) == "0" for pod in mine)
    ready = min(count(workload, "status", "readyReplicas"), wanted)
    return (
        all(_mark(pod) == _mark(at(group, "leaderTemplate")) for pod in mine)
        and leaders >= min(count(workload, "status", "replicas"), wanted)
        and sum(map(is_ready, mine)) >= ready * count(group, "size", default=1)
    )


def _mark(template: Any) -> tuple[str, str]:
    """What tells templates apart: worker hash and restart id."""
    restart = text(template, "metadata", "annotations", names.RESTART_ANNOTATION)
    return label(template, names.WORKER_HASH_LABEL), restart
