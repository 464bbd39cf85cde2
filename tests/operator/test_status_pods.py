"""Why a pod is not ready: every plight that Kubernetes knows, in one line that stays the same."""

import json

import pytest
from dynamo_operator.diagnosis.capacity import unschedulable
from dynamo_operator.diagnosis.pods import Trouble, exit_text, grouped, trouble
from dynamo_operator.diagnosis.wording import last_words, one_line

from tests.operator import objects
from tests.operator.objects import Json


def said(pod: Json) -> Trouble:
    found = trouble(pod)
    assert found is not None
    return found


def test_a_ready_pod_and_one_that_leaves_have_no_trouble() -> None:
    leaving = objects.pod_unready()
    leaving["metadata"]["deletionTimestamp"] = objects.LATER
    assert trouble(objects.pod_ready()) is None
    assert trouble(leaving) is None


# --- nodes


def test_too_few_gpus() -> None:
    found = said(objects.pod_unschedulable())
    assert found.reason == "Unschedulable"
    assert found.detail == "0/4 nodes have a free nvidia.com/gpu; free some or add nodes"
    assert (found.fault, found.lasting) == ("cluster", False)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "0/4 nodes are available: 1 node(s) had untolerated taint {gpu: }, 3 Insufficient"
            " nvidia.com/gpu. preemption: 0/4 nodes are available: 4 Preemption is not helpful.",
            "0/4 nodes have 8 free nvidia.com/gpu: 1 node(s) had untolerated taint {gpu: }, 3"
            " Insufficient nvidia.com/gpu",
        ),
        (
            "0/2 nodes are available: 2 Insufficient cpu, 2 Insufficient nvidia.com/gpu. no new"
            " claims to deallocate, preemption: 0/2 nodes are available: 2 No victims.",
            "0/2 nodes have 8 free nvidia.com/gpu: 2 Insufficient cpu, 2 Insufficient"
            " nvidia.com/gpu",
        ),
        (
            "0/2 nodes are available: 2 Insufficient memory.",
            "0/2 nodes have enough free memory; free some or add nodes",
        ),
        (
            '0/1 nodes are available: persistentvolumeclaim "models" not found.',
            '0/1 nodes fit: persistentvolumeclaim "models" not found',
        ),
        ("0/0 nodes are available", "the cluster has no node"),
        ("no nodes available to schedule pods", "no nodes available to schedule pods"),
        ("", "no node is found"),
    ],
)
def test_what_the_scheduler_says(message: str, expected: str) -> None:
    assert unschedulable(message, objects.pod_unschedulable(gpus=8)) == expected


def test_how_much_memory_was_asked_for() -> None:
    pod = objects.pod(main={"resources": {"requests": {"memory": "16Gi"}}})
    message = "0/2 nodes are available: 2 Insufficient memory."
    assert unschedulable(message, pod).startswith("0/2 nodes have enough free memory (16Gi asked)")


def test_scheduling_gates() -> None:
    pod = objects.pod(
        phase="Pending",
        node="",
        conditions={"PodScheduled": {"status": "False", "reason": "SchedulingGated"}},
        spec={"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]},
    )
    assert said(pod).detail == "held by kueue.x-k8s.io/admission"


def test_an_evicted_pod() -> None:
    found = said(objects.pod_evicted())
    assert (found.reason, found.fault) == ("Evicted", "cluster")
    assert "low on resource: memory" in found.detail


# --- images


def test_an_image_that_does_not_exist() -> None:
    found = said(objects.pod_unpullable())
    assert found.reason == "ImagePullBackOff"
    assert (
        found.detail == "registry.example/llm:none: not found; correct the image's name or push it"
    )
    assert (found.fault, found.lasting) == ("template", True)


def test_pulling_and_backing_off_read_the_same() -> None:
    again = objects.pod_unpullable()
    waiting = again["status"]["containerStatuses"][0]["state"]["waiting"]
    waiting["reason"] = "ErrImagePull"
    waiting["message"] = waiting["message"].partition("ErrImagePull: ")[2]
    assert trouble(again) == trouble(objects.pod_unpullable())


def test_an_image_that_needs_a_secret() -> None:
    message = (
        'failed to pull and unpack image "nvcr.io/x:1": failed to resolve reference "nvcr.io/x:1":'
        " failed to authorize: failed to fetch oauth token: 401 Unauthorized"
    )
    found = said(
        objects.pod_waiting("worker", "ErrImagePull", message, main={"image": "nvcr.io/x:1"})
    )
    assert found.detail.startswith("nvcr.io/x:1: failed to authorize")
    assert found.detail.endswith("; give imagePullSecrets that may read it")


def test_an_image_name_that_is_none() -> None:
    message = 'Failed to apply default image tag "UPPER": couldn\'t parse image name'
    found = said(objects.pod_waiting("worker", "InvalidImageName", message))
    assert found.reason == "InvalidImageName"
    assert found.lasting


def test_an_image_that_must_be_there_already() -> None:
    found = said(objects.pod_waiting("worker", "ErrImageNeverPull", "…"))
    assert "imagePullPolicy is Never" in found.detail


# --- containers


def test_a_missing_secret() -> None:
    pod = objects.pod_waiting("worker", "CreateContainerConfigError", 'secret "hf-token" not found')
    found = said(pod)
    assert found.reason == "CreateContainerConfigError"
    assert found.detail == (
        'container main: secret "hf-token" not found; create it, or mark the reference optional'
    )


def test_a_crash_with_its_last_words() -> None:
    found = said(objects.pod_crashing())
    assert found.reason == "CrashLoopBackOff"
    assert found.detail == (
        "container main ended with exit code 1: loading | RuntimeError: CUDA out of memory"
    )
    assert (found.fault, found.lasting) == ("template", True)


@pytest.mark.parametrize("moment", ["running", "ended"])
def test_a_crash_reads_the_same_at_every_moment(moment: str) -> None:
    """A container that crashes runs, ends and waits by turns; the status must not turn with it."""
    assert trouble(objects.pod_crashing(moment=moment)) == trouble(objects.pod_crashing())


def test_restarts_are_not_counted_in_words() -> None:
    assert trouble(objects.pod_crashing(restarts=5)) == trouble(objects.pod_crashing(restarts=99))
    assert not said(objects.pod_crashing(restarts=1)).lasting


def test_too_little_memory() -> None:
    pod = objects.pod_crashing(
        code=137, reason="OOMKilled", main={"resources": {"limits": {"memory": "16Gi"}}}
    )
    found = said(pod)
    assert found.reason == "OOMKilled"
    assert found.detail == "container main needs more than its memory limit of 16Gi; raise it"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1, "exit code 1"),
        (127, "exit code 127 (command not found)"),
        (137, "exit code 137 (SIGKILL)"),
        (143, "exit code 143 (SIGTERM)"),
        (255, "exit code 255"),
    ],
)
def test_exit_codes(code: int, expected: str) -> None:
    assert exit_text(code) == expected


def test_a_program_that_is_not_there() -> None:
    message = 'failed to create task: exec: "dynamo": executable file not found in $PATH'
    found = said(objects.pod_crashing(message=message, code=128, reason="StartError"))
    assert "executable file not found" in found.detail


def test_init_containers() -> None:
    crashing = objects.pod(
        phase="Pending",
        spec={"initContainers": [{"name": "fetch", "image": "fetch:1"}]},
        init_statuses=[
            objects.container(
                objects.waiting("CrashLoopBackOff"),
                name="fetch",
                restarts=4,
                lastState=objects.terminated(1, "no such model"),
            )
        ],
        statuses=[objects.container(objects.waiting("PodInitializing"))],
    )
    assert said(crashing).detail == "init container fetch ended with exit code 1: no such model"

    runs = objects.pod(
        phase="Pending",
        init_statuses=[objects.container(objects.RUNNING, name="fetch")],
        statuses=[objects.container(objects.waiting("PodInitializing"))],
    )
    assert said(runs).detail == "init container fetch runs"

    done = objects.pod_starting(
        init_statuses=[
            objects.container(objects.terminated(0, reason="Completed"), name="fetch", ready=True)
        ]
    )
    assert said(done).detail == "container main has not passed its startup probe yet"


def test_a_reason_that_nobody_knows_yet() -> None:
    found = said(objects.pod_waiting("worker", "Some New Reason", "of a newer kubelet"))
    assert found.reason == "RunContainerError"
    assert found.detail == "container main: of a newer kubelet"


# --- starting


def test_volumes_that_are_waited_for() -> None:
    volumes = [
        {"name": "a", "secret": {"secretName": "hf-token"}},
        {"name": "b", "persistentVolumeClaim": {"claimName": "models"}},
        {"name": "c", "configMap": {"name": "maybe", "optional": True}},
        {"name": "d", "emptyDir": {}},
    ]
    found = said(objects.pod_waiting(spec={"volumes": volumes}))
    assert found.reason == "ContainerCreating"
    assert found.detail == (
        "the node sets up volumes and network (PersistentVolumeClaim models, Secret hf-token must"
        " exist)"
    )
    assert not found.fault


def test_an_image_that_is_being_pulled() -> None:
    there = {"PodReadyToStartContainers": {"status": "True"}}
    assert said(objects.pod_waiting(conditions=there)).detail == f"the node pulls {objects.IMAGE}"


def test_a_model_that_loads() -> None:
    found = said(objects.pod_starting())
    assert (found.reason, found.fault) == ("Starting", "")


def test_readiness_that_fails_from_the_start_and_later() -> None:
    first = said(objects.pod_unready())
    later = said(objects.pod_unready(was_ready=True))
    assert (first.reason, first.fault) == ("NotReady", "")
    assert (later.reason, later.fault) == ("NotReady", "template")
    assert "no picker follows it" in first.detail
    assert "picker" not in said(objects.pod_unready("frontend")).detail


def test_a_pod_that_nobody_has_looked_at() -> None:
    assert said(objects.pod(phase="Pending", node="")).detail == "waiting for the scheduler"


# --- together


def test_pods_are_counted_by_reason_the_most_telling_first() -> None:
    groups = grouped(
        "worker",
        [
            objects.pod_unschedulable(),
            objects.pod_ready(),
            objects.pod_unpullable(),
            objects.pod_unschedulable(number=2),
        ],
    )
    assert [str(group) for group in groups] == [
        "ImagePullBackOff on 1 of 4 worker pods: registry.example/llm:none: not found; correct the"
        " image's name or push it",
        "Unschedulable on 2 of 4 worker pods: 0/4 nodes have a free nvidia.com/gpu; free some or"
        " add nodes",
    ]


def test_the_order_of_pods_does_not_matter() -> None:
    pods = [
        objects.pod_crashing(message="a"),
        objects.pod_crashing(message="b"),
        objects.pod_starting(),
    ]
    assert grouped("worker", pods) == grouped("worker", pods[::-1])


def test_logs_become_one_line() -> None:
    assert one_line("\x1b[31mred\x1b[0m\ttab\n\x00end") == "red tab end"
    assert last_words("first\n\n" + "x" * 300 + "\nlast\n", 20) == "last"
    assert len(last_words("y" * 500, 50)) == 50


def test_the_last_words_of_a_json_log() -> None:
    cause = 'error: argument --block-size: invalid value: "none"'
    message = f"the engine exited with status 2; its last lines:\nusage: …\n{cause}"
    log = json.dumps({"ts": "…", "level": "ERROR", "message": message}, ensure_ascii=False)
    assert last_words(f"starting\n{log}", 60) == cause
    assert last_words(log[60:], 60) == cause, "its beginning is cut off"
    assert last_words('{"half": "a line', 60) == '{"half": "a line'
    assert last_words("[1, 2]") == "[1, 2]"
