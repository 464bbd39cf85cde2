"""Probe actions against real servers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc.aio
import pytest
from aiohttp import web
from dynamo_cli.local.asking import Answer, ask
from dynamo_cli.local.probes import Exec, Grpc, HttpGet, TcpSocket


async def no_command(command: tuple[str, ...]) -> tuple[int, str]:
    raise AssertionError(command)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/redirect":
            raise web.HTTPFound("/302-target")
        if request.path == "/slow":
            await asyncio.sleep(30)
        if request.path == "/header":
            return web.Response(status=200 if request.headers.get("X-A") == "b" else 400)
        if request.path == "/status":
            return web.json_response({"ready": False, "reason": "still loading"}, status=503)
        status = {"/ok": 200, "/204": 204, "/302-target": 200, "/404": 404, "/503": 503}
        return web.Response(status=status[request.path], text="because" * (request.path == "/503"))

    app = web.Application()
    app.router.add_get("/{path}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@pytest.mark.parametrize(
    ("path", "ok"),
    [("/ok", True), ("/204", True), ("/redirect", True), ("/404", False), ("/503", False)],
)
async def test_http_status(port: int, path: str, ok: bool) -> None:
    assert (await ask(HttpGet(port, path), "127.0.0.1", 2, no_command)).ok is ok


async def test_http_headers_and_the_reason_of_a_failure(port: int) -> None:
    with_header = HttpGet(port, "/header", headers=(("X-A", "b"),))
    assert (await ask(with_header, "127.0.0.1", 2, no_command)).ok
    answer = await ask(HttpGet(port, "/503"), "127.0.0.1", 2, no_command)
    assert answer == Answer(False, "/503 says 503 because")
    answer = await ask(HttpGet(port, "/status"), "127.0.0.1", 2, no_command)
    assert answer == Answer(False, "/status says 503 still loading")


async def test_a_slow_answer_is_a_failure(port: int) -> None:
    answer = await ask(HttpGet(port, "/slow"), "127.0.0.1", 0.1, no_command)
    assert answer == Answer(False, "no answer within 0.1 s")


async def test_tcp(port: int, unused_tcp_port: int) -> None:
    assert (await ask(TcpSocket(port), "127.0.0.1", 2, no_command)).ok
    answer = await ask(TcpSocket(unused_tcp_port), "127.0.0.1", 2, no_command)
    assert answer == Answer(False, f"port {unused_tcp_port}: Connection refused")
    answer = await ask(HttpGet(unused_tcp_port), "127.0.0.1", 2, no_command)
    assert answer == Answer(False, f"port {unused_tcp_port}: Connection refused")


async def test_exec() -> None:
    def command(status: int) -> Callable[[tuple[str, ...]], Awaitable[tuple[int, str]]]:
        async def run(argv: tuple[str, ...]) -> tuple[int, str]:
            assert argv == ("check", "it")
            return status, "first\nlast"

        return run

    action = Exec(("check", "it"))
    assert (await ask(action, "", 1, command(0))).ok
    answer = await ask(action, "", 1, command(3))
    assert answer == Answer(False, "exit status 3: last")


@pytest.mark.parametrize(
    ("service", "status", "ok"), [("", 1, True), ("name", 1, True), ("", 2, False)]
)
async def test_grpc_health(service: str, status: int, ok: bool) -> None:
    asked: list[bytes] = []

    async def check(request: bytes, context: object) -> bytes:
        asked.append(request)
        return bytes([8, status])

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(check)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        answer = await ask(Grpc(port, service), "127.0.0.1", 5, no_command)
        assert answer.ok is ok
        assert asked == [b"\x0a\x04name" if service else b""]
    finally:
        await server.stop(None)


async def test_grpc_without_a_server(unused_tcp_port: int) -> None:
    answer = await ask(Grpc(unused_tcp_port), "127.0.0.1", 5, no_command)
    assert not answer.ok
    assert "UNAVAILABLE" in answer.message
