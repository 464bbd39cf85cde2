"""`dynamo epp` as a process: behind an Envoy set up as a foreign gateway, in front of engines that
know nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from aiohttp import web
from dynamo_epp.frontend.bootstrap import Sockets
from dynamo_epp.frontend.envoy import Envoy
from dynamo_epp.gateway import GatewaySettings, Tls, run_picker
from dynamo_epp.models import rules_from
from dynamo_epp.serving import PickerSettings, ServingKvPicker
from dynamo_runtime.discovery import Endpoint, write_endpoints
from dynamo_runtime.lifecycle import Lifecycle, Phase
from prometheus_client import CollectorRegistry

from tests.gateway_epp.test_server_full_duplex import gateway_config, pattern

Engines = Callable[[], Awaitable[Any]]

TLS = {
    "name": "envoy.transport_sockets.tls",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    },
}
BY_METADATA = {
    "name": "pool",
    "type": "ORIGINAL_DST",
    "lb_policy": "CLUSTER_PROVIDED",
    "original_dst_lb_config": {
        "metadata_key": {
            "key": "envoy.lb",
            "path": [{"key": "x-gateway-destination-endpoint"}],
        }
    },
}


def told_as_served(hostport: str) -> Any:
    """A filter that says where every answer came from, as gateways do behind their routers."""
    return {
        "name": "envoy.filters.http.set_metadata",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
            "metadata": [
                {
                    "metadata_namespace": "envoy.lb",
                    "allow_overwrite": True,
                    "value": {"x-gateway-destination-endpoint-served": hostport},
                }
            ],
        },
    }


@dataclass
class Running:
    """A picker with a gateway before it."""

    url: str
    status: str
    picker: ServingKvPicker
    lifecycle: Lifecycle
    registry: CollectorRegistry
    client: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = io.BytesIO(data)  # in chunks
        async with self.client.post(self.url + path, data=sent, headers=headers) as answer:
            return answer.status, answer.headers, await answer.read()

    async def until_idle(self) -> None:
        """Wait until no request is open, and see that none is counted as load."""
        async with asyncio.timeout(30):
            while True:
                if not self.registry.get_sample_value("dynamo_epp_ext_proc_streams"):
                    break
                await asyncio.sleep(0.02)
        loads = [w.load.active_requests() for w in self.picker._pool.workers.values()]
        assert loads == [0] * len(loads)

    async def get(self, url: str) -> tuple[int, bytes]:
        async with self.client.get(url) as answer:
            return answer.status, await answer.read()


def envoy_config(
    sockets: Sockets, host: str, *, tls: bool, metadata: bool, served: str = ""
) -> str:
    config: Any = json.loads(gateway_config(sockets, host, "FULL_DUPLEX_STREAMED"))
    resources = config["static_resources"]
    picker, pool = resources["clusters"]
    address = {"socket_address": {"address": host, "port_value": 9002}}
    endpoint = picker["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"] = address
    if tls:
        picker["transport_socket"] = TLS
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    ext_proc = manager["http_filters"][0]["typed_config"]
    if served:
        manager["http_filters"].insert(0, told_as_served(served))
        ext_proc.setdefault("metadata_options", {})["forwarding_namespaces"] = {
            "untyped": ["envoy.lb"]
        }
    if metadata:
        options = pool["typed_extension_protocol_options"]
        resources["clusters"][1] = {**BY_METADATA, "typed_extension_protocol_options": options}
        ext_proc.setdefault("metadata_options", {})["receiving_namespaces"] = {
            "untyped": ["envoy.lb"]
        }
    return json.dumps(yaml.safe_load(json.dumps(config)))


@pytest.fixture
async def behind_gateway(
    own_address: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Awaitable[Running]]]:
    """``await behind_gateway(engines, …)`` starts a picker for them and a gateway before it."""
    monkeypatch.setattr("dynamo_epp.serving.START_WARM_S", 0.5)  # some engines never tell
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *engines: Any,
            tls: Tls | None = None,
            metadata: bool = False,
            conformance: bool = False,
            served: str = "",
            **options: Any,
        ) -> Running:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            file = directory / "endpoints.json"
            write_endpoints(
                file,
                [
                    Endpoint(name=e.address, address=e.address, port=8000, ready=True)
                    for e in engines
                ],
            )
            settings = GatewaySettings(
                host=own_address,
                tls=tls or Tls(),
                drain_accept_seconds=0,
                conformance_headers=conformance,
            )
            lifecycle = Lifecycle()
            made: list[tuple[ServingKvPicker, CollectorRegistry]] = []

            def make(registry: CollectorRegistry) -> ServingKvPicker:
                picker = ServingKvPicker(
                    PickerSettings(endpoints_file=file, relays=True, fallbacks=0, **options),
                    lifecycle,
                    registry,
                )
                made.append((picker, registry))
                return picker

            # Before gRPC: a fork beside its threads makes it complain.
            sockets = Sockets(directory)
            secure = tls is None or tls.enabled
            sockets.bootstrap.write_text(
                envoy_config(sockets, own_address, tls=secure, metadata=metadata, served=served)
            )
            envoy = await Envoy.start(sockets, concurrency=1, log_level="error")
            stack.push_async_callback(envoy.stop)
            task = asyncio.create_task(run_picker(settings, lifecycle, make))

            async def stop() -> None:
                lifecycle.request_stop("the test is over")
                assert await task == 0

            stack.push_async_callback(stop)
            async with asyncio.timeout(60):
                while lifecycle.phase is not Phase.READY:
                    assert not task.done()
                    await asyncio.sleep(0.01)
                await envoy.live()
            client = await stack.enter_async_context(
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
            )
            picker, registry = made[0]
            return Running(
                f"http://{own_address}:8000",
                f"http://{own_address}:9090",
                picker,
                lifecycle,
                registry,
                client,
            )

        yield start


def stock(model: str) -> Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]:
    """What a stock engine answers, of one model; streams if it is asked to."""

    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": model}]})
        if request.path != "/v1/completions":
            return web.Response(status=404)
        asked = json.loads(body)
        if not asked.get("stream"):
            return web.json_response({"model": asked["model"], "echo": asked["prompt"]})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(20):
            event = json.dumps({"id": number, "model": asked["model"]}, separators=(",", ":"))
            half = len(event) // 2
            await response.write(f"data: {event[:half]}".encode())
            await asyncio.sleep(0)
            await response.write(f"{event[half:]}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    return answer


@pytest.mark.parametrize("metadata", [False, True], ids=["by header", "by metadata"])
@pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])
async def test_every_byte_of_stock_engines_arrives(
    behind_gateway: Any, engines: Engines, secure: bool, metadata: bool
) -> None:
    pool = [await engines(), await engines()]
    for engine in pool:
        engine.handler = stock("m")
    running = await behind_gateway(*pool, tls=Tls(enabled=secure), metadata=metadata)
    prompts = [pattern(size).hex() for size in (0, 10, 40_000, 300_000)] * 4

    async def one(prompt: str) -> None:
        status, headers, body = await running.post(
            "/v1/completions", {"model": "m", "prompt": prompt}
        )
        assert status == 200
        assert headers["content-type"].startswith("application/json")
        assert json.loads(body) == {"model": "m", "echo": prompt}

    await asyncio.gather(*map(one, [*prompts, "x" * 8_000_000]))
    served = [[s for s in engine.seen if s.path == "/v1/completions"] for engine in pool]
    assert sum(map(len, served)) == len(prompts) + 1
    assert all(served)
    status, page = await running.get(f"{running.url}/v1/models")
    assert (status, json.loads(page)) == (200, {"data": [{"id": "m"}]})


async def test_a_rewrite_is_undone_in_the_answer(behind_gateway: Any, engines: Engines) -> None:
    engine = await engines()
    engine.handler = stock("engine-name")
    running = await behind_gateway(engine)
    rewrite = {
        "metadata": {"name": "canary"},
        "spec": {
            "poolRef": {"name": "p"},
            "rules": [
                {
                    "matches": [{"model": {"value": "nice"}}],
                    "targets": [{"modelRewrite": "engine-name"}],
                }
            ],
        },
    }
    running.picker._picker.rules = rules_from([], [rewrite], "p")
    body = b'{ "model" : "nice", "prompt": "x",  "temperature":0.10 }'
    status, _, answer = await running.post("/v1/completions", body)
    assert (status, json.loads(answer)) == (200, {"model": "nice", "echo": "x"})
    sent = next(s.body for s in engine.seen if s.path == "/v1/completions")
    assert json.loads(sent)["model"] == "engine-name"
    assert b'"temperature":0.10' in sent  # values keep their bytes
    streamed = {"model": "nice", "prompt": "x", "stream": True}
    status, _, answer = await running.post("/v1/completions", streamed)
    events = [{"id": number, "model": "nice"} for number in range(20)]
    lines = [f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events]
    assert answer == "".join([*lines, "data: [DONE]\n\n"]).encode()
    counted = {"rewrite": "canary", "target": "engine-name"}
    assert running.registry.get_sample_value("dynamo_epp_model_rewrites_total", counted) == 2


async def test_what_is_not_known_is_refused_by_default(
    behind_gateway: Any, engines: Engines
) -> None:
    engine = await engines()
    engine.handler = stock("m")
    running = await behind_gateway(engine)
    for path, body, status, said in [
        ("/admin/stop", {"model": "m"}, 404, "No API at /admin/stop"),
        ("/v1/completions", b"{", 400, "not valid JSON"),
        ("/v1/completions", {"model": "x", "prompt": ""}, 404, "'x' does not exist"),
    ]:
        got, headers, answer = await running.post(path, body)
        assert (got, said in json.loads(answer)["error"]["message"]) == (status, True)
        assert headers["content-type"] == "application/json"
    status, answer = await running.get(f"{running.url}/metrics")
    assert status == 404
    assert b"No API at /metrics without a body" in answer
    assert not [s for s in engine.seen if s.path == "/admin/stop"]


async def test_any_path_goes_by_load_to_backends_without_metrics(
    behind_gateway: Any, engines: Engines
) -> None:
    engine = await engines()  # answers anything, but not as an engine

    async def echo(request: web.Request, body: bytes) -> web.StreamResponse:
        if request.path in ("/metrics", "/v1/models"):
            return web.Response(status=404)
        return web.Response(body=body or request.path.encode())

    engine.handler = echo
    running = await behind_gateway(engine, any_path=True)
    body = json.dumps({"model": "conformance-fake-model", "prompt": "x"}).encode()
    assert (await running.post("/anything", body))[::2] == (200, body)
    assert (await running.post("/v1/completions", body))[::2] == (200, body)
    assert (await running.post("/v1/completions", b"\xff"))[::2] == (200, b"\xff")
    assert await running.get(f"{running.url}/primary/path") == (200, b"/primary/path")
    status, page = await running.get(f"{running.status}/debug/decisions")
    decisions = json.loads(page)["decisions"]
    assert (status, {d["how"] for d in decisions}) == (200, {"load-only"})
    assert [d["reason"] for d in reversed(decisions)][:2] == [
        "No API at /anything; there are /v1/chat/completions, /v1/completions, /v1/embeddings, "
        "/v1/responses.",
        "no worker is known to serve the model 'conformance-fake-model'",
    ]
    with_transfer = json.dumps({"kv_transfer_params": {"x": 1}, "a": 1}).encode()
    assert (await running.post("/anything", with_transfer))[::2] == (200, b'{"a":1}')


async def test_health_is_told_in_plain_text_under_every_name(
    behind_gateway: Any, engines: Engines, own_address: str
) -> None:
    running = await behind_gateway(await engines())
    names = ["", "readiness", "liveness", "envoy.service.ext_proc.v3.ExternalProcessor"]
    async with grpc.aio.insecure_channel(f"{own_address}:9003") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        for name in [*names, "inference-extension"]:
            request = b"\x0a" + bytes([len(name)]) + name.encode() if name else b""
            assert await check(request) == b"\x08\x01"
        running.lifecycle.set_not_ready("the pool is gone")
        assert await check(b"") == b"\x08\x02"
        running.lifecycle.set_ready()


async def test_a_pool_that_goes_makes_the_picker_not_ready(
    behind_gateway: Any, engines: Engines
) -> None:
    running = await behind_gateway(await engines())
    running.picker._on_absent("InferencePool ns/p does not exist")
    assert running.lifecycle.reason == "InferencePool ns/p does not exist"
    assert running.registry.get_sample_value("dynamo_epp_pool_found") == 0
    status, page = await running.get(f"{running.status}/ready")
    assert (status, b"InferencePool ns/p does not exist" in page) == (503, True)
    running.picker._on_absent("")
    assert running.lifecycle.ready
    assert running.registry.get_sample_value("dynamo_epp_pool_found") == 1


async def echoed(request: web.Request, body: bytes) -> web.StreamResponse:
    """As the conformance suite's echo server: a request can ask for a header of its response."""
    if request.path in ("/metrics", "/v1/models"):
        return web.Response(status=404)
    name, _, value = request.headers.get("X-Echo-Set-Header", "").partition(":")
    host = request.transport.get_extra_info("sockname")[0] if request.transport else ""
    return web.Response(text=host, headers={name: value} if name else {})


async def test_the_conformance_suite_steers(behind_gateway: Any, engines: Engines) -> None:
    pool = [await engines(), await engines(), await engines()]
    for engine in pool:
        engine.handler = echoed
    running = await behind_gateway(*pool, conformance=True, any_path=True)
    steer = "test-epp-endpoint-selection"
    for engine in pool:
        foreign = f"10.9.9.9, {engine.address}"
        for wanted in (engine.address, engine.hostport, foreign):
            body = {"model": "conformance-fake-model", "prompt": "x"}
            status, headers, answer = await running.post("/primary", body, **{steer: wanted})
            assert (status, answer.decode()) == (200, engine.address)
            assert headers["x-conformance-test-served-endpoint"] == engine.hostport
        async with running.client.get(running.url, headers={steer: engine.address}) as got:
            assert await got.text() == engine.address
    status, _, answer = await running.post("/primary", {}, **{steer: "10.9.9.9:80"})
    assert status == 503
    assert json.loads(answer)["error"]["message"]


async def test_without_the_flag_nobody_steers(behind_gateway: Any, engines: Engines) -> None:
    engine = await engines()
    engine.handler = echoed
    running = await behind_gateway(engine, any_path=True, served=engine.hostport)
    headers = {"test-epp-endpoint-selection": "10.9.9.9"}
    status, answered, _ = await running.post("/x", {}, **headers)
    assert status == 200
    assert "x-conformance-test-served-endpoint" not in answered
    assert "X-Echo-Set-Header" not in engine.seen[-1].headers


async def test_the_endpoint_that_served_is_told_and_kept(
    behind_gateway: Any, engines: Engines
) -> None:
    first, second = await engines(), await engines()
    for engine in (first, second):
        engine.handler = echoed
    running = await behind_gateway(
        first, second, conformance=True, any_path=True, served=second.hostport
    )
    steer = {"test-epp-endpoint-selection": first.address, "x-request-id": "r-1"}
    status, headers, _ = await running.post("/x", {}, **steer)
    assert status == 200
    assert headers["x-conformance-test-served-endpoint"] == second.hostport
    await running.until_idle()
    _, page = await running.get(f"{running.status}/debug/decisions?request_id=r-1")
    (decision,) = json.loads(page)["decisions"]
    assert decision["outcome"]["upstream"] == second.hostport
    assert decision["outcome"]["served_by"] == second.address
    assert decision["outcome"]["status"] == 200


async def test_a_drain_lets_running_answers_end(behind_gateway: Any, engines: Engines) -> None:
    engine = await engines()
    going, go = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request, _: bytes) -> web.StreamResponse:
        if request.path != "/x":
            return web.Response(status=404)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first ")
        going.set()
        await go.wait()
        await response.write(b"last")
        return response

    engine.handler = slow
    running = await behind_gateway(engine, any_path=True)
    asked = asyncio.create_task(running.post("/x", {}))
    await asyncio.wait_for(going.wait(), 60)
    running.lifecycle.request_stop("a test")
    status, page = await running.get(f"{running.status}/ready")
    assert (status, json.loads(page)["phase"]) == (503, "draining")
    go.set()
    status, _, body = await asked
    assert (status, body) == (200, b"first last")


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(
    behind_gateway: Any, engines: Engines, own_address: str
) -> None:
    engine = await engines()
    engine.handler = stock("m")
    running = await behind_gateway(engine)
    for _ in range(20):
        _, writer = await asyncio.open_connection(own_address, 8000)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"
        writer.write(head + b"{" * 70_000)
        await writer.drain()
        writer.transport.abort()
    body = {"model": "m", "prompt": "x"}
    assert (await running.post("/v1/completions", body))[0] == 200
    await running.until_idle()
    assert [seen.body for seen in engine.seen if seen.path == "/v1/completions"] == [
        json.dumps(body).encode()
    ]


async def test_an_engine_that_dies_in_the_middle_of_its_answer_leaves_nothing(
    behind_gateway: Any, engines: Engines
) -> None:
    engine, die = await engines(), asyncio.Event()

    async def dies(request: web.Request, body: bytes) -> web.StreamResponse:
        if request.path != "/v1/completions":
            return await stock("m")(request, body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await die.wait()
        assert request.transport is not None
        request.transport.abort()  # type: ignore[attr-defined]
        return response

    engine.handler = dies
    running = await behind_gateway(engine)
    body = json.dumps({"model": "m", "prompt": "x", "stream": True})
    async with running.client.post(f"{running.url}/v1/completions", data=body) as answer:
        assert await answer.content.readany() == b"data: 1\n\n"
        die.set()
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    await running.until_idle()
    ended = {"model": "m", "endpoint": "completions", "request_type": "stream"}
    counted = running.registry.get_sample_value(
        "dynamo_frontend_requests_total", ended | {"status": "cancelled"}
    )
    assert counted == 1
