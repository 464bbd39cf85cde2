"""Gathering: objects sorted by graph, and never behind our own writes."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from dynamo_operator.reconcile import gather
from dynamo_operator.reconcile.gather import GraphIndex
from dynamo_operator.reconcile.ownership import FIELD_MANAGER
from dynamo_operator.render import names
from hypothesis import given, settings
from hypothesis import strategies as st

Json = dict[str, Any]


def graph(name: str = "g", uid: str = "u1", version: int = 1, **status: Any) -> Json:
    item: Json = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": uid,
            "generation": 1,
            "resourceVersion": str(version),
        },
        "spec": {"components": [{"name": "Worker", "type": "worker"}]},
    }
    if status:
        item["status"] = status
    return item


def service(name: str, owner: str = "u1", version: int = 1, label: str = "g") -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "labels": {names.GRAPH_LABEL: label},
            "ownerReferences": [{"kind": "DynamoGraphDeployment", "name": "g", "uid": owner}],
        },
    }


class Index:
    def __init__(self) -> None:
        self.due: list[tuple[str, str]] = []
        self.index = GraphIndex(lambda key, urgent: self.due.append(key))
        self.index.graph_changed(None, graph())

    def children(self) -> dict[str, str]:
        """Name -> version of the graph's children."""
        raw = self.index.raw(("ns", "g"))
        assert raw is not None
        seen = self.index.observe(raw, frozenset())
        return {
            name: child["metadata"]["resourceVersion"] for (_, name), child in seen.children.items()
        }


def test_only_what_a_graph_owns_is_its_child() -> None:
    it = Index()
    it.index.child_changed(None, service("mine"))
    it.index.child_changed(None, service("of-an-earlier-one", owner="u0"))
    another = service("of-another", owner="u2", label="g")
    another["metadata"]["ownerReferences"][0]["name"] = "h"
    it.index.child_changed(None, another)
    assert it.children() == {"mine": "1"}
    assert set(it.due) == {("ns", "g")}


def test_what_an_earlier_graph_left_is_a_child_if_we_applied_it() -> None:
    """`kubectl delete --cascade=orphan`, and the graph comes back."""
    it = Index()
    left, of_others = service("left"), service("of-others")
    for item in (left, of_others):
        del item["metadata"]["ownerReferences"]
    entry = {"manager": FIELD_MANAGER, "operation": "Apply", "fieldsV1": {"f:spec": {}}}
    left["metadata"]["managedFields"] = [entry]
    of_others["metadata"]["managedFields"] = [{**entry, "manager": "kubectl"}]
    it.index.child_changed(None, left)
    it.index.child_changed(None, of_others)
    assert it.children() == {"left": "1"}


def test_a_child_that_lost_its_label_is_still_its_owners() -> None:
    it = Index()
    it.index.child_changed(None, service("g-old"))
    it.index.child_changed(service("g-old"), service("g-old", version=2, label="another"))
    assert it.children() == {"g-old": "2"}
    it.index.child_changed(service("g-old", version=2, label="another"), None)
    assert it.children() == {}


def test_a_change_makes_the_graph_due_and_nothing_else() -> None:
    it = Index()
    it.index.graph_changed(None, graph("h", "u2"))
    it.due.clear()
    it.index.child_changed(None, service("a"))
    assert it.due == [("ns", "g")]
    it.due.clear()
    moved = service("a", version=2, label="h")
    del moved["metadata"]["ownerReferences"]
    it.index.child_changed(service("a"), moved)
    assert set(it.due) == {("ns", "g"), ("ns", "h")}
    assert it.children() == {}


def test_our_own_writes_are_seen_before_the_cache_has_them() -> None:
    it = Index()
    it.index.wrote(service("a", version=5))
    assert it.children() == {"a": "5"}
    it.index.child_changed(None, service("a", version=4))  # the cache is behind
    assert it.children() == {"a": "5"}
    it.index.child_changed(service("a", version=4), service("a", version=6))
    assert it.children() == {"a": "6"}


def test_what_we_deleted_is_gone_before_the_cache_knows() -> None:
    it = Index()
    it.index.child_changed(None, service("a"))
    it.index.deleted(service("a"))
    assert it.children() == {}
    it.index.child_changed(service("a"), service("a", version=2))  # it is on its way out
    assert it.children() == {}
    it.index.child_changed(service("a", version=2), None)
    again = service("a", version=9)
    again["metadata"]["uid"] = "another"
    it.index.child_changed(None, again)
    assert it.children() == {"a": "9"}


def test_an_answer_that_comes_after_the_event_is_no_news() -> None:
    it = Index()
    it.index.child_changed(None, service("a", version=5))
    it.index.wrote(service("a", version=5))
    it.index.child_changed(service("a", version=5), None)
    assert it.children() == {}
    it.index.wrote(service("a", version=5))  # the slowest answer of all
    assert it.children() == {}


def test_a_status_that_we_wrote_is_the_graphs_until_the_cache_knows_better() -> None:
    it = Index()
    it.index.wrote_graph(graph(version=3, state="pending"))
    raw = it.index.raw(("ns", "g"))
    assert raw is not None
    assert raw["status"] == {"state": "pending"}
    it.index.graph_changed(graph(), graph(version=4, state="failed"))
    raw = it.index.raw(("ns", "g"))
    assert raw is not None
    assert raw["status"] == {"state": "failed"}


def test_a_graph_made_anew_is_not_taken_for_the_old_one() -> None:
    it = Index()
    it.index.wrote_graph(graph(version=7, state="successful"))
    it.index.graph_changed(graph(), None)
    assert it.index.raw(("ns", "g")) is None
    it.index.graph_changed(None, graph(uid="u9", version=2))
    raw = it.index.raw(("ns", "g"))
    assert raw is not None
    assert "status" not in raw


def test_what_vanished_while_nobody_watched_is_not_taken_for_there() -> None:
    it = Index()
    it.index.wrote(service("a", version=5))
    it.due.clear()
    it.index.listed("Service", None, "4")
    assert it.children() == {"a": "5"}  # the list is older than the write
    it.index.listed("Service", None, "9")
    assert it.children() == {}
    assert it.due == [("ns", "g")]


def test_a_status_is_no_reason_to_look_at_a_graph_again() -> None:
    it = Index()
    it.due.clear()
    it.index.graph_changed(graph(), graph(version=2, state="pending"))
    assert it.due == []
    changed = graph(version=3)
    changed["metadata"]["generation"] = 2
    it.index.graph_changed(graph(version=2), changed)
    assert it.due == [("ns", "g")]


@settings(max_examples=200)
@given(st.data())
def test_any_order_of_events_and_writes_ends_with_the_truth(data: st.DataObject) -> None:
    """The API server's history of one object, of which the cache shows every state in order while
    our writes' answers come in at once."""
    it = Index()
    history: list[Json | None] = [None]
    late: list[Json] = []  # answers that come after the events
    shown = 0
    for version in range(1, data.draw(st.integers(2, 12))):
        mine = data.draw(st.booleans())
        last = history[-1]
        if last is not None and data.draw(st.booleans()):
            if mine:
                it.index.deleted(last)
            history.append(None)
        else:
            item = service("a", version=version)
            item["metadata"]["uid"] = last["metadata"]["uid"] if last else f"uid-{version}"
            history.append(item)
            if mine and data.draw(st.booleans()):
                late.append(item)
            elif mine:
                it.index.wrote(item)
        while shown < len(history) - 1 and data.draw(st.booleans()):
            it.index.child_changed(history[shown], history[shown + 1])
            shown += 1
    while shown < len(history) - 1:
        it.index.child_changed(history[shown], history[shown + 1])
        shown += 1
    for item in late:
        it.index.wrote(item)
    final = history[-1]
    assert it.children() == ({} if final is None else {"a": final["metadata"]["resourceVersion"]})


def test_secrets_are_forgotten_but_for_their_registries() -> None:
    config = {"auths": {"registry.example": {"auth": "c2VjcmV0"}, "docker.io": {}}}
    data = base64.b64encode(json.dumps(config).encode()).decode()
    secret = {
        "metadata": {"name": "s", "namespace": "ns", "annotations": {"x": "y"}},
        "data": {".dockerconfigjson": data},
    }
    kept = gather.docker_secret(secret)
    assert kept["registries"] == ["docker.io", "registry.example"]
    assert "data" not in kept
    assert "c2VjcmV0" not in json.dumps(kept)


@pytest.mark.parametrize("data", [{}, {".dockerconfigjson": "?"}, {".dockerconfigjson": "W10="}])
def test_a_secret_that_is_none_names_no_registry(data: Json) -> None:
    assert gather.registries({"metadata": {"name": "s"}, "data": data}) == []


def test_pods_specs_are_not_kept() -> None:
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": "d",
            "namespace": "ns",
            "managedFields": [
                {"manager": "kube-controller-manager", "subresource": "status"},
                {"manager": "dynamo-operator", "operation": "Apply"},
                {"manager": "kube-controller-manager", "subresource": "scale"},
            ],
        },
        "spec": {"replicas": 2, "template": {"metadata": {"labels": {}}, "spec": {"x": 1}}},
        "status": {"replicas": 2},
    }
    cut = gather.child(deployment)
    assert cut["spec"]["template"] == {"metadata": {"labels": {}}}
    assert [e.get("subresource", "") for e in cut["metadata"]["managedFields"]] == ["", "scale"]
    assert deployment["spec"]["template"]["spec"] == {"x": 1}  # type: ignore[index]
