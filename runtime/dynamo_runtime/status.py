"""The status server: `/live`, `/ready`, `/health` and `/metrics` of a process.

Probes and Prometheus get their own small server, apart from the traffic, so that load can't starve
them and no route of it can be reached through the data path.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from dynamo_runtime.lifecycle import Lifecycle, Phase

log = logging.getLogger(__name__)


class AddressInUse(Exception):
    """The address a server was to listen on is taken (or not ours to take)."""


def bind(host: str, port: int) -> socket.socket:
    """A listening-ready TCP socket on ``host:port`` (port 0: any free one).

    Raises ``AddressInUse`` with a sentence that names the address and the cause.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise AddressInUse(f"can't listen on {host}:{port}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


class StatusServer:
    """Serves the state of ``lifecycle`` and the metrics of ``registry``.

    `/live` is 200 as long as the process runs. `/ready` and `/health` are 200 while it may get
    traffic and 503 otherwise, both with ``{"ready", "phase", "reason"}``. Add routes to ``app``
    before ``start``.
    """

    def __init__(
        self, lifecycle: Lifecycle, registry: CollectorRegistry, host: str, port: int
    ) -> None:
        self._lifecycle = lifecycle
        self._registry = registry
        self.host = host
        self.port = port
        self.app = web.Application()
        self.app.router.add_get("/live", self._live)
        self.app.router.add_get("/ready", self._ready)
        self.app.router.add_get("/metrics", self._metrics)
        self.foreign_metrics: Callable[[], str] = lambda: ""
        """Metrics of another process that `/metrics` passes on, in Prometheus' text format."""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen. Raises ``AddressInUse``."""
        if not any(
            route.resource and route.resource.canonical == "/health"
            for route in self.app.router.routes()
        ):
            self.app.router.add_get("/health", self._ready)
        sock = bind(self.host, self.port)
        self.port = sock.getsockname()[1]
        self._runner = web.AppRunner(self.app, access_log=None, handle_signals=False)
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()
        log.info("status server on http://%s:%d", self.host, self.port)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _live(self, _: web.Request) -> web.Response:
        stopped = self._lifecycle.phase is Phase.STOPPED
        return self._json(503 if stopped else 200)

    async def _ready(self, _: web.Request) -> web.Response:
        return self._json(200 if self._lifecycle.ready else 503)

    def _json(self, status: int) -> web.Response:
        state = self._lifecycle
        body = {"ready": state.ready, "phase": state.phase.value, "reason": state.reason}
        return web.Response(
            status=status, body=msgspec.json.encode(body), content_type="application/json"
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        foreign = self.foreign_metrics()
        # Another process's page has the one format that everybody understands, so ours has it too.
        encode, content_type = choose_encoder("" if foreign else request.headers.get("Accept", ""))
        if foreign:
            page = encode(self._registry) + foreign.encode()
            return web.Response(body=page, headers={"Content-Type": content_type})
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})
