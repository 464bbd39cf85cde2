"""For every world, however odd: a valid status comes out, it rests, and Ready is true of it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from dynamo_crds.v1beta1 import AdapterStatus, GraphStatus
from dynamo_operator.diagnosis.pods import trouble
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.reconcile.ownership import APPLIED_ANNOTATION
from dynamo_operator.reconcile.plan import ComponentPlan, Plan, Refused, RestartPlan, Rollback
from dynamo_operator.render.notes import Note
from dynamo_operator.status import adapter_status, events, graph_status
from hypothesis import given
from hypothesis import strategies as st

from tests.operator import objects

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
NAMES = ("frontend", "worker", "epp", "planner", "Prefill")
RULERS = ("graph", "adapter", "kept", "outlived", "kube-controller-manager")

JUNK: list[Any] = [
    None,
    True,
    -1,
    2**40,
    1.5,
    "",
    "x",
    "\x00\x1b[31m\ud7ff",
    [],
    [None],
    {},
    {"a": 1},
]

PODS: list[Callable[..., Json]] = [
    objects.pod_ready,
    objects.pod_starting,
    objects.pod_unready,
    objects.pod_unschedulable,
    objects.pod_waiting,
    objects.pod_unpullable,
    objects.pod_crashing,
    objects.pod_evicted,
]


@st.composite
def mangled(draw: st.DrawFn, value: Json, most: int = 4) -> Json:
    """`value` with up to `most` fields, at any depth, taken away or replaced by junk."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        at: Any = value
        while True:
            if not isinstance(at, dict | list) or not at:
                break
            keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from(keys))
            below = at[key]
            if isinstance(below, dict | list) and below and draw(st.booleans()):
                at = below
                continue
            if draw(st.booleans()):
                del at[key]
            else:
                at[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            break
    return value


@st.composite
def pods(draw: st.DrawFn) -> Json:
    build = draw(st.sampled_from(PODS))
    pod = build(draw(st.sampled_from(NAMES)), number=draw(st.integers(0, 9)))
    return draw(mangled(pod))


counts = st.integers(0, 3)


@st.composite
def workloads(draw: st.DrawFn, name: str, object_name: str, calm: bool) -> Json:
    """A Deployment; its counts are in order if `calm`, and often if not."""
    wanted = draw(counts)
    if calm or draw(st.booleans()):
        return objects.deployment(name, wanted, object_name=object_name, mark="new")
    return objects.deployment(
        name,
        wanted,
        object_name=object_name,
        replicas=draw(counts),
        updated=draw(counts),
        available=draw(counts),
        seen=draw(st.sampled_from([1, 2])),
        mark=draw(st.sampled_from(["new", "old", ""])),
        stalled=draw(st.booleans()),
        refused=draw(st.sampled_from(["", "exceeded quota: gpus"])),
    )


REFUSED = st.builds(
    Refused,
    st.sampled_from(["Deployment/g-worker", "Service/g-worker", "Role/x"]),
    st.sampled_from(["no", ""]),
    st.sampled_from(["worker", "", "gone"]),
    st.booleans(),
)
NOTES = st.builds(
    Note,
    st.sampled_from(["worker", "frontend", ""]),
    st.sampled_from(["RuntimeUnsupported", "GroveNotRendered", "RuntimeMapped"]),
    st.sampled_from(["this", "that"]),
)


@st.composite
def worlds(draw: st.DrawFn, mangle: bool = False) -> tuple[Observed, Plan]:
    """What is observed of a graph, and a plan for it; every other one is nearly well."""
    calm = not mangle and draw(st.booleans())
    children: dict[tuple[str, str], Json] = {}
    planned: list[ComponentPlan] = []
    manifests: list[Json] = []
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3)):
        current, old = f"g-{name.lower()}", f"g-{name.lower()}-old"
        for object_name in (current, old):
            if object_name == current or (not calm and draw(st.booleans())):
                child = draw(workloads(name, object_name, calm))
                children["Deployment", object_name] = draw(mangled(child)) if mangle else child
        found = children["Deployment", current]
        number = found.get("spec", {}).get("replicas", 1) if not mangle else 1
        kinds = ["Deployment"] * 8 + ["LeaderWorkerSet", ""]
        kind = draw(st.sampled_from(kinds[:1] if calm else kinds))
        ruled = draw(st.sampled_from(RULERS))
        planned.append(
            objects.component(
                name,
                draw(st.sampled_from([number, number, number, 1])),
                workload_kind=kind,
                workload=current if kind else "",
                old_workloads=(old,),
                scaled_by=ruled,
                ignored_replicas=draw(st.sampled_from([None, 7])),
            )
        )
        manifests.append(
            {
                "kind": "Deployment",
                "metadata": {"name": current, "annotations": {APPLIED_ANNOTATION: "new"}},
            }
        )
    plan = Plan(
        manifests=tuple(manifests),
        components=tuple(planned),
        notes=tuple(draw(st.lists(NOTES, max_size=0 if calm else 2))),
        refused=tuple(draw(st.lists(REFUSED, max_size=0 if calm else 1))),
        rollback=draw(st.sampled_from([None, None, None, Rollback("b", "a", "it crashes")])),
        restart=draw(
            st.sampled_from([None, None, RestartPlan("r", "Restarting", ("worker",))]),
        ),
    )
    observed = replace(objects.observed(pods=draw(st.lists(pods(), max_size=4))), children=children)
    return observed, plan


@given(pods())
def test_every_pod_has_its_trouble_told(pod: Json) -> None:
    found = trouble(pod)
    assert found is None or found.reason


@given(worlds(mangle=True), worlds(mangle=True))
def test_every_world_has_a_valid_status_that_rests(
    first: tuple[Observed, Plan], second: tuple[Observed, Plan]
) -> None:
    """From any status before, the next one is valid, and seen again nothing is left to write."""
    before: Json = {}
    for generation, (observed, plan) in enumerate((first, second), start=1):
        seen = objects.with_status(observed, before, generation)
        status = graph_status(seen, plan, NOW)
        assert GraphStatus.model_validate(status).manifest() == status
        events(before, status, plan)
        later = objects.with_status(observed, status, generation)
        again = graph_status(later, plan, NOW + timedelta(days=1))
        assert again == status
        assert list(again) == list(status)
        assert events(status, again, plan) == ()
        before = status


@given(worlds())
def test_ready_is_true_only_of_what_runs(world: tuple[Observed, Plan]) -> None:
    observed, plan = world
    status = graph_status(observed, plan, NOW)
    (ready,) = [c for c in status["conditions"] if c["type"] == "Ready"]
    assert (ready["status"] == "True") == (status["state"] == "successful")
    if ready["status"] != "True":
        return
    assert plan.components
    assert plan.rollback is None
    serving = {(c.workload_kind, c.workload) for c in plan.components}
    for component in plan.components:
        workload = observed.children[component.workload_kind, component.workload]
        found = workload["status"]
        assert workload["metadata"]["annotations"][APPLIED_ANNOTATION] == "new"
        assert found["observedGeneration"] == workload["metadata"]["generation"]
        for count in ("replicas", "updatedReplicas", "availableReplicas"):
            assert found.get(count, 0) == component.replicas
        for condition in status["components"][component.name]["conditions"]:
            if condition["type"] == "Routable" and component.replicas:
                assert condition["status"] == "True"
    for key, child in observed.children.items():
        if key not in serving:
            assert not child["spec"]["replicas"]
            assert not child["status"].get("replicas")


@given(
    mangled(objects.adapter(replicas=2, generation=3, observedGeneration=2)), worlds(mangle=True)
)
def test_every_adapter_has_a_valid_status_that_rests(
    adapter: Json, world: tuple[Observed, Plan]
) -> None:
    observed, plan = world
    status = adapter_status(adapter, observed, plan, NOW)
    assert AdapterStatus.model_validate(status).manifest() == status
    later = {**adapter, "status": status}
    assert adapter_status(later, observed, plan, NOW + timedelta(days=1)) == status
