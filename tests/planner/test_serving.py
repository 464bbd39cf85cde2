"""The planner as a process: scraping real pages, scaling through the real local socket."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from dynamo_cli.local.scales import ScaleServer
from dynamo_planner.config import GivenConfig, PlannerConfig
from dynamo_planner.connectors import (
    InvalidComponents,
    LocalScaleApi,
    Scalable,
    ScaleConnector,
    scalables,
)
from dynamo_planner.metrics import PlannerMetrics
from dynamo_planner.record import replay
from dynamo_planner.serving import Planner, run_planner
from dynamo_planner.settings import Settings
from dynamo_planner.sources import DirectScrape, Misconfigured, Workers, endpoint_source
from dynamo_planner.state import State
from dynamo_runtime.discovery import Endpoint, FileEndpointSource, write_endpoints
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import ApiError, ApiUnreachable, KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from prometheus_client import CollectorRegistry

COMPONENTS = [Scalable("Worker", "worker", "g-worker")]
CONFIG = PlannerConfig(
    mode="agg",
    optimization_target="load",
    decode_scale_up_kv_rate=50,
    decode_scale_down_kv_rate=20,
    load_min_observations=1,
    scale_up_stabilization_seconds=0,
    max_gpu_budget=4,
)


class Worker:
    """A worker's two ports on one: a metrics page and /v1/models."""

    def __init__(self) -> None:
        self.kv_usage = 0.1
        self.broken = False
        self.padding = 0  # bytes of other metrics before those that are read
        self.port = 0

    async def metrics(self, _: web.Request) -> web.Response:
        if self.broken:
            raise web.HTTPServiceUnavailable
        page = "# other\n" * (self.padding // 8) + (
            'vllm:num_requests_running{engine="0"} 4\n'
            'vllm:num_requests_waiting{engine="0"} 0\n'
            "dynamo_worker_active_prefill_tokens 7\n"
            f'vllm:kv_cache_usage_perc{{engine="0"}} {self.kv_usage}\n'
        )
        return web.Response(text=page)

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": 4096}]})


@asynccontextmanager
async def worker() -> AsyncIterator[Worker]:
    found = Worker()
    app = web.Application()
    app.router.add_get("/metrics", found.metrics)
    app.router.add_get("/v1/models", found.models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.port = runner.addresses[0][1]
    try:
        yield found
    finally:
        await runner.cleanup()


class Machine:
    """What the local runner is to a planner: an endpoints file and a scale socket."""

    def __init__(self, folder: Path, port: int) -> None:
        self.file, self.socket = folder / "endpoints.json", folder / "s"
        self.port, self.wanted, self.ready = port, 1, 1
        self.server = ScaleServer(
            self.socket,
            {"g-worker": "g-worker-abc"},
            wanted=lambda name: self.wanted,
            ready=lambda name: self.ready,
            scale=self.scale,
        )
        self.publish()

    async def scale(self, deployment: str, replicas: int) -> None:
        assert deployment == "g-worker-abc"
        self.wanted = self.ready = replicas
        self.publish()

    def publish(self) -> None:
        write_endpoints(
            self.file,
            [
                Endpoint(
                    f"w{n}",
                    "127.0.0.1",
                    self.port,
                    ready=True,
                    labels={"nvidia.com/dynamo-component": "Worker"},
                )
                for n in range(self.ready)
            ],
        )


@asynccontextmanager
async def planner(
    tmp_path: Path, *, config: PlannerConfig = CONFIG, **more: Any
) -> AsyncIterator[tuple[Planner, Machine, Worker, Lifecycle, CollectorRegistry]]:
    registry, lifecycle = CollectorRegistry(), Lifecycle()
    async with worker() as engine:
        machine = Machine(tmp_path, engine.port)
        await machine.server.start()
        api = LocalScaleApi(str(machine.socket))
        workers = Workers(FileEndpointSource(machine.file, interval_s=0.01))
        source = DirectScrape(workers)
        following = asyncio.create_task(workers.run())
        try:
            made = Planner(
                GivenConfig(config),
                State(),
                workers,
                source,
                ScaleConnector(api, "default", COMPONENTS),
                lifecycle,
                PlannerMetrics(registry),
                **more,
            )
            await until(lambda: not workers.problem)
            yield made, machine, engine, lifecycle, registry
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await api.close()
            await machine.server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_it_looks_decides_and_scales(tmp_path: Path) -> None:
    recording = io.BytesIO()
    async with planner(tmp_path, recording=recording) as (made, machine, engine, lifecycle, seen):
        assert not lifecycle.ready
        decision = await made.look()
        assert decision is not None
        assert decision.orders == ()
        assert lifecycle.ready
        (role,) = decision.roles
        assert (role.observed.ready, role.observed.seen) == (1, 1)
        engine.kv_usage = 0.9
        await made.look()
        assert machine.wanted == 2
        await until(lambda: made._workers.pods("Worker").ready == 2)
        engine.kv_usage = 0.3
        await made.look()
        assert seen.get_sample_value("dynamo_planner_num_decode_replicas") == 2
        assert seen.get_sample_value("dynamo_planner_orders_total", {"outcome": "taken"}) == 1
        queued = {"worker_id": "w0", "dp_rank": "0"}
        assert seen.get_sample_value("dynamo_planner_engine_queued_prefill_tokens", queued) == 7
        state = {"dynamo_planner_load_scaling_decision": "no_change"}
        assert seen.get_sample_value("dynamo_planner_load_scaling_decision", state) == 1
    again = list(replay(io.BytesIO(recording.getvalue())))
    assert [each.same for each in again] == [True] * 3


async def test_a_worker_that_does_not_answer_is_a_reading_that_grows_old(tmp_path: Path) -> None:
    now = [0.0]
    async with planner(tmp_path, clock=lambda: now[0]) as (made, _, engine, lifecycle, seen):
        source = made._source
        assert isinstance(source, DirectScrape)
        source._clock = lambda: now[0]
        await made.look()
        engine.broken = True
        now[0] = 10.0
        decision = await made.look()
        assert decision is not None
        assert decision.roles[0].observed.age_s == 10
        assert lifecycle.ready
        now[0] = 20.0
        decision = await made.look()
        assert decision is not None
        assert decision.roles[0].held
        assert not lifecycle.ready
        assert "nothing was heard of any of 1 workers" in lifecycle.reason
        assert seen.get_sample_value("dynamo_planner_problem") == 1
        engine.broken = False
        await made.look()
        assert lifecycle.ready


async def test_without_scales_nothing_is_decided_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with planner(tmp_path) as (made, machine, engine, lifecycle, _):
        engine.kv_usage = 0.9
        await machine.server.stop()
        with caplog.at_level(logging.ERROR):
            assert await made.look() is None
            assert await made.look() is None
        assert machine.wanted == 1
        assert "the scales can't be read" in lifecycle.reason
        assert len(caplog.records) == 1


async def test_an_order_that_fails_is_told_and_given_again(tmp_path: Path) -> None:
    async with planner(tmp_path) as (made, machine, engine, _, seen):
        engine.kv_usage = 0.9
        machine.server._deployments = {}

        async def desired() -> dict[str, int]:
            return {"Worker": machine.wanted}

        made._connector.desired = desired  # type: ignore[method-assign]
        await made.look()
        decision = await made.look()
        assert decision is not None
        assert decision.notes[0].startswith("order for Worker failed: ")
        assert len(decision.orders) == 1
        assert seen.get_sample_value("dynamo_planner_orders_total", {"outcome": "failed"}) == 2


async def test_a_mode_without_its_workers_is_a_problem(tmp_path: Path) -> None:
    async with planner(tmp_path, config=PlannerConfig()) as (made, _, _, lifecycle, _):
        await made.look()
        assert lifecycle.reason.startswith("mode disagg scales prefill and decode workers")


async def test_the_process_serves_until_it_is_stopped(tmp_path: Path) -> None:
    async with worker() as engine:
        machine = Machine(tmp_path, engine.port)
        await machine.server.start()
        lifecycle = Lifecycle()
        settings = Settings.from_env(
            {
                "DYN_PLANNER_COMPONENTS": msgspec.json.encode(COMPONENTS).decode(),
                "DYN_DISCOVERY_BACKEND": "file",
                "DYN_ENDPOINTS_FILE": str(machine.file),
                "DYN_LOCAL_SCALE_SOCKET": str(machine.socket),
                "DYN_SYSTEM_HOST": "127.0.0.1",
                "DYN_SYSTEM_PORT": str(free_port()),
            },
            tmp_path / "r.jsonl",
        )
        config = CONFIG.model_copy(update={"load_adjustment_interval_seconds": 0.05})
        running = asyncio.create_task(
            run_planner(settings, GivenConfig(config, ("a note",)), State(), lifecycle)
        )
        await until(lambda: lifecycle.ready)
        url = f"http://127.0.0.1:{settings.status_port}"
        async with aiohttp.ClientSession() as client:
            async with client.get(f"{url}/planner") as answer:
                told = await answer.json()
            async with client.get(f"{url}/planner/decisions") as answer:
                decisions = (await answer.json())["decisions"]
        assert told["notes"] == ["a note"]
        assert told["config"]["mode"] == "agg"
        assert told["last"]["decision"]["roles"][0]["reason"]
        assert decisions
        lifecycle.request_stop("test")
        assert await running == 0
        await machine.server.stop()
    with (tmp_path / "r.jsonl").open("rb") as lines:
        assert all(each.same for each in replay(lines))


def free_port() -> int:
    from dynamo_runtime.status import bind

    sock = bind("127.0.0.1", 0)
    port = int(sock.getsockname()[1])
    sock.close()
    return port


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"min_endpoint": 3, "max_gpu_budget": 5}, "max_gpu_budget is 5, and the fewest .* need 6"),
        ({"components": {"Wroker": {}}}, "components.Wroker: .* did you mean Worker?"),
        ({"min_endpoint": 3, "components": {"Worker": {"max_endpoint": 2}}}, "may have 2 replicas"),
        (
            {"max_endpoint": 1, "components": {"Worker": {"min_endpoint": 2}}},
            "must have 2 replicas",
        ),
    ],
)
async def test_limits_that_no_fleet_can_keep_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any], told: str
) -> None:
    settings = Settings(
        components='[{"name": "Worker", "role": "worker", "adapter": "a", "gpus": 2}]',
        discovery="file",
        endpoints_file=tmp_path / "e.json",
        scale_socket=str(tmp_path / "s"),
    )
    given = GivenConfig(PlannerConfig.model_validate({"mode": "agg", **config}))
    assert await run_planner(settings, given, State(), Lifecycle()) == 1
    (line,) = caplog.messages
    assert re.search(told, line)


async def test_what_can_not_start_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(discovery="file")
    assert await run_planner(settings, GivenConfig(CONFIG), State(), Lifecycle()) == 1
    assert caplog.messages == ["discovery backend file needs DYN_ENDPOINTS_FILE"]


# --- the scale socket


async def test_the_socket_answers_as_the_api_server_does(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1)
    await machine.server.start()
    api = LocalScaleApi(str(machine.socket))
    path = (
        "/apis/nvidia.com/v1beta1/namespaces/default/dynamographdeploymentscalingadapters/{}/scale"
    )
    try:
        scale = await api.get(path.format("g-worker"))
        assert (scale["kind"], scale["spec"], scale["status"]) == (
            "Scale",
            {"replicas": 1},
            {"replicas": 1},
        )
        scale = await api.merge_patch(path.format("g-worker"), {"spec": {"replicas": 3}})
        assert scale["spec"] == {"replicas": 3}
        assert machine.wanted == 3
        for call, status in (
            (api.get(path.format("other")), 404),
            (api.merge_patch(path.format("g-worker"), {"spec": {}}), 400),
            (api.merge_patch(path.format("g-worker"), {"spec": {"replicas": -1}}), 422),
            (api.merge_patch(path.format("g-worker"), {"spec": {"replicas": 100000}}), 422),
        ):
            with pytest.raises(ApiError) as caught:
                await call
            assert caught.value.status == status
    finally:
        await machine.server.stop()
        await api.close()
    gone = LocalScaleApi(str(machine.socket))
    with pytest.raises(ApiUnreachable):
        await gone.get(path.format("g-worker"))
    await gone.close()


async def test_a_cluster_is_scaled_at_the_same_paths(tmp_path: Path) -> None:
    """The real client of the API server, and the runner's answers over TCP in its place."""
    machine = Machine(tmp_path, 1)
    runner = machine.server._runner
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    async with KubernetesClient(Access(f"http://{host}:{port}"), user_agent="test") as client:
        connector = ScaleConnector(client, "default", COMPONENTS)
        assert await connector.desired() == {"Worker": 1}
        await connector.scale("Worker", 3)
        assert await connector.desired() == {"Worker": 3}
        stranger = ScaleConnector(client, "default", [Scalable("X", "worker", "g-x")])
        with pytest.raises(ApiError, match="no such scale"):
            await stranger.desired()
    await runner.cleanup()


# --- settings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "DYN_PLANNER_COMPONENTS: "),
        ('[{"name": "A"}]', "missing required field `role`"),
        ('[{"name": "A", "role": "epp", "adapter": "a"}]', "Invalid enum value 'epp'"),
        (json.dumps([{"name": "A", "role": "worker", "adapter": "a"}] * 2), "have one name"),
    ],
)
def test_components_that_say_nonsense_are_named(text: str, told: str) -> None:
    with pytest.raises(InvalidComponents, match=told):
        scalables(text)


def test_settings_that_can_not_work_name_the_variable() -> None:
    with pytest.raises(ValueError, match="DYN_SYSTEM_PORT is 'x'"):
        Settings.from_env({"DYN_SYSTEM_PORT": "x"})
    for backend, told in (("etcd", "'etcd' is not available"), ("kubernetes", "no graph")):
        with pytest.raises(Misconfigured, match=told):
            endpoint_source(
                backend, file=None, graph="", namespace="", on_problem=lambda problem: None
            )


async def test_a_large_page_is_read_to_its_end(tmp_path: Path) -> None:
    async with planner(tmp_path) as (made, _, engine, _, _):
        engine.padding = 200_000
        (reading,) = await made._source.readings()
        assert reading.kv_usage == 0.1
        assert reading.context_tokens == 4096
        engine.padding = 20 << 20
        await made._source.readings()
        (again,) = await made._source.readings()
        assert again.age_s is not None
        assert again.age_s > 0
