"""Whether what a LeaderWorkerSet says of itself is about its latest templates.

Its status names no generation that it is about, as a Deployment's does. So for a moment after a
change all its groups still count as updated and ready. The leaders' pods tell whether they are:
they carry the worker hash and the restart id of the template they were made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dynamo_operator.diagnosis.fields import at, condition, count, label, text
from dynamo_operator.reconcile.observed import Json
from dynamo_operator.render import names


def is_updating(workload: Mapping[str, Any]) -> bool:
    """Whether groups are being replaced. Until they all have been, counts may be of old ones."""
    return condition(workload, "UpdateInProgress").get("status") == "True"


def is_current(workload: Mapping[str, Any], pods: Iterable[Json]) -> bool:
    """Whether the status of a LeaderWorkerSet, one of whose pods may be any of `pods`, has to do
    with its templates as they are: an update is under way, or every group that counts is of them.
    """
    if is_updating(workload):
        return True
    template = at(workload, "spec", "leaderWorkerTemplate", "leaderTemplate")
    name = text(workload, "metadata", "name")
    leaders = [
        _mark(pod) == _mark(template)
        for pod in pods
        if label(pod, names.GROUPS_LABEL) == name
        and label(pod, names.NODE_LABEL) == "0"
        and not at(pod, "metadata", "deletionTimestamp")
    ]
    counted = min(
        count(workload, "status", "replicas"), count(workload, "spec", "replicas", default=1)
    )
    return all(leaders) and len(leaders) >= counted


def _mark(template: Any) -> tuple[str, str]:
    """What tells templates apart: worker hash and restart id."""
    restart = text(template, "metadata", "annotations", names.RESTART_ANNOTATION)
    return label(template, names.WORKER_HASH_LABEL), restart
