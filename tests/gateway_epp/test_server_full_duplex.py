"""Behind a gateway that is not ours: full duplex through a real Envoy, trailers included."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from dynamo_epp.extproc import PickRequest, Route
from dynamo_epp.frontend.bootstrap import Sockets
from dynamo_epp.frontend.envoy import Envoy
from dynamo_epp.server import PickerServer

Engines = Callable[[], Awaitable[Any]]
GATEWAY = Path(__file__).parents[2] / "benchmarks" / "epp" / "gateway.yaml"


def gateway_config(sockets: Sockets, host: str, response_body_mode: str) -> str:
    """As a Gateway's controller writes it for an InferencePool: full duplex, ORIGINAL_DST."""
    listen = {"socket_address": {"address": host, "port_value": 8000}}
    text = GATEWAY.read_text()
    for name, value in {
        "@ADMIN@": json.dumps({"pipe": {"path": str(sockets.admin)}}),
        "@LISTEN@": json.dumps(listen),
        "@PICKER@": json.dumps({"pipe": {"path": str(sockets.picker)}}),
        "@RESPONSE_BODY_MODE@": response_body_mode,
    }.items():
        text = text.replace(name, value)
    return json.dumps(yaml.safe_load(text))


@pytest.fixture
async def gateway(
    own_address: str, test_picker: Any, request: pytest.FixtureRequest
) -> AsyncIterator[str]:
    """The address of a gateway whose picker is ``test_picker``."""
    mode = getattr(request, "param", "FULL_DUPLEX_STREAMED")
    with tempfile.TemporaryDirectory() as directory:
        sockets = Sockets(Path(directory))
        sockets.bootstrap.write_text(gateway_config(sockets, own_address, mode))
        envoy = await Envoy.start(sockets, concurrency=1, log_level="error")
        server = PickerServer(test_picker, ready=lambda: True, decision_header=True)
        try:
            await server.start(f"unix:{sockets.picker}")
            async with asyncio.timeout(20):
                await envoy.live()
            yield own_address
        finally:
            await envoy.stop()
            await server.stop(0)


def pattern(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


async def generated(request: web.Request, body: bytes) -> web.StreamResponse:
    size, chunks = int(request.headers["x-size"]), int(request.headers["x-chunks"])
    headers = {"x-digest": hashlib.sha256(body).hexdigest()}
    if not chunks:
        return web.Response(body=pattern(size), headers=headers)
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    data = pattern(size)
    step = max(1, -(-size // chunks))
    for start in range(0, size, step):
        await response.write(data[start : start + step])
    return response


@pytest.mark.parametrize("gateway", ["FULL_DUPLEX_STREAMED", "NONE", "STREAMED"], indirect=True)
async def test_every_byte_arrives_both_ways(
    gateway: str, engines: Engines, test_picker: Any
) -> None:
    engine = await engines()
    engine.handler = generated
    test_picker.endpoints = (engine.hostport,)
    sizes = [0, 1, 997, 61_999, 62_001, 65_537, 400_000]
    rng = random.Random(3)
    slots = asyncio.Semaphore(12)

    async def one(client: aiohttp.ClientSession, sent: int, got: int, chunks: int) -> None:
        body = pattern(sent)
        headers = {"x-size": str(got), "x-chunks": str(chunks)}
        async with (
            slots,
            client.post(f"http://{gateway}:8000/v1/completions", data=body, headers=headers) as r,
        ):
            assert r.status == 200
            assert r.headers["x-digest"] == hashlib.sha256(body).hexdigest()
            assert r.headers["x-dynamo-routing"] == "test;overlap=1/2"
            assert await r.read() == pattern(got)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as client:
        cases = [(rng.choice(sizes), rng.choice(sizes), rng.choice([0, 1, 60])) for _ in range(100)]
        await asyncio.gather(*(one(client, *case) for case in cases))
    await test_picker.until(lambda: len(test_picker.freed) == len(cases))
    assert {route.status for route in test_picker.freed} == {200}
    assert len(engine.seen) == len(cases)


@pytest.mark.parametrize("pieces", [[], [b"one"], [b"one", b"", b"x" * 70_000]])
async def test_request_trailers_finish_the_body(
    gateway: str, own_address: str, test_picker: Any, pieces: list[bytes]
) -> None:
    """An upstream that shows the raw request tells that the trailers arrived behind the body."""
    got: asyncio.Queue[bytes] = asyncio.Queue()
    complete = b"0\r\nx-checksum: abc\r\n\r\n"

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = b""
        while not received.endswith(complete):
            received += await reader.read(65536)
        got.put_nowait(received)
        writer.write(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            b"4\r\nbody\r\n0\r\nx-cost: 7\r\n\r\n"
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(upstream, own_address, 8001)
    test_picker.endpoints = (f"{own_address}:8001",)
    async with server, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(gateway, 8000)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nte: trailers\r\n"
            b"trailer: x-checksum\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        )
        for piece in filter(None, pieces):
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        writer.write(complete)
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"4\r\nbody\r\n" in answer
    assert answer.endswith(b"x-cost: 7\r\n\r\n")
    (request,) = test_picker.requests
    assert request.body == b"".join(pieces)
    _, _, raw_body = (await got.get()).partition(b"\r\n\r\n")
    sent = b""
    while not raw_body.startswith(b"0\r\n"):
        size, _, raw_body = raw_body.partition(b"\r\n")
        sent += raw_body[: int(size, 16)]
        raw_body = raw_body[int(size, 16) + 2 :]
    assert sent == b"".join(pieces)


async def test_the_picker_changes_the_body(
    gateway: str, engines: Engines, test_picker: Any
) -> None:
    engine = await engines()

    async def choose(_: PickRequest) -> Route:
        return Route((engine.hostport,), body=pattern(150_000))

    test_picker.choose = choose
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"http://{gateway}:8000/v1/completions", data=b"{}") as answer,
    ):
        assert answer.status == 200
    assert engine.seen[0].body == pattern(150_000)


async def test_a_client_that_leaves_frees_its_route(
    gateway: str, engines: Engines, test_picker: Any
) -> None:
    engine = await engines()
    test_picker.endpoints = (engine.hostport,)

    async def endless(request: web.Request, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await asyncio.Event().wait()
        return response

    engine.handler = endless
    async with aiohttp.ClientSession() as client:
        url = f"http://{gateway}:8000/v1/completions"
        async with client.post(url, data=b"{}") as answer:
            assert await answer.content.readany() == b"first"
            assert test_picker.freed == []
    await test_picker.until(lambda: test_picker.freed == test_picker.given)


async def test_a_request_without_a_body(gateway: str, engines: Engines, test_picker: Any) -> None:
    engine = await engines()
    test_picker.endpoints = (engine.hostport,)
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://{gateway}:8000/v1/models") as answer,
    ):
        assert await answer.read() == b"engine " + engine.address.encode() + b" "
    assert test_picker.requests[0].body is None
