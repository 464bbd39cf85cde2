"""Requests through the real frontend: every byte, the right engine, errors in OpenAI's words."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from dynamo_epp.extproc import PickRequest, Refusal, Route

Engines = Callable[[], Awaitable[Any]]
Frontends = Callable[..., Awaitable[Any]]

CHAT = "/v1/chat/completions"


def pattern(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


async def generated(request: web.Request, body: bytes) -> web.StreamResponse:
    """A body of ``x-size`` bytes, in ``x-chunks`` chunks; the request's digest as a header."""
    size, chunks = int(request.headers["x-size"]), int(request.headers["x-chunks"])
    data = pattern(size)
    headers = {"x-digest": hashlib.sha256(body).hexdigest()}
    if not chunks:
        return web.Response(body=data, headers=headers)
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/event-stream"
    await response.prepare(request)
    step = max(1, -(-size // chunks))
    for start in range(0, size, step):
        await response.write(data[start : start + step])
    await response.write_eof()
    return response


def error(answer: Any) -> dict[str, Any]:
    """The error of an answer, which must be in OpenAI's words."""
    assert answer.headers["Content-Type"] == "application/json", answer
    problem = json.loads(answer.body)["error"]
    assert set(problem) == {"message", "type", "param", "code"}
    assert problem["message"]
    return dict(problem)


async def test_every_byte_arrives_both_ways(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    engine.handler = generated
    sizes = [0, 1, 200, 997, 16_384, 65_536, 100_001, 1_000_000]
    rng = random.Random(7)
    cases = [
        (rng.choice(sizes), rng.choice(sizes), rng.choice([0, 0, 1, 7, 100]), rng.random() < 0.4)
        for _ in range(160)
    ]

    async def one(sent: int, got: int, chunks: int, upload_chunked: bool) -> None:
        body = pattern(sent + 1)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 50_000):
                yield body[start : start + 50_000]

        answer = await frontend.post(
            CHAT,
            pieces() if upload_chunked else body,
            headers={"x-size": str(got), "x-chunks": str(chunks)},
        )
        assert answer.status == 200
        assert answer.headers["x-digest"] == hashlib.sha256(body).hexdigest()
        assert answer.body == pattern(got)

    slots = asyncio.Semaphore(16)

    async def limited(*case: Any) -> None:
        async with slots:
            await one(*case)

    await asyncio.gather(*(limited(*case) for case in cases))
    picker = frontend.picker
    await picker.until(lambda: len(picker.freed) == len(cases))
    assert len(engine.seen) == len(picker.requests) == len(cases)
    assert {id(route) for route in picker.freed} == {id(route) for route in picker.given}


async def test_a_dead_first_endpoint_costs_the_client_nothing(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, first, second = await frontends(), await engines(), await engines()
    await frontend.pool(first, second)
    await first.stop()
    for body in (b"{}", pattern(1_000_000)):
        answer = await frontend.post(CHAT, body)
        assert answer.body == b"engine " + second.address.encode() + b" " + body
    assert len(second.seen) == 2
    picker = frontend.picker
    await picker.until(lambda: len([e for e in picker.entries if e.attempts == 2]) == 2)
    assert picker.entries[-1].upstream == second.hostport


async def test_the_list_is_gone_down_in_its_order(frontends: Frontends, engines: Engines) -> None:
    frontend = await frontends()
    dead = [await engines() for _ in range(2)]
    third, fourth = await engines(), await engines()
    await frontend.pool(*dead, third, fourth)
    for engine in dead:
        await engine.stop()
    for order in ([*dead, third, fourth], [dead[0], fourth, dead[1], third]):
        frontend.picker.endpoints = tuple(engine.hostport for engine in order)
        alive = next(engine for engine in order if engine not in dead)
        for _ in range(5):
            assert (await frontend.post(CHAT, b"{}")).status == 200
        assert len(alive.seen) == 5
    assert len(third.seen) == len(fourth.seen) == 5


async def test_a_large_upload_that_expects_to_be_asked(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    body = pattern(1_000_000)
    answer = await frontend.post(CHAT, body, expect100=True)
    assert (answer.status, engine.seen[0].body) == (200, body)


async def test_an_engine_that_dies_before_its_answer_is_retried_on_the_next(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, first, second = await frontends(), await engines(), await engines()
    await frontend.pool(first, second)

    async def die(request: web.Request, _: bytes) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    first.handler = die
    answer = await frontend.post(CHAT, b"{}")
    assert (answer.status, answer.body) == (200, b"engine " + second.address.encode() + b" {}")
    assert (len(first.seen), len(second.seen)) == (1, 1)


async def test_an_engine_that_dies_in_its_answer_is_an_error_and_no_second_try(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, first, second = await frontends(), await engines(), await engines()
    await frontend.pool(first, second)

    async def half(request: web.Request, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: half\n\n")
        assert request.transport is not None
        await asyncio.sleep(0.05)  # let the first bytes leave before the connection is reset
        request.transport.abort()
        return response

    first.handler = half
    with pytest.raises(aiohttp.ClientPayloadError):
        await frontend.post(CHAT, b"{}")
    assert second.seen == []
    await frontend.picker.until(lambda: len(frontend.picker.freed) == 1)


async def test_only_endpoints_of_the_list_are_used(frontends: Frontends, engines: Engines) -> None:
    frontend, listed, other = await frontends(), await engines(), await engines()
    await frontend.pool(listed, other)
    # An address outside the pool is skipped.
    frontend.picker.endpoints = ("127.0.0.9:1", listed.hostport)
    assert (await frontend.post(CHAT, b"{}")).body.startswith(b"engine " + listed.address.encode())
    # When the list is exhausted the request fails, although another engine would answer.
    await listed.stop()
    frontend.picker.endpoints = (listed.hostport,)
    answer = await frontend.post(CHAT, b"{}")
    assert (answer.status, error(answer)["code"]) == (503, "no_engine_reached")
    frontend.picker.endpoints = ("127.0.0.9:1",)
    assert (await frontend.post(CHAT, b"{}")).status == 503
    assert other.seen == []


async def test_the_pool_follows_the_endpoints(frontends: Frontends, engines: Engines) -> None:
    frontend, first = await frontends(), await engines()
    await frontend.pool(first)
    second = await engines()
    await frontend.pool(second)
    frontend.picker.endpoints = (first.hostport,)
    assert (await frontend.post(CHAT, b"{}")).status == 503
    assert first.seen == []


async def test_a_body_over_the_limit_is_413(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(body_limit=100_000), await engines()
    await frontend.pool(engine)
    assert (await frontend.post(CHAT, bytes(90_000))).status == 200
    answer = await frontend.post(CHAT, bytes(300_000))
    assert (answer.status, error(answer)["code"]) == (413, "request_too_large")
    assert "100000 bytes" in error(answer)["message"]
    assert len(engine.seen) == 1


async def raw(frontend: Any, method: str, path: str, version: str = "1.1") -> int:
    """The status of a request whose path no client library tidies up."""
    host = frontend.settings.http_host
    reader, writer = await asyncio.open_connection(host, 8000)
    writer.write(
        f"{method} {path} HTTP/{version}\r\nhost: x\r\ncontent-length: 2\r\n"
        "connection: close\r\n\r\n{}".encode()
    )
    status = int((await reader.readline()).split()[1])
    writer.close()
    await writer.wait_closed()
    return status


async def test_no_other_path_reaches_an_engine(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    admin = "/reset_prefix_cache"
    tricks = [
        admin,
        "/v1/load_lora_adapter",
        "/",
        "/V1/chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/completions/..%2f..%2f..%2freset_prefix_cache",
        "/v1/chat/completions/../../../reset_prefix_cache",
        "/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/reset_prefix_cache",
        "/v1/chat/completions%2f..%2f..%2f..%2freset_prefix_cache",
        "/v1/chat/completions%5c..%5c..%5c..%5creset_prefix_cache",
        "/v1/chat/completions;/../../../reset_prefix_cache",
        "/v1/chat/completions;x=/reset_prefix_cache",
        "//reset_prefix_cache",
        "/v1//..//reset_prefix_cache",
        "/./reset_prefix_cache",
        "/v1/models/../../reset_prefix_cache",
        "/v1/models/..%2f..%2freset_prefix_cache",
        "/health/../reset_prefix_cache",
        "/v1/chat/completions%00/reset_prefix_cache",
        "/v1/chat/completions%23/../reset_prefix_cache",
        "/v1/completions%252f..%252freset_prefix_cache",
        f"http://x{admin}",
    ]
    for path in tricks:
        for method in ("POST", "GET", "PUT", "DELETE"):
            assert await raw(frontend, method, path) in (400, 404, 405), (method, path)
    assert await raw(frontend, "CONNECT", "x:80") in (400, 403, 404, 405)
    assert engine.seen == []
    # Spelled differently, still an allowed path: the engine sees the plain spelling.
    for path in ("/v1/./chat/completions", "//v1/chat//completions", "/v1/chat%2Fcompletions"):
        assert await raw(frontend, "POST", path + "?a=b") == 200
    assert {seen.path for seen in engine.seen} == {CHAT + "?a=b"}


async def test_reads_and_wrong_methods(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    for path in (CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses"):
        assert (await frontend.post(path, b"{}")).status == 200
        answer = await frontend.get(path)
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        assert error(answer)["code"] == "method_not_allowed"
    assert [seen.path for seen in engine.seen][-1] == "/v1/responses"
    assert json.loads((await frontend.get("/v1/models")).body)["data"] == [{"id": "m"}]
    assert json.loads((await frontend.get("/v1/models/org/name")).body) == {"id": "org/name"}
    assert (await raw(frontend, "GET", "/v1/models/org%2Fname")) == 200
    assert json.loads((await frontend.get("/health")).body)["ready"] is True
    assert (await frontend.get("/live")).status == 200
    assert (await frontend.get("/metrics")).status == 200
    for path in ("/health", "/v1/models"):
        assert await raw(frontend, "HEAD", path) == 200
    answer = await frontend.post("/v1/models", b"{}")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert error(answer)["message"] == "use GET or HEAD here"
    assert await raw(frontend, "POST", CHAT, version="1.0") == 200
    missing = await frontend.get("/nope")
    assert (missing.status, error(missing)["code"]) == (404, "not_found")


async def test_headers_of_clients_that_would_steer_are_gone_before_the_picker(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, engine, victim = await frontends(), await engines(), await engines()
    await frontend.pool(engine, victim)
    frontend.picker.endpoints = (engine.hostport,)
    hostile = {
        "x-gateway-destination-endpoint": victim.hostport,
        "X-Gateway-Destination-Endpoint-Subset": victim.hostport,
        "X-Dynamo-Worker-Instance-Id": "1",
        "x-dynamo-booking": "forged",
        "x-prefiller-host-port": "6.6.6.6:1",
        "x-data-parallel-rank": "1",
        "x-data-parallel-host-port": "6.6.6.6:1",
        "x-encoder-hosts-ports": "6.6.6.6:1",
        "x-kv-cache-source-host-port": "6.6.6.6:1",
        "x-envoy-max-retries": "99",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-original-path": "/reset_prefix_cache",
    }
    kept = {"authorization": "Bearer x", "x-custom": "1"}
    answer = await frontend.post(CHAT, b"{}", headers=hostile | kept)
    assert answer.status == 200
    (request,) = frontend.picker.requests
    ((seen),) = engine.seen
    for name in map(str.lower, hostile):
        assert name not in request.head.headers
    assert seen.headers["x-gateway-destination-endpoint"] == engine.hostport
    assert {name for name in map(str.lower, hostile) if name in seen.headers} == {
        "x-gateway-destination-endpoint"
    }
    assert kept.items() <= seen.headers.items()
    assert not any(name.lower().startswith("x-envoy") for name in answer.headers)


async def test_the_picker_changes_headers_and_body(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    new = pattern(200_000)

    async def choose(_: PickRequest) -> Route:
        return Route(
            (engine.hostport,),
            set_headers=(("x-dynamo-booking", "r-1;tokens=3;cached=0"), ("x-custom", "ours")),
            remove_headers=("cookie",),
            body=new,
        )

    frontend.picker.choose = choose
    await frontend.post(CHAT, b"{}", headers={"cookie": "a=b", "x-custom": "theirs"})
    (seen,) = engine.seen
    assert seen.body == new
    assert seen.headers["x-dynamo-booking"] == "r-1;tokens=3;cached=0"
    assert seen.headers["x-custom"] == "ours"
    assert "cookie" not in seen.headers


async def test_a_refusal_reaches_the_client_as_it_is(frontends: Frontends) -> None:
    frontend = await frontends()
    body = b'{"error":{"message":"own words"}}'
    for status in (400, 404, 413, 429, 500, 503, 504):
        reason = (("x-llm-d-request-dropped-reason", "rejected-saturated"),)
        refusal = Refusal(status, body, reason)

        async def choose(_: PickRequest, refusal: Refusal = refusal) -> Refusal:
            return refusal

        frontend.picker.choose = choose
        answer = await frontend.post(CHAT, b"{}")
        assert (answer.status, answer.body) == (status, body)
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"


async def test_a_failing_picker_is_500_in_openai_words(frontends: Frontends) -> None:
    frontend = await frontends()

    async def choose(_: PickRequest) -> Route:
        raise RuntimeError("broken")

    frontend.picker.choose = choose
    answer = await frontend.post(CHAT, b"{}")
    assert (answer.status, error(answer)["type"]) == (500, "server_error")


async def test_a_post_without_a_body_is_the_pickers_business(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    assert (await frontend.post(CHAT, b"")).status == 200
    assert frontend.picker.requests[0].body in (None, b"")


async def test_request_ids(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    kept = await frontend.post(CHAT, b"{}", headers={"x-request-id": "client:id_1"})
    made = await frontend.post(CHAT, b"{}")
    replaced = await frontend.post(CHAT, b"{}", headers={"x-request-id": "no spaces"})
    assert kept.headers["x-request-id"] == "client:id_1"
    assert len(made.headers["x-request-id"]) == 36
    assert len(replaced.headers["x-request-id"]) == 36
    answered = [answer.headers["x-request-id"] for answer in (kept, made, replaced)]
    assert [seen.headers["x-request-id"] for seen in engine.seen] == answered
    assert [
        request.head.headers["x-request-id"] for request in frontend.picker.requests
    ] == answered
    picker = frontend.picker
    await picker.until(lambda: {*answered} <= {entry.request_id for entry in picker.entries})


async def test_the_access_log_tells_what_became_of_a_request(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    engine.handler = generated
    await frontend.post(
        CHAT, b"x" * 123, headers={"x-size": "5000", "x-chunks": "5", "x-request-id": "mine"}
    )
    picker = frontend.picker
    await picker.until(lambda: picker.entries[-1:] and picker.entries[-1].request_id == "mine")
    entry = picker.entries[-1]
    assert (entry.method, entry.path, entry.status, entry.flags) == ("POST", CHAT, 200, ())
    assert (entry.upstream, entry.attempts) == (engine.hostport, 1)
    assert (entry.request_bytes, entry.response_bytes) == (123, 5000)
    assert entry.routing == "test;overlap=1/2"
    assert entry.first_byte_s is not None
    assert entry.last_byte_s is not None
    assert 0 < entry.first_byte_s <= entry.last_byte_s < 5


@pytest.mark.parametrize("decision_header", [True, False])
async def test_the_decision_header_is_optional(
    frontends: Frontends, engines: Engines, decision_header: bool
) -> None:
    frontend, engine = await frontends(decision_header=decision_header), await engines()
    await frontend.pool(engine)
    answer = await frontend.post(CHAT, b"{}")
    told = answer.headers.get("x-dynamo-routing")
    assert told == ("test;overlap=1/2" if decision_header else None)


async def endless(request: web.Request, _: bytes) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"data: first\n\n")
    await asyncio.Event().wait()
    return response


async def test_a_client_that_leaves_an_answer_frees_its_route(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    engine.handler = endless
    async with frontend.client.post(frontend.url + CHAT, data=b"{}") as response:
        assert await response.content.readany() == b"data: first\n\n"
        assert frontend.picker.freed == []
    await frontend.picker.until(lambda: len(frontend.picker.freed) == 1)
    assert frontend.picker.freed == frontend.picker.given


async def test_a_client_that_leaves_during_the_pick_cancels_it(frontends: Frontends) -> None:
    frontend = await frontends()
    begun, undone = asyncio.Event(), asyncio.Event()

    async def choose(_: PickRequest) -> Route:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            undone.set()
        raise AssertionError

    frontend.picker.choose = choose
    request = asyncio.create_task(frontend.post(CHAT, b"{}"))
    await begun.wait()
    request.cancel()
    async with asyncio.timeout(5):
        await undone.wait()
    assert frontend.picker.freed == []


async def test_a_silent_engine_is_cut_off(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(stream_idle_timeout=0.3), await engines()
    await frontend.pool(engine)

    async def silent(_: web.Request, __: bytes) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    engine.handler = silent
    answer = await frontend.post(CHAT, b"{}")
    assert (answer.status, error(answer)["code"]) == (504, "stream_idle_timeout")
    engine.handler = endless
    with pytest.raises(aiohttp.ClientPayloadError):
        await frontend.post(CHAT, b"{}")
    await frontend.picker.until(lambda: len(frontend.picker.freed) == 2)


async def test_http2_without_tls(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sS", "--http2-prior-knowledge", "-w", " %{http_version}", "-d", "{}"),
        frontend.url + CHAT,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert out == b"engine " + engine.address.encode() + b" {} 2"
