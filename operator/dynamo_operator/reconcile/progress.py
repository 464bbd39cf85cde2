"""Whether a workload still comes forward, or has stood still for longer than a start takes.

A Deployment's controller tells (`progressDeadlineSeconds`; workers have `DEADLINE_SECONDS` there).
That of a LeaderWorkerSet knows no deadline, but since when some of its groups have not been ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dynamo_operator.diagnosis.fields import condition, count, moment, text
from dynamo_operator.render.deployments import DEADLINE_SECONDS


def standstill(workload: Mapping[str, Any], now: datetime | None) -> str:
    """Why it is taken for standing still, in a few words; "" while it comes forward or is at rest,
    or its controller has yet to see its latest spec. `now`: None where time does not matter."""
    if text(workload, "kind") == "LeaderWorkerSet":
        left_s = _left_s(workload, now)
        return "groups are missing" if left_s is not None and left_s <= 0 else ""
    progressing = condition(workload, "Progressing")
    if progressing.get("reason") != "ProgressDeadlineExceeded":
        return ""
    if count(workload, "status", "observedGeneration") < count(workload, "metadata", "generation"):
        return ""
    return text(progressing, "message") or "no progress"


def look_again_s(workload: Mapping[str, Any], now: datetime | None) -> float | None:
    """In so many seconds it may stand still without anybody saying so; None: never."""
    left_s = _left_s(workload, now)
    return left_s if left_s is not None and left_s > 0 else None


def _left_s(workload: Mapping[str, Any], now: datetime | None) -> float | None:
    """Seconds that a LeaderWorkerSet has left to get its groups ready; None: nothing is awaited."""
    if text(workload, "kind") != "LeaderWorkerSet" or now is None:
        return None
    progressing = condition(workload, "Progressing")
    since = moment(progressing, "lastTransitionTime")
    if progressing.get("status") != "True" or since is None:
        return None
    if not count(workload, "spec", "replicas", default=1):
        return None
    return DEADLINE_SECONDS - (now - since).total_seconds()
