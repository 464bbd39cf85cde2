"""What moves from one status to the next: times, the rollout, adapters, events."""

from datetime import UTC, datetime, timedelta

import pytest
from dynamo_crds.v1beta1 import AdapterStatus
from dynamo_operator.reconcile.observed import Observed
from dynamo_operator.reconcile.plan import Plan, Refused, RestartPlan, Rollback
from dynamo_operator.render.notes import Note
from dynamo_operator.status import adapter_status, events, graph_status

from tests.operator import objects
from tests.operator.objects import Json, component, deployment, observed, plan, with_status

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Story:
    """A graph whose status is written again and again, a minute apart."""

    def __init__(self) -> None:
        self.status: Json = {}
        self.minute = 0
        self.told: list[tuple[str, str]] = []

    @property
    def time(self) -> str:
        return f"2026-01-01T12:{self.minute:02}:00Z"

    def see(self, seen: Observed, wanted: Plan, generation: int = 1) -> Json:
        self.minute += 1
        seen = with_status(seen, self.status, generation)
        new = graph_status(seen, wanted, START + timedelta(minutes=self.minute))
        told = events(self.status, new, wanted)
        self.told = [(event.type, event.reason) for event in told]
        self.status = new
        again = graph_status(with_status(seen, new, generation), wanted, START + timedelta(days=1))
        assert again == new
        assert events(new, again, wanted) == ()
        return new

    def since(self, type: str) -> str:
        (found,) = [c for c in self.status["conditions"] if c["type"] == type]
        return str(found["lastTransitionTime"])


FRONTEND = deployment("frontend")
TWO = plan(component("frontend"), component(replicas=2))
READY = observed(FRONTEND, deployment(wanted=2))
NOTHING = observed()
ROLLING = observed(FRONTEND, deployment(wanted=2, replicas=3, updated=1, available=2))
STALLED = observed(FRONTEND, deployment(wanted=2, replicas=3, updated=1, available=2, stalled=True))
CRASHING = observed(
    FRONTEND,
    deployment(wanted=2, replicas=3, updated=1, available=2),
    pods=[objects.pod_ready(), objects.pod_ready(number=1), objects.pod_crashing(number=2)],
)


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_time_is_kept_while_the_status_stays(story: Story) -> None:
    story.see(NOTHING, TWO)
    started = story.time
    story.see(observed(FRONTEND, deployment(wanted=2, available=1)), TWO)
    assert story.since("Ready") == started
    story.see(READY, TWO)
    assert story.since("Ready") == story.time
    assert story.since("Degraded") == started


def test_a_graph_comes_up(story: Story) -> None:
    story.see(NOTHING, TWO)
    assert story.told == []
    story.see(observed(FRONTEND, deployment(wanted=2, available=1)), TWO)
    assert story.told == []
    assert "rollingUpdate" not in story.see(READY, TWO)
    assert story.told == [("Normal", "Ready")]


def test_a_rollout_from_start_to_end(story: Story) -> None:
    story.see(READY, TWO)
    assert story.see(ROLLING, TWO, 2)["rollingUpdate"] == {
        "phase": "InProgress",
        "startTime": story.time,
        "updatedComponents": ["frontend"],
    }
    assert story.told == [("Normal", "RolloutStarted"), ("Normal", "NotReady")]
    began = story.time
    # The old pods are gone, a new one still starts: that belongs to it.
    late = observed(FRONTEND, deployment(wanted=2, available=1))
    assert story.see(late, TWO, 2)["rollingUpdate"]["phase"] == "InProgress"
    done = {
        "phase": "Completed",
        "startTime": began,
        "endTime": "2026-01-01T12:04:00Z",
        "updatedComponents": ["frontend", "worker"],
    }
    assert story.see(READY, TWO, 2)["rollingUpdate"] == done
    assert story.told == [("Normal", "RolloutCompleted"), ("Normal", "Ready")]
    assert (
        story.see(observed(FRONTEND, deployment(wanted=2, available=1)), TWO, 2)["rollingUpdate"]
        == done
    )
    assert story.told == [("Warning", "NotReady")]


def test_the_next_rollout_has_times_of_its_own(story: Story) -> None:
    for seen, generation in ((READY, 1), (ROLLING, 2), (READY, 2)):
        story.see(seen, TWO, generation)
    assert story.see(ROLLING, TWO, 3)["rollingUpdate"]["startTime"] == story.time
    assert ("Normal", "RolloutStarted") in story.told


def test_scaling_is_no_rollout(story: Story) -> None:
    story.see(READY, TWO)
    more = plan(component("frontend"), component(replicas=4))
    status = story.see(observed(FRONTEND, deployment(wanted=4, available=2)), more, 2)
    assert "rollingUpdate" not in status
    assert status["state"] == "pending"


def number(wanted: int) -> Plan:
    return plan(component("frontend"), component(replicas=wanted))


def test_scaling_is_no_news_however_many_steps_it_takes(story: Story) -> None:
    story.see(READY, number(2))
    for seen, wanted in (
        (observed(FRONTEND, deployment(wanted=2)), 4),  # its controller has yet to see it
        (observed(FRONTEND, deployment(wanted=4, available=2)), 4),
        (observed(FRONTEND, deployment(wanted=5, available=3)), 5),
        (observed(FRONTEND, deployment(wanted=5)), 5),
        (observed(FRONTEND, deployment(wanted=1, replicas=5, available=5)), 1),
        (observed(FRONTEND, deployment(wanted=1)), 1),
    ):
        status = story.see(seen, number(wanted))
        assert story.told == []
        ready, progressing, _ = status["conditions"]
        assert ready["status"] == "True" or progressing["reason"] == "Scaling"


def test_pods_that_are_lost_are_news_and_so_is_their_return(story: Story) -> None:
    story.see(READY, TWO)
    lost = story.see(observed(FRONTEND, deployment(wanted=2, available=1)), TWO)
    assert story.told == [("Warning", "NotReady")]
    assert lost["conditions"][1]["reason"] == "Starting"
    story.see(READY, TWO)
    assert story.told == [("Normal", "Ready")]


def test_what_goes_wrong_while_scaling_is_told_and_so_is_its_end(story: Story) -> None:
    story.see(READY, TWO)
    waiting = observed(
        FRONTEND,
        deployment(wanted=4, available=2),
        pods=[objects.pod_unschedulable(number=3)],
    )
    story.see(waiting, number(4))
    assert story.told == [("Warning", "Unschedulable"), ("Warning", "NotReady")]
    story.see(observed(FRONTEND, deployment(wanted=4)), number(4))
    assert story.told == [("Normal", "Ready")]


def test_a_rollout_that_stalls_and_recovers(story: Story) -> None:
    story.see(READY, TWO)
    story.see(ROLLING, TWO, 2)
    began = story.time
    status = story.see(STALLED, TWO, 2)
    assert status["rollingUpdate"]["phase"] == "Failed"
    assert status["rollingUpdate"]["endTime"] == story.time
    assert story.told == [("Warning", "RolloutStalled")]
    assert story.see(ROLLING, TWO, 2)["rollingUpdate"]["startTime"] == began
    assert story.told == []
    assert story.see(READY, TWO, 2)["rollingUpdate"]["phase"] == "Completed"


def test_a_rollout_that_fails_and_goes_back(story: Story) -> None:
    story.see(READY, TWO)
    story.see(CRASHING, TWO, 2)
    assert story.told == [
        ("Normal", "RolloutStarted"),
        ("Warning", "CrashLoopBackOff"),
        ("Warning", "NotReady"),
    ]
    back = plan(*TWO.components, rollback=Rollback("bbbbbbbb", "aaaaaaaa", "it crashes"))
    status = story.see(ROLLING, back, 2)
    assert story.told == [("Warning", "RolledBack")]
    assert status["rollingUpdate"]["phase"] == "Failed"
    story.see(READY, back, 2)
    assert story.told == []
    assert story.status["state"] == "failed"
    assert story.status["rollingUpdate"]["updatedComponents"] == ["frontend"]
    story.see(READY, TWO, 3)
    assert story.told == [("Normal", "RolloutCompleted"), ("Normal", "Ready")]


def test_a_restart_is_told_and_is_no_rollout(story: Story) -> None:
    story.see(READY, TWO)
    under_way = plan(*TWO.components, restart=RestartPlan("r1", "Restarting", ("worker",)))
    assert "rollingUpdate" not in story.see(ROLLING, under_way, 2)
    assert ("Normal", "RestartStarted") in story.told
    done = plan(*TWO.components, restart=RestartPlan("r1", "Completed"))
    assert story.see(READY, done, 2)["restart"] == {"observedID": "r1", "phase": "Completed"}
    assert story.told == [("Normal", "RestartCompleted"), ("Normal", "Ready")]


def test_what_is_wrong_is_told_once(story: Story) -> None:
    note = Note("worker", "RuntimeUnsupported", "nobody knows it")
    story.see(READY, plan(*TWO.components, notes=(note,)))
    assert story.told == [("Warning", "RuntimeUnsupported")]
    refused = Refused("Deployment/g-worker", "no", "worker")
    story.see(READY, plan(*TWO.components, refused=(refused,)))
    assert story.told == [("Warning", "WriteRefused")]


def test_a_number_in_the_graph_that_has_no_effect_is_warned_of(story: Story) -> None:
    def ruled(number: int, ignored: int | None, changed: bool = False) -> Plan:
        worker = component(
            replicas=number,
            scaled_by="adapter",
            ignored_replicas=ignored,
            renumbered=changed,
        )
        return plan(component("frontend"), worker)

    def reason() -> str:
        conditions = story.status["components"]["worker"]["conditions"]
        (found,) = [c["reason"] for c in conditions if c["type"] == "ScalingActive"]
        return str(found)

    warning = ("Warning", "GraphReplicasIgnored")
    story.see(READY, ruled(2, None))
    # The autoscaler scales: the graph's number was right once, and nobody has touched it.
    story.see(observed(FRONTEND, deployment(wanted=5)), ruled(5, 2))
    assert warning not in story.told
    assert reason() == "ScaledByAdapter"
    story.see(observed(FRONTEND, deployment(wanted=5)), ruled(5, 3, changed=True), 2)
    assert warning in story.told
    story.see(observed(FRONTEND, deployment(wanted=6)), ruled(6, 3), 2)
    assert warning not in story.told
    assert reason() == "GraphReplicasIgnored"
    story.see(observed(FRONTEND, deployment(wanted=6)), ruled(6, 3), 3)
    assert warning not in story.told
    story.see(observed(FRONTEND, deployment(wanted=6)), ruled(6, 4, changed=True), 4)
    assert warning in story.told
    # The adapter comes to the graph's number, and leaves it again.
    for number, ignored in ((4, None), (5, 4)):
        story.see(observed(FRONTEND, deployment(wanted=number)), ruled(number, ignored), 4)
        assert reason() == "ScaledByAdapter"
        assert warning not in story.told


# --- adapters


def test_an_adapters_status() -> None:
    old = deployment(object_name="g-worker-old", wanted=2)
    new = deployment(object_name="g-worker", wanted=3)
    wanted = plan(component(replicas=3, scaled_by="adapter", old_workloads=("g-worker-old",)))
    status = adapter_status(objects.adapter(replicas=3), observed(old, new), wanted, START)
    assert AdapterStatus.model_validate(status).manifest() == status
    assert status == {
        "replicas": 5,
        "selector": (
            "nvidia.com/dynamo-component=worker,nvidia.com/dynamo-graph-deployment-name=g"
        ),
        "observedGeneration": 1,
    }


def test_when_an_adapter_scaled_last() -> None:
    seen = observed(deployment(wanted=2))
    first = adapter_status(objects.adapter(), seen, plan(), START)
    scaled = adapter_status(objects.adapter(generation=2, **first), seen, plan(), START)
    assert scaled["lastScaleTime"] == "2026-01-01T12:00:00Z"
    later = START + timedelta(days=1)
    assert adapter_status(objects.adapter(generation=2, **scaled), seen, plan(), later) == scaled


def test_an_adapter_of_engines_selects_leaders() -> None:
    wanted = plan(component(replicas=2, workload_kind="LeaderWorkerSet"))
    seen = observed(objects.leader_worker_set(wanted=2))
    status = adapter_status(objects.adapter(), seen, wanted, START)
    assert status["replicas"] == 2
    assert status["selector"].endswith(",leaderworkerset.sigs.k8s.io/worker-index=0")


def test_an_adapter_of_nothing() -> None:
    status = adapter_status(objects.adapter("gone"), observed(), plan(), START)
    assert status["replicas"] == 0
