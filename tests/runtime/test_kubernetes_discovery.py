"""Endpoints from pods: what counts as one, and that a picker's list follows the API server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_operator.render import Platform, names, render
from dynamo_runtime.discovery import Endpoint, KubernetesEndpointSource
from dynamo_runtime.discovery.kubernetes import _cut, endpoint_of
from dynamo_runtime.kubernetes import labels
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.kube_api import KubeApi, failure, serving

Json = dict[str, Any]
Snapshot = tuple[Endpoint, ...]
PODS = "/api/v1/pods"
LABELS = {labels.GRAPH: "g", labels.CLASS: "worker", labels.ROLE: "worker"}
PORTS = [
    {"name": "http", "containerPort": 8000},
    {"name": "worker-stream", "containerPort": 5557},
    {"name": "system", "containerPort": 9090},
    {"containerPort": 1},
]


def pod(
    name: str = "p",
    *,
    address: str | None = "10.0.0.1",
    ready: bool | None = None,
    phase: str = "Running",
    terminating: bool = False,
    ports: list[Json] | None = None,
    **more: str,
) -> Json:
    metadata: Json = {"name": name, "namespace": "ns", "labels": {**LABELS, **more}}
    status: Json = {"phase": phase}
    if terminating:
        metadata["deletionTimestamp"] = "2000-01-01T00:00:00Z"
    if address:
        status["podIP"] = address
    if ready is not None:
        status["conditions"] = [
            {"type": "Initialized", "status": "True"},
            {"type": "Ready", "status": str(ready)},
        ]
    containers = [
        {"name": "sidecar", "ports": [{"name": "http", "containerPort": 1}]},
        {"name": "main", "ports": PORTS if ports is None else ports},
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": containers},
        "status": status,
    }


def test_a_pod_as_an_endpoint() -> None:
    found = endpoint_of(pod(ready=True, **{labels.WORKER_HASH: "abc", labels.ROLE: "decode"}))
    assert found == Endpoint(
        name="p",
        address="10.0.0.1",
        port=8000,
        role="decode",
        ready=True,
        terminating=False,
        generation="abc",
        stream_port=5557,
        status_port=9090,
        labels={**LABELS, labels.WORKER_HASH: "abc", labels.ROLE: "decode"},
    )
    stock = endpoint_of(pod(ports=[{"name": "http", "containerPort": 8001}]))
    assert stock is not None
    assert (stock.port, stock.stream_port, stock.status_port) == (8001, None, None)


def test_pods_are_known_before_they_are_ready_and_while_they_go() -> None:
    for given_pod, ready, terminating in (
        (pod(), False, False),
        (pod(ready=False), False, False),
        (pod(ready=True, terminating=True), True, True),
        (pod(phase="Pending"), False, False),
    ):
        found = endpoint_of(given_pod)
        assert found is not None
        assert (found.ready, found.terminating) == (ready, terminating)


@pytest.mark.parametrize(
    "none",
    [
        pod(address=None),
        pod(phase="Failed"),
        pod(phase="Succeeded"),
        pod(ports=[{"name": "system", "containerPort": 9090}]),
        pod(**{labels.ROLE: "frontend"}),
        pod(**{labels.GROUP_INDEX: "1"}),
        {"metadata": {"name": "bare"}},
    ],
)
def test_pods_that_are_no_endpoints(none: Json) -> None:
    assert endpoint_of(none) is None


@given(
    st.sampled_from([None, "10.0.0.1", "fd00::1"]),
    st.sampled_from([None, True, False]),
    st.sampled_from(["Pending", "Running", "Failed"]),
    st.booleans(),
)
def test_what_is_kept_of_a_pod_is_all_that_counts(
    address: str | None, ready: bool | None, phase: str, terminating: bool
) -> None:
    whole = pod(address=address, ready=ready, phase=phase, terminating=terminating)
    assert endpoint_of(_cut(whole)) == endpoint_of(whole)
    bare = {"metadata": {"name": "bare"}}
    assert endpoint_of(_cut(bare)) is None


@given(st.text("abc-.", min_size=1, max_size=120))
def test_the_labels_are_those_that_the_operator_writes(graph: str) -> None:
    assert labels.graph_value(graph) == names.bounded(graph)
    assert (labels.GRAPH, labels.ROLE) == (names.GRAPH_LABEL, names.TYPE_LABEL)
    assert (labels.CLASS, labels.WORKER_HASH) == (names.CLASS_LABEL, names.WORKER_HASH_LABEL)
    assert labels.GROUP_INDEX == names.NODE_LABEL


def test_a_rendered_worker_is_an_endpoint() -> None:
    graph = DynamoGraphDeployment.model_validate(
        {
            "metadata": {"name": "g", "namespace": "ns"},
            "spec": {
                "components": [
                    {
                        "name": "decode",
                        "type": "decode",
                        "podTemplate": {
                            "spec": {
                                "containers": [{"name": "main", "image": "dynamo-platform/worker"}]
                            }
                        },
                    },
                    {"name": "front", "type": "frontend"},
                ]
            },
        }
    )
    pods = [
        {**manifest["spec"]["template"], "status": {"podIP": "10.0.0.1"}}
        for manifest in render(graph, Platform(image_tag="test"))
        if manifest["kind"] == "Deployment"
    ]
    selector = dict(term.split("=") for term in labels.workers_of("g").split(","))
    (worker,) = (p for p in pods if selector.items() <= p["metadata"]["labels"].items())
    worker["metadata"]["name"] = "g-decode-0"
    found = endpoint_of(worker)
    assert found is not None
    assert (found.role, found.port, found.stream_port, found.status_port) == (
        "decode",
        8000,
        5557,
        9090,
    )
    assert found.generation


# --- the source -----------------------------------------------------------------------------------


@asynccontextmanager
async def snapshots_of(
    api: KubeApi, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> AsyncIterator[AsyncGenerator[Snapshot]]:
    monkeypatch.setattr("dynamo_runtime.kubernetes.informer.BACKOFF_S", (0.001, 0.005))
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        source = KubernetesEndpointSource(
            client, "ns", labels.workers_of("g"), rng=random.Random(1), **options
        )
        async with aclosing(source.snapshots()) as snapshots:
            yield snapshots


async def following(snapshots: AsyncGenerator[Snapshot]) -> Snapshot:
    return await asyncio.wait_for(anext(snapshots), 5)


async def test_snapshots_follow_the_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as api, snapshots_of(api, monkeypatch) as snapshots:
        api.put(PODS, pod("foreign", **{labels.GRAPH: "other"}))
        assert await following(snapshots) == ()
        api.put(PODS, pod("b", address=None))
        api.put(PODS, pod("a"))
        (a,) = await following(snapshots)
        assert (a.name, a.ready) == ("a", False)
        # A burst is one snapshot, sorted by name.
        api.put(PODS, pod("b", address="10.0.0.2"))
        api.put(PODS, pod("b", address="10.0.0.2", ready=True))
        api.put(PODS, pod("a", ready=True))
        a, b = await following(snapshots)
        assert (a.ready, b.ready, b.address) == (True, True, "10.0.0.2")
        # What changes nothing is no snapshot.
        touched = pod("a", ready=True)
        touched["status"]["startTime"] = "now"
        api.put(PODS, touched)
        api.put(PODS, pod("a", ready=True, terminating=True))
        a, b = await following(snapshots)
        assert a.terminating
        api.delete(PODS, "ns", "a")
        assert await following(snapshots) == (b,)


async def test_the_last_snapshot_stays_while_the_server_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems: asyncio.Queue[str] = asyncio.Queue()
    async with (
        serving() as api,
        snapshots_of(api, monkeypatch, on_problem=problems.put_nowait) as snapshots,
    ):
        api.put(PODS, pod("a", ready=True))
        assert len(await following(snapshots)) == 1
        await api.watch_opened.wait()
        waiting = asyncio.ensure_future(following(snapshots))
        away = asyncio.Event()

        async def gone(request: Any) -> Any:
            away.set()
            request.transport.abort()

        api.interfere = gone
        api.drop_watches()
        await away.wait()
        assert api.url in await asyncio.wait_for(problems.get(), 5)
        assert not waiting.done()
        api.put(PODS, pod("b", address="10.0.0.2"))
        api.interfere = None
        assert [endpoint.name for endpoint in await waiting] == ["a", "b"]
        assert await problems.get() == ""


async def test_a_picker_without_rights_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    problems: asyncio.Queue[str] = asyncio.Queue()
    async with (
        serving() as api,
        snapshots_of(api, monkeypatch, on_problem=problems.put_nowait) as snapshots,
    ):
        api.failures.append(lambda _: failure(403, "Forbidden", "pods is forbidden: User x"))
        first = asyncio.ensure_future(following(snapshots))
        assert await asyncio.wait_for(problems.get(), 5) == (
            "needs a role that allows list and watch of pods in namespace ns: "
            "pods is forbidden: User x"
        )
        assert await first == ()


async def test_an_endpoint_that_no_proxy_can_use_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as api, snapshots_of(api, monkeypatch) as snapshots:
        api.put(PODS, pod("bad", ports=[{"name": "http", "containerPort": 70000}]))
        api.put(PODS, pod("good"))
        assert [endpoint.name for endpoint in await following(snapshots)] == ["good"]
        api.put(PODS, pod("more"))
        assert len(await following(snapshots)) == 2
    assert caplog.text.count("pod bad is left out: port is 70000") == 1
