"""Conversations between a proxy and ``Exchange``, made up at random, and what must hold of each.

    python -m tests.gateway_epp.fuzz_exchange --seconds 3600

runs them for as long as you like; a case that fails is named by its seed. The property tests make
the same conversations from Hypothesis' randomness, which shrinks them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_epp.extproc import Exchange, PickRequest, Refusal, Route
from dynamo_epp.extproc.wire import BODY_CHUNK_LIMIT
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

BODY_LIMIT = 1 << 20
ENGINE, ASKED = "engine/model", "asked"

Message = pb.ProcessingRequest


def pattern(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


def answers(outcome: list[bytes | PickRequest] | list[bytes]) -> list[pb.ProcessingResponse]:
    return [pb.ProcessingResponse.FromString(item) for item in outcome if isinstance(item, bytes)]


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    """``data`` in pieces, some of them empty, some as a proxy's buffers make them."""
    style = rng.randrange(4)
    if style == 0:
        return [data]
    if style == 1:
        step = rng.choice([1, 7, 1000]) if len(data) < 5000 else rng.choice([16_384, 65_536])
        return [data[start : start + step] for start in range(0, len(data), step)] or [b""]
    edges = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 6)))
    return [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]


def body_of(rng: random.Random) -> bytes:
    size = rng.choice([0, 1, 3, 300, BODY_CHUNK_LIMIT, BODY_CHUNK_LIMIT + 1, 200_000, 900_000])
    return pattern(rng.randint(0, size) if rng.random() < 0.5 else size)


def config(message: Message, *, duplex: bool, response: bool) -> None:
    full = ProcessingMode.FULL_DUPLEX_STREAMED
    message.protocol_config.request_body_mode = full if duplex else ProcessingMode.BUFFERED
    message.protocol_config.response_body_mode = full if response else ProcessingMode.NONE


def headers_of(message: Message, response: bool, **values: str) -> None:
    part = message.response_headers if response else message.request_headers
    for name, value in values.items():
        key = {"status": ":status", "path": ":path", "method": ":method"}.get(name, name)
        part.headers.headers.add(key=key.replace("_", "-"), raw_value=value.encode())


# --- conversations as they should be --------------------------------------------------------------


@dataclass
class Sent:
    """What came back in one direction."""

    kinds: list[str] = field(default_factory=list)
    body: bytes = b""
    ends: int = 0

    def take(self, answer: pb.ProcessingResponse, direction: str) -> None:
        kind = str(answer.WhichOneof("response"))
        assert kind.startswith(direction), (kind, direction)
        self.kinds.append(kind.removeprefix(f"{direction}_"))
        if kind.endswith("_body"):
            common = getattr(answer, kind).response
            assert common.body_mutation.WhichOneof("mutation") == "streamed_response"
            chunk = common.body_mutation.streamed_response
            assert len(chunk.body) <= BODY_CHUNK_LIMIT
            assert not self.ends, "a chunk behind the last one"
            self.body += chunk.body
            self.ends += chunk.end_of_stream

    def check(self, body: bytes, *, has_body: bool, trailers: bool) -> None:
        assert self.body == body
        order = sorted(self.kinds, key=["headers", "body", "trailers"].index)
        assert self.kinds == order, "headers, body, trailers is the order"
        assert self.kinds.count("headers") == 1
        assert self.kinds.count("trailers") == trailers
        assert self.ends == (has_body and not trailers)


def full_duplex(rng: random.Random) -> None:
    """A whole exchange; each byte arrives, in both directions."""
    relayed = rng.random() < 0.8
    exchange = Exchange(body_limit=BODY_LIMIT, decision_header=rng.random() < 0.5)
    sent, received = body_of(rng), body_of(rng)
    has_body, trailers = rng.random() < 0.9, rng.random() < 0.3
    replaced = body_of(rng) if has_body and rng.random() < 0.3 else None
    restored = rng.random() < 0.3
    if restored:
        received = _events(rng)
    route = Route(
        ("10.0.0.1:8000",),
        body=replaced,
        restore_model=(ENGINE, ASKED) if restored else None,
        routing="exact",
    )

    first = Message()
    config(first, duplex=True, response=relayed)
    headers_of(first, False, method="POST", path="/v1/completions")
    first.request_headers.end_of_stream = not has_body
    messages = [first]
    if has_body:
        messages += _body(cut(rng, sent), "request_body", ended=not trailers)
        if trailers:
            messages.append(Message(request_trailers=pb.HttpTrailers()))
    to_engine = Sent()
    asked: list[PickRequest] = []
    for message in messages:
        items = exchange.feed(message.SerializeToString())
        asked += [item for item in items if isinstance(item, PickRequest)]
        assert answers(items) == []
    (pick,) = asked
    assert pick.body == (sent if has_body else None)
    for answer in answers(exchange.answer(route)):
        to_engine.take(answer, "request")
    expected = (sent if replaced is None else replaced) if has_body else b""
    to_engine.check(expected, has_body=has_body, trailers=has_body and trailers)
    if relayed:
        _response(rng, exchange, route, received, restored=restored)


def _response(
    rng: random.Random, exchange: Exchange, route: Route, received: bytes, *, restored: bool
) -> None:
    has_body, trailers = bool(received) or rng.random() < 0.5, rng.random() < 0.3
    message = Message()
    headers_of(message, True, status="200", content_type="text/event-stream")
    message.response_headers.end_of_stream = not has_body and not trailers
    if rng.random() < 0.5:
        served = message.metadata_context.filter_metadata["envoy.lb"]
        served["x-gateway-destination-endpoint-served"] = "10.0.0.1:8000"
    messages = [message]
    if has_body:
        messages += _body(cut(rng, received), "response_body", ended=not trailers)
    if trailers:
        messages.append(Message(response_trailers=pb.HttpTrailers()))
    to_client = Sent()
    for message in messages:
        if rng.random() < 0.2:
            message.attributes["envoy.filters.http.ext_proc"].update({"a": "b"})
        for answer in answers(exchange.feed(message.SerializeToString())):
            to_client.take(answer, "response")
    engine, asked = (json.dumps(name).encode() for name in (ENGINE, ASKED))
    expected = received.replace(engine, asked) if restored else received
    to_client.check(expected, has_body=has_body, trailers=trailers)
    assert (route.status, route.complete) == (200, True)


def _events(rng: random.Random) -> bytes:
    """Server-sent events; at times broken off in the middle of one."""
    events = (
        json.dumps({"model": ENGINE, "text": "x" * rng.randint(0, 40)})
        for _ in range(rng.randint(0, 30))
    )
    data = "".join(f"data: {event}\n\n" for event in events).encode()
    return data[: rng.randint(0, len(data))] if rng.random() < 0.5 else data


def _body(chunks: list[bytes], kind: str, *, ended: bool) -> list[Message]:
    bodies = [pb.HttpBody(body=chunk) for chunk in chunks]
    bodies[-1].end_of_stream = ended
    return [Message(**{kind: body}) for body in bodies]


# --- conversations that no proxy should have ------------------------------------------------------


KINDS = [
    *("request_headers", "request_body", "request_trailers"),
    *("response_headers", "response_body", "response_trailers", "nothing", "noise"),
]


def _any_message(rng: random.Random) -> bytes:
    message = Message()
    kind = rng.choice(KINDS)
    if kind == "noise":
        return rng.randbytes(rng.randint(0, 30))
    if kind.endswith("body"):
        body = getattr(message, kind)
        body.body = pattern(rng.choice([0, 1, 100, 70_000]))
        body.end_of_stream = rng.random() < 0.3
    elif kind.endswith("headers"):
        values = {"status": rng.choice(["200", "²", "99999", ""]), "content_type": "text/plain"}
        values |= {
            "path": "/v1/completions",
            "x_request_id": rng.choice(["", "a", "\n", "x" * 999]),
        }
        headers_of(message, kind.startswith("response"), **values)
        getattr(message, kind).end_of_stream = rng.random() < 0.3
    elif kind != "nothing":
        getattr(message, kind).SetInParent()
    if rng.random() < 0.3:
        config(message, duplex=rng.random() < 0.7, response=rng.random() < 0.7)
    if rng.random() < 0.2:
        hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
        hint["x-gateway-destination-endpoint-subset"] = rng.choice(["10.0.0.1", 7.0, True, None])
    message.observability_mode = rng.random() < 0.02
    data: bytes = message.SerializeToString()
    if rng.random() < 0.1:
        data = data[: rng.randint(0, len(data))]
    return data


def any_order(rng: random.Random) -> None:
    """Whatever comes: no exception, answers that a proxy can read, one pick at most."""
    limit = rng.choice([50, 200_000])
    exchange = Exchange(duplex=rng.random() < 0.5, body_limit=limit)
    picks, immediate = 0, False
    for _ in range(rng.randint(1, 12)):
        items = exchange.feed(_any_message(rng))
        out = answers(items)
        for item in items:
            if isinstance(item, PickRequest):
                assert item is items[-1]
                picks += 1
                out += answers(exchange.answer(_any_outcome(rng)))
        assert len(exchange._body) <= limit
        for answer in out:
            assert answer.WhichOneof("response")
            assert not immediate, "something behind an immediate response"
            immediate = answer.HasField("immediate_response")
        if immediate:
            assert exchange.closed
    assert picks <= 1


def _any_outcome(rng: random.Random) -> Route | Refusal:
    if rng.random() < 0.3:
        return Refusal(rng.choice([429, 503, 999]), rng.choice([b"", b"{}"]))
    endpoints = rng.choice([(), ("10.0.0.1:1",), ("10.0.0.1:1", "10.0.0.2:1")])
    return Route(
        endpoints,
        set_headers=(("x-a", rng.choice(["b", "é", "\ud800"])),),
        body=rng.choice([None, b"", b"{}"]),
        restore_model=rng.choice([None, (ENGINE, ASKED)]),
    )


CASES: tuple[Callable[[random.Random], None], ...] = (full_duplex, any_order)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, help="one case again, instead of new ones")
    options = parser.parse_args()
    logging.disable()  # what is wrong with a conversation is told for each of them
    begin = time.monotonic()
    seed = random.randrange(1 << 48) if options.seed is None else options.seed
    tried = 0
    while time.monotonic() - begin < options.seconds:
        for case in CASES:
            try:
                case(random.Random(seed))
            except Exception as error:
                print(f"{case.__name__} fails with --seed {seed}: {error!r}", file=sys.stderr)
                raise
        tried += 1
        if options.seed is not None:
            break
        seed += 1
    print(f"{tried} seeds of {len(CASES)} kinds of conversations, none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
