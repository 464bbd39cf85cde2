"""The status of a scaling adapter: what `kubectl scale` and a HorizontalPodAutoscaler read."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dynamo_operator.diagnosis.fields import INT32_MAX, at, count, text
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.reconcile.plan import Plan
from dynamo_operator.render import names
from dynamo_operator.status import facts
from dynamo_operator.status.facts import LEADER_WORKER_SET
from dynamo_operator.status.verdict import timestamp

LEADER = "leaderworkerset.sigs.k8s.io/worker-index=0"
"""One pod for each engine of several pods, so that an autoscaler counts engines."""


def adapter_status(
    adapter: Mapping[str, Any], observed: Observed, plan: Plan, now: datetime
) -> Json:
    """The whole status of an adapter of the graph, as `AdapterStatus` of v1beta1 has it.

    `replicas` are those that exist, of all generations; `selector` finds their pods;
    `lastScaleTime` is when the adapter's number last changed, which its generation tells.
    """
    name = text(adapter, "spec", "dgdRef", "componentName")
    component = next((c for c in plan.components if c.name == name), None)
    current, old = facts.workloads(component, observed) if component is not None else (None, ())
    labels = {
        names.GRAPH_LABEL: names.bounded(observed.name),
        names.COMPONENT_LABEL: name,
    }
    selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    if component is not None and component.workload_kind == LEADER_WORKER_SET:
        selector = f"{selector},{LEADER}"
    generation = count(adapter, "metadata", "generation", default=1)
    status: Json = {
        "replicas": min(sum(item.replicas for item in (current, *old) if item), INT32_MAX),
        "selector": selector,
        "observedGeneration": generation,
    }
    seen = at(adapter, "status", "observedGeneration")
    last = text(adapter, "status", "lastScaleTime")
    if isinstance(seen, int) and seen != generation:
        last = timestamp(now)
    if last:
        status["lastScaleTime"] = last
    return status
