"""Where planning leads, whatever happens: told in a namespace in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from dynamo_operator.reconcile import planning, revisions
from dynamo_operator.reconcile.plan import Plan
from dynamo_operator.render import names, whole_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator.simulation import Namespace

Json = dict[str, Any]


def component(name: str, kind: str, image: str = "one", **more: Any) -> Json:
    container = {"name": "main", "image": f"example.test/{image}:1", "command": ["serve"]}
    return {
        "name": name,
        "type": kind,
        "podTemplate": {"spec": {"containers": [container]}},
        **more,
    }


def aggregated(**more: Any) -> Namespace:
    return Namespace(
        {"components": [component("Front", "frontend"), component("Worker", "worker", **more)]}
    )


def apart(**more: Any) -> Namespace:
    return Namespace(
        {
            "components": [
                component("Front", "frontend"),
                component("P", "prefill", replicas=2),
                component("D", "decode", replicas=3),
            ]
        },
        **more,
    )


def set_image(name: str, image: str) -> Any:
    def change(spec: Json) -> None:
        entry = next(c for c in spec["components"] if c["name"] == name)
        entry["podTemplate"]["spec"]["containers"][0]["image"] = f"example.test/{image}:1"

    return change


def set_replicas(name: str, number: int) -> Any:
    def change(spec: Json) -> None:
        next(c for c in spec["components"] if c["name"] == name)["replicas"] = number

    return change


def opt_in(name: str, on: bool) -> Any:
    def change(spec: Json) -> None:
        entry = next(c for c in spec["components"] if c["name"] == name)
        entry.pop("scalingAdapter", None)
        if on:
            entry["scalingAdapter"] = {}

    return change


def replicas(world: Namespace, name: str) -> int:
    return sum(w["spec"].get("replicas", 1) for w in world.workloads(name))


def of(plan: Plan, name: str) -> planning.ComponentPlan:
    return next(c for c in plan.components if c.name == name)


def templates(world: Namespace) -> dict[str, Json]:
    return {
        name: item["spec"]["template"]
        for (kind, name), item in world.children.items()
        if kind == "Deployment"
    }


# --- operators


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a newer operator come, whose rendering sets a variable more on every pod."""
    render = planning.render_with_notes

    def newer(graph: Any, platform: Any, **how: Any) -> Any:
        changed = graph.model_copy(deep=True)
        for entry in changed.spec.components:
            main = entry.pod_template["spec"]["containers"][0]
            main["env"] = [*main.get("env", []), {"name": "NEW", "value": "1"}]
        return render(changed, platform, **how)

    return lambda: monkeypatch.setattr(planning, "render_with_notes", newer)


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An operator that recorded one hash for all components."""
    current = revisions.current

    def as_it_was(observed: Any, found: Any, fresh: Any) -> Any:
        whole = whole_inputs(observed.graph.spec, observed.annotations)
        return replace(current(observed, found, fresh), whole=whole)

    monkeypatch.setattr(revisions, "current", as_it_was)
    return lambda: monkeypatch.setattr(revisions, "current", current)


def is_renewed(world: Namespace) -> dict[str, bool]:
    """Component -> whether its pods are of the newer operator's rendering."""
    return {
        item["metadata"]["labels"][names.COMPONENT_LABEL]: any(
            entry["name"] == "NEW" for entry in template["spec"]["containers"][0].get("env", [])
        )
        for item in world.children.values()
        if item["kind"] == "Deployment" and (template := item["spec"]["template"])
    }


# --- rest


def test_a_settled_graph_is_left_alone() -> None:
    world = aggregated(replicas=3, scalingAdapter={})
    world.settle()
    before = world.writes
    world.reconcile()
    assert world.writes == before
    assert replicas(world, "Worker") == 3


def test_drift_is_put_right() -> None:
    world = aggregated(replicas=3)
    world.settle()
    world.kubectl_scale("Worker", 7)
    world.settle()
    assert replicas(world, "Worker") == 3
    del world.children["Service", "g-front"]
    world.settle()
    assert ("Service", "g-front") in world.children


def test_what_is_rendered_no_more_is_deleted() -> None:
    world = aggregated(scalingAdapter={})
    world.settle()

    def drop(spec: Json) -> None:
        spec["components"] = [c for c in spec["components"] if c["name"] != "Front"]

    world.edit(drop)
    world.settle()
    assert not world.workloads("Front")
    assert ("Service", "g-front") not in world.children


# --- replicas


def test_an_adapter_rules_and_leaves_what_runs() -> None:
    world = aggregated(replicas=2)
    world.settle()
    world.kubectl_scale("Worker", 2)
    world.edit(opt_in("Worker", True))
    world.settle()
    adapter = world.adapter("Worker")
    assert adapter is not None
    assert adapter["spec"]["replicas"] == 2  # seeded from what runs
    world.scale("Worker", 5)
    plan = world.settle()
    assert replicas(world, "Worker") == 5
    assert of(plan, "Worker").scaled_by == "adapter"
    assert of(plan, "Worker").ignored_replicas == 2

    world.edit(set_replicas("Worker", 4))  # said, and without effect
    assert of(world.reconcile(), "Worker").renumbered
    plan = world.settle()
    assert not of(plan, "Worker").renumbered
    assert replicas(world, "Worker") == 5
    assert of(plan, "Worker").ignored_replicas == 4

    world.edit(opt_in("Worker", False))
    plan = world.settle()
    assert world.adapter("Worker") is None
    assert replicas(world, "Worker") == 5  # what runs is kept
    assert of(plan, "Worker").scaled_by == "kept"
    world.kubectl_scale("Worker", 9)  # and drift is put right to that
    world.settle()
    assert replicas(world, "Worker") == 5

    world.edit(set_replicas("Worker", 3))  # until the graph's number changes
    plan = world.settle()
    assert replicas(world, "Worker") == 3
    assert of(plan, "Worker").scaled_by == "graph"


def test_a_deleted_adapter_comes_back_with_what_runs() -> None:
    world = aggregated(replicas=2, scalingAdapter={})
    world.settle()
    world.scale("Worker", 6)
    world.settle()
    adapter = world.adapter("Worker")
    assert adapter is not None
    del world.children[planning.ADAPTER, adapter["metadata"]["name"]]
    world.settle()
    adapter = world.adapter("Worker")
    assert adapter is not None
    assert adapter["spec"]["replicas"] == 6
    assert replicas(world, "Worker") == 6


def test_an_adapter_can_scale_to_zero_and_back() -> None:
    world = aggregated(replicas=2, scalingAdapter={})
    world.settle()
    for number in (0, 3):
        world.scale("Worker", number)
        world.settle()
        assert replicas(world, "Worker") == number


def test_an_autoscaler_on_the_workload_is_yielded_to() -> None:
    world = aggregated(replicas=2)
    world.settle()
    world.autoscale("Worker", 8)
    plan = world.settle()
    assert replicas(world, "Worker") == 8
    assert of(plan, "Worker").scaled_by == "kube-controller-manager"
    before = world.writes
    world.autoscale("Worker", 9)
    world.settle()
    assert world.writes == before  # nothing to say about it
    world.kubectl_scale("Worker", 7)  # it is the autoscaler's to put right
    plan = world.settle()
    assert world.writes == before
    assert replicas(world, "Worker") == 7
    assert of(plan, "Worker").scaled_by == "kube-controller-manager"


@pytest.mark.parametrize("seen", [True, False])
def test_an_adapter_begins_with_what_an_autoscaler_has_scaled_to(seen: bool) -> None:
    world = aggregated(replicas=2)
    world.settle()
    world.autoscale("Worker", 8)
    if seen:
        world.settle()
    world.edit(opt_in("Worker", True))
    world.settle()
    adapter = world.adapter("Worker")
    assert adapter is not None
    assert adapter["spec"]["replicas"] == replicas(world, "Worker") == 8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_history_of_scaling_ends_where_the_rules_say(data: st.DataObject) -> None:
    world = aggregated(replicas=1)
    world.settle()
    graph, adapter, runs, kept_for = 1, None, 1, None
    autoscaled = yielded = False  # an autoscaler owns the field; nobody else is to write it
    for _ in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["graph", "on", "off", "scale", "drift", "autoscale"]))
        number = data.draw(st.integers(0, 5))
        if what == "graph":
            world.edit(set_replicas("Worker", number))
            if adapter is None and number != (kept_for if kept_for is not None else graph):
                autoscaled = yielded = autoscaled and number == runs
                runs, kept_for = number, None
            graph = number
        elif what == "on" and adapter is None:
            world.edit(opt_in("Worker", True))
            adapter, yielded = runs, False
        elif what == "off" and adapter is not None:
            world.edit(opt_in("Worker", False))
            adapter, kept_for, yielded = None, graph, autoscaled
        elif what == "scale" and adapter is not None:
            world.scale("Worker", number)
            autoscaled = autoscaled and number == runs
            adapter = runs = number
        elif what == "drift":
            world.kubectl_scale("Worker", number)
            runs, autoscaled = number if yielded else runs, False
        elif what == "autoscale":
            world.autoscale("Worker", number)
            autoscaled = adapter is None or number == runs
            if adapter is None:
                runs, yielded = number, True
        world.settle()
        assert replicas(world, "Worker") == runs


# --- rollouts


def test_workers_apart_go_over_to_a_new_generation_together() -> None:
    world = apart()
    first = world.settle().worker_hash
    world.edit(set_image("D", "two"))
    second = world.settle().worker_hash
    assert second != first
    for name, number in (("P", 2), ("D", 3)):
        (workload,) = world.workloads(name)
        assert workload["metadata"]["name"].endswith(second)
        assert workload["spec"]["replicas"] == number


def test_a_new_group_comes_before_an_old_one_goes() -> None:
    world = aggregated(multinode={"nodeCount": 2}, replicas=1)
    first = world.settle().worker_hash
    (old,) = world.workloads("Worker")
    assert old["metadata"]["name"] == f"g-worker-group-{first}"
    world.edit(set_image("Worker", "two"))
    for _ in range(20):
        world.reconcile()
        up = [w.get("status", {}).get("availableReplicas", 0) for w in world.workloads("Worker")]
        assert any(up)
        world.controllers()
    second = world.settle().worker_hash
    (new,) = world.workloads("Worker")
    assert new["metadata"]["name"] == f"g-worker-group-{second}"
    assert replicas(world, "Worker") == 1


def test_engines_over_several_nodes_wait_for_no_others() -> None:
    world = aggregated(multinode={"nodeCount": 2})
    world.graph["spec"]["components"].append(
        component("Other", "worker", multinode={"nodeCount": 2})
    )
    world.settle()
    (stuck,) = world.workloads("Other")
    world.works = lambda template: "broken" not in template["spec"]["containers"][0]["image"]
    world.edit(set_image("Other", "broken"))
    second = world.settle().worker_hash
    assert stuck["metadata"]["name"] in {w["metadata"]["name"] for w in world.workloads("Other")}
    (moved,) = world.workloads("Worker")
    assert moved["metadata"]["name"] == f"g-worker-group-{second}"


def test_groups_of_an_operator_that_named_them_without_a_generation_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = aggregated(multinode={"nodeCount": 2})
    made = revisions.made
    monkeypatch.setattr(revisions, "made", lambda *what: replace(made(*what), groups_apart=False))
    world.settle()
    (old,) = world.workloads("Worker")
    assert old["metadata"]["name"] == "g-worker-group"
    monkeypatch.undo()
    before = world.writes
    world.settle()
    assert world.writes == before
    world.edit(set_image("Worker", "two"))
    second = world.settle().worker_hash
    (new,) = world.workloads("Worker")
    assert new["metadata"]["name"] == f"g-worker-group-{second}"
    world.edit(set_image("Worker", "one"))
    world.settle()
    (again,) = world.workloads("Worker")
    assert again["metadata"]["name"] == "g-worker-group"


def test_going_back_in_the_middle_never_deletes_what_serves() -> None:
    world = apart()
    first = world.settle().worker_hash
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]
    world.edit(set_image("D", "two"))
    world.settle()
    serving = {w["metadata"]["uid"] for w in world.workloads("D") + world.workloads("P")}
    assert replicas(world, "P") >= 2
    world.edit(set_image("D", "one"))
    assert world.settle().worker_hash == first
    left = world.workloads("D") + world.workloads("P")
    assert len(left) == 2
    assert {w["metadata"]["uid"] for w in left} <= serving
    assert all(w["status"]["availableReplicas"] == w["spec"]["replicas"] for w in left)


@pytest.mark.parametrize("make", [aggregated, apart])
def test_workers_that_fail_go_back_as_a_whole_once(make: Any) -> None:
    world: Namespace = make()
    worker = "Worker" if make is aggregated else "D"
    world.annotate(names.ROLLBACK_ANNOTATION, "true")
    good = world.settle().worker_hash
    kept = templates(world)
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]
    world.edit(set_image(worker, "two"))
    plan = world.settle()
    assert plan.worker_hash == good
    assert plan.rollback is not None
    assert "ImagePullBackOff" in plan.rollback.message
    assert templates(world) == kept
    # Numbers still are the graph's, and a scaled graph does not try the failed template again.
    world.edit(set_replicas(worker, 4))
    assert world.settle().rollback is not None
    assert replicas(world, worker) == 4
    # Another template is another chance.
    world.edit(set_image(worker, "three"))
    plan = world.settle()
    assert plan.rollback is None
    assert plan.worker_hash not in (good, "")


def test_without_the_annotation_nothing_goes_back() -> None:
    world = aggregated()
    good = world.settle().worker_hash
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]
    world.edit(set_image("Worker", "two"))
    plan = world.settle()
    assert plan.rollback is None
    assert plan.worker_hash != good
    world.annotate(names.ROLLBACK_ANNOTATION, "true")
    assert world.settle().worker_hash == good


def test_the_first_template_has_nothing_to_go_back_to() -> None:
    world = Namespace(
        {"components": [component("Worker", "worker", image="two")]}, lambda template: False
    )
    world.annotate(names.ROLLBACK_ANNOTATION, "true")
    assert world.settle().rollback is None


def test_a_blip_does_not_give_up_what_serves() -> None:
    world = apart()
    world.settle()
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]
    world.edit(set_image("D", "two"))
    world.settle()
    serving = {w["metadata"]["name"]: w["spec"]["replicas"] for w in world.workloads("D")}
    for workload in world.workloads("P") + world.workloads("D"):
        workload["status"]["availableReplicas"] = workload["status"]["readyReplicas"] = 0
    world.reconcile()
    assert {w["metadata"]["name"]: w["spec"]["replicas"] for w in world.workloads("D")} == serving


def test_workers_at_zero_prove_nothing() -> None:
    world = aggregated(replicas=2)
    world.annotate(names.ROLLBACK_ANNOTATION, "true")
    good = world.settle().worker_hash
    world.edit(set_replicas("Worker", 0))
    world.settle()
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]
    world.edit(set_image("Worker", "two"))
    world.settle()
    world.edit(set_replicas("Worker", 2))
    assert world.settle().worker_hash == good


def test_a_template_that_never_worked_gives_way_to_what_is_rendered_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = aggregated()
    world.works = lambda template: bool(template["spec"].get("imagePullSecrets"))
    world.settle()
    secrets = {"example.test": ("docker",)}  # it is found only now
    world.platform = replace(world.platform, pull_secrets_by_registry=secrets)
    world.settle()
    assert all(t["spec"]["imagePullSecrets"] for t in templates(world).values())


def test_what_belongs_to_a_component_that_still_serves_stays() -> None:
    world = Namespace(
        {
            "components": [
                component("Front", "frontend", "ours"),
                component("Worker", "worker", replicas=3),
            ]
        }
    )
    world.settle()
    kept = {key for key in world.children if key[1] == "g-worker"}
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]

    def rename(spec: Json) -> None:
        spec["components"][1] = component("Other", "worker", "two", replicas=3)

    world.edit(rename)
    world.settle()
    assert kept <= world.children.keys()
    world.works = lambda template: True
    world.settle()
    assert not kept & world.children.keys()


def test_budgets_stay_through_a_rollout() -> None:
    world = apart()
    world.settle()
    budgets = {key for key in world.children if key[0] == "PodDisruptionBudget"}
    assert budgets
    world.edit(set_image("D", "two"))
    for _ in range(20):
        world.reconcile()
        assert budgets <= world.children.keys()
        world.controllers()


def test_an_autoscalers_number_outlives_a_generation_and_yields_to_a_changed_graph() -> None:
    world = apart()
    world.settle()
    world.autoscale("D", 9)
    world.settle()
    for image in ("two", "one", "two"):  # back again, too
        world.edit(set_image("D", image))
        plan = world.settle()
        assert replicas(world, "D") == 9
        assert of(plan, "D").scaled_by == "outlived"
    world.edit(set_replicas("D", 4))
    world.settle()
    assert replicas(world, "D") == 4


def test_a_template_that_recovers_is_a_good_one() -> None:
    world = aggregated()
    world.annotate(names.ROLLBACK_ANNOTATION, "true")
    world.works = lambda template: False  # the registry is away, say
    first = world.settle().worker_hash
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]
    world.settle()
    world.edit(set_image("Worker", "two"))
    plan = world.settle()
    assert plan.rollback is not None
    assert plan.worker_hash == first


@pytest.mark.parametrize("make", [aggregated, apart])
def test_a_newer_operator_restarts_nothing(make: Any, upgrade: Any) -> None:
    world: Namespace = make()
    world.settle()
    before = templates(world)
    upgrade()
    world.settle()
    assert templates(world) == before
    world.edit(set_replicas(next(iter(c for c in ("Worker", "D") if world.workloads(c))), 5))
    world.settle()
    assert templates(world) == before
    world.annotate(names.ADOPT_ANNOTATION, "now")
    world.settle()
    assert all(is_renewed(world).values())


EDITS: list[tuple[Any, set[str]]] = [
    (lambda spec: spec["components"][0].update(sharedMemorySize="1Gi"), {"Front"}),
    (lambda spec: spec["components"].append(component("Plan", "planner")), {"Plan"}),
    (lambda spec: spec["components"][1].update(minAvailable=1), set()),
    (lambda spec: spec["components"][1].update(sharedMemorySize="1Gi"), {"Worker", "P", "D"}),
    (lambda spec: spec.update(labels={"a": "b"}), {"Front", "Worker", "P", "D"}),
]


@pytest.mark.parametrize(("edit", "renewed"), EDITS)
@pytest.mark.parametrize("make", [aggregated, apart])
@pytest.mark.parametrize("recorded", ["whole", "each"])
def test_after_an_upgrade_an_edit_renews_what_it_is_about(
    make: Any, edit: Any, renewed: set[str], recorded: str, upgrade: Any, older: Any
) -> None:
    world: Namespace = make()
    if recorded == "each":
        older()
    world.settle()
    before = templates(world)
    older()
    upgrade()
    writes = world.writes
    world.settle()
    assert world.writes == writes
    world.edit(edit)
    world.settle()
    found = is_renewed(world)
    assert {name for name in found if found[name]} == renewed & found.keys()
    if not renewed & {"Worker", "P", "D"}:
        assert {n: t for n, t in templates(world).items() if n != "g-front" and n != "g-plan"} == {
            n: t for n, t in before.items() if n != "g-front"
        }
    writes = world.writes
    world.settle()
    assert world.writes == writes


def test_workers_that_went_back_are_not_tried_again_for_an_edit_of_another_component() -> None:
    world = aggregated()
    world.annotate(names.ROLLBACK_ANNOTATION, "true")
    good = world.settle().worker_hash
    world.works = lambda template: "two" not in template["spec"]["containers"][0]["image"]
    world.edit(set_image("Worker", "two"))
    world.settle()
    world.edit(set_image("Front", "three"))
    workers = templates(world)["g-worker"]
    plan = world.reconcile()
    assert plan.rollback is not None
    assert plan.worker_hash == good
    assert templates(world)["g-worker"] == workers
    assert "three" in templates(world)["g-front"]["spec"]["containers"][0]["image"]


def test_a_planner_learns_of_adapters_that_come_later() -> None:
    world = aggregated()
    world.edit(lambda spec: spec["components"].append(component("Plan", "planner")))
    world.settle()
    before = templates(world)
    assert "DYN_PLANNER_COMPONENTS" not in str(before["g-plan"])
    world.edit(opt_in("Worker", True))
    world.settle()
    after = templates(world)
    assert "g-worker" in str(after["g-plan"])
    assert "DYN_PLANNER_COMPONENTS" in str(after["g-plan"])
    assert [name for name in after if after[name] != before[name]] == ["g-plan"]


def test_revisions_do_not_pile_up() -> None:
    world = aggregated()
    for turn in range(12):
        world.edit(set_image("Worker", f"v{turn}"))
        world.settle()
    kept = [key for key in world.children if key[0] == "ControllerRevision"]
    assert 2 <= len(kept) <= 6


# --- restarts


def stamps(world: Namespace, name: str) -> set[str]:
    return {
        (w["spec"]["template"]["metadata"].get("annotations") or {}).get(names.RESTART_ANNOTATION)
        for w in world.workloads(name)
    }


def test_a_restart_goes_one_component_at_a_time() -> None:
    world = aggregated()
    world.settle()
    world.edit(lambda spec: spec.update(restart={"id": "r1"}))
    plan = world.reconcile()
    assert plan.restart is not None
    assert plan.restart.in_progress == ("Front",)
    assert stamps(world, "Front") == {"r1"}
    assert stamps(world, "Worker") == {None}
    world.reconcile()  # not before the first has settled
    assert stamps(world, "Worker") == {None}
    plan = world.settle()
    assert stamps(world, "Worker") == {"r1"}
    assert plan.restart is not None
    assert plan.restart.phase == "Completed"
    before = templates(world)
    world.edit(lambda spec: spec.pop("restart"))
    world.settle()
    assert templates(world) == before  # taking the request away restarts nothing


def test_a_restart_that_is_over_is_over() -> None:
    world = aggregated()
    world.settle()
    world.edit(lambda spec: spec.update(restart={"id": "r1"}))
    world.settle()
    world.graph["status"]["restart"] = {"observedID": "r1", "phase": "Completed"}
    world.edit(set_replicas("Worker", 3))
    plan = world.reconcile()  # the new pods are on their way
    assert plan.restart is not None
    assert plan.restart.phase == "Completed"
    assert stamps(world, "Worker") == {"r1"}


def test_a_parallel_restart_goes_all_at_once() -> None:
    world = aggregated()
    world.settle()
    world.edit(lambda spec: spec.update(restart={"id": "r", "strategy": {"type": "Parallel"}}))
    world.reconcile()
    assert stamps(world, "Front") == stamps(world, "Worker") == {"r"}


def test_a_restart_follows_the_order_that_is_given() -> None:
    world = aggregated()
    world.settle()
    strategy = {"type": "Sequential", "order": ["Worker", "Front"]}
    world.edit(lambda spec: spec.update(restart={"id": "r", "strategy": strategy}))
    plan = world.reconcile()
    assert plan.restart is not None
    assert plan.restart.in_progress == ("Worker",)
