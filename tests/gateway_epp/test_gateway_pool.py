"""A picker for an InferencePool in a cluster: what it says while there is none, and its return."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from dynamo_epp.gateway import GatewaySettings, Tls, run_picker
from dynamo_epp.models import ModelRules
from dynamo_epp.serving import PickerSettings, ServingKvPicker
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry

from tests.gateway_epp.conftest import EchoEngine
from tests.runtime.kube_api import serving
from tests.runtime.test_inference_pool import POOLS, pod, pool
from tests.runtime.test_kubernetes_frontend import KUBECONFIG

PODS = "/api/v1/pods"
SETTINGS = PickerSettings(discovery_backend="inference-pool", pool_name="pool", relays=True)


class Watched(Lifecycle):
    """Tells when its state changes."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = asyncio.Event()

    def set_not_ready(self, reason: str) -> None:
        super().set_not_ready(reason)
        self.changed.set()

    def set_ready(self) -> None:
        super().set_ready()
        self.changed.set()

    async def until(self, state: str) -> None:
        """Wait for a reason that begins like ``state``; "" for readiness."""
        async with asyncio.timeout(100):
            while not (self.ready if not state else self.reason.startswith(state)):
                self.changed.clear()
                await self.changed.wait()


class Ruled(ServingKvPicker):
    """Tells when it has rules."""

    ruled: asyncio.Event

    def _adopt_rules(self, rules: ModelRules) -> None:
        super()._adopt_rules(rules)
        self.ruled.set()


async def no_metrics(request: web.Request, body: bytes) -> web.StreamResponse:
    if request.path == "/v1/models":
        return web.json_response({"data": [{"id": "m"}]})
    return web.Response(status=404)


def rewrite() -> dict[str, Any]:
    rule = {
        "matches": [{"model": {"value": "nice"}}],
        "targets": [{"modelRewrite": "m", "weight": 1}],
    }
    return {
        "metadata": {"name": "r", "namespace": "ns"},
        "spec": {"poolRef": {"name": "pool"}, "rules": [rule]},
    }


def objective() -> dict[str, Any]:
    return {
        "metadata": {"name": "urgent", "namespace": "ns"},
        "spec": {"poolRef": {"name": "pool"}, "priority": 7},
    }


async def ready(address: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://{address}:9090/ready") as answer,
    ):
        return answer.status, json.loads(await answer.read())["reason"]


async def test_a_pool_that_comes_goes_and_comes_back(
    own_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: Any
) -> None:
    engine: EchoEngine = await engines()
    engine.handler = no_metrics
    async with serving() as api:
        path = tmp_path / "kubeconfig"
        path.write_text(KUBECONFIG.format(url=api.url))
        monkeypatch.setenv("KUBECONFIG", str(path))
        api.put(PODS, pod("a", address=engine.address, ready=True))
        lifecycle, registry = Watched(), list[CollectorRegistry]()
        pickers: list[ServingKvPicker] = []
        ruled = asyncio.Event()

        def make(metrics: CollectorRegistry) -> ServingKvPicker:
            registry.append(metrics)
            picker = Ruled(SETTINGS, lifecycle, metrics)
            picker.ruled = ruled
            pickers.append(picker)
            return picker

        settings = GatewaySettings(host=own_address, drain_accept_seconds=0)
        running = asyncio.create_task(run_picker(settings, lifecycle, make))
        try:
            await lifecycle.until("InferencePool ns/pool does not exist")
            assert (await ready(own_address))[0] == 503
            assert registry[0].get_sample_value("dynamo_epp_pool_found") == 0
            api.put(POOLS, pool())
            await lifecycle.until("")
            assert await ready(own_address) == (200, "")
            assert registry[0].get_sample_value("dynamo_epp_pool_found") == 1
            api.put("/apis/llm-d.ai/v1alpha2/inferencemodelrewrites", rewrite())
            await asyncio.wait_for(ruled.wait(), 100)
            assert pickers[0]._picker.rules.exact.keys() == {"nice"}
            ruled.clear()
            api.put("/apis/llm-d.ai/v1alpha2/inferenceobjectives", objective())
            await asyncio.wait_for(ruled.wait(), 100)
            assert pickers[0]._gate.objectives("urgent") == 7
            api.delete(POOLS, "ns", "pool")
            await lifecycle.until("InferencePool ns/pool does not exist")
            assert await ready(own_address) == (
                503,
                "InferencePool ns/pool does not exist (inference.networking.k8s.io/v1)",
            )
            assert list(pickers[0]._pool.workers) == ["a"]  # requests may be under way
            api.put(POOLS, pool())
            await lifecycle.until("")
        finally:
            lifecycle.request_stop("the test is over")
            assert await running == 0


async def test_a_graphs_picker_obeys_what_is_said_of_the_graphs_pool(
    own_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as api:
        path = tmp_path / "kubeconfig"
        path.write_text(KUBECONFIG.format(url=api.url))
        monkeypatch.setenv("KUBECONFIG", str(path))
        api.put("/apis/llm-d.ai/v1alpha2/inferencemodelrewrites", rewrite())
        lifecycle, pickers = Watched(), list[ServingKvPicker]()

        def make(metrics: CollectorRegistry) -> ServingKvPicker:
            backend = PickerSettings(discovery_backend="kubernetes", graph="g", rules_pool="pool")
            pickers.append(ServingKvPicker(backend, lifecycle, metrics))
            return pickers[0]

        settings = GatewaySettings(host=own_address, drain_accept_seconds=0)
        running = asyncio.create_task(run_picker(settings, lifecycle, make))
        try:
            await lifecycle.until("")
            assert pickers[0]._picker.rules.exact.keys() == {"nice"}
            assert pickers[0]._gate.expects("m")
        finally:
            lifecycle.request_stop("the test is over")
            assert await running == 0


async def test_a_picker_may_open_as_many_files_as_its_process(
    own_address: str, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1 if soft == hard else soft, hard))
    try:
        settings = GatewaySettings(host=own_address, tls=Tls(cert_path=tmp_path))
        assert await run_picker(settings, Lifecycle(), lambda _: pytest.fail("no certificate")) == 1
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
