"""The middleware in the engine: what it reports, and that it changes no byte."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from dynamo_kv_router.stream.format import Finished
from dynamo_workers.engine_side import FOLDER, MIDDLEWARE
from dynamo_workers.in_flight import Flights
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(FOLDER))  # as the launcher puts it on the engine's path
import dynamo_engine_middleware as middleware

Send = Callable[[dict[str, Any]], Awaitable[None]]
Report = list[Any]


def test_the_flag_given_to_engines_names_the_class() -> None:
    module, _, name = MIDDLEWARE.rpartition(".")
    assert getattr(sys.modules[module], name) is middleware.EngineLoad


class Launcher:
    """The other end of the report socket."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/reports"
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.PULL)
        self.socket.bind(self.address)

    async def next(self, *kinds: str) -> Report:
        """The next report of one of ``kinds``; others are skipped."""
        while True:
            payload = await asyncio.wait_for(self.socket.recv(), 5)
            assert isinstance(payload, bytes)
            report: Report = msgspec.msgpack.decode(payload)
            if not kinds or report[0] in kinds:
                return report

    def close(self) -> None:
        self.socket.close(linger=0)
        self._context.term()


@pytest.fixture
async def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Launcher]:
    launcher = Launcher(tmp_path)
    monkeypatch.setenv("DYN_ENGINE_REPORT_SOCKET", launcher.address)
    yield launcher
    launcher.close()


Load = Callable[[Any], Any]


@pytest.fixture
def load() -> Iterator[Load]:
    """Makes the middleware around an application, as an engine's server would."""
    made: list[middleware.EngineLoad] = []

    def make(app: Any) -> middleware.EngineLoad:
        made.append(middleware.EngineLoad(app))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Call:
    """One request through the middleware into an application written as a coroutine."""

    def __init__(self, app: Any, path: str, booking: str | None, method: str = "POST") -> None:
        headers = [(b"content-type", b"application/json")]
        if booking is not None:
            headers.append((b"x-dynamo-booking", booking.encode()))
        self.scope = {"type": "http", "method": method, "path": path, "headers": headers}
        self.sent: list[dict[str, Any]] = []
        self._app = app

    async def run(self) -> list[dict[str, Any]]:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(dict(message))

        await self._app(self.scope, receive, send)
        return self.sent


def start(content_type: str, status: int = 200) -> dict[str, Any]:
    headers = [(b"content-type", content_type.encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def answer(messages: list[dict[str, Any]]) -> Any:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


USAGE = {
    "prompt_tokens": 70,
    "completion_tokens": 5,
    "total_tokens": 75,
    "prompt_tokens_details": {"cached_tokens": 64},
}


async def test_an_unstreamed_answer_reports_arrival_and_usage(
    load: Load, launcher: Launcher
) -> None:
    text = json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": USAGE}).encode()
    messages = [start("application/json"), body(text)]
    app = load(answer(messages))

    sent = await Call(app, "/v1/chat/completions", "r1-7;tokens=70;cached=64").run()

    assert sent == messages
    accepted = await launcher.next()
    assert accepted[0] == "a"
    assert accepted[2:] == ["r1-7", 70, 64]
    done = await launcher.next()
    assert done[0] == "d"
    assert done[2:] == ["r1-7", 70, 64, 5, 200]


async def test_a_stream_reports_its_first_token_and_the_usage_of_its_last_chunk(
    load: Load, launcher: Launcher
) -> None:
    chunk = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    messages = [
        start("text/event-stream; charset=utf-8"),
        body(b": keep-alive\n\n", more=True),
        *(body(chunk, more=True) for _ in range(3)),
        body(b'data: {"choices":[],"usage":' + json.dumps(USAGE).encode() + b"}\n\n", more=True),
        body(b"data: [DONE]\n\n", more=True),
        body(b""),
    ]
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Send) -> None:
        await send(messages[0])
        await send(messages[1])
        await gate.wait()
        for message in messages[2:]:
            await send(message)

    call = Call(load(app), "/v1/chat/completions", "r1-8;tokens=70;cached=0")
    running = asyncio.create_task(call.run())
    assert (await launcher.next())[2] == "r1-8"
    # A keep-alive is no token: progress says so for as long as nothing else was sent.
    assert (await launcher.next())[3] == {"r1-8": 0}
    gate.set()
    assert (await launcher.next("f"))[2:] == ["r1-8"]
    assert (await launcher.next("d"))[2:] == ["r1-8", 70, 64, 5, 200]
    assert await running == messages
    assert (await launcher.next("t"))[2:] == [0, {}]


async def test_the_responses_api_announces_itself_before_its_first_token(
    load: Load, launcher: Launcher
) -> None:
    created = b'event: response.created\ndata: {"type":"response.created"}\n\n'
    delta = b'event: response.output_text.delta\ndata: {"delta":"x"}\n\n'
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Send) -> None:
        await send(start("text/event-stream"))
        await send(body(created, more=True))
        await gate.wait()
        await send(body(delta))

    running = asyncio.create_task(Call(load(app), "/v1/responses", "r1-9").run())
    assert (await launcher.next())[2:] == ["r1-9", -1, -1]
    assert (await launcher.next())[0] == "t"
    gate.set()
    assert (await launcher.next("f", "d"))[0] == "f"
    await running


@pytest.mark.parametrize("end", ["cancelled", "returned", "raised"])
async def test_a_stream_that_is_cut_is_finished_all_the_same(
    load: Load, launcher: Launcher, end: str
) -> None:
    forever = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Send) -> None:
        await send(start("text/event-stream"))
        await send(body(b"data: {}\n\n", more=True))
        if end == "raised":
            raise RuntimeError("engine gone")
        if end == "cancelled":
            await forever.wait()

    running = asyncio.create_task(
        Call(load(app), "/v1/completions", "r2-1;tokens=3;cached=0").run()
    )
    await launcher.next("f")
    running.cancel()
    outcome = (await asyncio.gather(running, return_exceptions=True))[0]
    if end == "raised":
        assert isinstance(outcome, RuntimeError)
    assert (await launcher.next("d"))[2:] == ["r2-1", -1, -1, -1, middleware.LEFT_EARLY]


@pytest.mark.usefixtures("launcher")
async def test_the_head_of_a_stream_waits_for_its_first_event(load: Load) -> None:
    """As long as nothing was sent, a proxy may ask another engine."""
    sent, computed = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Send) -> None:
        await send(start("text/event-stream; charset=utf-8"))
        await send(body(b"", more=True))
        sent.set()
        await computed.wait()
        await send(body(b"data: {}\n\n", more=True))
        await send(body(b"data: [DONE]\n\n"))

    call = Call(load(app), "/v1/chat/completions", "p-1")
    running = asyncio.create_task(call.run())
    await sent.wait()
    assert call.sent == []
    computed.set()
    assert [m.get("status") or m["body"] for m in await running] == [
        200,
        b"data: {}\n\n",
        b"data: [DONE]\n\n",
    ]


@pytest.mark.usefixtures("launcher")
async def test_a_stream_without_events_has_a_head_all_the_same(load: Load) -> None:
    call = Call(load(answer([start("text/event-stream"), body(b"")])), "/v1/completions", None)
    assert await call.run() == [start("text/event-stream"), body(b"")]


async def test_a_client_that_leaves_before_the_answer_is_a_499(
    load: Load, launcher: Launcher
) -> None:
    """vLLM answers such a request all the same, into the void."""

    async def app(scope: Any, receive: Any, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        await send(start("application/json"))
        await send(body(b"null"))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    scope = Call(app, "/v1/completions", "r2-3").scope
    await load(app)(scope, receive, send)
    assert (await launcher.next("d"))[2:] == ["r2-3", -1, -1, -1, middleware.LEFT_EARLY]


async def test_a_failure_before_any_answer_is_a_500(load: Load, launcher: Launcher) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        await Call(load(app), "/v1/completions", "r2-2").run()
    assert (await launcher.next("d"))[2:] == ["r2-2", -1, -1, -1, middleware.FAILED]


async def test_requests_without_a_usable_booking_get_distinct_names(
    load: Load, launcher: Launcher
) -> None:
    app = load(answer([start("application/json"), body(b"{}")]))
    for booking in (None, "", "r1-1;tokens=many", "x" * 300):
        await Call(app, "/v1/embeddings", booking).run()
    names = {(await launcher.next("a"))[2] for _ in range(4)}
    assert len(names) == 4
    assert all(name.startswith("direct-") for name in names)


async def test_two_requests_under_one_booking_are_two_requests(
    load: Load, launcher: Launcher
) -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    waiting = iter(gates)

    async def app(scope: Any, receive: Any, send: Send) -> None:
        await next(waiting).wait()
        await send(start("application/json"))
        await send(body(b"{}"))

    engine = load(app)
    calls = [asyncio.create_task(Call(engine, "/v1/completions", "r1-1").run()) for _ in range(2)]
    names = [(await launcher.next("a"))[2] for _ in range(2)]
    assert names[0] == "r1-1"
    assert names[1].startswith("direct-")
    for gate, name in zip(gates, names, strict=True):
        gate.set()
        assert (await launcher.next("d"))[2] == name
    await asyncio.gather(*calls)


@pytest.mark.parametrize(
    ("kind", "method", "path"),
    [
        ("websocket", "GET", "/v1/chat/completions"),
        ("lifespan", "", ""),
        ("http", "GET", "/v1/chat/completions"),
        ("http", "POST", "/tokenize"),
        ("http", "GET", "/health"),
    ],
)
async def test_what_is_no_inference_passes_untouched(
    load: Load, launcher: Launcher, kind: str, method: str, path: str
) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    scope = {"type": kind, "method": method, "path": path, "headers": []}
    receive, send = object(), object()
    engine = load(app)
    await engine(scope, receive, send)  # type: ignore[arg-type]
    assert seen == [(scope, receive, send)]
    # The next report is of the request after it.
    await Call(
        load(answer([start("application/json"), body(b"{}")])),
        "/v1/completions",
        "after",
    ).run()
    assert (await launcher.next())[2] == "after"


async def test_without_a_launcher_it_does_nothing(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DYN_ENGINE_REPORT_SOCKET", raising=False)
    messages = [start("application/json"), body(b"{}")]
    sent = await Call(load(answer(messages)), "/v1/completions", "r1-1").run()
    assert sent == messages


async def test_reports_lost_while_the_launcher_is_away_are_counted_and_healed(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_ENGINE_REPORT_SOCKET", f"ipc://{tmp_path}/reports")
    monkeypatch.setattr(middleware, "QUEUE_REPORTS", 1)
    app = load(answer([start("application/json"), body(b"{}")]))
    for number in range(20):
        await Call(app, "/v1/completions", f"r1-{number}").run()
    late = Launcher(tmp_path)
    try:
        told = await late.next("t")
        assert told[2] > 0
        assert told[3] == {}
    finally:
        late.close()


@given(
    usage=st.fixed_dictionaries(
        {},
        optional={
            "prompt_tokens": st.integers(0, 10**6),
            "completion_tokens": st.integers(0, 10**6) | st.none(),
            "prompt_tokens_details": st.none()
            | st.fixed_dictionaries({"cached_tokens": st.none() | st.integers(0, 10**6)}),
        },
    ),
    text=st.text(),
    after=st.text(max_size=200),
    spaced=st.booleans(),
)
def test_usage_is_found_whatever_the_generated_text_says(
    usage: dict[str, Any], text: str, after: str, spaced: bool
) -> None:
    misleading = text + '"usage":{"prompt_tokens":1}'
    page = {"choices": [misleading], "usage": usage, "kv_transfer_params": after, "metrics": None}
    raw = json.dumps(page, separators=None if spaced else (",", ":"), ensure_ascii=False).encode()
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    completion = usage.get("completion_tokens")
    assert middleware.read_usage(raw[-middleware.TAIL_BYTES :]) == (
        usage.get("prompt_tokens", -1),
        -1 if cached is None else cached,
        -1 if completion is None else completion,
    )


def test_usage_of_the_other_apis() -> None:
    responses = (
        b'{"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":4},"output_tokens":2}}'
    )
    assert middleware.read_usage(responses) == (9, 4, 2)
    # The Messages API leaves cached tokens out of input_tokens.
    messages = b'{"usage":{"input_tokens":5,"cache_read_input_tokens":4,"output_tokens":2}}'
    assert middleware.read_usage(messages) == (9, 4, 2)
    assert middleware.read_usage(b'{"usage":null}') == (-1, -1, -1)
    assert middleware.read_usage(b'{"usage":{"prompt_tok') == (-1, -1, -1)


@given(st.binary(max_size=300))
def test_no_booking_header_can_raise(value: bytes) -> None:
    read = middleware.read_booking(value)
    assert read is None or (read[0] and read[1] >= -1 and read[2] >= -1)


@given(st.binary(max_size=300))
def test_no_body_can_make_usage_raise(tail: bytes) -> None:
    middleware.read_usage(b'{"usage":' + tail)


async def test_how_asking_prefill_workers_went_is_reported_of_its_request(
    launcher: Launcher, load: Load
) -> None:
    async def app(scope: Any, receive: Any, send: Send) -> None:
        scope[middleware.FLIGHT].prefilled("local", ["10.0.0.1:8000"])
        await send(start("application/json"))
        await send(body(b"{}"))

    await Call(load(app), "/v1/completions", "p-1;tokens=70;cached=0").run()
    flights = Flights()
    flights.apply(await launcher.next("a"))
    report = await launcher.next("p")
    assert report[2:] == ["p-1", "local", ["10.0.0.1:8000"]]
    flights.apply(report)
    [finished] = [e for e in flights.apply(await launcher.next("d")) if isinstance(e, Finished)]
    assert finished.prefillers_failed == ("10.0.0.1:8000",)
