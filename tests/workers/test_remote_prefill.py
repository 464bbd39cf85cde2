"""The middleware of prefill and decode workers: two hops, and nobody else's transfers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from dynamo_runtime.prefill_grant import BadSecret, Grant, read_secret
from dynamo_workers.engine_side import FOLDER, PREFILL_MIDDLEWARE
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(FOLDER))  # as the launcher puts it on the engine's path
import dynamo_engine_prefill as prefill

SECRET = b"0123456789abcdef"
NOW = 1_700_000_000
PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_block_ids": [[1, 2]],
    "remote_host": "127.0.0.1",
    "remote_port": 5700,
}
BODY = {"model": "m", "messages": [{"role": "user", "content": "né"}], "stream": True}
HOP1 = {
    "model": "m",
    "messages": BODY["messages"],
    "stream": False,
    "max_tokens": 1,
    "kv_transfer_params": prefill.ASK_PREFILL,
}


def test_the_flag_given_to_engines_names_the_class() -> None:
    module, _, name = PREFILL_MIDDLEWARE.rpartition(".")
    assert getattr(sys.modules[module], name) is prefill.RemotePrefill


# --- the grant


def grant(*addresses: str, enforce: bool = False, expires: int = NOW + 60) -> Grant:
    cached = tuple(range(0, 16 * len(addresses), 16))
    return Grant(addresses, "b-1", expires, enforce, 32, cached)


def headers(
    given: Grant, *, secret: bytes = SECRET, booking: str = "b-1;tokens=100;cached=100"
) -> dict[bytes, bytes]:
    pairs = [*given.headers(secret), ("x-dynamo-booking", booking)]
    return {name.encode(): value.encode() for name, value in pairs}


@pytest.mark.parametrize("booking", ["b-1;tokens=100;cached=3", "b-1.prefill;tokens=100"])
def test_both_ends_understand_each_other(booking: str) -> None:
    signed = headers(grant("10.0.0.1:8000", "[::1]:8000", enforce=True), booking=booking)
    assert prefill.read_grant(signed, SECRET, NOW) == (
        ("10.0.0.1:8000", "[::1]:8000"), "b-1", 100, True, 32, (0, 16)
    )  # fmt: skip


def test_no_grant_is_none() -> None:
    assert prefill.read_grant({b"x-dynamo-booking": b"b-1"}, SECRET, NOW) is None


@given(st.data())
def test_a_changed_grant_is_not_valid(data: st.DataObject) -> None:
    signed = headers(grant("10.0.0.1:8000", "10.0.0.2:8000"))
    name = data.draw(st.sampled_from([prefill.PREFILLERS_HEADER, prefill.GRANT_HEADER]))
    value = bytearray(signed[name])
    at = data.draw(st.integers(0, len(value) - 1))
    value[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(prefill.InvalidGrant):
        prefill.read_grant({**signed, name: bytes(value)}, SECRET, NOW)


@pytest.mark.parametrize(
    ("signed", "secret", "now", "why"),
    [
        (headers(grant("a:1")), b"another-secret-00", NOW, "signature is wrong"),
        (headers(grant("a:1"), booking="b-2"), SECRET, NOW, "signature is wrong"),
        (headers(grant("a:1")), SECRET, NOW + 61, "expired 1 s ago"),
        (headers(grant("a:1")), b"", NOW, "has no secret"),
        ({prefill.PREFILLERS_HEADER: b"a:1"}, SECRET, NOW, "signature is wrong"),
        ({prefill.GRANT_HEADER: b"enforce=1"}, SECRET, NOW, "signature is wrong"),
    ],
)
def test_what_else_is_not_valid(
    signed: dict[bytes, bytes], secret: bytes, now: float, why: str
) -> None:
    with pytest.raises(prefill.InvalidGrant, match=why):
        prefill.read_grant(signed, secret, now)


def test_the_secret_comes_from_the_environment_or_a_file(tmp_path: Any) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef\n")
    for env in (
        {"DYN_PD_SECRET": " 0123456789abcdef"},
        {"DYN_PD_SECRET_FILE": str(tmp_path / "secret")},
    ):
        assert read_secret(env) == prefill.read_secret(env) == SECRET
    assert (read_secret({}), prefill.read_secret({})) == (None, b"")
    with pytest.raises(BadSecret, match="DYN_PD_SECRET: 5 bytes are too short") as caught:
        read_secret({"DYN_PD_SECRET": "quiet"})
    assert "quiet" not in str(caught.value)
    with pytest.raises(BadSecret, match="DYN_PD_SECRET_FILE=/nowhere: No such file"):
        read_secret({"DYN_PD_SECRET_FILE": "/nowhere"})


# --- the two hops


Answer = Callable[[], Awaitable[web.StreamResponse]]


@dataclass
class Prefiller:
    """A prefill worker that answers as it is told, and remembers what it was asked."""

    address: str = ""
    asked: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    answer: Answer | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # a client left

    async def handle(self, request: web.Request) -> web.StreamResponse:
        sent = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append((sent, await request.json()))
        try:
            if self.answer is not None:
                return await self.answer()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        return web.json_response({"choices": [], "kv_transfer_params": PARAMS})


def status(number: int, body: Any = None) -> Answer:
    async def answer() -> web.StreamResponse:
        return web.json_response(body or {"error": number}, status=number)

    return answer


@pytest.fixture
async def prefillers() -> AsyncIterator[list[Prefiller]]:
    async with contextlib.AsyncExitStack() as stack:
        started = []
        for _ in range(2):
            one = Prefiller()
            app = web.Application()
            app.router.add_post("/{path:.*}", one.handle)
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            one.address = f"127.0.0.1:{runner.addresses[0][1]}"
            started.append(one)
        yield started


@dataclass
class Flight:
    """What the middleware around it is told."""

    told: list[tuple[Any, ...]] = field(default_factory=list)

    def prefilled(self, outcome: str, failed: Sequence[str]) -> None:
        self.told.append((outcome, *failed))

    def computes(self, cached: int) -> None:
        self.told.append(("computes", cached))


@dataclass
class Worker:
    """The middleware around an engine that remembers the bodies it got."""

    middleware: Any
    bodies: list[Any]

    async def post(
        self,
        body: Any,
        given: dict[bytes, bytes] | None = None,
        *,
        path: str = "/v1/chat/completions",
        left: asyncio.Event | None = None,
        flight: Flight | None = None,
    ) -> tuple[int, bytes]:
        """Status (0: no answer) and body; ``left`` is when the client leaves."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        half = len(raw) // 2
        messages = [
            {"type": "http.request", "body": raw[:half], "more_body": True},
            {"type": "http.request", "body": raw[half:], "more_body": False},
        ]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await (left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [
                (b"content-length", b"%d" % len(raw)),
                (b"x-request-id", b"r-1"),
                (b"cookie", b"secret"),
                *(given or {}).items(),
            ],
            prefill.FLIGHT: flight,
        }
        await self.middleware(scope, receive, send)
        if not sent:
            return 0, b""
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


Make = Callable[..., Worker]


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    made: list[Worker] = []

    def make(role: str, **options: Any) -> Worker:
        bodies: list[Any] = []

        async def engine(scope: Any, receive: Any, send: Any) -> None:
            raw = (await receive())["body"]
            assert dict(scope["headers"])[b"content-length"] == b"%d" % len(raw)
            bodies.append(json.loads(raw))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"answer"})

        monkeypatch.setenv("DYN_COMPONENT_TYPE", role)
        monkeypatch.setenv("DYN_PD_SECRET", SECRET.decode())
        made.append(Worker(prefill.RemotePrefill(engine, wall=lambda: NOW, **options), bodies))
        return made[-1]

    yield make
    for one in made:
        await one.middleware.close()


async def test_hop_1_computes_the_prompt_and_hop_2_answers(
    worker: Make, prefillers: list[Prefiller]
) -> None:
    decode, flight = worker("decode"), Flight()
    body = {
        **BODY,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 50,
        "min_tokens": 5,
        "kv_transfer_params": {"do_remote_prefill": True},
        "vllm_xargs": {"kv_transfer_params": {}, "mine": 1},
    }
    signed = headers(grant(prefillers[0].address, prefillers[1].address))
    assert await decode.post(body, signed, flight=flight) == (200, b"answer")
    [(sent, hop1)] = prefillers[0].asked
    assert hop1 == {**HOP1, "max_completion_tokens": 1, "vllm_xargs": {"mine": 1}}
    assert sent["x-dynamo-booking"] == "b-1.prefill;tokens=100;cached=0"
    assert sent["x-request-id"] == "r-1"
    assert "cookie" not in sent
    assert decode.bodies == [
        {**body, "vllm_xargs": {"mine": 1}, "kv_transfer_params": PARAMS},
    ]
    assert flight.told == [("remote",)]
    assert prefillers[1].asked == []


INCOMPLETE = {"kv_transfer_params": {**PARAMS, "remote_block_ids": None}}


@pytest.mark.parametrize(
    "answer", [status(500), status(404), status(200, {"choices": []}), status(200, INCOMPLETE)]
)
async def test_another_prefill_worker_is_tried_first(
    worker: Make, prefillers: list[Prefiller], answer: Answer
) -> None:
    decode, flight = worker("decode"), Flight()
    prefillers[0].answer = answer
    signed = headers(grant(prefillers[0].address, "127.0.0.1:1", prefillers[1].address))
    assert await decode.post(BODY, signed, flight=flight) == (200, b"answer")
    assert decode.bodies == [{**BODY, "kv_transfer_params": PARAMS}]
    assert prefillers[1].asked[0][0]["x-dynamo-booking"] == "b-1.prefill;tokens=100;cached=32"
    assert flight.told == [("remote", prefillers[0].address, "127.0.0.1:1")]


@pytest.mark.parametrize("enforce", [False, True])
async def test_without_any_the_grant_decides(
    worker: Make, prefillers: list[Prefiller], enforce: bool
) -> None:
    decode, flight = worker("decode"), Flight()
    prefillers[0].answer = status(503)
    asked = (prefillers[0].address, "127.0.0.1:1")
    signed = headers(grant(*asked, enforce=enforce))
    answered, body = await decode.post(BODY, signed, flight=flight)
    if enforce:
        assert answered == 503
        assert json.loads(body)["error"]["code"] == "no_prefill_worker_available"
        assert (decode.bodies, flight.told) == ([], [("refused", *asked)])
    else:
        assert (answered, decode.bodies) == (200, [BODY])
        assert flight.told == [("local", *asked), ("computes", 32)]


async def test_a_wrong_request_is_nobodys_failure(
    worker: Make, prefillers: list[Prefiller]
) -> None:
    decode, flight = worker("decode"), Flight()
    prefillers[0].answer = status(400, {"error": {"message": "too long"}})
    signed = headers(grant(prefillers[0].address, prefillers[1].address))
    answered, body = await decode.post(BODY, signed, flight=flight)
    assert (answered, json.loads(body)) == (400, {"error": {"message": "too long"}})
    assert (decode.bodies, prefillers[1].asked) == ([], [])
    assert flight.told == [("rejected",)]


async def test_parameters_are_not_used_when_their_lease_may_be_over(
    worker: Make, prefillers: list[Prefiller]
) -> None:
    times = iter([0.0, prefill.LEASE_S / 2 + 0.1])
    decode, flight = worker("decode", clock=lambda: next(times)), Flight()
    assert (await decode.post(BODY, headers(grant(prefillers[0].address)), flight=flight))[0] == 200
    assert decode.bodies == [BODY]
    assert flight.told == [("local",), ("computes", 32)]


async def test_a_client_that_leaves_ends_the_prefill(
    worker: Make, prefillers: list[Prefiller]
) -> None:
    decode, left = worker("decode"), asyncio.Event()

    async def never() -> web.StreamResponse:
        left.set()
        await asyncio.Event().wait()
        raise AssertionError

    prefillers[0].answer = never
    signed = headers(grant(prefillers[0].address))
    assert await decode.post(BODY, signed, left=left) == (0, b"")
    await asyncio.wait_for(prefillers[0].gone.wait(), 5)
    assert decode.bodies == []


@pytest.mark.parametrize(("enforce", "answered"), [(False, 200), (True, 503)])
async def test_a_grant_that_is_not_valid_is_not_followed(
    worker: Make, prefillers: list[Prefiller], enforce: bool, answered: int
) -> None:
    decode, flight = worker("decode"), Flight()
    forged = headers(grant(prefillers[0].address, enforce=enforce), secret=b"another-secret-00")
    body = {**BODY, "kv_transfer_params": PARAMS}
    assert (await decode.post(body, forged, flight=flight))[0] == answered
    assert prefillers[0].asked == []
    if enforce:
        assert (decode.bodies, flight.told) == ([], [("refused",)])
    else:
        assert decode.bodies == [BODY]
        assert flight.told == [("invalid-grant",), ("computes", 0)]


ESCAPED = b'{"model": "m", "kv_transfer\\u005fparams": {"do_remote_prefill": true}}'


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("body", "left"),
    [
        ({"model": "m", "kv_transfer_params": PARAMS}, {"model": "m"}),
        ({"vllm_xargs": {"kv_transfer_params": PARAMS, "a": 1}}, {"vllm_xargs": {"a": 1}}),
        ({"model": "m", "kv_transfer_params": prefill.ASK_PREFILL}, {"model": "m"}),
        (ESCAPED, {"model": "m"}),
        (json.dumps({"model": "m", "kv_transfer_params": 1}).encode("utf-16"), {"model": "m"}),
        (b'{"a": NaN, "b": "\\ud800", "ec_transfer_params": 1}', None),
    ],
)
async def test_nobody_else_makes_a_transfer(
    worker: Make, role: str, path: str, body: Any, left: Any
) -> None:
    engine = worker(role)
    assert (await engine.post(body, path=path))[0] == 200
    if left is None:
        assert engine.bodies[0].keys() == {"a", "b"}
    else:
        assert engine.bodies == [left]


async def test_a_prefill_worker_lets_hop_1_through_with_a_grant(worker: Make) -> None:
    engine = worker("prefill")
    signed = headers(grant("127.0.0.1:1"), booking="b-1.prefill;tokens=100;cached=0")
    assert (await engine.post(HOP1, signed))[0] == 200
    assert engine.bodies == [HOP1]
    foreign = {**HOP1, "kv_transfer_params": PARAMS}
    assert (await engine.post(foreign, signed))[0] == 200
    assert "kv_transfer_params" not in engine.bodies[1]


async def test_a_body_that_is_no_object_is_the_engines_to_refuse(worker: Make) -> None:
    decode = worker("decode")
    assert (await decode.post(b"[1]", headers(grant("127.0.0.1:1"))))[0] == 200
    assert decode.bodies == [[1]]
