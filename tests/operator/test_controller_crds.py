"""The CRDs go, come and change hands while the operator runs."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from dynamo_crds.generate import KINDS, definition
from dynamo_operator.controller import process
from dynamo_operator.controller.crds import OwnCrds
from dynamo_operator.controller.metrics import OperatorMetrics
from dynamo_operator.controller.process import Operator
from dynamo_operator.controller.settings import OperatorSettings
from dynamo_operator.install.crds import ForeignCrds
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry

from tests.operator.test_controller_mastery import until
from tests.runtime.kube_api import KubeApi, failure, serving

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    """It serves no graphs without their CRDs; and no optional kinds."""
    async with serving() as api:

        async def answer(request: web.Request) -> web.StreamResponse | None:
            group = request.path.startswith("/apis/") and request.path.count("/") == 3
            graphs = request.path.startswith("/apis/nvidia.com/")
            installed = any(key[0] == CRDS for key in api.objects)
            missing = group or (graphs and not installed)
            return failure(404, "NotFound", "404 page not found") if missing else None

        api.interfere = answer
        yield api


@pytest.fixture
async def client(api: KubeApi) -> AsyncIterator[KubernetesClient]:
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        yield client


def install(api: KubeApi, *, dynamos: bool = False) -> None:
    for kind in KINDS:
        crd = copy.deepcopy(definition(kind, None))
        if dynamos:
            crd["metadata"]["annotations"] = {"controller-gen.kubebuilder.io/version": "v0.17.3"}
        api.put(CRDS, crd)


def operator(client: KubernetesClient, lifecycle: Lifecycle) -> Operator:
    settings = OperatorSettings(leader_elect=False, discovery_seconds=0.01)
    metrics = OperatorMetrics(CollectorRegistry())
    return Operator(settings, lifecycle, client, client, metrics, "test")


async def test_what_is_missing_is_said_and_found_when_it_comes(
    api: KubeApi, client: KubernetesClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GAUGES_EVERY_S", 0.01)
    lifecycle = Lifecycle()
    running = asyncio.create_task(operator(client, lifecycle).run())
    try:
        await until(lambda: "dynamo operator crds --apply --no-webhook" in lifecycle.reason)
        assert lifecycle.reason.startswith(f"no CustomResourceDefinition {KINDS[0].crd}, ")
        install(api)
        await until(lambda: lifecycle.ready)
    finally:
        lifecycle.request_stop("test")
        assert await running == 0


async def test_the_process_ends_when_they_have_become_dynamos(
    api: KubeApi, client: KubernetesClient, caplog: pytest.LogCaptureFixture
) -> None:
    install(api)
    lifecycle = Lifecycle()
    running = asyncio.create_task(operator(client, lifecycle).run())
    await until(lambda: lifecycle.ready)
    install(api, dynamos=True)
    async with asyncio.timeout(20):
        assert await running == 1
        assert "exist and are not ours" in caplog.text
        # Started again, it says so at once.
        assert await operator(client, Lifecycle()).run() == 1


async def test_who_may_not_look_goes_on_without(api: KubeApi, client: KubernetesClient) -> None:
    crds = OwnCrds(client, 60.0)
    api.fail(403)
    await crds.look()
    assert crds.missing == ""
    install(api, dynamos=True)
    with pytest.raises(ForeignCrds):
        await crds.look()
