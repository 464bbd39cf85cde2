"""Kubernetes Events: what somebody who watches a graph wants to be told, once.

They come from the difference of two statuses alone, so that none is told twice, not even by another
operator that takes over. What becomes true again is counted where it was said (`tell`). That a
graph is not Ready while its numbers are being changed is no news.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dynamo_operator.diagnosis.fields import at, items, text
from dynamo_operator.reconcile.plan import Plan
from dynamo_operator.status.components import GRAPH_REPLICAS_IGNORED
from dynamo_operator.status.conditions import ROLLED_BACK, SCALING, STALLED
from dynamo_operator.status.rollout import COMPLETED, FAILED, IN_PROGRESS


@dataclass(frozen=True, slots=True)
class EventText:
    """One event about a graph."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def events(old: Mapping[str, Any], new: Mapping[str, Any], plan: Plan) -> tuple[EventText, ...]:
    """What to tell about the step from the status `old` to `new` under `plan`, in order."""
    return (
        *_rollout(old, new, plan),
        *_restart(old, new),
        *_appeared(old, new),
        *_degraded(old, new),
        *_ready(old, new),
        *_ignored(old, new),
    )


def _condition(status: Mapping[str, Any], type: str) -> Mapping[str, Any]:
    return next((c for c in items(status, "conditions") if c.get("type") == type), {})


def _ready(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventText]:
    before, now = _condition(old, "Ready"), _condition(new, "Ready")
    if now.get("status") == before.get("status"):
        return
    if now.get("status") == "True":
        if not _only_scales(old):
            yield EventText("Normal", "Ready", text(now, "message"))
    elif before.get("status") == "True" and not _only_scales(new):
        planned = now.get("reason") == "updating"
        kind: Literal["Normal", "Warning"] = "Normal" if planned else "Warning"
        yield EventText(kind, "NotReady", text(now, "message"))


def _only_scales(status: Mapping[str, Any]) -> bool:
    """Whether a changed number is all that keeps the graph from being Ready."""
    progressing = _condition(status, "Progressing")
    return (progressing.get("status"), progressing.get("reason")) == (
        "True",
        SCALING,
    ) and _condition(status, "Degraded").get("status") != "True"


def _degraded(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventText]:
    """What is wrong, under its own reason, unless another event tells it."""
    before, now = _condition(old, "Degraded"), _condition(new, "Degraded")
    told = {ROLLED_BACK, text(_condition(new, "RuntimeUnsupported"), "reason")}
    told.add(text(_condition(new, "NotRendered"), "reason"))
    if text(new, "rollingUpdate", "phase") == FAILED:
        told.add(STALLED)
    if now.get("status") != "True" or now.get("reason") in told:
        return
    if before.get("status") != "True" or before.get("reason") != now.get("reason"):
        yield EventText("Warning", text(now, "reason"), text(now, "message"))


def _appeared(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventText]:
    for type in ("RuntimeUnsupported", "NotRendered"):
        before, now = _condition(old, type), _condition(new, type)
        if now.get("status") == "True" and (
            before.get("status") != "True" or before.get("reason") != now.get("reason")
        ):
            yield EventText("Warning", text(now, "reason"), text(now, "message"))


def _rollout(old: Mapping[str, Any], new: Mapping[str, Any], plan: Plan) -> Iterator[EventText]:
    before, now = text(old, "rollingUpdate", "phase"), text(new, "rollingUpdate", "phase")
    again = at(old, "rollingUpdate", "startTime") != at(new, "rollingUpdate", "startTime")
    went_back = _condition(new, "RolledBack")
    if went_back.get("status") == "True" and _condition(old, "RolledBack").get("status") != "True":
        yield EventText("Warning", ROLLED_BACK, text(went_back, "message"))
    if now == before and not (again and now == IN_PROGRESS):
        return
    progress = text(_condition(new, "Progressing"), "message")
    if now == IN_PROGRESS and (again or before == COMPLETED):
        yield EventText("Normal", "RolloutStarted", progress)
    elif now == COMPLETED:
        yield EventText("Normal", "RolloutCompleted", "every component runs the new template")
    elif now == FAILED and plan.rollback is None:
        yield EventText("Warning", "RolloutStalled", progress)


def _restart(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventText]:
    before, now = at(old, "restart") or {}, at(new, "restart") or {}
    if now == before or not now:
        return
    id, phase = text(now, "observedID"), text(now, "phase")
    if (id, phase) == (text(before, "observedID"), text(before, "phase")):
        return
    if phase == "Completed" and not before and not at(old, "conditions"):
        return  # a graph that is new has nothing to restart
    kind: Literal["Normal", "Warning"] = "Warning" if phase == FAILED else "Normal"
    reason = "RestartStarted" if phase == "Restarting" else f"Restart{phase}"
    yield EventText(kind, reason, f"restart {id}: {phase.lower()}")


def _ignored(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventText]:
    """A number that was written into the graph while somebody else rules over it."""
    for name in at(new, "components") or {}:
        before = _condition(at(old, "components", name) or {}, "ScalingActive")
        now = _condition(at(new, "components", name), "ScalingActive")
        if now.get("reason") != GRAPH_REPLICAS_IGNORED:
            continue
        number = text(now, "message").partition(",")[0]  # `spec.components[W].replicas is 3`
        if not text(before, "message").startswith(f"{number},"):
            yield EventText("Warning", GRAPH_REPLICAS_IGNORED, text(now, "message"))
