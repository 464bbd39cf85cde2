"""The gRPC shell with a real client: no gRPC error, one release for each route, health names."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from dynamo_epp.extproc import PickRequest, Refusal, Route
from dynamo_epp.server import AccessEntry, PickerServer
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from h2.connection import H2Connection
from h2.errors import ErrorCodes

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
LOGS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
HEALTH = "/grpc.health.v1.Health/"


class ScriptedPicker:
    """Does what the test says; remembers what was released."""

    def __init__(self) -> None:
        self.behaviour: Callable[[PickRequest], Awaitable[Route | Refusal]] = self.route
        self.picked: list[Route] = []
        self.freed: list[Route] = []
        self.release = asyncio.Event()

    async def route(self, _: PickRequest) -> Route:
        self.picked.append(Route(("127.0.0.1:1",)))
        return self.picked[-1]

    async def pick(self, request: PickRequest) -> Route | Refusal:
        return await self.behaviour(request)

    def answered(self, route: Route) -> None:
        pass

    def released(self, route: Route) -> None:
        self.freed.append(route)
        self.release.set()


def stubborn(
    picker: ScriptedPicker, begun: asyncio.Event
) -> Callable[[PickRequest], Awaitable[Route | Refusal]]:
    """Picks only when it is cancelled; ``begun`` tells when it waits."""

    async def pick(request: PickRequest) -> Route:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return await picker.route(request)
        raise AssertionError

    return pick


class Peer:
    """An ext_proc client, as Envoy is one."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = channel.stream_stream(PROCESS)()

    async def say(self, message: pb.ProcessingRequest) -> None:
        await self.call.write(message.SerializeToString())

    async def hear(self) -> pb.ProcessingResponse | None:
        data = await self.call.read()
        return None if data == grpc.aio.EOF else pb.ProcessingResponse.FromString(data)


@pytest.fixture
def picker() -> ScriptedPicker:
    return ScriptedPicker()


@pytest.fixture
def entries() -> list[AccessEntry]:
    return []


@pytest.fixture
async def server(
    picker: ScriptedPicker, entries: list[AccessEntry], tmp_path: Path
) -> AsyncIterator[PickerServer]:
    server = PickerServer(picker, ready=lambda: True, on_access=entries.append)
    await server.start(f"unix:{tmp_path}/epp.sock")
    yield server
    await server.stop(0)


@pytest.fixture
async def channel(server: PickerServer, tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/epp.sock") as channel:
        yield channel


def head(end: bool = True) -> pb.ProcessingRequest:
    message = pb.ProcessingRequest()
    message.request_headers.end_of_stream = end
    header = message.request_headers.headers.headers.add()
    header.key, header.raw_value = ":path", b"/v1/models"
    return message


async def test_a_held_stream_is_released_when_the_peer_ends_it(
    picker: ScriptedPicker, channel: grpc.aio.Channel
) -> None:
    peer = Peer(channel)
    await peer.say(head())
    answer = await peer.hear()
    assert answer is not None
    assert answer.request_headers.response.clear_route_cache
    assert picker.freed == []
    await peer.call.done_writing()
    assert await peer.hear() is None
    assert await peer.call.code() == grpc.StatusCode.OK
    assert picker.freed == picker.picked


async def test_a_held_stream_is_released_when_the_peer_cancels(
    picker: ScriptedPicker, channel: grpc.aio.Channel, server: PickerServer
) -> None:
    peer = Peer(channel)
    await peer.say(head())
    await peer.hear()
    peer.call.cancel()
    await picker.release.wait()
    assert picker.freed == picker.picked
    assert server.streams == 0


async def test_a_peer_that_leaves_during_the_pick_cancels_it(
    picker: ScriptedPicker, channel: grpc.aio.Channel
) -> None:
    begun, undone = asyncio.Event(), asyncio.Event()

    async def queue_for_ever(_: PickRequest) -> Route:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            undone.set()
        raise AssertionError

    picker.behaviour = queue_for_ever
    peer = Peer(channel)
    await peer.say(head())
    await begun.wait()
    peer.call.cancel()
    await undone.wait()
    assert picker.freed == []


async def test_a_peer_that_leaves_before_the_pick_began(
    picker: ScriptedPicker, server: PickerServer, tmp_path: Path
) -> None:
    """Its request and its reset come in one read."""
    reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/epp.sock")
    peer = H2Connection()
    peer.initiate_connection()
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": PROCESS,
        ":authority": "epp",
        "content-type": "application/grpc",
    }
    request = head().SerializeToString()
    peer.send_headers(1, [*headers.items()])
    peer.send_data(1, b"\0" + len(request).to_bytes(4, "big") + request)
    peer.reset_stream(1, ErrorCodes.CANCEL)
    peer.ping(b"all done")
    writer.write(peer.data_to_send())
    said = b""
    while b"all done" not in said:
        said += await reader.read(1000)
    assert server.streams == 0
    assert picker.freed == picker.picked
    writer.close()


async def test_a_picker_that_finishes_although_cancelled_is_released(
    picker: ScriptedPicker, channel: grpc.aio.Channel
) -> None:
    begun = asyncio.Event()

    picker.behaviour = stubborn(picker, begun)
    peer = Peer(channel)
    await peer.say(head())
    await begun.wait()
    peer.call.cancel()
    await picker.release.wait()
    assert picker.freed == picker.picked
    assert len(picker.freed) == 1


@pytest.mark.parametrize("error", [RuntimeError("no idea"), asyncio.CancelledError("no idea")])
async def test_a_failing_picker_is_an_error_body_not_a_grpc_error(
    picker: ScriptedPicker,
    channel: grpc.aio.Channel,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    async def fail(_: PickRequest) -> Route:
        raise error

    picker.behaviour = fail
    peer = Peer(channel)
    await peer.say(head())
    answer = await peer.hear()
    assert answer is not None
    assert answer.immediate_response.status.code == 500
    assert json.loads(answer.immediate_response.body)["error"]["type"] == "server_error"
    assert await peer.hear() is None
    assert await peer.call.code() == grpc.StatusCode.OK
    assert "no idea" in caplog.text


async def test_an_answer_that_can_not_be_written_is_an_error_too(
    picker: ScriptedPicker, channel: grpc.aio.Channel
) -> None:
    """A stream that merely ended would let the request go on without its body."""

    async def broken(_: PickRequest) -> Route:
        return Route((1,))  # type: ignore[arg-type]

    picker.behaviour = broken
    peer = Peer(channel)
    await peer.say(head())
    answer = await peer.hear()
    assert answer is not None
    assert answer.immediate_response.status.code == 500
    assert await peer.hear() is None
    assert await peer.call.code() == grpc.StatusCode.OK


async def test_garbage_is_no_grpc_error(channel: grpc.aio.Channel) -> None:
    peer = Peer(channel)
    await peer.call.write(b"\xff\xff\xff")
    answer = await peer.hear()
    assert answer is not None
    assert answer.immediate_response.status.code == 500
    assert await peer.call.code() == grpc.StatusCode.OK


@pytest.fixture
async def narrow(picker: ScriptedPicker, tmp_path: Path) -> AsyncIterator[PickerServer]:
    """A server that takes small bodies only, at ``narrow.sock``."""
    server = PickerServer(picker, ready=lambda: True, body_limit=1000)
    await server.start(f"unix:{tmp_path}/narrow.sock")
    yield server
    await server.stop(0)


@pytest.mark.parametrize(
    ("compression", "size", "code", "words"),
    [
        (grpc.Compression.Gzip, 10_000, 500, "the gateway sent a compressed message"),
        (grpc.Compression.NoCompression, 2_000_000, 413, "the gateway sent a message of 2000000"),
    ],
)
async def test_what_can_not_be_read_is_no_grpc_error(
    picker: ScriptedPicker,
    narrow: PickerServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    compression: grpc.Compression,
    size: int,
    code: int,
    words: str,
) -> None:
    """Nor is what was picked before kept for ever."""
    async with grpc.aio.insecure_channel(
        f"unix:{tmp_path}/narrow.sock", compression=compression
    ) as channel:
        peer = Peer(channel)
        await peer.say(head())
        await peer.hear()
        await peer.call.write(bytes(size))
        answer = await peer.hear()
        assert answer is not None
        assert answer.immediate_response.status.code == code
        assert words in json.loads(answer.immediate_response.body)["error"]["message"]
        assert await peer.call.code() == grpc.StatusCode.OK
    assert words.removeprefix("the gateway ") in caplog.text
    assert narrow.streams == 0
    assert len(picker.freed) == 1


async def test_what_can_not_be_read_ends_the_pick_too(
    picker: ScriptedPicker,
    narrow: PickerServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = asyncio.Event()

    picker.behaviour = stubborn(picker, begun)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/narrow.sock") as channel:
        peer = Peer(channel)
        await peer.say(head())
        await begun.wait()
        await peer.call.write(bytes(2_000_000))
        answer = await peer.hear()
        assert answer is not None
        assert answer.immediate_response.status.code == 413
        await picker.release.wait()
    assert narrow.streams == 0
    assert picker.freed == picker.picked
    assert "a message of 2000000 bytes" in caplog.text


async def test_a_burst_waits_its_turn(
    picker: ScriptedPicker, server: PickerServer, tmp_path: Path
) -> None:
    """However many requests come at once, all of them are answered."""
    with grpc.insecure_channel(f"unix:{tmp_path}/epp.sock") as channel:
        await asyncio.to_thread(grpc.channel_ready_future(channel).result, 10)
        calls = []

        def begin() -> None:
            process = channel.unary_stream(PROCESS)
            calls.extend(process(head().SerializeToString()) for _ in range(1500))

        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()  # the server's loop stands still meanwhile, so all of them pile up
        answers = await asyncio.to_thread(lambda: [list(call) for call in calls])
    assert {len(answer) for answer in answers} == {1}
    await picker.release.wait()
    assert len(picker.freed) == len(picker.picked) == 1500


async def test_draining_lets_a_held_stream_end(
    picker: ScriptedPicker, channel: grpc.aio.Channel, server: PickerServer
) -> None:
    peer = Peer(channel)
    await peer.say(head())
    await peer.hear()
    stopping = asyncio.create_task(server.stop(30))
    await asyncio.sleep(0)
    await peer.call.done_writing()
    assert await peer.call.code() == grpc.StatusCode.OK
    await stopping
    assert picker.freed == picker.picked


@pytest.mark.parametrize(
    ("service", "status"),
    [
        ("", 1),
        ("liveness", 1),
        ("readiness", 1),
        ("envoy.service.ext_proc.v3.ExternalProcessor", 1),
        ("inference-extension", 1),
    ],
)
async def test_health_names(channel: grpc.aio.Channel, service: str, status: int) -> None:
    request = b"\x0a" + bytes((len(service),)) + service.encode() if service else b""
    assert await channel.unary_unary(HEALTH + "Check")(request) == bytes((8, status))


async def test_health_of_an_unknown_name_is_not_found(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await channel.unary_unary(HEALTH + "Check")(b"\x0a\x04nope")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    assert "inference-extension" in str(error.value.details())


async def test_health_follows_readiness_on_its_own_port_too(
    picker: ScriptedPicker, tmp_path: Path
) -> None:
    ready = False
    server = PickerServer(picker, ready=lambda: ready)
    await server.start(f"unix:{tmp_path}/a.sock", health_address=f"unix:{tmp_path}/b.sock")
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/b.sock") as channel:
            check = channel.unary_unary(HEALTH + "Check")
            assert await check(b"\x0a\x09readiness") == b"\x08\x02"
            assert await check(b"\x0a\x08liveness") == b"\x08\x01"
            watch = channel.unary_stream(HEALTH + "Watch")(b"")
            assert await watch.read() == b"\x08\x02"
            ready = True
            assert await watch.read() == b"\x08\x01"
            watch.cancel()
            # Health is all that this port has.
            call = channel.stream_stream(PROCESS)()
            assert await call.code() == grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0)


async def test_a_taken_port_is_an_os_error(picker: ScriptedPicker) -> None:
    first, second = (PickerServer(picker, ready=lambda: True) for _ in range(2))
    port = await first.start("127.0.0.1:0")
    try:
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            await second.start(f"127.0.0.1:{port}")
    finally:
        await first.stop(0)


async def test_access_log_entries(
    channel: grpc.aio.Channel, entries: list[AccessEntry], caplog: pytest.LogCaptureFixture
) -> None:
    message = als_pb2.StreamAccessLogsMessage()
    entry = message.http_logs.log_entry.add()
    common = entry.common_properties
    common.upstream_remote_address.socket_address.address = "10.0.0.1"
    common.upstream_remote_address.socket_address.port_value = 8000
    common.upstream_request_attempt_count = 2
    common.response_flags.upstream_connection_failure = True
    common.time_to_first_upstream_rx_byte.nanos = 5_000_000
    common.metadata.filter_metadata["envoy.lb"].fields["x-dynamo-routing"].string_value = "exact"
    entry.request.request_id, entry.request.path = "abc", "/v1/completions"
    entry.request.request_method, entry.request.request_body_bytes = 3, 17  # POST
    entry.response.response_code.value, entry.response.response_body_bytes = 200, 99
    bare = als_pb2.StreamAccessLogsMessage()
    bare.http_logs.log_entry.add()

    call = channel.stream_unary(LOGS)()
    for data in (b"\xff\xff", message.SerializeToString(), bare.SerializeToString()):
        await call.write(data)
    await call.done_writing()
    await call
    assert entries[0] == AccessEntry(
        request_id="abc",
        method="POST",
        path="/v1/completions",
        status=200,
        flags=("upstream_connection_failure",),
        details="",
        upstream="10.0.0.1:8000",
        attempts=2,
        first_byte_s=0.005,
        last_byte_s=None,
        request_bytes=17,
        response_bytes=99,
        routing="exact",
    )
    assert (entries[1].upstream, entries[1].flags, entries[1].first_byte_s) == ("", (), None)
    assert not caplog.records
