"""When a graph counts as routed: real HTTP servers in the frontends' place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from dynamo_cli.local.routed import until_routed

Serve = Callable[[web.Response | list[dict[str, str]]], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves `/health`: a fixed answer, or a list of instances that a test may change."""
    runners: list[web.AppRunner] = []

    async def start(health: web.Response | list[dict[str, str]]) -> str:
        async def answer(_: web.Request) -> web.Response:
            if isinstance(health, web.Response):
                return health
            return web.json_response({"status": "healthy", "instances": health})

        app = web.Application()
        app.router.add_get("/health", answer)
        runners.append(runner := web.AppRunner(app))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        return f"http://{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_every_frontend_has_to_know_every_engine(serve: Serve) -> None:
    knows = [{"name": name, "state": "exact"} for name in ("a", "b")]
    learns = [{"name": "a", "state": "approximate"}]
    waiting = asyncio.create_task(until_routed([await serve(knows), await serve(learns)], "ab", 30))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    learns.append({"name": "b", "state": "cache-unknown"})
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    learns[1] = {"name": "b", "state": "exact"}
    assert await waiting


async def test_it_has_a_limit(serve: Serve) -> None:
    assert not await until_routed([await serve([])], ["a"], 0.2)


async def test_foreign_frontends_are_not_waited_for(serve: Serve) -> None:
    foreign = [await serve(web.Response(text="OK")), await serve(web.Response(status=404))]
    assert await until_routed([*foreign, "http://127.0.0.1:1"], ["a"], 30)
    assert await until_routed([], ["a"], 30)
