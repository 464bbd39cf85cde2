"""Objects are counted by the one process that takes care of them: sums over pods are true."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from aiohttp import web
from dynamo_operator.controller import process
from dynamo_operator.controller.metrics import OperatorMetrics
from dynamo_operator.controller.process import LEADER_LEASE, Operator
from dynamo_operator.controller.settings import OperatorSettings
from dynamo_operator.marker import MARKER
from dynamo_operator.render import Platform, names
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry

from tests.operator.objects import Json, adapter, graph_raw
from tests.runtime.kube_api import KubeApi, failure, serving

NVIDIA = "/apis/nvidia.com/v1beta1"
LEASES = "/apis/coordination.k8s.io/v1/leases"
OTHERS = "team-b"


def moved(item: Json, namespace: str) -> Json:
    return {**item, "metadata": {**item["metadata"], "namespace": namespace}}


def lease(name: str, namespace: str) -> Json:
    spec = {
        "holderIdentity": "other",
        "leaseDurationSeconds": 30,
        "renewTime": "2026-01-01T12:00:00.000000Z",
    }
    return {"metadata": {"name": name, "namespace": namespace}, "spec": spec}


def counts(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Kind, namespace -> objects."""
    return {
        (sample.labels["resource_type"], sample.labels["namespace"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "dynamo_operator_resources_total"
    }


async def interfere(request: web.Request) -> web.StreamResponse | None:
    """Discovery finds no optional kinds; nothing can be written."""
    if request.path.startswith("/apis/") and request.path.count("/") == 3:
        return failure(404, "NotFound", "not found")
    if request.method != "GET":
        return failure(403, "Forbidden", "forbidden")
    return None


async def counted(
    api: KubeApi, client: KubernetesClient, patience_s: float, *, leader_elect: bool
) -> dict[tuple[str, str], float]:
    """What an operator counts once its caches are filled; waits so long for two kinds."""
    ours = {names.MANAGED_BY_LABEL: names.MANAGED_BY}
    labelled = adapter()
    labelled["metadata"]["labels"] = {**labelled["metadata"].get("labels", {}), **ours}
    for namespace in ("team-a", OTHERS):
        api.put(f"{NVIDIA}/dynamographdeployments", moved(graph_raw(), namespace))
        api.put(f"{NVIDIA}/dynamographdeploymentscalingadapters", moved(labelled, namespace))
    api.put(LEASES, lease(MARKER, OTHERS))
    api.interfere = interfere
    registry, lifecycle = CollectorRegistry(), Lifecycle()
    operator = Operator(
        OperatorSettings(leader_elect=leader_elect, platform=Platform(image_tag="test")),
        lifecycle,
        client,
        client,
        OperatorMetrics(registry),
        "cluster-wide",
    )
    running = asyncio.create_task(operator.run())
    try:
        async with asyncio.timeout(20):
            while not lifecycle.ready or operator._is_ours(OTHERS):  # noqa: ASYNC110
                await asyncio.sleep(0)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while len(counts(registry)) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        return counts(registry)
    finally:
        lifecycle.request_stop("test")
        await running


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GAUGES_EVERY_S", 0.01)


async def test_a_leader_counts_what_it_takes_care_of() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        assert await counted(api, client, 20.0, leader_elect=False) == {
            ("dynamographdeployment", "team-a"): 1,
            ("dynamographdeploymentscalingadapter", "team-a"): 1,
        }


async def test_a_standby_counts_nothing() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        api.put(LEASES, lease(LEADER_LEASE, client.namespace))
        assert await counted(api, client, 0.2, leader_elect=True) == {}
