"""What the engine's HTTP server knows about its own load, told to the launcher beside it.

An engine's metrics say how many requests run, seconds late and without names. A picker needs more:
that the request it sent has arrived (so that it can drop its own guess), that its prompt has been
computed, that it is over, and what the engine counted. Only the server's own process sees that
for every request, whoever sent it. This module is loaded there, as ASGI middleware:

    PYTHONPATH=<this folder> … --middleware dynamo_engine_middleware.EngineLoad

It is one file without imports from this project, because it runs in the engine's Python, which
has none of it; msgspec and pyzmq are there because vLLM itself needs them.

Reports leave through a ZeroMQ PUSH socket (address: ``DYN_ENGINE_REPORT_SOCKET``; unset: this
module does nothing). They are never waited for: a report that can't be queued is dropped and
counted, and a periodic progress report lists every request in flight, so that a lost report is
healed within a tick. Requests and responses pass through unchanged, but for one thing: the head of
a stream of events waits for the first of them. An engine sends it when the request arrives, and
from then on no proxy may give the request to another engine, though nothing is computed yet.

Reports are msgpack arrays, the first element names the kind, the second is this process's id:

    ["a", pid, booking, prompt_tokens, cached_tokens]              accepted
    ["f", pid, booking]                                            first token on its way
    ["d", pid, booking, prompt, cached, completion, status]        done (-1: not reported)
    ["t", pid, dropped_reports, {booking: chunks_sent}]            progress of all in flight
    ["p", pid, booking, outcome, [ip:port, …]]                     prefill workers were asked,
                                                                   those in vain

The last one is said by `dynamo_engine_prefill.py`, which finds a request's ``Flight`` in the ASGI
scope.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec
import zmq

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SOCKET_VARIABLE = "DYN_ENGINE_REPORT_SOCKET"
BOOKING_HEADER = b"x-dynamo-booking"
FLIGHT = "dynamo.flight"  # key in the ASGI scope
LONGEST_BOOKING = 200  # bytes; ours are about 40

# Routes that make the engine compute. Everything else (probes, metrics, tokenize) is not load.
INFERENCE_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v2/embed",
        "/v1/score",
        "/score",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/pooling",
        "/classify",
        "/inference/v1/generate",
        "/invocations",
    }
)

TICK_SECONDS = 0.25  # progress of decoding is told this often, in one message a process
TAIL_BYTES = 8192  # enough for what follows a usage object, and for the object itself
QUEUE_REPORTS = 10_000  # reports that wait while the launcher is away; more are dropped

LEFT_EARLY = 499  # status of a response whose client went before its end (nginx's number)
FAILED = 500  # status of a request that ended without any response

# The Responses API announces itself before the engine has computed anything. Everywhere else
# vLLM sends its first event with the engine's first output.
NOT_YET_A_TOKEN = (b"response.created", b"response.in_progress", b"response.queued")

_JSON = json.JSONDecoder()


def read_booking(value: bytes) -> tuple[str, int, int] | None:
    """``<id>;tokens=<isl>;cached=<overlap>`` → (id, tokens, cached); ``None`` if malformed.

    Missing numbers are -1 (unknown). Fields that aren't known are ignored.
    """
    if len(value) > LONGEST_BOOKING:
        return None
    name, *fields = value.decode("latin-1").split(";")
    name = name.strip()
    if not name:
        return None
    numbers = {"tokens": -1, "cached": -1}
    for field in fields:
        key, _, text = field.strip().partition("=")
        if key in numbers:
            if not text.isdecimal():
                return None
            numbers[key] = int(text)
    return name, numbers["tokens"], numbers["cached"]


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def read_usage(tail: bytes) -> tuple[int, int, int]:
    """The last ``usage`` object in ``tail`` → (prompt, cached, completion) tokens, -1 if unknown.

    Reads the shapes of the chat, completions and embeddings APIs (``prompt_tokens``,
    ``completion_tokens``, ``prompt_tokens_details.cached_tokens``), of the Responses API
    (``input_tokens``, ``output_tokens``, ``input_tokens_details``) and of the Messages API, whose
    ``input_tokens`` leave out what came from or went to the cache.

    The search for an unescaped ``"usage":`` can't be misled by generated text: inside a JSON
    string every quote is escaped.
    """
    at = len(tail)
    while (at := tail.rfind(b'"usage":', 0, at)) >= 0:
        text = tail[at + len(b'"usage":') :].decode("utf-8", "replace").lstrip()
        if text.startswith("{"):
            break
    else:
        return -1, -1, -1
    try:
        usage, _ = _JSON.raw_decode(text)
    except ValueError:
        return -1, -1, -1
    prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
    completion = _count(usage.get("completion_tokens", usage.get("output_tokens")))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = _count(details.get("cached_tokens"))
    if "cache_read_input_tokens" in usage:
        cached = _count(usage["cache_read_input_tokens"])
        prompt += max(cached, 0) + max(_count(usage.get("cache_creation_input_tokens")), 0)
    return prompt, cached, completion


class Reports:
    """The way out: one PUSH socket a process, made when the event loop runs."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._encode = msgspec.msgpack.Encoder().encode
        self._pid = os.getpid()
        self._in_flight: dict[str, Flight] = {}  # booking -> request, until it is done
        self._direct = itertools.count(1)
        self._dropped = 0
        self._ticking: asyncio.TimerHandle | None = None
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_REPORTS)
        self._socket.setsockopt(zmq.LINGER, 200)  # milliseconds; the last "done" gets out
        self._socket.connect(address)

    def _push(self, *report: object) -> bool:
        try:
            self._socket.send(self._encode(report), zmq.NOBLOCK)
        except zmq.ZMQError:
            self._dropped += 1
            return False
        return True

    def accepted(self, header: bytes | None) -> Flight:
        """Note a request that has arrived; ``header`` is its booking, if it has one."""
        booking = read_booking(header) if header is not None else None
        name, tokens, cached = booking or ("", -1, -1)
        if not name or name in self._in_flight:
            # A booking names one request. A second one under the same name must not end the first.
            name = f"direct-{self._pid}-{next(self._direct)}"
        flight = self._in_flight[name] = Flight(self, name, tokens)
        self.computes(flight, cached)
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
        return flight

    def computes(self, flight: Flight, cached: int) -> None:
        self._push("a", self._pid, flight.booking, flight.tokens, cached)

    def prefilled(self, flight: Flight, outcome: str, failed: Sequence[str]) -> None:
        self._push("p", self._pid, flight.booking, outcome, failed)

    def first_token(self, flight: Flight) -> None:
        self._push("f", self._pid, flight.booking)

    def done(self, flight: Flight, usage: tuple[int, int, int], status: int) -> None:
        del self._in_flight[flight.booking]
        self._push("d", self._pid, flight.booking, *usage, status)

    def _tick(self) -> None:
        progress = {name: flight.chunks for name, flight in self._in_flight.items()}
        told = self._push("t", self._pid, self._dropped, progress)
        # The last tick says that nothing is in flight; it is repeated until it gets through.
        self._ticking = None
        if progress or not told:
            self._ticking = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def close(self) -> None:
        """Stop reporting. What is queued still goes out."""
        if self._ticking is not None:
            self._ticking.cancel()
        self._socket.close()


class Flight:
    """One request in flight. Watches the response messages, which it passes on unchanged."""

    __slots__ = (
        "_first",
        "_reports",
        "_sse",
        "_tail",
        "booking",
        "chunks",
        "ended",
        "status",
        "tokens",
    )

    def __init__(self, reports: Reports, booking: str, tokens: int) -> None:
        self._reports = reports
        self.booking = booking
        self.tokens = tokens  # of the prompt, as the picker counted; -1: not known
        self.chunks = 0  # body messages of a stream: at least a token each
        self.status = 0  # 0 until the response starts
        self.ended = False
        self._sse = False
        self._first = False
        self._tail = b""  # last TAIL_BYTES of the body: usage stands there

    def computes(self, cached: int) -> None:
        """The engine has to compute all but ``cached`` tokens, unlike what the booking said."""
        self._reports.computes(self, cached)

    def prefilled(self, outcome: str, failed: Sequence[str]) -> None:
        """How asking prefill workers went, and which (``ip:port``) were asked in vain: see
        `dynamo_engine_prefill`."""
        self._reports.prefilled(self, outcome, failed)

    def watch(self, message: Message) -> None:
        if self.ended:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._sse = is_event_stream(message)
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body:
                self._saw(body)
            if not message.get("more_body", False):
                self.end(self.status)

    def _saw(self, body: bytes) -> None:
        if len(body) >= TAIL_BYTES:
            self._tail = bytes(body[-TAIL_BYTES:])
        else:
            self._tail = (self._tail + body)[-TAIL_BYTES:]
        # A line that starts with a colon is a comment: a keep-alive, no token.
        if not self._sse or body.startswith(b":"):
            return
        if not self._first:
            if any(mark in body[:512] for mark in NOT_YET_A_TOKEN):
                return
            self._first = True
            self._reports.first_token(self)
        self.chunks += 1

    def end(self, status: int) -> None:
        """Report the end, once."""
        if not self.ended:
            self.ended = True
            self._reports.done(self, read_usage(self._tail), status)


def is_event_stream(start: Message) -> bool:
    """Whether a response that starts so is a stream of server-sent events."""
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )


class EngineLoad:
    """Pure ASGI middleware. Refuses nothing and adds nothing; heads of streams wait for their
    first event."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._address = os.environ.get(SOCKET_VARIABLE, "")
        self._reports: Reports | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                self.close()
            return
        if (
            not self._address
            or scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["path"] not in INFERENCE_PATHS
        ):
            await self.app(scope, receive, send)
            return
        if self._reports is None:
            self._reports = Reports(self._address)
        header = next((value for name, value in scope["headers"] if name == BOOKING_HEADER), None)
        flight = self._reports.accepted(header)

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                flight.end(LEFT_EARLY)  # no effect where the response was complete
            return message

        head: Message | None = None

        async def watched_send(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start" and is_event_stream(message):
                head = message
                return
            if head is not None:
                if not message.get("body") and message.get("more_body", False):
                    return
                start, head = head, None
                await pass_on(start)
            await pass_on(message)

        async def pass_on(message: Message) -> None:
            await send(message)
            flight.watch(message)

        try:
            await self.app({**scope, FLIGHT: flight}, watched_receive, watched_send)
        except Exception:
            # Once a response has begun, the usual exception is the client's disconnect.
            flight.end(LEFT_EARLY if flight.status else FAILED)
            raise
        finally:
            flight.end(LEFT_EARLY)

    def close(self) -> None:
        """The server ends."""
        if self._reports is not None:
            self._reports.close()
            self._reports = None
            self._address = ""
