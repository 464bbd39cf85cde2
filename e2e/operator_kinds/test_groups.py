"""Engines over several nodes, with the real LeaderWorkerSet controller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from e2e.operator import graphs
from e2e.operator.operators import HostOperator
from e2e.operator.space import GRAPH_LABEL, Json, Space, condition, is_ready, uids
from e2e.operator_kinds.chat import chat

GRAPH, COMPONENT = "multinode", "Worker"
ADAPTER = "multinode-worker"
INDEX_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"
CLASS_LABEL = "nvidia.com/dynamo-component-class"
HASH_LABEL = "nvidia.com/dynamo-worker-hash"
ROLL_S = 150.0
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "multinode.yaml"
ENGINES = ROOT / "tests" / "operator" / "graphs" / "multinode.yaml"


@pytest.fixture(scope="module")
def groups(space: Space) -> Iterator[Space]:
    """The namespace, and a graph whose engine spans two pods, ready."""
    space.cluster.install_addon("lws")
    space.apply(graph())
    space.wait_ready(GRAPH, ROLL_S)
    yield space
    space.kubectl("delete", "dgd", GRAPH, "--ignore-not-found")


def graph(**env: str) -> Json:
    """The example, with what its pods ask for and variables for its workers."""
    whole: Json = yaml.safe_load(EXAMPLE.read_text())
    for component in whole["spec"]["components"]:
        (main,) = component["podTemplate"]["spec"]["containers"]
        image = main["image"].rpartition("/")[2]
        main["resources"] = graphs.container(image)["resources"]
        if component["name"] == COMPONENT:
            main["env"] = [{"name": name, "value": value} for name, value in env.items()]
    return whole


def leaders(space: Space) -> list[Json]:
    found = space.pods(GRAPH, COMPONENT)
    return [pod for pod in found if pod["metadata"]["labels"][INDEX_LABEL] == "0"]


def component_status(space: Space) -> Json:
    status: Json = space.get("dgd", GRAPH)["status"]["components"][COMPONENT]
    return status


@pytest.mark.timeout(300)
def test_the_leader_serves(groups: Space) -> None:
    status = component_status(groups)
    (leader,) = leaders(groups)
    worker_hash = leader["metadata"]["labels"][HASH_LABEL]
    assert status["componentKind"] == "LeaderWorkerSet"
    assert status["componentNames"] == [f"multinode-worker-group-{worker_hash}"]
    counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
    assert [status[count] for count in counts] == [1, 1, 1, 1]
    assert groups.columns(GRAPH)["STATE"] == "successful"

    pods = groups.pods(GRAPH, COMPONENT)
    assert len(pods) == 2
    assert all(map(is_ready, pods))
    assert [
        pod["metadata"]["name"] for pod in pods if CLASS_LABEL in pod["metadata"]["labels"]
    ] == [leader["metadata"]["name"]]
    answer = chat(groups, GRAPH, graphs.MODEL, "who leads?")
    assert (answer.how, answer.worker) == ("exact", leader["metadata"]["name"])


@pytest.mark.timeout(300)
def test_the_adapter_scales_groups(groups: Space) -> None:
    first = uids(groups.pods(GRAPH, COMPONENT))
    for number in (2, 1):
        groups.kubectl("scale", f"dgdsa/{ADAPTER}", f"--replicas={number}")
        groups.until(is_scaled(groups, number), f"{number} groups", ROLL_S, told(groups))
        adapter = groups.get("dgdsa", ADAPTER)["status"]
        assert adapter["replicas"] == number
        # What an autoscaler averages over: one pod a group.
        selected = groups.list("pods", adapter["selector"])
        assert uids(selected) == uids(leaders(groups))
        assert first <= uids(groups.pods(GRAPH, COMPONENT)), "the first group was not touched"


def is_scaled(space: Space, number: int) -> Callable[[], bool]:
    def now() -> bool:
        ready = condition(space.get("dgd", GRAPH), "Ready").get("status") == "True"
        pods = space.pods(GRAPH, COMPONENT, ending=True)
        return (
            ready
            and component_status(space)["availableReplicas"] == number
            and len(pods) == 2 * number
            and all(map(is_ready, pods))
        )

    return now


def told(space: Space) -> Callable[[], str]:
    return lambda: space.story(GRAPH)


@pytest.mark.timeout(300)
def test_a_change_rolls_the_group(groups: Space) -> None:
    """A new group is made before the old one goes, and Ready is said of the new one only."""
    old = uids(groups.pods(GRAPH, COMPONENT))
    frontends = uids(groups.pods(GRAPH, "Frontend"))
    groups.apply(graph(GENERATION="2"))

    def replaced() -> bool:
        pods = groups.pods(GRAPH, COMPONENT)
        assert any(map(is_ready, pods)), "the engine is away"
        return len(pods) == 2 and all(map(is_ready, pods)) and not uids(pods) & old

    groups.until(replaced, "a new group", ROLL_S, told(groups))
    groups.wait_ready(GRAPH, ROLL_S)
    assert component_status(groups)["updatedReplicas"] == 1
    assert uids(groups.pods(GRAPH, "Frontend")) == frontends
    (leader,) = leaders(groups)
    answer = chat(groups, GRAPH, graphs.MODEL, "who leads?")
    assert (answer.how, answer.worker) == ("exact", leader["metadata"]["name"])


@pytest.mark.timeout(300)
def test_a_restart_has_ended_when_the_group_is_new(groups: Space) -> None:
    old = uids(groups.pods(GRAPH, COMPONENT))
    restart = {"id": "r1", "strategy": {"type": "Parallel"}}
    groups.patch("dgd", GRAPH, {"spec": {"restart": restart}})

    def completed() -> bool:
        found = groups.get("dgd", GRAPH)["status"].get("restart") or {}
        return (found.get("observedID"), found.get("phase")) == ("r1", "Completed")

    groups.until(completed, "restarted", ROLL_S, told(groups))
    pods = groups.pods(GRAPH, COMPONENT, ending=True)
    assert len(pods) == 2
    assert all(map(is_ready, pods))
    assert not uids(pods) & old


@pytest.mark.timeout(300)
def test_a_group_dies_as_a_whole(groups: Space) -> None:
    """An engine that has lost a node is none: its controller makes all of its pods anew."""
    old = groups.pods(GRAPH, COMPONENT)
    (lost,) = [pod for pod in old if pod not in leaders(groups)]
    groups.kubectl("delete", "pod", lost["metadata"]["name"], "--wait=false")

    def replaced() -> bool:
        pods = groups.pods(GRAPH, COMPONENT, ending=True)
        return len(pods) == 2 and all(map(is_ready, pods)) and not uids(pods) & uids(old)

    groups.until(replaced, "a new group", ROLL_S, told(groups))
    groups.wait_ready(GRAPH)


@pytest.mark.timeout(300)
def test_deleting_leaves_nothing(groups: Space) -> None:
    groups.kubectl("delete", "dgd", GRAPH)

    def left() -> str:
        kinds = "lws,sts,deploy,pods,svc,networkpolicy,dgdsa,controllerrevision,sa,role,rolebinding"
        found = groups.kubectl("get", kinds, "-o", "name").split()
        return " ".join(name for name in found if f"/{GRAPH}-" in name)

    groups.until(lambda: not left(), "nothing left", 90.0, left)


@pytest.mark.timeout(300)
def test_every_engine_is_taken_as_rendered(groups: Space, operator: HostOperator) -> None:
    """vLLM over torch.distributed, Ray and data parallel ranks, SGLang, TensorRT-LLM: the
    controller's webhooks accept them, and what they fill in is no drift."""
    whole = yaml.safe_load(ENGINES.read_text())
    for component in whole["spec"]["components"]:
        # Nothing is to run: this machine has no such images, and no node has this label.
        spec = component.setdefault("podTemplate", {}).setdefault("spec", {})
        spec["nodeSelector"] = {"e2e": "nowhere"}
    name, count = whole["metadata"]["name"], len(whole["spec"]["components"]) - 1

    def handled() -> bool:
        """Whether all sets are there, and their controller has looked at them."""
        sets = groups.list("lws", f"{GRAPH_LABEL}={name}")
        return len(sets) == count and all(item.get("status") for item in sets)

    groups.apply(whole)
    groups.until(handled, "all sets", 60.0, lambda: groups.story(name))
    assert condition(groups.get("dgd", name), "Degraded").get("reason") != "WriteRefused"

    reconciles = operator.metric("controller_runtime_reconcile_total")
    writes = operator.metric("dynamo_operator_writes_total")
    groups.annotate("dgd", name, "example.test/looked-at=again")
    groups.until(
        lambda: operator.metric("controller_runtime_reconcile_total") > reconciles, "reconciled"
    )
    assert operator.metric("dynamo_operator_writes_total") == writes
    said = [line for line in operator.log.splitlines() if f"/{name}: LeaderWorkerSet" in line]
    assert len(said) == count, "each was created, and never applied again"
    groups.kubectl("delete", "dgd", name)
