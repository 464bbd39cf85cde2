"""ext_proc, health and access log for Envoy.

The shell moves messages between calls and ``Exchange`` and asks the picker. Two promises are kept
here and nowhere else: Envoy never sees a gRPC error (it would turn one into a bare 500), and each
``Route`` that a picker returned is released exactly once, however the stream ends.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable

from dynamo_epp.extproc import Exchange, Picker, PickRequest, Refusal, Route, wire
from dynamo_epp.extproc.messages import REQUEST_ID_HEADER
from dynamo_epp.requests.errors import error_body
from dynamo_epp.server import access_log
from dynamo_epp.server.access_log import AccessEntry
from dynamo_epp.server.health import Health
from dynamo_epp.server.transport import Call, Handler, Server, Status

log = logging.getLogger(__name__)

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
ACCESS_LOGS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
MESSAGE_OVERHEAD = 1024 * 1024  # bytes of an ext_proc message besides the body: headers, metadata

PICKER_FAILED = Refusal(500, error_body(500, "the endpoint picker failed"))


class PickerServer:
    """Serves ``picker`` to Envoy.

    ``ready`` answers the health checks named for readiness. ``on_access`` gets each entry of
    Envoy's access log. ``body_limit`` (bytes) bounds a request's body; ``duplex``,
    ``decision_header`` and ``served_header`` are as in ``Exchange``.
    """

    def __init__(
        self,
        picker: Picker,
        *,
        ready: Callable[[], bool],
        on_access: Callable[[AccessEntry], None] | None = None,
        body_limit: int = 32 * 1024 * 1024,
        duplex: bool = False,
        decision_header: bool = False,
        served_header: str = "",
    ) -> None:
        self._picker = picker
        self._on_access = on_access
        self._body_limit = body_limit
        self._duplex = duplex
        self._decision_header = decision_header
        self._served_header = served_header
        self._health = Health(ready)
        self._servers: list[Server] = []
        self.streams = 0  # ext_proc streams open at the moment

    async def start(
        self,
        address: str,
        *,
        health_address: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> int:
        """Listen on ``address`` (``host:port`` or ``unix:/path``), with TLS if ``tls`` is given;
        for health on ``health_address`` too, always in plain text. Returns the port of ``address``
        (1 for a unix socket).

        Raises ``OSError`` if an address can't be bound.
        """
        limit = self._body_limit + MESSAGE_OVERHEAD
        server = Server(self._accept, message_limit=limit)
        port = await server.start(address, tls)
        self._servers.append(server)
        if health_address is not None:
            health = Server(self._health.accept, message_limit=MESSAGE_OVERHEAD)
            await health.start(health_address)
            self._servers.append(health)
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new streams, let open ones end for ``grace_s`` seconds, then cut them."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        self._servers = []

    def _accept(self, call: Call, path: str) -> Handler | None:
        if path == PROCESS:
            self.streams += 1
            exchange = Exchange(
                duplex=self._duplex,
                body_limit=self._body_limit,
                decision_header=self._decision_header,
                served_header=self._served_header,
            )
            return _Processing(self._picker, call, exchange, self._ended)
        if path == ACCESS_LOGS:
            return _AccessLogs(call, self._on_access)
        return self._health.accept(call, path)

    def _ended(self) -> None:
        self.streams -= 1


class _Processing:
    """One ext_proc stream: a request and its answer."""

    lasting = False

    def __init__(
        self, picker: Picker, call: Call, exchange: Exchange, ended: Callable[[], None]
    ) -> None:
        self._picker = picker
        self._call = call
        self._exchange = exchange
        self._ended = ended
        self._over = False
        self._route: Route | None = None
        self._answered = False
        self._picking: asyncio.Task[None] | None = None

    def message(self, data: bytes) -> None:
        try:
            items = self._exchange.feed(data)
            if not self._answered and self._route is not None and self._route.status:
                self._answered = True
                self._tell(self._picker.answered, self._route)
            for item in items:
                if type(item) is bytes:
                    self._call.send(item)
                else:
                    assert isinstance(item, PickRequest)
                    self._call.hold()
                    self._picking = asyncio.create_task(self._pick(item))
        except Exception:
            self._fail()
        if self._exchange.closed:
            self._end()

    def unreadable(self, status: Status, reason: str) -> None:
        log.error("the proxy sent %s", reason)
        code = 413 if status is Status.RESOURCE_EXHAUSTED else 500
        refusal = Refusal(code, error_body(code, f"the gateway sent {reason}"))
        self._call.send(wire.immediate(refusal))
        self._call.finish()
        self.broken()

    def half_closed(self) -> None:
        self._end()

    def broken(self) -> None:
        if self._picking is not None:
            self._picking.cancel()
        self._end()

    async def _pick(self, request: PickRequest) -> None:
        outcome = await self._outcome(request)
        if isinstance(outcome, Route):
            self._route = outcome
        if self._over:  # a picker may answer although it was cancelled
            self._release()
            return
        try:
            for message in self._exchange.answer(outcome):
                self._call.send(message)
        except Exception:
            self._fail()
        if self._call.finished or self._exchange.closed:
            self._end()
        else:
            self._call.release()

    async def _outcome(self, request: PickRequest) -> Route | Refusal:
        request_id = request.head.headers.get(REQUEST_ID_HEADER, "")
        try:
            return await self._picker.pick(request)
        except asyncio.CancelledError:
            if self._over:  # the client left
                raise
            log.exception(
                "the pick for request %s was cancelled, but not by its client", request_id
            )
        except Exception:
            log.exception("the pick for request %s failed", request_id)
        return PICKER_FAILED

    def _fail(self) -> None:
        # There is a bug. A mere end would let the request go on without the part of its body that
        # is here; nobody takes the answer of a broken stream.
        log.exception("an ext_proc stream ended early")
        self._call.send(wire.immediate(PICKER_FAILED))
        self._end()

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        self._call.finish()
        self._ended()
        self._release()

    def _release(self) -> None:
        if self._route is not None:
            self._tell(self._picker.released, self._route)

    def _tell(self, what: Callable[[Route], None], route: Route) -> None:
        try:
            what(route)
        except Exception:
            log.exception("the picker could not take news of a route")


class _AccessLogs:
    """Envoy's access log: one call for as long as Envoy runs."""

    lasting = True

    def __init__(self, call: Call, on_access: Callable[[AccessEntry], None] | None) -> None:
        self._call = call
        self._on_access = on_access

    def message(self, data: bytes) -> None:
        if self._on_access is None:
            return
        for entry in access_log.decode(data):
            try:
                self._on_access(entry)
            except Exception:
                log.exception("an access-log entry was not understood")

    def unreadable(self, status: Status, reason: str) -> None:
        pass

    def half_closed(self) -> None:
        self._call.send(b"")
        self._call.finish()

    def broken(self) -> None:
        pass
