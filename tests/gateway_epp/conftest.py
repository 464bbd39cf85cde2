"""A real frontend (Envoy and the gRPC server) between small engines and a picker under the test's
control, all on loopback addresses of their own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from dynamo_epp.extproc import PickRequest, Refusal, Route
from dynamo_epp.frontend import FrontendSettings, run_frontend
from dynamo_epp.server import AccessEntry
from dynamo_runtime.discovery import Endpoint
from dynamo_runtime.lifecycle import Lifecycle, Phase
from multidict import CIMultiDictProxy
from prometheus_client import CollectorRegistry

_hosts = itertools.count(1)


def next_address() -> str:
    """A loopback address that no other test, nor a test of another process, uses."""
    process, number = os.getpid() % 65536, next(_hosts)
    return f"127.{100 + number % 100}.{process >> 8}.{max(1, process & 255)}"


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class EchoEngine:
    """An HTTP server that remembers what it got and answers as ``handler`` says."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.seen: list[Seen] = []
        self.handler: Callable[[web.Request, bytes], Awaitable[web.StreamResponse]] = self.ok
        self._runner: web.AppRunner | None = None

    @property
    def hostport(self) -> str:
        return f"{self.address}:8000"

    async def ok(self, _: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(body=b"engine " + self.address.encode() + b" " + body)

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.address, 8000, backlog=1024).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append(Seen(request.method, request.path_qs, headers, body))
        return await self.handler(request, body)


@dataclass
class TestPicker:
    """Sends everything to ``endpoints`` unless ``choose`` says otherwise; remembers what was."""

    __test__ = False

    endpoints: tuple[str, ...] = ()
    known: Sequence[Endpoint] = ()
    choose: Callable[[PickRequest], Awaitable[Route | Refusal]] | None = None
    requests: list[PickRequest] = field(default_factory=list)
    given: list[Route] = field(default_factory=list)
    freed: list[Route] = field(default_factory=list)
    entries: list[AccessEntry] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    publish: Callable[[Sequence[Endpoint]], None] = lambda _: None

    async def pick(self, request: PickRequest) -> Route | Refusal:
        self.requests.append(request)
        outcome: Route | Refusal = Route(self.endpoints, routing="test;overlap=1/2")
        if self.choose is not None:
            outcome = await self.choose(request)
        if isinstance(outcome, Route):
            self.given.append(outcome)
        return outcome

    def answered(self, route: Route) -> None:
        pass

    def released(self, route: Route) -> None:
        self.freed.append(route)
        self._notify()

    def logged(self, entry: AccessEntry) -> None:
        self.entries.append(entry)
        self._notify()

    def _notify(self) -> None:
        async def notify() -> None:
            async with self.changed:
                self.changed.notify_all()

        self._notifying = asyncio.ensure_future(notify())

    async def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(condition)

    def add_routes(self, app: web.Application) -> None:
        async def models(_: web.Request) -> web.Response:
            return web.json_response({"object": "list", "data": [{"id": "m"}]})

        async def model(request: web.Request) -> web.Response:
            return web.json_response({"id": request.match_info["id"]})

        app.router.add_get("/v1/models", models)
        app.router.add_get("/v1/models/{id:.+}", model)

    async def start(self, publish: Callable[[Sequence[Endpoint]], None]) -> None:
        self.publish = publish
        publish(self.known)

    async def stop(self) -> None:
        pass


@dataclass
class RunningFrontend:
    url: str
    settings: FrontendSettings
    picker: TestPicker
    lifecycle: Lifecycle
    task: asyncio.Task[int]
    client: aiohttp.ClientSession

    async def pool(self, *engines: EchoEngine) -> None:
        """Make these the pool, and the picker's list; return when Envoy knows all of them."""
        self.picker.publish(
            [Endpoint(name=engine.address, address=engine.address, port=8000) for engine in engines]
        )
        for engine in engines:
            self.picker.endpoints = (engine.hostport,)
            async with asyncio.timeout(10):
                answer = await self.post("/v1/completions", b"{}")
                while answer.status == 503:
                    answer = await self.post("/v1/completions", b"{}")
            engine.seen.clear()
        self.picker.endpoints = tuple(engine.hostport for engine in engines)
        await self.picker.until(lambda: self.picker.freed == self.picker.given)
        for memory in (self.picker.requests, self.picker.given, self.picker.freed):
            memory.clear()

    async def post(self, path: str, body: bytes, **options: Any) -> Answer:
        async with self.client.post(self.url + path, data=body, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        async with self.client.get(self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())


@dataclass
class Answer:
    status: int
    headers: CIMultiDictProxy[str]
    body: bytes


@pytest.fixture
def own_address() -> str:
    return next_address()


@pytest.fixture
def test_picker() -> TestPicker:
    return TestPicker()


@pytest.fixture
async def engines() -> AsyncIterator[Callable[[], Awaitable[EchoEngine]]]:
    async with contextlib.AsyncExitStack() as stack:

        async def start() -> EchoEngine:
            engine = EchoEngine(next_address())
            await engine.start()
            stack.push_async_callback(engine.stop)
            return engine

        yield start


@pytest.fixture
async def frontends() -> AsyncIterator[Callable[..., Awaitable[RunningFrontend]]]:
    """``await frontends(**settings)`` starts one and waits until it is ready."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(picker: TestPicker | None = None, **options: Any) -> RunningFrontend:
            picker = picker or TestPicker()
            host = next_address()
            defaults = {
                "http_host": host,
                "status_host": host,
                "concurrency": 1,
                "drain_seconds": 5,
            }
            settings = FrontendSettings(**defaults | options)
            lifecycle = Lifecycle()

            def make_picker(_: CollectorRegistry) -> TestPicker:
                return picker

            task = asyncio.create_task(run_frontend(settings, lifecycle, make_picker))

            async def stop() -> None:
                lifecycle.request_stop("the test is over")
                await asyncio.wait({task})

            stack.push_async_callback(stop)
            async with asyncio.timeout(20):
                while lifecycle.phase is not Phase.READY:
                    assert not task.done()
                    await asyncio.sleep(0.01)
            client = await stack.enter_async_context(
                aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=30), auto_decompress=False
                )
            )
            url = f"http://{host}:{settings.http_port}"
            return RunningFrontend(url, settings, picker, lifecycle, task, client)

        yield start
