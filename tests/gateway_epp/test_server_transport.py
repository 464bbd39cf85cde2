"""The server's gRPC against h2 as its client, without sockets: nothing lost, memory bounded.

h2 checks every frame that it gets, so what breaks HTTP/2 fails here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest
import uvloop
from dynamo_epp.gateway import Tls
from dynamo_epp.gateway.tls import now, server_context
from dynamo_epp.server import transport
from dynamo_epp.server.transport import Call, Connection, Handler, Server, Status
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame
from hypothesis import given, settings
from hypothesis import strategies as st

LIMIT = 3 * transport.STREAM_WINDOW  # bytes of a message


class Wire:
    """What a connection writes to; it takes ``room`` bytes before it says stop."""

    def __init__(self, protocol: Connection) -> None:
        self.protocol = protocol
        self.written = bytearray()
        self.room = 1 << 60
        self.reads = True
        self.closed = False

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.written += data
            if len(self.written) > self.room and not self.protocol.full:
                self.protocol.pause_writing()

    def take(self) -> bytes:
        taken = bytes(self.written)
        self.written.clear()
        if self.protocol.full:
            self.protocol.resume_writing()
        return taken

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


class Echo:
    """Sends back what comes; holds after a message of which ``holds`` says so."""

    lasting = False

    def __init__(self, call: Call, holds: Callable[[bytes], bool] = lambda data: False) -> None:
        self.call = call
        self.holds = holds
        self.was_told: list[str] = []

    def message(self, data: bytes) -> None:
        assert "half-closed" not in self.was_told
        self.call.send(data)
        if self.holds(data):
            self.call.hold()

    def unreadable(self, status: Status, reason: str) -> None:
        self.was_told.append("unreadable")

    def half_closed(self) -> None:
        self.was_told.append("half-closed")
        self.call.finish()

    def broken(self) -> None:
        self.was_told.append("broken")


@dataclass
class Heard:
    """What a client got in one call."""

    status: int | None = None
    body: bytearray = field(default_factory=bytearray)
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None
    unread: int = 0  # bytes not acknowledged

    def messages(self) -> list[bytes]:
        return list(split(self.body))


def headers(path: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "epp"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def split(body: bytes | bytearray) -> Iterator[bytes]:
    at = 0
    while at < len(body):
        assert body[at] == 0
        end = at + 5 + int.from_bytes(body[at + 1 : at + 5], "big")
        assert end <= len(body), "the end of a message is missing"
        yield bytes(body[at + 5 : end])
        at = end


class Client:
    """h2 on the other side of a connection."""

    def __init__(
        self, make: Callable[[Call], Handler], *, window: int = 65_535, reads: bool = True
    ) -> None:
        self.handlers: list[Handler] = []
        self.left: list[Connection] = []
        self.calls_over = 0
        self.reads = reads
        self.unsent = b""

        def accept(call: Call, path: str) -> Handler | None:
            if path != "/echo":
                return None
            self.handlers.append(make(call))
            return self.handlers[-1]

        def over() -> None:
            self.calls_over += 1

        self.server = Connection(
            accept, LIMIT, opened=lambda _: None, call_over=over, closed=self.left.append
        )
        self.wire = Wire(self.server)
        self.heard: dict[int, Heard] = {}
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.server.connection_made(self.wire)  # type: ignore[arg-type]
        self.exchange()

    def begin(self, path: str = "/echo") -> int:
        stream = self.h2.get_next_available_stream_id()
        self.heard[stream] = Heard()
        self.h2.send_headers(stream, headers(path))
        return stream

    def say(self, stream: int, data: bytes, step: int = 16_384) -> int:
        """Send what the windows allow, in frames of ``step`` bytes; how much that was."""
        sent = 0
        while sent < len(data):
            room = min(self.h2.local_flow_control_window(stream), step, len(data) - sent)
            if room <= 0:
                self.exchange()
                room = min(self.h2.local_flow_control_window(stream), step, len(data) - sent)
                if room <= 0:
                    break
            self.h2.send_data(stream, data[sent : sent + room])
            sent += room
        return sent

    def exchange(self, cuts: Callable[[int], int] = lambda left: left) -> None:
        """Move bytes until both sides have said all; ``cuts`` says how many at a time."""
        while True:
            self.unsent += self.h2.data_to_send()
            while self.unsent and self.wire.reads and not self.wire.closed:
                size = cuts(len(self.unsent))
                taken, self.unsent = self.unsent[:size], self.unsent[size:]
                self.server.data_received(taken)
            incoming = self.wire.take()
            if not incoming and not (self.unsent and self.wire.reads):
                return
            self.hear(incoming)

    def hear(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            heard = self.heard.get(getattr(event, "stream_id", 0) or 0, Heard())
            match event:
                case ResponseReceived():
                    heard.status = int(dict(event.headers)[b":status"])
                case DataReceived():
                    heard.body += event.data
                    heard.unread += event.flow_controlled_length
                    if self.reads:
                        self.read(event.stream_id)
                case TrailersReceived():
                    heard.trailers = dict(event.headers)
                case StreamEnded():
                    heard.ended = True
                case StreamReset():
                    heard.reset = event.error_code

    def read(self, stream: int) -> None:
        """Give the server a new window for what was heard."""
        heard = self.heard[stream]
        if heard.unread:
            self.h2.acknowledge_received_data(heard.unread, stream)
            heard.unread = 0

    def end(self, stream: int) -> None:
        self.h2.end_stream(stream)


async def turn() -> None:
    """Let what was planned for soon happen."""
    await asyncio.sleep(0)


sizes = st.one_of(st.integers(0, 40), st.integers(0, 30_000))


@settings(deadline=None, max_examples=40)
@given(
    calls=st.lists(st.lists(sizes, max_size=4), min_size=1, max_size=3),
    step=st.integers(500, 16_384),
    cut=st.sampled_from((61, 4_000, 1_000_000)),
    window=st.sampled_from((300, 5_000, 65_535, 1_000_000)),
    room=st.sampled_from((100, 10_000, 1 << 60)),
)
async def test_every_message_comes_back(
    calls: list[list[int]], step: int, cut: int, window: int, room: int
) -> None:
    """Whatever the sizes, frames, windows, and cuts through the bytes of the connection."""
    client = Client(Echo, window=window)
    client.wire.room = room
    said = {
        client.begin(): [bytes((number % 251,)) * size for number, size in enumerate(call)]
        for call in calls
    }
    for stream, messages in said.items():
        body = b"".join(map(framed, messages))
        sent = 0
        while sent < len(body):
            sent += client.say(stream, body[sent:], step)
            client.exchange(lambda left: min(left, cut))
        client.end(stream)
        client.exchange(lambda left: min(left, cut))
    for stream, messages in said.items():
        heard = client.heard[stream]
        assert heard.messages() == messages
        assert (heard.status, heard.ended, heard.trailers) == (200, True, {b"grpc-status": b"0"})
    assert client.server.calls == client.server.blocked == {}
    assert client.calls_over == len(calls)
    assert all(handler.was_told == ["half-closed"] for handler in client.handlers)  # type: ignore[attr-defined]


class Obedient(Echo):
    """Does what a message's last word says, while the rest of a read is still to come."""

    def message(self, data: bytes) -> None:
        super().message(data)
        if data.endswith(b"hold"):
            self.call.hold()
        elif data.endswith(b"finish"):
            self.call.finish()


moves = st.tuples(
    st.sampled_from(
        (
            *("say", "say finish", "say hold", "end", "reset"),
            *("hold", "release", "answer", "finish", "exchange", "exchange in pieces"),
        )
    ),
    st.integers(0, 2),  # of which call
    sizes,
)


@settings(deadline=None, max_examples=150)
@given(script=st.lists(moves, max_size=30), window=st.sampled_from((300, 65_535)))
async def test_calls_end_once_in_whatever_order_things_happen(
    script: list[tuple[str, int, int]], window: int
) -> None:
    """Both sides speak, hold, end and break off as they like, with any of it in one read."""
    client = Client(Obedient, window=window)
    streams = [client.begin() for _ in range(3)]
    client.exchange()
    echoes = [handler for handler in client.handlers if isinstance(handler, Echo)]
    said: list[list[bytes]] = [[], [], []]
    silent: set[int] = set()  # clients that ended or reset their call
    reset: set[int] = set()
    for number, (move, which, size) in enumerate(script):
        stream, call = streams[which], echoes[which].call
        speaks = which not in silent and not client.heard[stream].ended
        match move:
            case "say" | "say finish" | "say hold" if speaks:
                message = bytes((number,)) * size + move.removeprefix("say ").encode()
                frame = framed(message)
                if len(frame) <= client.h2.local_flow_control_window(stream):
                    for at in range(0, len(frame), 16_384):
                        client.h2.send_data(stream, frame[at : at + 16_384])
                    said[which].append(message)
            case "end" if speaks:
                client.end(stream)
                silent.add(which)
            case "reset" if speaks:
                client.h2.reset_stream(stream, ErrorCodes.CANCEL)
                silent.add(which)
                reset.add(which)
            case "hold":
                call.hold()
            case "release":
                call.release()
            case "answer":
                call.send(b"more")
            case "finish":
                call.finish()
            case "exchange in pieces":
                client.exchange(lambda left: min(left, 5_000))
            case "exchange":
                await turn()
                client.exchange()
    client.exchange()
    while any(echo.call._held for echo in echoes):
        for echo in echoes:
            echo.call.release()
        await turn()
        client.exchange()
    for which, stream in enumerate(streams):
        if which not in silent and not client.heard[stream].ended:
            client.end(stream)
    client.exchange()
    assert client.server.calls == client.server.blocked == {}
    assert client.calls_over == 3
    for which, (stream, echo) in enumerate(zip(streams, echoes, strict=True)):
        heard = client.heard[stream]
        assert echo.was_told in ([], ["half-closed"], ["broken"], ["half-closed", "broken"])
        if which in reset:
            continue
        assert heard.ended
        echoed = [message for message in heard.messages() if message != b"more"]
        assert echoed == said[which][: len(echoed)]
        if echo.was_told == ["half-closed"]:
            assert echoed == said[which]


async def test_the_window_of_a_connection_comes_back_with_its_calls() -> None:
    """A little is left unacknowledged in each; lost, it would stop the connection in the end."""
    client = Client(Echo)
    before = client.h2.outbound_flow_control_window
    for number in range(40):
        stream = client.begin()
        client.say(stream, framed(bytes(40_000)))
        if number % 2:
            client.end(stream)
        else:
            client.h2.reset_stream(stream, ErrorCodes.CANCEL)
        client.exchange()
    # h2 itself waits for half a window before it tells, so ask what it owes.
    manager = client.server.h2._inbound_flow_control_window_manager
    owed = manager._bytes_processed
    assert client.h2.outbound_flow_control_window + owed == before


async def test_a_client_that_does_not_read_can_not_fill_memory() -> None:
    client = Client(Echo, reads=False)
    stream = client.begin()
    body = framed(bytes(60_000)) * 1_000  # 60 MB
    sent = client.say(stream, body)
    held = client.server.calls[stream]
    assert sent <= 65_535 + transport.SEND_LIMIT + 2 * transport.STREAM_WINDOW
    assert held._queued <= sent
    while len(client.heard[stream].body) < len(body):
        client.read(stream)
        client.exchange()
        sent += client.say(stream, body[sent:])
    assert client.heard[stream].body == body


async def test_a_handler_that_holds_gets_nothing_and_loses_nothing() -> None:
    client = Client(lambda call: Echo(call, holds=lambda data: data == b"wait"))
    stream = client.begin()
    body = framed(b"wait") + framed(bytes(50_000)) * 100
    sent = client.say(stream, body)
    assert sent <= transport.STREAM_WINDOW
    assert client.heard[stream].messages() == [b"wait"]
    client.server.calls[stream].release()
    await turn()
    client.exchange()
    while sent < len(body):
        sent += client.say(stream, body[sent:])
    client.end(stream)
    client.exchange()
    assert client.heard[stream].body == body
    assert client.heard[stream].ended


async def test_a_half_close_waits_for_a_handler_that_holds() -> None:
    client = Client(lambda call: Echo(call, holds=lambda data: True))
    stream = client.begin()
    client.say(stream, framed(b"a") + framed(b"b"))
    client.end(stream)
    client.exchange()
    (echo,) = client.handlers
    assert isinstance(echo, Echo)
    assert (client.heard[stream].messages(), echo.was_told) == ([b"a"], [])
    echo.call.release()
    echo.call.release()
    await turn()
    client.exchange()
    assert (client.heard[stream].messages(), echo.was_told) == ([b"a", b"b"], ["half-closed"])


async def test_a_reset_is_told_at_once_also_to_a_handler_that_holds() -> None:
    client = Client(lambda call: Echo(call, holds=lambda data: True))
    stream = client.begin()
    client.say(stream, framed(b"a"))
    client.exchange()
    client.h2.reset_stream(stream, ErrorCodes.CANCEL)
    client.exchange()
    (echo,) = client.handlers
    assert isinstance(echo, Echo)
    assert (echo.was_told, echo.call.finished) == (["broken"], True)
    echo.call.send(b"too late")
    echo.call.finish()
    echo.call.release()
    await turn()
    client.exchange()
    assert client.heard[stream].messages() == [b"a"]
    assert client.server.calls == {}


async def test_a_message_and_a_reset_in_one_read() -> None:
    """h2 knows of the reset before the handler gets the message."""
    client = Client(Echo)
    stream, other = client.begin(), client.begin()
    client.h2.send_data(stream, framed(b"a"))
    client.h2.reset_stream(stream, ErrorCodes.CANCEL)
    client.say(other, framed(b"b"))
    client.exchange()
    (first, _) = client.handlers
    assert isinstance(first, Echo)
    assert first.was_told == ["broken"]
    assert client.heard[other].messages() == [b"b"]


async def test_a_server_that_ends_first_says_so_and_hears_no_more() -> None:
    class Once(Echo):
        def message(self, data: bytes) -> None:
            self.call.send(data)
            self.call.finish()

    client = Client(Once)
    stream = client.begin()
    client.say(stream, framed(b"a"))
    client.exchange()
    heard = client.heard[stream]
    assert (heard.messages(), heard.trailers[b"grpc-status"]) == ([b"a"], b"0")
    assert heard.reset in (None, ErrorCodes.NO_ERROR)
    assert client.server.calls == {}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"\1\0\0\0\1x", Status.UNIMPLEMENTED, b"compressed"),
        (b"\0" + (LIMIT + 1).to_bytes(4, "big"), Status.RESOURCE_EXHAUSTED, b"%d" % (LIMIT + 1)),
    ],
)
async def test_what_can_not_be_taken_ends_the_call(
    body: bytes, status: Status, words: bytes
) -> None:
    client = Client(Echo)
    stream = client.begin()
    client.say(stream, framed(b"before") + body)
    client.exchange()
    heard = client.heard[stream]
    assert heard.messages() == [b"before"]
    assert heard.trailers[b"grpc-status"] == b"%d" % status
    assert words in heard.trailers[b"grpc-message"]
    (echo,) = client.handlers
    assert isinstance(echo, Echo)
    assert echo.was_told == ["unreadable"]


async def test_a_path_that_nobody_has_is_unimplemented() -> None:
    client = Client(Echo)
    stream = client.begin("/w%ä")
    client.exchange()
    heard = client.heard[stream]
    assert heard.trailers[b"grpc-status"] == b"%d" % Status.UNIMPLEMENTED
    assert b"/w%25" in heard.trailers[b"grpc-message"]


async def test_a_handler_that_fails_ends_its_call_only(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Echo):
        def message(self, data: bytes) -> None:
            if data == b"bad":
                raise RuntimeError("no idea")
            super().message(data)

    client = Client(Fails)
    bad, good = client.begin(), client.begin()
    client.say(bad, framed(b"bad"))
    client.say(good, framed(b"good"))
    client.exchange()
    assert client.heard[bad].trailers[b"grpc-status"] == b"%d" % Status.INTERNAL
    assert client.heard[good].messages() == [b"good"]
    assert "no idea" in caplog.text


async def test_an_end_in_the_same_read_but_a_frame_of_its_own() -> None:
    """h2 knows of the end before the handler gets the message that it answers with the last one."""

    class Once(Echo):
        def message(self, data: bytes) -> None:
            self.call.send(data)
            self.call.finish()

    client = Client(Once)
    stream = client.begin()
    client.h2.send_data(stream, framed(b"a"))
    client.end(stream)
    client.exchange()
    heard = client.heard[stream]
    assert (heard.messages(), heard.ended) == ([b"a"], True)
    assert (client.server.calls, client.calls_over) == ({}, 1)


async def test_what_is_no_grpc_and_a_reset_in_one_read() -> None:
    """It takes no other call with it."""
    client = Client(Echo)
    stream = client.begin()
    client.exchange()
    gone = client.h2.get_next_available_stream_id()
    client.h2.send_headers(
        gone, [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "epp")]
    )
    client.h2.reset_stream(gone, ErrorCodes.CANCEL)
    client.say(stream, framed(b"a"))
    client.exchange()
    assert client.heard[stream].messages() == [b"a"]
    assert not client.wire.closed


async def test_a_call_that_comes_too_late_and_its_reset_in_one_read() -> None:
    client = Client(Echo)
    stream = client.begin()
    client.exchange()
    client.server.drain()
    late = client.begin()
    client.h2.reset_stream(late, ErrorCodes.CANCEL)
    client.say(stream, framed(b"a"))
    data = client.h2.data_to_send()
    client.server.data_received(data)
    assert not client.wire.closed
    assert list(client.server.calls) == [stream]
    assert len(client.handlers) == 1


async def test_what_is_no_grpc_is_refused() -> None:
    client = Client(Echo)
    stream = client.h2.get_next_available_stream_id()
    client.heard[stream] = Heard()
    client.h2.send_headers(
        stream,
        [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "epp")],
        end_stream=True,
    )
    client.exchange()
    assert (client.heard[stream].status, client.heard[stream].ended) == (415, True)


@given(kind=st.integers(0, 11), flags=st.integers(0, 255), rest=st.binary(max_size=60))
async def test_no_frame_makes_the_server_fail(kind: int, flags: int, rest: bytes) -> None:
    client = Client(Echo)
    stream = client.begin()
    client.say(stream, framed(b"a"))
    client.exchange()
    head = len(rest).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    client.server.data_received(head + rest)
    await turn()
    (echo,) = client.handlers
    assert isinstance(echo, Echo)
    assert client.left == ([client.server] if client.wire.closed else [])
    assert not client.wire.closed or client.server.calls == {}
    assert echo.was_told in ([], ["half-closed"], ["broken"], ["unreadable"])


async def test_what_is_no_http2_closes_the_connection() -> None:
    client = Client(Echo)
    server = Connection(
        lambda call, path: None,
        LIMIT,
        opened=lambda _: None,
        call_over=int,
        closed=client.left.append,
    )
    wire = Wire(server)
    server.connection_made(wire)  # type: ignore[arg-type]
    server.data_received(b"GET / HTTP/1.1\r\nHost: epp\r\n\r\n")
    assert wire.closed
    await turn()
    assert client.left == [server]


async def test_calls_go_on_after_a_clients_goaway() -> None:
    client = Client(Echo)
    stream = client.begin()
    client.say(stream, framed(b"a"))
    client.exchange()
    client.server.data_received(GoAwayFrame(0).serialize())
    client.say(stream, framed(b"b"))
    client.end(stream)
    client.exchange()
    assert client.heard[stream].messages() == [b"a", b"b"]
    assert client.heard[stream].ended


async def test_calls_share_the_window_of_a_connection() -> None:
    """However much one has to say, the others have their turn."""
    client = Client(Echo, window=1_000_000, reads=False)
    streams = [client.begin() for _ in range(3)]
    for stream in streams:
        client.say(stream, framed(bytes(200_000)))
    client.exchange()
    heard = [client.heard[stream] for stream in streams]
    while not all(each.body for each in heard):
        assert sum(len(each.body) for each in heard) < 400_000
        client.h2.increment_flow_control_window(20_000)
        client.exchange()
    assert list(client.server.blocked) == streams
    while client.server.blocked:
        client.h2.increment_flow_control_window(50_000)
        client.exchange()
    assert [each.messages() for each in heard] == [[bytes(200_000)]] * 3


async def test_many_open_calls() -> None:
    client = Client(Echo)
    client.h2.remote_settings.update({SettingCodes.MAX_CONCURRENT_STREAMS: 10_000})
    streams = [client.begin() for _ in range(1_500)]
    for stream in streams:
        client.say(stream, framed(b"a"))
    client.exchange()
    assert len(client.server.calls) == 1_500
    for stream in streams:
        client.end(stream)
    client.exchange()
    assert client.server.calls == {}
    assert all(client.heard[stream].ended for stream in streams)
    client.begin()
    client.exchange()
    assert len(client.server.h2.streams) < 1_600  # h2 forgets those that ended


async def test_draining_lets_calls_end_and_takes_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client(Echo)
    stream = client.begin()
    client.say(stream, framed(b"a"))
    client.exchange()
    client.server.drain()
    late = client.begin()  # it had not heard yet
    client.say(stream, framed(b"b"))
    client.end(stream)
    outgoing = client.h2.data_to_send()
    client.server.data_received(outgoing)
    # h2 takes a connection for closed after GOAWAY, so the frames are looked at as they are.
    answer = bytes(client.wire.written)
    assert answer[3] == 0x07  # GOAWAY
    assert answer[9:17] == stream.to_bytes(4, "big") + bytes(4)
    assert framed(b"b") in answer
    assert bytes((0, 0, 4, 3, 0)) + late.to_bytes(4, "big") in answer  # RST_STREAM
    assert client.server.calls == {}
    assert not caplog.records


async def test_stopping_waits_for_calls_and_ends_what_lasts(own_address: str) -> None:
    class Lasting(Echo):
        lasting = True

    made: list[Echo] = []

    def accept(call: Call, path: str) -> Handler:
        made.append(Lasting(call) if path == "/lasting" else Echo(call))
        return made[-1]

    server = Server(accept, message_limit=LIMIT)
    port = await server.start(f"{own_address}:0")
    reader, writer = await asyncio.open_connection(own_address, port)
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    for path in ("/lasting", "/echo"):
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, headers(path))
        client.send_data(stream, framed(path.encode()))
    writer.write(client.data_to_send())
    while len(made) < 2:
        await reader.read(100)
    stopping = asyncio.create_task(server.stop(30))
    await turn()
    assert not stopping.done()
    client.end_stream(stream)
    writer.write(client.data_to_send())
    await stopping
    assert await reader.read() != b""
    assert reader.at_eof()
    assert [echo.call.finished for echo in made] == [True, True]
    writer.close()


def test_the_same_over_uvloop(own_address: str) -> None:
    """Its transports are not asyncio's."""
    uvloop.run(test_stopping_waits_for_calls_and_ends_what_lasts(own_address))


async def test_a_handshake_that_fails_leaves_nothing(own_address: str) -> None:
    server = Server(lambda call, path: None, message_limit=LIMIT)
    port = await server.start(f"{own_address}:0", server_context(Tls(), now()))
    reader, writer = await asyncio.open_connection(own_address, port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    await reader.read()
    writer.close()
    await writer.wait_closed()
    assert server._connections == set()
    await server.stop(0)


async def test_a_handshake_that_ends_after_the_server_did(own_address: str) -> None:
    server = Server(lambda call, path: None, message_limit=LIMIT)
    port = await server.start(f"{own_address}:0", server_context(Tls(), now()))
    reader, writer = await asyncio.open_connection(own_address, port)
    await server.stop(0)
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError):
        await writer.start_tls(trusting)
        await reader.read()
    assert reader.at_eof() or reader.exception() is not None
    writer.close()
    await server.stop(0)
    assert server._connections == set()


async def test_stopping_cuts_a_client_that_does_not_read(own_address: str) -> None:
    told: asyncio.Queue[str] = asyncio.Queue()

    class Talks(Echo):
        def message(self, data: bytes) -> None:
            for _ in range(1_000):
                self.call.send(bytes(60_000))
            told.put_nowait("talks")

        def broken(self) -> None:
            told.put_nowait("broken")

    server = Server(lambda call, path: Talks(call), message_limit=LIMIT)
    port = await server.start(f"{own_address}:0")
    _, writer = await asyncio.open_connection(own_address, port, limit=1)
    client = H2Connection()
    client.initiate_connection()
    client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
    client.increment_flow_control_window(2**30)
    client.send_headers(1, headers("/talk"))
    client.send_data(1, framed(b"a"))
    writer.write(client.data_to_send())
    assert await told.get() == "talks"
    await server.stop(0)
    assert told.get_nowait() == "broken"
    assert server._connections == set()
    writer.transport.abort()


@pytest.mark.parametrize(
    "test",
    [
        test_a_handshake_that_fails_leaves_nothing,
        test_a_handshake_that_ends_after_the_server_did,
        test_stopping_cuts_a_client_that_does_not_read,
    ],
)
def test_ends_over_uvloop(test: Callable[[str], Awaitable[None]], own_address: str) -> None:
    async def main() -> None:
        await test(own_address)

    uvloop.run(main())


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
