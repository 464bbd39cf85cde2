"""`status.rollingUpdate`: how far the graph's last rollout is, carried over from status to status.

A rollout is pods of an earlier template being replaced; the first start of a graph, scaling and
restarts are none. Phases are Dynamo's: InProgress until every component has settled, then
Completed; Failed once it stops coming forward or has been taken back.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dynamo_operator.diagnosis.fields import at, text
from dynamo_operator.reconcile.observed import Json
from dynamo_operator.status.facts import GraphFacts
from dynamo_operator.status.verdict import timestamp

IN_PROGRESS = "InProgress"
COMPLETED = "Completed"
FAILED = "Failed"


def rolling_update(facts: GraphFacts, status: Mapping[str, Any], now: datetime) -> Json:
    """The rollout's state; `status` is the graph's until now. Empty if there never was one."""
    old: Mapping[str, Any] = at(status, "rollingUpdate") or {}
    before = text(old, "phase")
    phase = _phase(facts, before)
    if not phase or phase == before == COMPLETED:
        return dict(old)
    same = before == IN_PROGRESS or (
        before == FAILED and at(status, "observedGeneration") == facts.observed.generation
    )
    result: Json = {
        "phase": phase,
        "startTime": (text(old, "startTime") if same else "") or timestamp(now),
    }
    if phase != IN_PROGRESS:
        ended = text(old, "endTime") if phase == before else ""
        result["endTime"] = ended or timestamp(now)
    went_back = facts.plan.rollback is not None
    updated = [
        component.name
        for component in facts.components
        if component.settled and not (went_back and component.plan.kind == "worker")
    ]
    if updated:
        result["updatedComponents"] = updated
    return result


def _phase(facts: GraphFacts, before: str) -> str:
    """The phase now; "" if `before` simply stays."""
    restart = facts.plan.restart
    restarting = restart.in_progress if restart is not None else ()
    rolling = any(c.rolling for c in facts.components if c.name not in restarting)
    under_way = before in ("Pending", IN_PROGRESS, FAILED)
    settled = all(component.settled for component in facts.components if component.rendered)
    stalled = any(component.stalled for component in facts.components)
    if facts.plan.rollback is not None or (stalled and (rolling or under_way)):
        return FAILED
    if rolling or (under_way and before != FAILED and not settled):
        return IN_PROGRESS
    if under_way and settled:
        return COMPLETED
    return before if before == COMPLETED else ""
