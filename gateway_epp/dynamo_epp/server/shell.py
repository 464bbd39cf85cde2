"""ext_proc, health and access log over grpc.aio.

The shell moves bytes between gRPC and ``Exchange`` and asks the picker. Two promises are kept here
and nowhere else: Envoy never sees a gRPC error (it would turn one into a bare 500), and each
``Route`` that a picker returned is released exactly once, however the stream ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from dynamo_epp.extproc import Exchange, Picker, PickRequest, Refusal, Route, wire
from dynamo_epp.extproc.messages import REQUEST_ID_HEADER
from dynamo_epp.requests.errors import error_body
from dynamo_epp.server import access_log
from dynamo_epp.server.access_log import AccessEntry
from dynamo_epp.server.health import Health

log = logging.getLogger(__name__)

MESSAGE_OVERHEAD = 1024 * 1024  # bytes of an ext_proc message besides the body: headers, metadata

PICKER_FAILED = Refusal(500, error_body(500, "the endpoint picker failed"))

Context = grpc.aio.ServicerContext[bytes, bytes]


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
        self._servers: list[grpc.aio.Server] = []
        self.streams = 0  # ext_proc streams open at the moment

    async def start(
        self,
        address: str,
        *,
        health_address: str | None = None,
        credentials: grpc.ServerCredentials | None = None,
    ) -> int:
        """Listen on ``address`` (``host:port`` or ``unix:/path``), with TLS if there are
        ``credentials``; for health on ``health_address`` too, always in plain text. Returns the
        port of ``address`` (1 for a unix socket).

        Raises ``OSError`` if an address can't be bound.
        """
        server = self._server()
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "envoy.service.ext_proc.v3.ExternalProcessor",
                    {"Process": grpc.stream_stream_rpc_method_handler(self._process)},
                ),
                grpc.method_handlers_generic_handler(
                    "envoy.service.accesslog.v3.AccessLogService",
                    {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(self._access_logs)},
                ),
                self._health.handler(),
            )
        )
        port = _bind(server, address, credentials)
        self._servers.append(server)
        if health_address is not None:
            health = self._server()
            health.add_generic_rpc_handlers((self._health.handler(),))
            _bind(health, health_address)
            self._servers.append(health)
        for each in self._servers:
            await each.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new streams, let open ones end for ``grace_s`` seconds, then cut them."""
        self._health.ending = True
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        self._servers = []

    def _server(self) -> grpc.aio.Server:
        return grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._body_limit + MESSAGE_OVERHEAD),
                ("grpc.max_send_message_length", -1),
                # Two pickers on one port would each get a part of the traffic, by surprise.
                ("grpc.so_reuseport", 0),
                # A held stream is silent for minutes; a proxy that pings meanwhile means no harm.
                ("grpc.http2.max_ping_strikes", 0),
                # A burst waits its turn. By default gRPC cancels calls at random once 1,000 have
                # not been accepted yet, and the client would get an error.
                ("grpc.server.max_pending_requests", 1_000_000),
                ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
            ]
        )

    async def _process(self, requests: AsyncIterator[bytes], context: Context) -> None:
        exchange = Exchange(
            duplex=self._duplex,
            body_limit=self._body_limit,
            decision_header=self._decision_header,
            served_header=self._served_header,
        )
        route: Route | None = None
        answered = False
        self.streams += 1
        try:
            async for data in requests:
                items = exchange.feed(data)
                if not answered and route is not None and route.status:
                    answered = True
                    self._tell(self._picker.answered, route)
                for item in items:
                    if type(item) is bytes:
                        await context.write(item)
                        continue
                    assert isinstance(item, PickRequest)
                    outcome = await self._pick(item)
                    if isinstance(outcome, Route):
                        route = outcome
                    for message in exchange.answer(outcome):
                        await context.write(message)
                if exchange.closed:
                    return
        except Exception:
            # The stream broke under us, or there is a bug. A mere end would let the request go on
            # without the part of its body that is here; nobody takes the answer of a broken stream.
            log.exception("an ext_proc stream ended early")
            with contextlib.suppress(Exception):
                await context.write(wire.immediate(PICKER_FAILED))
        finally:
            self.streams -= 1
            if route is not None:
                self._tell(self._picker.released, route)

    async def _pick(self, request: PickRequest) -> Route | Refusal:
        try:
            return await self._picker.pick(request)
        except Exception:
            request_id = request.head.headers.get(REQUEST_ID_HEADER, "")
            log.exception("the pick for request %s failed", request_id)
            return PICKER_FAILED

    def _tell(self, what: Callable[[Route], None], route: Route) -> None:
        try:
            what(route)
        except Exception:
            log.exception("the picker could not take news of a route")

    async def _access_logs(self, requests: AsyncIterator[bytes], _: Context) -> bytes:
        async for data in requests:
            if self._on_access is None:
                continue
            for entry in access_log.decode(data):
                try:
                    self._on_access(entry)
                except Exception:
                    log.exception("an access-log entry was not understood")
        return b""


def _bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:  # grpc's way to say that the address is taken
        raise OSError(f"can't listen on {address}: {error}") from error
