"""What a graph's conditions say of the world that they see."""

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from dynamo_crds.v1beta1 import GraphStatus
from dynamo_operator.reconcile import planning
from dynamo_operator.reconcile.observed import Observed
from dynamo_operator.reconcile.ownership import APPLIED_ANNOTATION
from dynamo_operator.reconcile.plan import Plan, Refused, RestartPlan, Rollback
from dynamo_operator.render import Platform
from dynamo_operator.render.notes import Note
from dynamo_operator.status import graph_status

from tests.operator import objects
from tests.operator.objects import Json, component, deployment, observed, plan

VLLM: Json = {
    "spec": {
        "containers": [
            {
                "name": "main",
                "image": "nvcr.io/nvidia/ai-dynamo/vllm-runtime:1",
                "args": ["--model", "m"],
            }
        ]
    }
}

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def status_of(seen: Observed, wanted: Plan) -> Json:
    status = graph_status(seen, wanted, NOW)
    assert GraphStatus.model_validate(status).manifest() == status
    return status


def brief(item: Json, type: str) -> tuple[str, str, str] | None:
    found = [c for c in item["conditions"] if c["type"] == type]
    return (found[0]["status"], found[0]["reason"], found[0]["message"]) if found else None


def condition(item: Json, type: str) -> tuple[str, str, str]:
    found = brief(item, type)
    assert found is not None
    return found


def test_all_runs() -> None:
    status = status_of(observed(deployment("frontend"), deployment()), plan())
    assert status["state"] == "successful"
    assert condition(status, "Ready") == (
        "True",
        "all_resources_are_ready",
        "all 2 components run what the graph wants",
    )
    assert condition(status, "Progressing")[:2] == ("False", "Complete")
    assert condition(status, "Degraded")[:2] == ("False", "AsExpected")
    worker = status["components"]["worker"]
    assert worker["componentNames"] == ["g-worker"]
    assert worker["runtimeNamespace"] == "team-a-g"
    assert condition(worker, "Available") == (
        "True",
        "ReplicasAvailable",
        "1 of 1 pods are available",
    )
    assert condition(worker, "Routable")[:2] == ("True", "Routable")
    assert brief(worker, "ScalingActive") is None
    for item in (*status["conditions"], *worker["conditions"]):
        assert item["observedGeneration"] == 1
        assert item["lastTransitionTime"] == "2026-01-01T12:00:00Z"


def test_nothing_is_there_yet() -> None:
    status = status_of(observed(), plan())
    assert status["state"] == "initializing"
    assert condition(status, "Ready") == (
        "False",
        "pods_not_ready",
        "frontend: Deployment g-frontend does not exist yet; worker: Deployment g-worker does not"
        " exist yet",
    )
    assert condition(status, "Progressing")[:2] == ("True", "Starting")
    assert condition(status, "Degraded")[0] == "False"
    assert status["components"]["worker"]["replicas"] == 0
    assert condition(status["components"]["worker"], "Available")[1] == "NotCreated"


def test_pods_start() -> None:
    seen = observed(
        deployment("frontend"),
        deployment(wanted=3, available=1),
        pods=[objects.pod_ready("frontend"), objects.pod_starting(), objects.pod_ready(number=1)],
    )
    status = status_of(seen, plan(component("frontend"), component(replicas=3)))
    assert status["state"] == "pending"
    assert condition(status, "Ready") == (
        "False",
        "pods_not_ready",
        "Starting on 1 of 2 worker pods: container main has not passed its startup probe yet",
    )
    assert condition(status, "Progressing")[2] == "worker: 1 of 3 pods are available"
    assert condition(status, "Degraded")[0] == "False"
    assert condition(status["components"]["worker"], "Available")[2] == "1 of 3 pods are available"


# --- what fails


def test_an_image_that_does_not_exist_shows_in_one_line() -> None:
    seen = observed(
        deployment("frontend"),
        deployment(wanted=3, available=2),
        pods=[objects.pod_ready(), objects.pod_ready(number=1), objects.pod_unpullable(number=2)],
    )
    status = status_of(seen, plan(component("frontend"), component(replicas=3)))
    assert status["state"] == "failed"
    message = (
        "ImagePullBackOff on 1 of 3 worker pods: registry.example/llm:none: not found; correct the"
        " image's name or push it"
    )
    assert condition(status, "Ready") == ("False", "pods_not_ready", message)
    assert condition(status, "Degraded") == ("True", "ImagePullBackOff", message)
    assert condition(status, "Progressing") == (
        "False",
        "ImagePullBackOff",
        f"worker: 2 of 3 pods are available; {message}",
    )
    assert condition(status["components"]["worker"], "Available")[0] == "True"


def test_no_free_gpu_is_waited_for() -> None:
    seen = observed(
        deployment("frontend"), deployment(available=0), pods=[objects.pod_unschedulable()]
    )
    status = status_of(seen, plan())
    assert status["state"] == "pending"
    assert condition(status, "Ready")[1] == "insufficient_capacity"
    assert condition(status, "Degraded")[1] == "Unschedulable"
    assert condition(status, "Progressing") == (
        "True",
        "Starting",
        "worker: 0 of 1 pods are available; Unschedulable on 1 of 1 worker pod: 0/4 nodes have a"
        " free nvidia.com/gpu; free some or add nodes",
    )
    assert condition(status["components"]["worker"], "Available") == (
        "False",
        "Unschedulable",
        "Unschedulable on 1 of 1 worker pod: 0/4 nodes have a free nvidia.com/gpu; free some or add"
        " nodes",
    )


def test_a_quota_keeps_pods_from_being_created() -> None:
    quota = "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: 8, limited: 8"
    seen = observed(deployment("frontend"), deployment(replicas=0, refused=quota))
    status = status_of(seen, plan())
    assert condition(status, "Degraded") == (
        "True",
        "QuotaExceeded",
        f"QuotaExceeded of worker pods: {quota}; raise the quota or ask for less",
    )
    assert status["state"] == "pending"


def test_different_plights_are_told_together_what_fails_first() -> None:
    seen = observed(
        deployment("frontend", available=0),
        deployment(available=0),
        pods=[objects.pod_starting("frontend"), objects.pod_unschedulable()],
    )
    ready = condition(status_of(seen, plan()), "Ready")
    assert ready[1] == "mixed_not_ready_reasons"
    assert ready[2].startswith("Unschedulable on 1 of 1 worker pod: ")
    assert "; Starting on 1 of 1 frontend pod: " in ready[2]


def test_a_pod_that_ended_tells_nothing_once_it_is_replaced() -> None:
    pods = [objects.pod_evicted(), objects.pod_starting(number=1)]
    seen = observed(deployment("frontend"), deployment(available=0), pods=pods)
    assert condition(status_of(seen, plan()), "Degraded")[0] == "False"
    seen = observed(deployment("frontend"), deployment(available=0), pods=pods[:1])
    assert condition(status_of(seen, plan()), "Degraded")[1] == "Evicted"


def test_a_refused_object() -> None:
    refused = Refused(
        "Deployment/g-worker", 'spec.template.spec.containers[0].image: "" …', "worker"
    )
    status = status_of(observed(deployment("frontend")), plan(refused=(refused,)))
    assert status["state"] == "failed"
    assert condition(status, "Ready")[1:] == (
        "some_resources_are_not_ready",
        'worker: Deployment/g-worker is refused: spec.template.spec.containers[0].image: "" …',
    )
    assert condition(status, "Degraded")[1] == "WriteRefused"


def test_a_refusal_that_may_pass_is_no_failure() -> None:
    running = observed(deployment("frontend"), deployment())
    service = Refused("Service/g-worker", "timeout", "worker", transient=True)
    workload = Refused("Deployment/g-worker", "timeout", "worker", transient=True)
    for refused in (service, workload):
        status = status_of(running, plan(refused=(refused,)))
        assert status["state"] == "pending"
        assert condition(status, "Ready") == (
            "False",
            "updating",
            f"worker: {refused.object} is refused: timeout; tried again",
        )
        assert condition(status, "Degraded")[:2] == ("True", "WriteRefused")


def test_a_graph_that_cannot_be_read() -> None:
    refused = Refused("DynamoGraphDeployment/g", "spec.components.0.type: not a type")
    status = status_of(observed(), Plan(refused=(refused,)))
    assert status["state"] == "failed"
    assert condition(status, "Ready")[2] == (
        "DynamoGraphDeployment/g is refused: spec.components.0.type: not a type"
    )
    assert "components" not in status
    # What runs is left as it is, and nothing is on its way.
    status = status_of(observed(deployment("frontend")), Plan(refused=(refused,)))
    assert condition(status, "Progressing")[:2] == ("False", "WriteRefused")


def test_messages_are_bounded() -> None:
    seen = observed(
        deployment("frontend"),
        deployment(available=0),
        pods=[objects.pod_waiting("worker", "CreateContainerConfigError", "x" * 5000)],
    )
    for item in status_of(seen, plan())["conditions"]:
        assert len(item["message"]) <= 512


# --- the current generation


def marked(mark: str) -> Json:
    return {
        "kind": "Deployment",
        "metadata": {"name": "g-worker", "annotations": {APPLIED_ANNOTATION: mark}},
    }


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (deployment(mark="old"), "worker: Deployment g-worker is being updated"),
        (deployment(mark="new", seen=1), "worker: Deployment g-worker is being updated"),
        (
            deployment(mark="new", wanted=1, replicas=2, updated=1, available=1),
            "worker: 1 of 1 pods run the current template",
        ),
        (
            deployment(mark="new", wanted=1, replicas=2, updated=2, available=2),
            "worker: 2 of 1 pods are available",
        ),
    ],
    ids=["not-applied", "not-seen", "old-pods-left", "too-many"],
)
def test_never_successful_before_the_change_has_arrived(worker: Json, text: str) -> None:
    seen = observed(deployment("frontend"), worker)
    status = status_of(seen, plan(manifests=(marked("new"),)))
    assert status["state"] == "pending"
    assert condition(status, "Ready")[2] == text


def test_generations_side_by_side() -> None:
    old = deployment(object_name="g-worker-old", wanted=2)
    new = deployment(object_name="g-worker-new", wanted=1, available=0)
    wanted = component(replicas=2, workload="g-worker-new", old_workloads=("g-worker-old",))
    status = status_of(
        observed(deployment("frontend"), old, new), plan(component("frontend"), wanted)
    )
    worker = status["components"]["worker"]
    assert worker["componentNames"] == ["g-worker-new", "g-worker-old"]
    counts = [worker[f"{name}Replicas"] for name in ("updated", "ready", "available")]
    assert (worker["replicas"], counts) == (3, [1, 2, 2])
    assert condition(worker, "Available")[2] == (
        "2 of 2 pods are available, 2 of them of an earlier generation"
    )
    assert condition(worker, "Routable")[0] == "True"
    assert condition(status, "Ready")[1] == "updating"
    assert condition(status, "Progressing") == (
        "True",
        "RollingOut",
        "worker: 1 of 2 pods run the current template",
    )


def test_a_component_that_was_taken_out_still_runs() -> None:
    seen = observed(deployment("frontend"), deployment(), deployment("extra"))
    status = status_of(seen, plan())
    assert condition(status, "Ready")[1:] == ("updating", "Deployment/g-extra of before still runs")
    assert condition(status, "Progressing")[0] == "True"


def test_no_progress_within_the_deadline() -> None:
    seen = observed(
        deployment("frontend"),
        deployment(wanted=2, available=1, stalled=True),
        pods=[objects.pod_ready(), objects.pod_starting(number=1)],
    )
    status = status_of(seen, plan(component("frontend"), component(replicas=2)))
    assert status["state"] == "failed"
    assert condition(status, "Progressing")[:2] == ("False", "ProgressDeadlineExceeded")
    assert condition(status, "Degraded")[1] == "ProgressDeadlineExceeded"
    assert "no progress within its deadline: Starting on 1 of 2" in condition(status, "Ready")[2]


def test_rolled_back() -> None:
    back = Rollback("bbbbbbbb", "aaaaaaaa", "container main crashes (exit code 1)")
    seen = observed(deployment("frontend"), deployment())
    status = status_of(seen, plan(rollback=back))
    assert status["state"] == "failed"
    for type, expected in (
        ("Ready", "False"),
        ("Progressing", "False"),
        ("Degraded", "True"),
        ("RolledBack", "True"),
    ):
        assert condition(status, type)[0] == expected
        assert "container main crashes" in condition(status, type)[2]
    again = status_of(objects.with_status(seen, status, 2), plan())
    assert condition(again, "RolledBack")[:2] == ("False", "NotRolledBack")
    assert again["state"] == "successful"


def test_a_restart() -> None:
    restart = RestartPlan("r1", "Restarting", ("worker",))
    seen = observed(
        deployment("frontend"), deployment(wanted=2, replicas=3, updated=1, available=2)
    )
    wanted = plan(component("frontend"), component(replicas=2), restart=restart)
    status = status_of(seen, wanted)
    assert status["restart"] == {
        "observedID": "r1",
        "phase": "Restarting",
        "inProgress": ["worker"],
    }
    assert condition(status, "Progressing") == ("True", "Restarting", "restart r1: worker")
    assert "rollingUpdate" not in status


def test_engines_of_several_pods() -> None:
    workload: dict[str, Any] = {"workload_kind": "LeaderWorkerSet"}
    wanted = plan(component("frontend"), component(replicas=2, **workload))
    groups = objects.leader_worker_set(wanted=2)
    pods = [*objects.pods_of_group(0), *objects.pods_of_group(1)]
    status = status_of(observed(deployment("frontend"), groups, pods=pods), wanted)
    assert status["state"] == "successful"
    assert status["components"]["worker"]["componentKind"] == "LeaderWorkerSet"
    part = objects.leader_worker_set(wanted=2, ready=1, updated=1, updating=True)
    status = status_of(observed(deployment("frontend"), part), wanted)
    assert condition(status, "Progressing")[2] == "worker: 1 of 2 engines run the current template"


def test_engines_are_new_only_when_their_pods_are() -> None:
    """A LeaderWorkerSet that was just changed still says of the old groups that they are updated:
    its status names no generation."""
    wanted = plan(component("frontend"), component(replicas=2, workload_kind="LeaderWorkerSet"))
    groups = objects.leader_worker_set(wanted=2)
    new, old = objects.pods_of_group(0), objects.pods_of_group(1, template="bbbbbbbb")
    for pods in (
        [*objects.pods_of_group(0, template="bbbbbbbb"), *old],
        [*new, *old],
        new,
        [*new, objects.pods_of_group(1)[0]],
        [*new, *objects.pods_of_group(1, ready=False)],
    ):
        status = status_of(observed(deployment("frontend"), groups, pods=pods), wanted)
        assert condition(status, "Ready") == (
            "False",
            "updating",
            "worker: LeaderWorkerSet g-worker is being updated",
        )


# --- routable


def test_a_worker_without_a_picker_is_not_routable() -> None:
    seen = observed(
        deployment("frontend", available=0),
        deployment(),
        pods=[objects.pod_crashing("frontend"), objects.pod_ready()],
    )
    status = status_of(seen, plan())
    assert condition(status["components"]["worker"], "Available")[0] == "True"
    assert condition(status["components"]["worker"], "Routable") == (
        "False",
        "NoPickerReady",
        "no pod of frontend is ready to send it requests",
    )
    assert condition(status["components"]["frontend"], "Routable")[1] == "NoneReady"


def test_a_worker_alone_and_a_planner() -> None:
    status = status_of(
        observed(deployment(), deployment("planner")), plan(component(), component("planner"))
    )
    assert status["state"] == "successful"
    assert condition(status["components"]["worker"], "Routable")[0] == "True"
    assert brief(status["components"]["planner"], "Routable") is None


def test_scaled_to_zero() -> None:
    seen = observed(deployment("frontend"), deployment(wanted=0))
    status = status_of(seen, plan(component("frontend"), component(replicas=0)))
    assert status["state"] == "successful"
    assert condition(status, "Ready")[2].endswith("; scaled to zero: worker")
    for type in ("Available", "Routable"):
        assert condition(status["components"]["worker"], type)[:2] == ("False", "ScaledToZero")


# --- notes


def test_an_unknown_runtime_is_not_called_ready() -> None:
    note = Note("worker", "RuntimeUnsupported", "image x runs y; image and command stay as written")
    status = status_of(observed(deployment("frontend"), deployment()), plan(notes=(note,)))
    assert status["state"] == "failed"
    assert condition(status, "RuntimeUnsupported") == (
        "True",
        "RuntimeUnsupported",
        "worker: image x runs y; image and command stay as written",
    )
    assert condition(status, "Degraded")[1] == "RuntimeUnsupported"
    assert condition(status["components"]["worker"], "Routable")[0] == "Unknown"
    assert condition(status, "Ready")[0] == "False"


def test_fields_that_are_not_rendered_leave_the_rest_ready() -> None:
    notes = (
        Note("worker", "GroveNotRendered", "experimental.grove: pods are Deployments"),
        Note("", "RestartNotRendered", "restart asks the operator for an action"),
    )
    status = status_of(observed(deployment("frontend"), deployment()), plan(notes=notes))
    assert status["state"] == "successful"
    assert condition(status, "NotRendered") == (
        "True",
        "GroveNotRendered",
        "worker: experimental.grove: pods are Deployments",
    )


def test_a_component_that_is_left_out() -> None:
    note = Note("worker", "MultinodeNeedsLeaderWorkerSet", "multinode: no LeaderWorkerSet here")
    left_out = component(workload_kind="", workload="")
    status = status_of(
        observed(deployment("frontend")), plan(component("frontend"), left_out, notes=(note,))
    )
    assert status["state"] == "failed"
    assert condition(status, "Ready") == (
        "False",
        "some_resources_are_not_ready",
        "worker: multinode: no LeaderWorkerSet here",
    )
    assert condition(status, "Degraded")[1] == "MultinodeNeedsLeaderWorkerSet"
    assert list(status["components"]) == ["frontend"]


def test_what_was_changed_of_the_manifest_is_said() -> None:
    notes = (
        Note("worker", "RuntimeMapped", "`python3 -m dynamo.vllm` → `dynamo worker vllm`"),
        Note("frontend", "ImageDefaulted", "no image given"),
    )
    running = observed(deployment("frontend"), deployment())
    status = status_of(running, plan(notes=notes))
    assert status["state"] == "successful"
    assert condition(status, "Adapted") == (
        "True",
        "GraphAdapted",
        "worker: RuntimeMapped: `python3 -m dynamo.vllm` → `dynamo worker vllm`; frontend:"
        " ImageDefaulted: no image given",
    )
    again = status_of(objects.with_status(running, status), plan())
    assert condition(again, "Adapted")[:2] == ("False", "AsWritten")
    assert brief(status_of(running, plan()), "Adapted") is None


# --- scaling


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"scaled_by": "adapter"},
            ("True", "ScaledByAdapter", "the scaling adapter dgdsa/g-worker rules with 5"),
        ),
        (
            {"scaled_by": "adapter", "ignored_replicas": 3},
            ("True", "ScaledByAdapter", "the scaling adapter dgdsa/g-worker rules with 5"),
        ),
        (
            {"scaled_by": "adapter", "ignored_replicas": 3, "renumbered": True},
            (
                "True",
                "GraphReplicasIgnored",
                "spec.components[Worker].replicas is 3, the scaling adapter dgdsa/g-worker rules"
                " with 5; change it with kubectl scale dgdsa/g-worker",
            ),
        ),
        (
            {"scaled_by": "kept"},
            (
                "False",
                "AdapterRemoved",
                "the scaling adapter is gone; 5 stay until spec.components[Worker].replicas"
                " changes",
            ),
        ),
        (
            {"scaled_by": "outlived"},
            (
                "False",
                "AutoscalerOutlived",
                "the workload that an autoscaler scaled to 5 is gone; they stay until"
                " spec.components[Worker].replicas changes; point the autoscaler at a scaling"
                " adapter",
            ),
        ),
        (
            {"scaled_by": "kube-controller-manager", "ignored_replicas": 3},
            (
                "True",
                "ScaledByAutoscaler",
                "kube-controller-manager on Deployment/g-worker rules with 5",
            ),
        ),
    ],
)
def test_who_rules_over_the_replicas(fields: Json, expected: tuple[str, str, str]) -> None:
    seen = observed(deployment("Worker", wanted=5))
    status = status_of(seen, plan(component("Worker", 5, **fields)))
    assert status["state"] == "successful"
    assert condition(status["components"]["Worker"], "ScalingActive") == expected


# --- with the real plan


def test_from_apply_to_successful() -> None:
    """What is planned, once it is there as planned and its controllers say so, is successful."""
    raw = objects.graph_raw(
        [
            {"name": "Frontend", "type": "frontend"},
            {"name": "Prefill", "type": "prefill", "replicas": 2, "podTemplate": VLLM},
            {"name": "Decode", "type": "decode", "podTemplate": VLLM},
        ]
    )
    platform = Platform(namespace="team-a", image_tag="test")
    empty = observed(raw=raw)
    assert status_of(empty, planning.plan(empty, platform))["state"] == "initializing"
    children = [copy.deepcopy(manifest) for manifest in planning.plan(empty, platform).manifests]
    for child in children:
        child["metadata"] |= {"uid": child["metadata"]["name"], "generation": 1}
        if child["kind"] == "Deployment":
            number = child["spec"]["replicas"]
            counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
            child["status"] = {"observedGeneration": 1, **dict.fromkeys(counts, number)}
    there = observed(*children, raw=raw)
    status = status_of(there, planning.plan(there, platform))
    assert (status["state"], condition(status, "Ready")[0]) == ("successful", "True")

    changed = copy.deepcopy(raw)
    changed["metadata"]["generation"] = 2
    changed["spec"]["components"][2]["podTemplate"]["spec"]["containers"][0]["args"] = [
        "--model",
        "n",
    ]
    after = observed(*children, raw={**changed, "status": status})
    status = status_of(after, planning.plan(after, platform))
    assert (status["state"], condition(status, "Ready")[1]) == ("pending", "updating")
