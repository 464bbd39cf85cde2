"""gRPC over HTTP/2 for many small messages: h2 keeps the protocol's state, this moves the bytes.

Behind a foreign gateway every chunk of every answer passes through here, so a handler is called
with each message instead of being awaited for it: a task switch would cost more than the message.
What is written while bytes are taken in leaves in one write.

Memory is bounded by flow control. What a handler is not ready for, and what would add to answers
that its client does not read, is not acknowledged, and a client sends no more than a window of it.

Sources: RFC 9113; gRPC's ``doc/PROTOCOL-HTTP2.md``. Of gRPC there is what proxies and probes need:
no compression (it is never announced, so nobody may use it) and no deadlines (clients keep theirs).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

log = logging.getLogger(__name__)

STREAM_WINDOW = 1024 * 1024
"""Bytes that a client may send in one call before the first of them were taken."""
ACKNOWLEDGED = STREAM_WINDOW // 4
"""Bytes that are acknowledged together."""
CONNECTION_WINDOW = 2**31 - 1
"""The same for a connection: no limit of its own, so that no call waits for another."""
FRAME_LIMIT = 256 * 1024
"""Bytes of a frame from a client; large bodies come in few of them."""
HEADERS_LIMIT = 64 * 1024
CALLS_LIMIT = 100_000
"""Open calls of one connection. A client with more opens another connection."""
SEND_LIMIT = 256 * 1024
"""Bytes that may wait for a client to read before no more is taken from it in that call."""
WRITE_LIMIT = 1024 * 1024
"""The same for the socket of a connection."""
BACKLOG = 4096
"""Connections that may wait to be accepted."""
CLOSE_S = 1.0
"""How long a client may take to read the last bytes of a connection."""

_PREFIX = struct.Struct(">BI")  # compressed or not, length
_HEADERS = [(b":status", b"200"), (b"content-type", b"application/grpc")]


class Status(enum.IntEnum):
    """gRPC's status codes, those that are used here."""

    OK = 0
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13


class Handler(Protocol):
    """The server's side of one call. All is called on the loop, in the order of what came."""

    @property
    def lasting(self) -> bool:
        """The call goes on until somebody ends it; a server that stops does not wait for it."""
        ...

    def message(self, data: bytes) -> None: ...

    def unreadable(self, status: Status, reason: str) -> None:
        """A message came that can't be taken, also to one who holds. If this does not end the
        call, it ends with ``status`` and ``reason``."""

    def half_closed(self) -> None:
        """The client will send no more. It may still wait for answers."""

    def broken(self) -> None:
        """The client cancelled the call or is gone. Comes at once, also to one who holds."""


Accept = Callable[["Call", str], Handler | None]
"""Takes a call and its path; None: there is no such method."""


class Call:
    """What a handler has of its call: the way back, and a brake."""

    __slots__ = (
        "_client_done",
        "_connection",
        "_half_closed",
        "_held",
        "_id",
        "_partial",
        "_queue",
        "_queued",
        "_started",
        "_trailers",
        "_unacknowledged",
        "_waiting",
        "finished",
        "handler",
    )

    handler: Handler

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self.finished = False
        """Nothing that is sent now reaches the client."""
        self._connection = connection
        self._id = stream_id
        self._partial = bytearray()  # from the beginning of a message, not yet all of it
        self._waiting: deque[bytes] = deque()  # messages for a handler that holds
        self._held = False
        self._client_done = False  # the client's last byte has come
        self._half_closed = False  # and so has all before it, and the handler is to hear of it
        self._unacknowledged = 0  # bytes that came and for which there is no new window yet
        self._started = False  # response headers are sent
        self._queue: deque[bytes | memoryview] = deque()  # of the body, for want of a window
        self._queued = 0  # bytes of it
        self._trailers: list[tuple[bytes, bytes]] | None = None  # once nothing comes before them

    def send(self, message: bytes) -> None:
        """A message to the client, as soon as it can take it."""
        if self.finished:
            return
        self._queue.append(b"\0" + len(message).to_bytes(4, "big") + message)
        self._queued += len(message) + 5
        self.push()
        self._connection.write_soon()

    def finish(self, status: Status = Status.OK, message: str = "") -> None:
        """End the call, after what was sent before. The first time counts."""
        if self.finished:
            return
        self.finished = True
        self._trailers = [(b"grpc-status", b"%d" % status)]
        if message:
            self._trailers.append((b"grpc-message", _percent_encoded(message)))
        self._waiting.clear()
        self.push()
        self._connection.write_soon()

    def hold(self) -> None:
        """Keep messages back until ``release``."""
        self._held = True

    def release(self) -> None:
        self._held = False
        with self._connection.guarded(self):
            self._deliver()
        self._acknowledge()
        self._connection.write_soon()

    # --- what the connection tells

    def received(self, data: bytes, size: int, last: bool) -> None:
        """Part of the request body; it counts ``size`` bytes for flow control."""
        self._client_done = last
        self._unacknowledged += size
        if self.finished:
            pass
        elif not self._partial and len(data) >= 5 and _PREFIX.unpack_from(data)[1] == len(data) - 5:
            self._take(data[0], data[5:])  # as a rule a frame holds one message
        else:
            self._partial += data
            self._cut()
        self._acknowledge()

    def client_finished(self) -> None:
        self._client_done = self._half_closed = True
        self._deliver()

    def client_left(self) -> None:
        self._drop()
        self._acknowledge()
        self.handler.broken()

    def push(self) -> None:
        """Give the connection what it has room for."""
        try:
            self._push()
        except ProtocolError:  # the client left, and of that the news is still on its way to us
            self._drop()
        self._acknowledge()

    def _push(self) -> None:
        h2, queue = self._connection.h2, self._queue
        if (queue or self._trailers) and not self._started:
            self._started = True
            h2.send_headers(self._id, _HEADERS)
        while queue:
            room = 0
            if not self._connection.full:
                room = min(h2.local_flow_control_window(self._id), h2.max_outbound_frame_size)
            if room <= 0:
                self._connection.blocked[self._id] = self
                return
            data = queue.popleft()
            if len(data) > room:
                view = memoryview(data)
                queue.appendleft(view[room:])
                data = view[:room]
            h2.send_data(self._id, data)
            self._queued -= len(data)
        if self._trailers is not None:
            h2.send_headers(self._id, self._trailers, end_stream=True)
            self._trailers = None
            self._connection.over(self._id)
            if not self._client_done:  # RFC 9113 section 8.1: it need not go on
                h2.reset_stream(self._id, ErrorCodes.NO_ERROR)

    # --- inside

    def _drop(self) -> None:
        self.finished = True
        self._trailers = None
        self._queue.clear()
        self._queued = 0
        self._waiting.clear()
        self._partial.clear()

    def _cut(self) -> None:
        """Take the whole messages out of what has come."""
        data, at = self._partial, 0
        limit = self._connection.message_limit
        while len(data) - at >= 5 and not self.finished:
            compressed, length = _PREFIX.unpack_from(data, at)
            if length > limit:
                what = f"a message of {length} bytes; at most {limit} are taken"
                self._refuse(Status.RESOURCE_EXHAUSTED, what)
            elif len(data) - at - 5 < length:
                break
            else:
                end = at + 5 + length
                with memoryview(data) as view:
                    message = bytes(view[at + 5 : end])
                self._take(compressed, message)
                at = end
        del data[: len(data) if self.finished else at]

    def _take(self, compressed: int, message: bytes) -> None:
        if compressed:
            self._refuse(Status.UNIMPLEMENTED, "a compressed message, which is not understood")
        elif self._held:
            self._waiting.append(message)
        else:
            self.handler.message(message)

    def _refuse(self, status: Status, reason: str) -> None:
        self.handler.unreadable(status, reason)
        self.finish(status, reason)

    def _deliver(self) -> None:
        while self._waiting and not self._held:
            self.handler.message(self._waiting.popleft())
        if self._half_closed and not self._held and not self.finished:
            self._half_closed = False  # it is told once
            self.handler.half_closed()

    def _acknowledge(self) -> None:
        """Give the client a new window, unless its handler is busy or it does not read."""
        size = self._unacknowledged
        if size < ACKNOWLEDGED and not self.finished:
            return  # the client has window enough
        if size and (self.finished or not (self._held or self._queued > SEND_LIMIT)):
            self._unacknowledged = 0
            self._connection.h2.acknowledge_received_data(size, self._id)


class _H2(H2Connection):
    """h2 as it is, but for two things."""

    _opened = 0
    _counted = 0

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        """A client's GOAWAY is about streams that a server opens (RFC 9113 section 6.8), of which
        there are none: its calls go on. h2 would take the connection for closed."""
        return [], []

    @property
    def open_inbound_streams(self) -> int:
        """h2 looks at all streams whenever one more opens. Here they are counted anew when as many
        have opened as there are, which costs the same for each however many there are."""
        self._opened += 1
        if self._opened >= min(len(self.streams), CALLS_LIMIT // 10):
            self._opened = 0
            self._counted = super().open_inbound_streams
        return self._counted + self._opened


class Connection(asyncio.Protocol):
    """One client's connection. ``message_limit`` bounds a message to the server, in bytes;
    ``opened``, ``call_over`` and ``closed`` hear of what their names say."""

    def __init__(
        self,
        accept: Accept,
        message_limit: int,
        *,
        opened: Callable[[Connection], None],
        call_over: Callable[[], None],
        closed: Callable[[Connection], None],
    ) -> None:
        self.h2 = _H2(
            H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.message_limit = message_limit
        self.calls: dict[int, Call] = {}
        self.blocked: dict[int, Call] = {}  # those that wait for a window; the first is next
        self.full = False
        """The client reads too slowly for more to be written."""
        self._accept = accept
        self._opened = opened
        self._call_over = call_over
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._taking = False  # what is sent now is written when all that came was taken in
        self._write_due = False
        self._widened = False  # there may be room for several calls that had none
        self._draining = False

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's have no such base
        self._transport.set_write_buffer_limits(WRITE_LIMIT)
        self.h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_FRAME_SIZE: FRAME_LIMIT,
                SettingCodes.MAX_CONCURRENT_STREAMS: CALLS_LIMIT,
                SettingCodes.MAX_HEADER_LIST_SIZE: HEADERS_LIMIT,
            },
        )
        # h2 takes up no initial values by itself.
        self.h2.max_inbound_frame_size = FRAME_LIMIT
        self.h2.decoder.max_header_list_size = HEADERS_LIMIT
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(CONNECTION_WINDOW - 65_535)
        self._write()
        self._opened(self)

    def data_received(self, data: bytes) -> None:
        self._taking = True
        try:
            for event in self.h2.receive_data(data):
                self._take(event)
            if self._widened:
                self._widened = False
                self._unblock()
        except ProtocolError as error:
            log.info("a client broke HTTP/2: %s", error)
            self.close()
        finally:
            self._taking = False
            self._write()

    def eof_received(self) -> None:
        return None  # what is on its way to a client that closed one side would be lost anyway

    def pause_writing(self) -> None:
        self.full = True
        if self._transport is not None:
            self._transport.pause_reading()  # it may be its pings that we answer

    def resume_writing(self) -> None:
        self.full = False
        if self._transport is not None:
            self._transport.resume_reading()
        self._unblock()
        self._write()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.blocked.clear()
        while self.calls:
            _, call = self.calls.popitem()
            with self.guarded(call):
                call.client_left()
        self._closed(self)

    # --- for calls

    def write_soon(self) -> None:
        """What calls were given leaves with the rest of this turn of the loop."""
        if not self._taking and not self._write_due:
            self._write_due = True
            asyncio.get_running_loop().call_soon(self._write)

    def over(self, stream_id: int) -> None:
        """The call is at its end, in both directions."""
        self.calls.pop(stream_id, None)
        self.blocked.pop(stream_id, None)
        self._call_over()

    @contextlib.contextmanager
    def guarded(self, call: Call) -> Iterator[None]:
        """A handler that fails ends its own call and no other."""
        try:
            yield
        except Exception:
            log.exception("a call failed")
            call.finish(Status.INTERNAL, "the server failed; its log says how")

    # --- for the server

    @property
    def busy(self) -> bool:
        """There are calls that a server should wait for."""
        return any(not call.handler.lasting for call in self.calls.values())

    def drain(self) -> None:
        """Take no new calls."""
        self._draining = True
        if self._transport is not None:
            # h2 would regard the connection as closed from here on.
            last = GoAwayFrame(0, last_stream_id=self.h2.highest_inbound_stream_id)
            self._write()
            self._transport.write(last.serialize())

    def close(self) -> None:
        """End what lasts, cut what still runs. The client has ``CLOSE_S`` to read what was sent."""
        for call in list(self.calls.values()):
            if call.handler.lasting:
                call.finish()
        self._write()
        if self._transport is not None:
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSE_S, self._abort)

    # --- inside

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _take(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            call = self.calls.get(event.stream_id)
            if call is None:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                return
            with self.guarded(call):
                last = event.stream_ended is not None
                call.received(event.data, event.flow_controlled_length, last)
        elif isinstance(event, RequestReceived):
            self._begin(event.stream_id, dict(event.headers))
        elif isinstance(event, StreamEnded):
            call = self.calls.get(event.stream_id)
            if call is not None:
                with self.guarded(call):
                    call.client_finished()
        elif isinstance(event, StreamReset):
            call = self.calls.get(event.stream_id)
            self.over(event.stream_id)
            if call is not None:
                with self.guarded(call):
                    call.client_left()
        elif isinstance(event, WindowUpdated) and event.stream_id:
            call = self.blocked.pop(event.stream_id, None)
            if call is not None:
                call.push()
        elif isinstance(event, WindowUpdated | RemoteSettingsChanged):
            self._widened = True

    def _begin(self, stream_id: int, headers: dict[bytes, bytes]) -> None:
        is_grpc = headers.get(b"content-type", b"").startswith(b"application/grpc")
        if self._draining or headers.get(b":method") != b"POST" or not is_grpc:
            with contextlib.suppress(ProtocolError):  # it may have been all, or left already
                if self._draining:
                    self.h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
                else:
                    self.h2.send_headers(stream_id, [(b":status", b"415")], end_stream=True)
                    self.h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
            return
        path = headers.get(b":path", b"").decode("ascii", "replace")
        call = Call(self, stream_id)
        handler = self._accept(call, path)
        if handler is None:
            call.finish(Status.UNIMPLEMENTED, f"there is no method {path}")
        else:
            call.handler = handler
            self.calls[stream_id] = call

    def _unblock(self) -> None:
        """Those that wait go on while there is room; who had some waits behind who had none."""
        for stream_id, call in list(self.blocked.items()):
            if self.full or self.h2.outbound_flow_control_window <= 0:
                return
            del self.blocked[stream_id]
            call.push()

    def _write(self) -> None:
        self._write_due = False
        data = self.h2.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)


class Server:
    """Listens, and knows its connections. ``accept`` gets each call."""

    def __init__(self, accept: Accept, *, message_limit: int) -> None:
        self._accept = accept
        self._message_limit = message_limit
        self._listening: asyncio.Server | None = None
        self._stopped = False
        self._connections: set[Connection] = set()
        self._ended = asyncio.Event()  # a call or a connection has

    async def start(self, address: str, tls: ssl.SSLContext | None = None) -> int:
        """Listen on ``address`` (``host:port`` or ``unix:/path``); the port, 1 for a unix socket.

        Raises ``OSError`` if the address can't be bound.
        """
        loop = asyncio.get_running_loop()
        try:
            if address.startswith("unix:"):
                path = address.removeprefix("unix:")
                self._listening = await loop.create_unix_server(
                    self._connect, path, backlog=BACKLOG, ssl=tls
                )
                return 1
            wire = _listen(address)
        except OSError as error:
            raise OSError(f"can't listen on {address}: {error}") from error
        self._listening = await loop.create_server(
            self._connect, sock=wire, backlog=BACKLOG, ssl=tls
        )
        return int(wire.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those that end by themselves end for ``grace_s``, cut the rest."""
        self._stopped = True
        if self._listening is not None:
            self._listening.close()
        for connection in self._connections:
            connection.drain()
        await self._until(lambda: not any(each.busy for each in self._connections), grace_s)
        for connection in list(self._connections):
            connection.close()
        await self._until(lambda: not self._connections, 2 * CLOSE_S)

    async def _until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Whether ``done`` came true in time, as calls and connections end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not done():
                    self._ended.clear()
                    await self._ended.wait()
        return done()

    def _connect(self) -> Connection:
        return Connection(
            self._accept,
            self._message_limit,
            opened=self._connected,
            call_over=self._ended.set,
            closed=self._disconnected,
        )

    def _connected(self, connection: Connection) -> None:
        self._connections.add(connection)
        if self._stopped:  # its TLS handshake was still going on
            connection.drain()
            connection.close()

    def _disconnected(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._ended.set()


def _listen(address: str) -> socket.socket:
    """A socket for ``host:port``; a host ``[::]`` takes both families, as gRPC's servers do."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    # Not shared with others: two pickers on one port would each get a part of the traffic.
    wire = socket.create_server(
        (host, int(port)), family=family, backlog=BACKLOG, dualstack_ipv6=both
    )
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # those accepted have it, too
    return wire


def _percent_encoded(text: str) -> bytes:
    """As gRPC wants status messages: printable ASCII, everything else as %XX."""
    return b"".join(
        b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in text.encode()
    )
