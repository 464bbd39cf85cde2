"""How a frontend starts, drains and ends, and what it leaves behind: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from dynamo_epp.frontend import FrontendSettings, bootstrap, run_frontend, write_eds
from dynamo_epp.frontend.bootstrap import Sockets, dump
from dynamo_epp.frontend.envoy import Envoy
from dynamo_runtime.lifecycle import Lifecycle, Phase

Engines = Callable[[], Awaitable[Any]]
Frontends = Callable[..., Awaitable[Any]]


@pytest.fixture
def envoys(monkeypatch: pytest.MonkeyPatch) -> list[Envoy]:
    """Each Envoy that was started."""
    started: list[Envoy] = []
    start = Envoy.start

    async def spy(*args: Any, **options: Any) -> Envoy:
        started.append(await start(*args, **options))
        return started[-1]

    monkeypatch.setattr(Envoy, "start", spy)
    return started


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each temporary directory that was made."""
    made: list[str] = []
    mkdtemp = tempfile.mkdtemp

    def spy(*args: Any, **options: Any) -> str:
        made.append(mkdtemp(*args, **options))
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", spy)
    return made


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_nothing_is_left_behind(
    frontends: Frontends, envoys: list[Envoy], scratch: list[str]
) -> None:
    frontend = await frontends()
    (directory,) = scratch
    assert Path(directory).stat().st_mode & 0o777 == 0o700
    assert Path(directory, "admin.sock").is_socket()
    frontend.lifecycle.request_stop("test")
    assert await frontend.task == 0
    assert not alive(envoys[0].pid)
    assert not Path(directory).exists()
    with pytest.raises(aiohttp.ClientConnectorError):
        await frontend.get("/live")


async def test_two_frontends_do_not_meet(frontends: Frontends, engines: Engines) -> None:
    one, two = await frontends(), await frontends()
    first, second = await engines(), await engines()
    await one.pool(first)
    await two.pool(second)
    assert (await one.post("/v1/completions", b"1")).body.startswith(
        b"engine " + first.address.encode()
    )
    assert (await two.post("/v1/completions", b"2")).body.startswith(
        b"engine " + second.address.encode()
    )


@pytest.mark.parametrize("field", ["http_port", "status_port"])
async def test_a_taken_port_is_one_line(
    field: str,
    caplog: pytest.LogCaptureFixture,
    scratch: list[str],
    own_address: str,
    test_picker: Any,
) -> None:
    own = own_address
    with socket.create_server((own, 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"http_port": 0, "status_port": 0} | {field: port}
        settings = FrontendSettings(http_host=own, status_host=own, **ports)
        assert await run_frontend(settings, Lifecycle(), lambda _: test_picker) == 1
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert f"{own}:{port}" in record.message
    assert "\n" not in record.message
    assert not any(Path(directory).exists() for directory in scratch)


async def test_an_envoy_that_dies_ends_the_frontend(
    frontends: Frontends, envoys: list[Envoy], caplog: pytest.LogCaptureFixture
) -> None:
    frontend = await frontends()
    os.kill(envoys[0].pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        assert await frontend.task == 1
    assert "Envoy was killed by signal 9" in caplog.text
    assert frontend.lifecycle.phase is Phase.DRAINING


async def test_a_stop_while_starting(
    test_picker: Any, own_address: str, envoys: list[Envoy]
) -> None:
    waiting = asyncio.Event()

    async def start(_: object) -> None:
        waiting.set()
        await asyncio.Event().wait()

    test_picker.start = start
    settings = FrontendSettings(http_host=own_address, status_host=own_address, concurrency=1)
    lifecycle = Lifecycle()
    task = asyncio.create_task(run_frontend(settings, lifecycle, lambda _: test_picker))
    await waiting.wait()
    assert lifecycle.reason == "waiting for the first list of endpoints"
    assert not lifecycle.ready
    lifecycle.request_stop("test")
    async with asyncio.timeout(10):
        assert await task == 0
    assert not alive(envoys[0].pid)


async def streaming(
    frontend: Any, engine: Any, finish: asyncio.Event
) -> tuple[aiohttp.ClientResponse, AsyncIterator[bytes]]:
    async def handler(request: web.Request, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await finish.wait()
        await response.write(b"last")
        return response

    engine.handler = handler
    response = await frontend.client.post(frontend.url + "/v1/completions", data=b"{}")
    content = response.content.iter_any()
    assert await anext(content) == b"first"
    return response, content


async def refused(frontend: Any) -> None:
    """Wait until the port takes no connection any more."""
    async with asyncio.timeout(5):
        while True:
            try:
                _, writer = await asyncio.open_connection(frontend.settings.http_host, 8000)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.01)


async def test_draining_lets_running_requests_end(frontends: Frontends, engines: Engines) -> None:
    frontend, engine = await frontends(), await engines()
    await frontend.pool(engine)
    finish = asyncio.Event()
    _, content = await streaming(frontend, engine, finish)
    frontend.lifecycle.request_stop("test")
    await refused(frontend)
    assert not frontend.task.done()
    finish.set()
    assert b"".join([part async for part in content]) == b"last"
    async with asyncio.timeout(5):
        assert await frontend.task == 0
    assert frontend.picker.freed == frontend.picker.given
    assert any(entry.response_bytes == len("firstlast") for entry in frontend.picker.entries)


async def test_draining_has_a_limit(
    frontends: Frontends, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    frontend, engine = await frontends(drain_seconds=0.3), await engines()
    await frontend.pool(engine)
    response, content = await streaming(frontend, engine, asyncio.Event())
    frontend.lifecycle.request_stop("test")
    with pytest.raises(aiohttp.ClientError):
        await anext(content)
    response.close()
    assert await frontend.task == 0
    assert "1 requests still run" in caplog.text
    assert frontend.picker.freed == frontend.picker.given


async def test_requests_are_accepted_until_load_balancers_know(
    frontends: Frontends, engines: Engines
) -> None:
    frontend, engine = await frontends(drain_accept_seconds=0.7), await engines()
    await frontend.pool(engine)
    frontend.lifecycle.request_stop("test")
    ready = await frontend.get("/health")
    assert ready.status == 503
    async with asyncio.timeout(5):
        while (answer := await frontend.post("/v1/completions", b"{}")).headers.get(
            "Connection"
        ) != "close":
            assert answer.status == 200
    assert answer.status == 200
    await refused(frontend)
    assert await frontend.task == 0


async def test_a_picker_that_is_away_is_503(own_address: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        sockets = Sockets(Path(directory))
        settings = FrontendSettings(http_host=own_address, status_host=own_address)
        sockets.bootstrap.write_text(dump(bootstrap(settings, sockets)))
        write_eds(sockets.eds, ())
        envoy = await Envoy.start(sockets, concurrency=1, log_level="warning")
        try:
            async with asyncio.timeout(10), aiohttp.ClientSession() as client:
                await envoy.live()
                url = f"http://{own_address}:8000/v1/completions"
                async with client.post(url, data=b"{}") as answer:
                    assert answer.status == 503
                    assert (await answer.json())["error"]["code"] == "picker_unavailable"
        finally:
            await envoy.stop()
