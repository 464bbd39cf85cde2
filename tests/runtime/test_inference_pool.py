"""Endpoints of an InferencePool: what its fields mean, and that a picker's list follows it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from dynamo_runtime.discovery import Endpoint, InferencePoolSource, InvalidPool, PoolSpec
from dynamo_runtime.discovery import selected_pods as pods_source
from dynamo_runtime.discovery.inference_pool import _cut, endpoints_of, target_ports
from dynamo_runtime.kubernetes import labels
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.kube_api import KubeApi, failure, serving

Json = dict[str, Any]
Snapshot = tuple[Endpoint, ...]
PODS = "/api/v1/pods"
POOLS = "/apis/inference.networking.k8s.io/v1/inferencepools"
OURS = [
    {"name": "http", "containerPort": 8000},
    {"name": "worker-stream", "containerPort": 5557},
    {"name": "system", "containerPort": 9090},
]


def pod(
    name: str = "p",
    *,
    address: str | None = "10.0.0.1",
    ready: bool = False,
    phase: str = "Running",
    terminating: bool = False,
    ports: list[Json] | None = None,
    annotations: dict[str, str] | None = None,
    **more: str,
) -> Json:
    metadata: Json = {
        "name": name,
        "namespace": "ns",
        "labels": {"app": "vllm", **more},
        "annotations": {"other": "x", **(annotations or {})},
    }
    status: Json = {
        "phase": phase,
        "conditions": [{"type": "Ready", "status": str(ready)}, {"type": "Other"}],
    }
    if terminating:
        metadata["deletionTimestamp"] = "2000-01-01T00:00:00Z"
    if address:
        status["podIP"] = address
    containers = [{"name": "proxy", "ports": [{"containerPort": 1}]}, {"name": "x", "ports": ports}]
    return {"metadata": metadata, "spec": {"containers": containers}, "status": status}


def pool(name: str = "pool", *numbers: int, **match_labels: str) -> Json:
    return {
        "metadata": {"name": name, "namespace": "ns"},
        "spec": {
            "selector": {"matchLabels": match_labels or {"app": "vllm"}},
            "targetPorts": [{"number": number} for number in numbers or (8000,)],
            "endpointPickerRef": {"name": "epp", "port": {"number": 9002}},
        },
    }


def test_a_pool_as_it_is_written() -> None:
    written = pool("p", 8000, 8001, b="2", a="1")
    assert PoolSpec.of(written) == PoolSpec("a=1,b=2", (8000, 8001), "http", "FailClose")
    written["spec"]["appProtocol"] = "kubernetes.io/h2c"
    written["spec"]["endpointPickerRef"]["failureMode"] = "FailOpen"
    found = PoolSpec.of(written)
    assert (found.app_protocol, found.failure_mode) == ("kubernetes.io/h2c", "FailOpen")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "spec.selector.matchLabels is empty"),
        ({"selector": {"matchLabels": {"a": "b"}}}, r"spec.targetPorts is \[\]"),
        (
            {
                "selector": {"matchLabels": {"a": "b"}},
                "targetPorts": [{"number": port} for port in range(1, 10)],
            },
            "it must be 1 to 8 port numbers",
        ),
        (
            {"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 70000}]},
            "targetPorts has 70000",
        ),
    ],
)
def test_a_pool_that_can_not_be_followed(spec: Json, said: str) -> None:
    with pytest.raises(InvalidPool, match=said):
        PoolSpec.of({"metadata": {"name": "p"}, "spec": spec})


def test_ports_are_named_by_their_flag() -> None:
    assert target_ports([2, 1, 2], "--flag") == (2, 1)
    with pytest.raises(InvalidPool, match="--flag has 0"):
        target_ports([0], "--flag")


def test_a_stock_pod_needs_nothing_but_an_address() -> None:
    (found,) = endpoints_of(pod(ready=True), [8000])
    assert found == Endpoint(
        name="p", address="10.0.0.1", port=8000, ready=True, labels={"app": "vllm"}
    )


def test_each_port_is_an_endpoint() -> None:
    found = list(endpoints_of(pod(terminating=True), [8000, 8001, 8002]))
    assert [(e.name, e.port, e.rank) for e in found] == [
        ("p-rank-0", 8000, 0),
        ("p-rank-1", 8001, 1),
        ("p-rank-2", 8002, 2),
    ]
    assert all(endpoint.terminating and endpoint.stream_port is None for endpoint in found)
    fewer = pod(annotations={"llm-d.ai/active-ports": "8000, 8002"})
    assert [e.name for e in endpoints_of(fewer, [8000, 8001, 8002])] == ["p-rank-0", "p-rank-2"]


def test_a_pod_with_our_launcher_is_followed_by_its_stream() -> None:
    found = list(endpoints_of(pod(ports=OURS, **{labels.WORKER_HASH: "h"}), [8000, 8001]))
    assert [(e.stream_port, e.status_port) for e in found] == [(5557, 9090), (None, None)]
    assert found[0].generation == "h"


@pytest.mark.parametrize(
    ("changed", "roles"),
    [
        ({}, ["worker"]),
        ({labels.ROLE: "decode"}, ["decode"]),
        ({labels.ROLE: "frontend"}, []),
        ({"llm-d.ai/role": "prefill"}, ["prefill"]),
        ({"llm-d.ai/role": "both"}, ["worker"]),
        ({labels.GROUP_INDEX: "1"}, []),
    ],
)
def test_what_a_pod_does(changed: dict[str, str], roles: list[str]) -> None:
    assert [endpoint.role for endpoint in endpoints_of(pod(**changed), [8000])] == roles


def test_pods_that_are_no_endpoints() -> None:
    assert not list(endpoints_of(pod(address=None), [8000]))
    assert not list(endpoints_of(pod(phase="Failed"), [8000]))


@given(
    st.builds(
        pod,
        address=st.sampled_from(["10.0.0.1", None]),
        ready=st.booleans(),
        terminating=st.booleans(),
        ports=st.sampled_from([None, [], OURS]),
        annotations=st.sampled_from([None, {"llm-d.ai/active-ports": "8001"}]),
    )
)
def test_what_is_cut_away_is_not_looked_at(whole: Json) -> None:
    ports = [8000, 8001]
    assert list(endpoints_of(_cut(whole), ports)) == list(endpoints_of(whole, ports))


# --- the source -----------------------------------------------------------------------------------


@asynccontextmanager
async def following(api: KubeApi, **options: Any) -> AsyncIterator[AsyncGenerator[Snapshot]]:
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        source = InferencePoolSource(client, "ns", "pool", rng=random.Random(1), **options)
        async with aclosing(source.snapshots()) as snapshots:
            yield snapshots


async def following_one(snapshots: AsyncGenerator[Snapshot]) -> Snapshot:
    return await asyncio.wait_for(anext(snapshots), 5)


def names(snapshot: Snapshot) -> list[str]:
    return [endpoint.name for endpoint in snapshot]


async def test_endpoints_follow_pool_and_pods() -> None:
    async with serving() as api, following(api) as snapshots:
        api.put(POOLS, pool("other", 1))
        api.put(POOLS, pool())
        api.put(PODS, pod("a"))
        api.put(PODS, pod("b", app="other"))
        assert names(await following_one(snapshots)) == ["a"]
        api.put(PODS, pod("a", ready=True))
        assert [endpoint.ready for endpoint in await following_one(snapshots)] == [True]
        # Another selector, another port: other endpoints, whole at once.
        api.put(POOLS, pool("pool", 8000, 8001, app="other"))
        assert names(await following_one(snapshots)) == ["b-rank-0", "b-rank-1"]
        api.put(PODS, pod("b", app="other", terminating=True))
        assert [endpoint.terminating for endpoint in await following_one(snapshots)] == [True] * 2
        api.delete(PODS, "ns", "b")
        assert await following_one(snapshots) == ()


async def test_a_pool_that_is_missing_is_told_and_waited_for() -> None:
    told: asyncio.Queue[str] = asyncio.Queue()
    specs: list[PoolSpec] = []
    async with (
        serving() as api,
        following(api, on_absent=told.put_nowait, on_pool=specs.append) as snapshots,
    ):
        api.put(PODS, pod("a"))
        first = asyncio.create_task(following_one(snapshots))
        assert await asyncio.wait_for(told.get(), 5) == (
            "InferencePool ns/pool does not exist (inference.networking.k8s.io/v1)"
        )
        broken = pool()
        broken["spec"]["targetPorts"] = []
        api.put(POOLS, broken)
        assert "spec.targetPorts" in await asyncio.wait_for(told.get(), 5)
        api.put(POOLS, pool())
        assert await asyncio.wait_for(told.get(), 5) == ""
        assert names(await first) == ["a"]
        # Gone: its pods are followed on, and nothing begins anew when it is back.
        after = asyncio.create_task(following_one(snapshots))
        api.delete(POOLS, "ns", "pool")
        assert "does not exist" in await asyncio.wait_for(told.get(), 5)
        api.put(PODS, pod("b"))
        assert names(await after) == ["a", "b"]
        after = asyncio.create_task(following_one(snapshots))
        api.put(POOLS, pool())
        assert await asyncio.wait_for(told.get(), 5) == ""
        assert len(specs) == 1
        api.delete(PODS, "ns", "a")
        assert names(await after) == ["b"]


async def test_a_kind_that_is_not_served_says_what_to_do() -> None:
    problems: asyncio.Queue[str] = asyncio.Queue()
    async with (
        serving() as api,
        following(api, on_problem=problems.put_nowait) as snapshots,
    ):
        api.failures.append(lambda _: failure(404, "NotFound", "could not find the resource"))
        api.put(POOLS, pool())
        first = asyncio.create_task(following_one(snapshots))
        said = await asyncio.wait_for(problems.get(), 5)
        assert "--endpoint-selector and --endpoint-target-ports need no InferencePool" in said
        assert "inferencepools.inference.networking.k8s.io" in said
        assert await first == ()


async def test_a_selector_needs_no_pool() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        api.put(PODS, pod("a"))
        api.put(PODS, pod("b", app="other"))
        source = pods_source(client, "ns", "app=vllm", (8000, 9000), rng=random.Random(1))
        async with aclosing(source.snapshots()) as snapshots:
            assert names(await following_one(snapshots)) == ["a-rank-0", "a-rank-1"]
        assert not any("inferencepools" in path for _, path in api.requests)
