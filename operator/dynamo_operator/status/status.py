"""The status of a graph, put together: state, conditions, components, restart, rollout.

Equal worlds give equal statuses: times are kept while what they date stays, so that nothing is
written while nothing changes.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from dynamo_operator.diagnosis.fields import INT32_MAX, at, items, text
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.reconcile.plan import Plan, RestartPlan
from dynamo_operator.render import names
from dynamo_operator.status import components, conditions, facts
from dynamo_operator.status.facts import Component, ComponentFacts, GraphFacts
from dynamo_operator.status.rollout import rolling_update
from dynamo_operator.status.verdict import Verdict, condition


def graph_status(observed: Observed, plan: Plan, now: datetime) -> Json:
    """The whole status subresource of a graph, as `GraphStatus` of v1beta1 has it.

    `plan` is the plan as it was carried out, with what was refused; `now` is aware and dates what
    has changed since `observed.status`. Equal to that status if nothing has: then write nothing.
    """
    old = observed.status
    found = facts.gather(observed, plan)
    ready = conditions.ready(found)
    status: Json = {
        "state": _state(found, ready, text(old, "state")),
        "observedGeneration": observed.generation,
        "conditions": _conditions(found, old, now),
    }
    replicas = {
        component.name: _component(found, component, old, now)
        for component in found.components
        if component.rendered
    }
    if replicas:
        status["components"] = replicas
    if plan.restart is not None:
        status["restart"] = _restart(plan.restart)
    rollout = rolling_update(found, old, now)
    if rollout:
        status["rollingUpdate"] = rollout
    return status


def _state(found: GraphFacts, ready: Verdict, before: str) -> str:
    """Dynamo's summary: successful if and only if Ready is true; failed if somebody has to do
    something; initializing until the first workload exists; else pending."""
    if ready.status == "True":
        return "successful"
    if (
        any(not refusal.transient for refusal in found.refused)
        or found.plan.rollback is not None
        or any(
            component.stalled
            or component.unsupported
            or not component.rendered
            or any(group.trouble.lasting for group in component.groups)
            for component in found.components
        )
    ):
        return "failed"
    if before in ("", "initializing") and not any(c.workloads for c in found.components):
        return "initializing"
    return "pending"


def _conditions(found: GraphFacts, old: Mapping[str, Any], now: datetime) -> list[Json]:
    before = _by_type(old)
    verdicts: dict[str, Verdict] = {type: check(found) for type, check in conditions.GRAPH.items()}
    for type, (check, otherwise) in conditions.AT_TIMES.items():
        verdict = check(found)
        if verdict is not None:
            verdicts[type] = verdict
        elif type in before:
            verdicts[type] = otherwise
    return _dated(verdicts, before, found, now)


def _component(
    found: GraphFacts, component: Component, old: Mapping[str, Any], now: datetime
) -> Json:
    """A component's `ReplicaStatus`; counts are of all its generations, but for the updated."""
    it = ComponentFacts(found, component)
    verdicts = {
        type: verdict
        for type, verdict in (
            ("Available", components.available(it)),
            ("Routable", components.routable(it)),
            ("ScalingActive", components.scaling(it)),
        )
        if verdict is not None
    }
    before = _by_type(at(old, "components", component.name))
    shared = any(
        spec.name == component.name and bool(spec.global_dynamo_namespace)
        for spec in found.observed.graph.spec.components
    )
    namespace = names.dynamo_namespace(found.observed.namespace, found.observed.name, shared)
    return {
        "componentKind": component.plan.workload_kind,
        "componentNames": [
            component.plan.workload,
            *sorted(workload.name for workload in component.old),
        ],
        "runtimeNamespace": namespace,
        "replicas": _sum(workload.replicas for workload in component.workloads),
        "updatedReplicas": component.updated,
        "readyReplicas": _sum(workload.ready for workload in component.workloads),
        "availableReplicas": _sum(workload.available for workload in component.workloads),
        "conditions": _dated(verdicts, before, found, now),
    }


def _sum(counts: Iterable[int]) -> int:
    return min(sum(counts), INT32_MAX)


def _restart(restart: RestartPlan) -> Json:
    result: Json = {"observedID": restart.id, "phase": restart.phase}
    if restart.in_progress:
        result["inProgress"] = list(restart.in_progress)
    return result


def _by_type(status: Any) -> dict[str, Mapping[str, Any]]:
    return {text(item, "type"): item for item in items(status, "conditions")}


def _dated(
    verdicts: Mapping[str, Verdict],
    before: Mapping[str, Mapping[str, Any]],
    found: GraphFacts,
    now: datetime,
) -> list[Json]:
    generation = found.observed.generation
    return [
        condition(type, verdict, before.get(type, {}), generation, now)
        for type, verdict in verdicts.items()
    ]
