"""Readings from Prometheus: whose samples are whose, how old they are, and what an outage is."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from dynamo_crds.problem import InvalidManifest
from dynamo_planner.config import PlannerConfig, given_config
from dynamo_planner.observe.reading import COUNTERS
from dynamo_planner.sources import Prometheus, PrometheusSource, Workers
from dynamo_runtime.discovery import Endpoint, FileEndpointSource, write_endpoints

COMPONENT = {"nvidia.com/dynamo-component": "W"}
FAMILIES = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
)


class Server:
    """Answers as Prometheus' HTTP API does, from samples that the test gives."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.samples: list[tuple[str, dict[str, str], float, float]] = []  # …, value, taken at
        self.status = 200
        self.asked: list[tuple[str, str, dict[str, str]]] = []  # token, query, parameters

    def worker(self, taken: float, **labels: str) -> None:
        """All series of an engine that has served 10 requests, as they were ``taken`` s ago."""
        at = self.now - taken
        add = self.samples.append
        add(("vllm:num_requests_running", {"engine": "0", **labels}, 3, at))
        add(("vllm:num_requests_waiting", {"engine": "0", **labels}, 1, at))
        add(("vllm:kv_cache_usage_perc", {"engine": "0", **labels}, 0.25, at))
        config = {"kv_cache_size_tokens": "1000", **labels}
        add(("vllm:cache_config_info", config, 1, at))
        for family in FAMILIES:
            add((f"{family}_sum", labels, 5, at))
            add((f"{family}_count", labels, 10, at))
        for name in ("prompt_tokens", "generation_tokens", "prefill_kv_computed_tokens"):
            add((f"vllm:request_{name}_sum", labels, 1000, at))
        add(("vllm:request_prefill_time_seconds_sum", labels, 2, at))

    async def query(self, request: web.Request) -> web.Response:
        query = str((await request.post())["query"])
        token = request.headers.get("Authorization", "")
        self.asked.append((token, query, dict(request.query)))
        if self.status != 200:
            body = {"status": "error", "errorType": "x", "error": "too bad"}
            return web.json_response(body, status=self.status)
        space = re.search(r'namespace="([^"]*)"', query)
        names = re.search(r'__name__=~"([^"]*)"', query)
        found: list[dict[str, Any]] = []
        for name, labels, value, at in self.samples:
            if space and labels.get("namespace") != space[1]:
                continue
            if names is None and name == "vllm:num_requests_running":
                found.append({"metric": labels, "value": [self.now, repr(at)]})
            elif names is not None and re.fullmatch(names[1], name):
                metric = {"__name__": name, **labels}
                found.append({"metric": metric, "value": [self.now, repr(value)]})
        data = {"resultType": "vector", "result": found}
        return web.json_response({"status": "success", "data": data})


@asynccontextmanager
async def source(
    tmp_path: Path, *endpoints: Endpoint, namespace: str = "", **keys: object
) -> AsyncIterator[tuple[PrometheusSource, Server, list[float]]]:
    server, now = Server(), [100.0]
    app = web.Application()
    app.router.add_post("/api/v1/query", server.query)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    config = PlannerConfig.model_validate(
        {
            "metric_pulling_prometheus_endpoint": f"http://127.0.0.1:{runner.addresses[0][1]}/",
            **keys,
        }
    )
    write_endpoints(tmp_path / "e.json", endpoints)
    workers = Workers(FileEndpointSource(tmp_path / "e.json", interval_s=0.01))
    following = asyncio.create_task(workers.run())
    try:
        async with asyncio.timeout(10):
            while workers.problem:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        made = PrometheusSource(
            workers, Prometheus.of(config), namespace=namespace, clock=lambda: now[0]
        )
        yield made, server, now
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await runner.cleanup()


def endpoint(name: str, address: str = "127.0.0.1", **more: Any) -> Endpoint:
    return Endpoint(name, address, 8000, ready=True, labels=COMPONENT, **more)


async def test_samples_go_to_their_pods_with_their_age(tmp_path: Path) -> None:
    pods = (
        endpoint("a"),
        endpoint("b", "127.0.0.2", status_port=9090),
        endpoint("c", "127.0.0.3"),
    )
    async with source(tmp_path, *pods) as (made, server, _):
        server.worker(4.0, pod="a", instance="127.0.0.1:8000")
        server.worker(9.0, instance="127.0.0.2:9090")
        server.worker(1.0, pod="stranger", instance="127.0.0.3:8000")
        a, b, c = await made.readings()
    assert (a.running, a.waiting, a.kv_usage, a.kv_tokens) == (3, 1, 0.25, 1000)
    assert all(getattr(a.counters, name) is not None for name in COUNTERS)
    assert [round(each.age_s or 0) for each in (a, b)] == [4, 9]
    assert (c.age_s, c.running) == (None, None)
    assert {each.component for each in (a, b, c)} == {"W"}


async def test_a_pod_that_is_scraped_twice_counts_once(tmp_path: Path) -> None:
    async with source(tmp_path, endpoint("a")) as (made, server, _):
        server.worker(2.0, pod="a", instance="127.0.0.1:8000")
        server.worker(2.0, pod="a", instance="127.0.0.1:9090")
        launcher = {"pod": "a", "instance": "127.0.0.1:9090"}
        server.samples.append(("dynamo_worker_active_prefill_tokens", launcher, 70, server.now))
        (reading,) = await made.readings()
    assert (reading.running, reading.queued_tokens) == (3, 70)


async def test_only_the_namespace_is_asked_for(tmp_path: Path) -> None:
    async with source(tmp_path, endpoint("a"), namespace="n") as (made, server, _):
        server.worker(1.0, pod="a", namespace="other")
        (reading,) = await made.readings()
        assert reading.age_s is None
        server.worker(1.0, pod="a", namespace="n")
        (reading,) = await made.readings()
        assert reading.running == 3


async def test_an_outage_leaves_readings_that_grow_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with source(tmp_path, endpoint("a")) as (made, server, now):
        server.worker(2.0, pod="a")
        await made.readings()
        server.status = 503
        for later in (10.0, 20.0):
            now[0] = 100.0 + later
            (reading,) = await made.readings()
            assert reading.age_s == pytest.approx(2.0 + later)
        server.status = 200
        await made.readings()
    told = [r.message for r in caplog.records if r.name.startswith("dynamo_planner")]
    assert len(told) == 2
    assert "503 too bad" in told[0]
    assert told[1] == "Prometheus answers again"


async def test_tokens_and_parameters_go_with_each_query(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    keys = {
        "metric_pulling_prometheus_token_file": str(file),
        "metric_pulling_prometheus_extra_query_params": {"tenant": "t"},
    }
    async with source(tmp_path, endpoint("a"), **keys) as (made, server, _):
        await made.readings()
        file.write_text("two\n")
        await made.readings()
        file.unlink()
        await made.readings()
    assert [token for token, _, _ in server.asked] == ["Bearer one"] * 2 + ["Bearer two"] * 2
    assert {tuple(parameters.items()) for _, _, parameters in server.asked} == {(("tenant", "t"),)}


def test_the_environment_says_what_the_configuration_does_not() -> None:
    env = {
        "PROMETHEUS_ENDPOINT": "http://p:9090",
        "PROMETHEUS_TOKEN": "secret",
        "PROMETHEUS_SSL_VERIFY": "True",
        "PROMETHEUS_EXTRA_QUERY_PARAMS": "a=b&c=d",
        "DYN_PLANNER_PROMETHEUS_REQUEST_TIMEOUT_SECONDS": "3",
    }
    config = given_config('{"metric_pulling_prometheus_endpoint": "http://q"}', env).config
    prometheus = Prometheus.of(config)
    assert prometheus.url == "http://q"
    assert (prometheus.token, prometheus.tls, prometheus.timeout_s) == ("secret", True, 3)
    assert prometheus.parameters == {"a": "b", "c": "d"}
    assert given_config("", env).config.metric_pulling_prometheus_endpoint == "http://p:9090"
    assert "secret" not in repr(config.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROMETHEUS_EXTRA_QUERY_PARAMS", "a"),
        ("DYN_PLANNER_PROMETHEUS_REQUEST_TIMEOUT_SECONDS", "soon"),
    ],
)
def test_a_variable_that_can_not_be_read_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is '{value}'"):
        given_config("", {name: value})
    with pytest.raises(InvalidManifest, match="metric_pulling_prometheus_request_timeout_seconds"):
        given_config("", {"DYN_PLANNER_PROMETHEUS_REQUEST_TIMEOUT_SECONDS": "0"})


def test_a_bundle_that_is_not_there_is_named() -> None:
    config = PlannerConfig(metric_pulling_prometheus_ca_bundle="/no/such/file")
    with pytest.raises(ValueError, match="metric_pulling_prometheus_ca_bundle /no/such/file"):
        Prometheus.of(config)
