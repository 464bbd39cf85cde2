"""A namespace gets another master while a reconcile runs, which then writes nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from dynamo_operator.controller.metrics import OperatorMetrics
from dynamo_operator.controller.process import Operator
from dynamo_operator.controller.settings import OperatorSettings
from dynamo_operator.marker import MARKER
from dynamo_operator.render import Platform
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry

from tests.operator.objects import graph_raw
from tests.runtime.kube_api import KubeApi, failure, serving

NAMESPACE = "team-a"
GRAPHS = "/apis/nvidia.com/v1beta1/dynamographdeployments"
LEASES = "/apis/coordination.k8s.io/v1/leases"
SPEC = {"holderIdentity": "other", "leaseDurationSeconds": 30, "renewTime": "x"}
MARK = {"metadata": {"name": MARKER, "namespace": NAMESPACE}, "spec": SPEC}


class World:
    """A cluster-wide operator and an API server where a write hangs, behind a webhook, say."""

    def __init__(self, api: KubeApi, client: KubernetesClient) -> None:
        self.api = api
        self.hanging = asyncio.Event()
        self.answers = asyncio.Event()
        self.registry = CollectorRegistry()
        self.lifecycle = Lifecycle()
        self.operator = Operator(
            OperatorSettings(leader_elect=False, platform=Platform(image_tag="test")),
            self.lifecycle,
            client,
            client,
            OperatorMetrics(self.registry),
            "cluster-wide",
        )
        api.interfere = self._interfere

    async def _interfere(self, request: web.Request) -> web.StreamResponse | None:
        if request.method == "GET":
            # Discovery: no optional kinds.
            group = request.path.startswith("/apis/") and request.path.count("/") == 3
            return failure(404, "NotFound", "not found") if group else None
        self.hanging.set()
        await self.answers.wait()
        return None

    def reconciles(self, result: str) -> float:
        labels = {"controller": "dynamographdeployment", "result": result}
        name = "controller_runtime_reconcile_total"
        return self.registry.get_sample_value(name, labels) or 0.0

    @property
    def writes(self) -> int:
        return sum(method != "GET" for method, _ in self.api.requests)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with (
        serving() as api,
        KubernetesClient(Access(api.url), user_agent="test") as client,
    ):
        api.put(GRAPHS, graph_raw())
        world = World(api, client)
        running = asyncio.create_task(world.operator.run())
        try:
            yield world
        finally:
            world.answers.set()
            world.lifecycle.request_stop("test")
            assert await running == 0


async def until(holds: Callable[[], bool]) -> None:
    """Looks at every turn of the loop, because a state is no event."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_reconcile_ends_where_another_operator_has_come(world: World) -> None:
    async with asyncio.timeout(20):
        await world.hanging.wait()
    world.api.put(LEASES, MARK)
    await until(lambda: not world.operator._is_ours(NAMESPACE))
    world.answers.set()
    await until(lambda: world.reconciles("yielded") == 1)
    assert world.writes == 1, "only what had been sent"
    assert world.reconciles("error") == 0

    world.api.delete(LEASES, NAMESPACE, MARKER)
    await until(lambda: world.reconciles("success") > 0)
    assert world.writes > 1, "and it goes on where it left off"
