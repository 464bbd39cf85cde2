"""The ext_proc state machine against the protocol's rules, without gRPC or Envoy."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence

import pytest
from dynamo_epp.extproc import Exchange, PickRequest, Refusal, Route
from dynamo_epp.extproc.wire import BODY_CHUNK_LIMIT
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

BUFFERED, DUPLEX = ProcessingMode.BUFFERED, ProcessingMode.FULL_DUPLEX_STREAMED
ROUTE = Route(endpoints=("10.0.0.1:8000", "10.0.0.2:8000"), routing="exact;overlap=3/5")


def config(message: pb.ProcessingRequest, request: int, response: int) -> pb.ProcessingRequest:
    message.protocol_config.SetInParent()
    message.protocol_config.request_body_mode = request  # type: ignore[assignment]
    message.protocol_config.response_body_mode = response  # type: ignore[assignment]
    return message


def request_headers(
    *extra: tuple[str, str], end: bool = False, modes: tuple[int, int] | None = (DUPLEX, DUPLEX)
) -> pb.ProcessingRequest:
    message = pb.ProcessingRequest()
    pairs = [(":method", "POST"), (":path", "/v1/chat/completions"), ("x-request-id", "abc")]
    for name, value in [*pairs, *extra]:
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    message.request_headers.end_of_stream = end
    return config(message, *modes) if modes else message


def body(kind: str, chunk: bytes, end: bool) -> pb.ProcessingRequest:
    message = pb.ProcessingRequest()
    part = getattr(message, kind)
    part.SetInParent()
    part.body, part.end_of_stream = chunk, end
    return message


def empty(kind: str) -> pb.ProcessingRequest:
    message = pb.ProcessingRequest()
    getattr(message, kind).SetInParent()
    return message


def response_headers(status: str = "200", served: str | None = None) -> pb.ProcessingRequest:
    message = empty("response_headers")
    header = message.response_headers.headers.headers.add()
    header.key, header.raw_value = ":status", status.encode()
    if served:
        fields = message.metadata_context.filter_metadata["envoy.lb"].fields
        fields["x-gateway-destination-endpoint-served"].string_value = served
    return message


def feed(exchange: Exchange, message: pb.ProcessingRequest) -> list[bytes | PickRequest]:
    return exchange.feed(message.SerializeToString())


def parsed(items: Sequence[bytes | PickRequest]) -> list[pb.ProcessingResponse]:
    return [pb.ProcessingResponse.FromString(item) for item in items if isinstance(item, bytes)]


def kinds(messages: Sequence[pb.ProcessingResponse]) -> list[str | None]:
    return [message.WhichOneof("response") for message in messages]


def set_headers(common: pb.CommonResponse) -> dict[str, bytes]:
    return {
        option.header.key: option.header.raw_value for option in common.header_mutation.set_headers
    }


def picked(items: Sequence[bytes | PickRequest]) -> PickRequest:
    (request,) = (item for item in items if isinstance(item, PickRequest))
    return request


def immediate(items: Sequence[bytes | PickRequest]) -> pb.ImmediateResponse:
    (message,) = parsed(items)
    assert message.WhichOneof("response") == "immediate_response"
    return message.immediate_response


# The frontend's shape: buffered and held.


def test_buffered_continues_headers_then_picks_on_the_body() -> None:
    exchange = Exchange()
    (answer,) = parsed(feed(exchange, request_headers(modes=(BUFFERED, 0))))
    assert answer == pb.ProcessingResponse(request_headers=pb.HeadersResponse())

    request = picked(feed(exchange, body("request_body", b'{"model":"m"}', True)))
    assert request.body == b'{"model":"m"}'
    assert request.head.method == "POST"
    assert request.head.path == "/v1/chat/completions"
    assert request.head.headers["x-request-id"] == "abc"
    assert request.subset is None

    (answer,) = parsed(exchange.answer(ROUTE))
    common = answer.request_body.response
    assert set_headers(common) == {"x-gateway-destination-endpoint": b"10.0.0.1:8000,10.0.0.2:8000"}
    assert common.clear_route_cache
    assert not common.HasField("body_mutation")
    fields = answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    assert fields["x-gateway-destination-endpoint"].string_value == "10.0.0.1:8000,10.0.0.2:8000"
    assert fields["x-dynamo-routing"].string_value == "exact;overlap=3/5"
    assert not exchange.closed  # held until the proxy ends the stream


def test_headers_are_overwritten_not_appended() -> None:
    exchange = Exchange()
    feed(exchange, request_headers(modes=(BUFFERED, 0)))
    feed(exchange, body("request_body", b"{}", True))
    route = Route(("1.1.1.1:1",), set_headers=(("x-dynamo-booking", "r-1;tokens=5"),))
    (answer,) = parsed(exchange.answer(route))
    options = answer.request_body.response.header_mutation.set_headers
    assert {option.append_action for option in options} == {2}
    assert all(not option.header.value for option in options)


@pytest.mark.parametrize("replacement", [b"", b"x", b"y" * 70_000])
def test_buffered_replaces_the_body_in_one_message(replacement: bytes) -> None:
    exchange = Exchange()
    feed(exchange, request_headers(modes=(BUFFERED, 0)))
    feed(exchange, body("request_body", b"{}", True))
    (answer,) = parsed(exchange.answer(Route(("1.1.1.1:1",), body=replacement)))
    mutation = answer.request_body.response.body_mutation
    sent = set_headers(answer.request_body.response)
    assert sent["content-length"] == str(len(replacement)).encode()
    assert mutation.body == replacement
    assert mutation.clear_body == (replacement == b"")


def test_a_buffered_body_is_complete_without_end_of_stream_and_trailers_wait_for_the_pick() -> None:
    exchange = Exchange()
    feed(exchange, request_headers(modes=(BUFFERED, 0)))
    assert picked(feed(exchange, body("request_body", b"{}", False))).body == b"{}"
    assert feed(exchange, empty("request_trailers")) == []
    assert kinds(parsed(exchange.answer(ROUTE))) == ["request_body", "request_trailers"]


@pytest.mark.parametrize("modes", [(BUFFERED, 0), (DUPLEX, DUPLEX), None])
def test_a_request_without_a_body_is_picked_at_once(modes: tuple[int, int] | None) -> None:
    exchange = Exchange()
    request = picked(feed(exchange, request_headers(end=True, modes=modes)))
    assert request.body is None
    (answer,) = parsed(exchange.answer(ROUTE))
    assert answer.WhichOneof("response") == "request_headers"
    assert answer.request_headers.response.clear_route_cache
    assert set_headers(answer.request_headers.response)


@pytest.mark.parametrize(
    ("modes", "unseen"), [((BUFFERED, 0), True), ((DUPLEX, DUPLEX), False), (None, False)]
)
def test_a_route_knows_whether_its_answer_will_pass_through(
    modes: tuple[int, int] | None, unseen: bool
) -> None:
    exchange, route = Exchange(), Route(("1.1.1.1:1",))
    picked(feed(exchange, request_headers(end=True, modes=modes)))
    exchange.answer(route)
    assert route.unseen == unseen


# Full duplex.


def test_duplex_defers_the_headers_answer_until_the_pick() -> None:
    exchange = Exchange()
    assert feed(exchange, request_headers()) == []
    assert feed(exchange, body("request_body", b'{"a":', False)) == []
    assert picked(feed(exchange, body("request_body", b"1}", True))).body == b'{"a":1}'
    head, chunk = parsed(exchange.answer(ROUTE))
    assert set_headers(head.request_headers.response)["x-gateway-destination-endpoint"]
    assert head.dynamic_metadata.fields["envoy.lb"]
    streamed = chunk.request_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (b'{"a":1}', True)


def test_duplex_request_trailers_finish_the_body_and_come_last() -> None:
    exchange = Exchange()
    feed(exchange, request_headers())
    feed(exchange, body("request_body", b"{}", False))
    assert picked(feed(exchange, empty("request_trailers"))).body == b"{}"
    answers = parsed(exchange.answer(ROUTE))
    assert kinds(answers) == ["request_headers", "request_body", "request_trailers"]
    assert not answers[1].request_body.response.body_mutation.streamed_response.end_of_stream


def test_duplex_relays_the_response_at_once_and_learns_from_it() -> None:
    exchange = Exchange(decision_header=True)
    feed(exchange, request_headers(end=True))
    mine = (("x-session-token", "dy0x"),)
    route = Route(("1.1.1.1:1", "2.2.2.2:2"), response_headers=mine, routing="exact")
    exchange.answer(route)
    (head,) = parsed(feed(exchange, response_headers("503", served="2.2.2.2:2")))
    assert set_headers(head.response_headers.response) == {
        "x-session-token": b"dy0x",
        "x-dynamo-routing": b"exact",
    }
    assert (route.status, route.served) == (503, "2.2.2.2:2")
    (chunk,) = parsed(feed(exchange, body("response_body", b"data: 1\n\n", False)))
    assert chunk.response_body.response.body_mutation.streamed_response.body == b"data: 1\n\n"
    assert kinds(parsed(feed(exchange, empty("response_trailers")))) == ["response_trailers"]


def test_a_response_body_in_another_mode_is_answered_one_to_one() -> None:
    exchange = Exchange()
    feed(exchange, request_headers(end=True, modes=(DUPLEX, ProcessingMode.STREAMED)))
    exchange.answer(ROUTE)
    (answer,) = parsed(feed(exchange, body("response_body", b"data", True)))
    assert answer == pb.ProcessingResponse(response_body=pb.BodyResponse())


def test_a_body_over_the_limit_is_413() -> None:
    exchange = Exchange(body_limit=10)
    feed(exchange, request_headers())
    assert feed(exchange, body("request_body", b"123456", False)) == []
    answer = immediate(feed(exchange, body("request_body", b"78901", False)))
    assert answer.status.code == 413
    assert json.loads(answer.body)["error"]["code"] == "request_too_large"
    assert feed(exchange, body("request_body", b"more", True)) == []


def test_a_response_before_the_pick_abandons_the_pick() -> None:
    exchange = Exchange()
    feed(exchange, request_headers())
    feed(exchange, body("request_body", b"{}", True))
    assert kinds(parsed(feed(exchange, response_headers("408")))) == ["response_headers"]
    assert exchange.answer(ROUTE) == []
    assert ROUTE.status == 0


# What the picker sees and what it may say.


def test_routing_headers_of_clients_are_removed_unless_set() -> None:
    exchange = Exchange()
    hostile = [
        ("X-Gateway-Destination-Endpoint", "6.6.6.6:1"),
        ("x-gateway-destination-endpoint-subset", "6.6.6.6:1"),
        ("x-dynamo-worker-instance-id", "7"),
        ("x-dynamo-booking", "forged"),
        ("x-prefiller-host-port", "6.6.6.6:1"),
        ("x-data-parallel-rank", "3"),
        ("user-agent", "curl"),
    ]
    feed(exchange, request_headers(*hostile, end=True))
    route = Route(
        ("1.1.1.1:1",), set_headers=(("x-dynamo-booking", "ours"),), remove_headers=("cookie",)
    )
    (answer,) = parsed(exchange.answer(route))
    mutation = answer.request_headers.response.header_mutation
    assert set(mutation.remove_headers) == {
        "x-gateway-destination-endpoint-subset",
        "x-dynamo-worker-instance-id",
        "x-prefiller-host-port",
        "x-data-parallel-rank",
        "cookie",
    }
    sent = set_headers(answer.request_headers.response)
    assert sent["x-gateway-destination-endpoint"] == b"1.1.1.1:1"
    assert sent["x-dynamo-booking"] == b"ours"


def test_header_values_come_from_raw_value_and_repeats_are_joined() -> None:
    message = request_headers(("accept", "a"), ("accept", "b"), end=True)
    old = message.request_headers.headers.headers.add()
    old.key, old.value = "x-old", "from value"
    bad = message.request_headers.headers.headers.add()
    bad.key, bad.raw_value = "x-bytes", b"\xff\xfe"
    head = picked(feed(Exchange(), message)).head
    assert head.headers["accept"] == "a,b"
    assert head.headers["x-old"] == "from value"
    assert head.headers["x-bytes"] == "��"


@pytest.mark.parametrize("given_id", [None, "", "a b", "x" * 129, "ü"])
def test_a_missing_or_strange_request_id_is_replaced(given_id: str | None) -> None:
    message = request_headers(end=True)
    del message.request_headers.headers.headers[2]
    if given_id is not None:
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = "x-request-id", given_id.encode()
    exchange = Exchange(make_request_id=lambda: "fresh")
    assert picked(feed(exchange, message)).head.headers["x-request-id"] == "fresh"
    (answer,) = parsed(exchange.answer(ROUTE))
    assert set_headers(answer.request_headers.response)["x-request-id"] == b"fresh"


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (["1.1.1.1:1", "2.2.2.2:2"], ("1.1.1.1:1", "2.2.2.2:2")),
        ("1.1.1.1:1, 2.2.2.2", ("1.1.1.1:1", "2.2.2.2")),
        ([], ()),
        ("", ()),
        (7.0, ()),
    ],
)
def test_subset_hint(hint: list[str] | str | float, expected: tuple[str, ...]) -> None:
    message = request_headers(end=True)
    fields = message.metadata_context.filter_metadata["envoy.lb.subset_hint"].fields
    value = fields["x-gateway-destination-endpoint-subset"]
    if isinstance(hint, list):
        value.list_value.SetInParent()
        for item in hint:
            value.list_value.values.add().string_value = item
    elif isinstance(hint, str):
        value.string_value = hint
    else:
        value.number_value = hint
    assert picked(feed(Exchange(), message)).subset == expected


def test_no_subset_hint_among_other_metadata() -> None:
    message = request_headers(end=True)
    message.metadata_context.filter_metadata["envoy.lb.subset_hint"].fields["x"].string_value = "y"
    assert picked(feed(Exchange(), message)).subset is None


@pytest.mark.parametrize(("status", "sent"), [(429, 429), (503, 503), (499, 400), (999, 500)])
def test_a_refusal_becomes_an_immediate_response(status: int, sent: int) -> None:
    exchange = Exchange()
    feed(exchange, request_headers())
    feed(exchange, body("request_body", b"{}", True))
    refusal = Refusal(status, b'{"error":{}}', (("x-llm-d-request-dropped-reason", "why"),))
    answer = immediate(exchange.answer(refusal))
    assert answer.status.code == sent
    assert answer.body == b'{"error":{}}'
    headers = {option.header.key: option.header.raw_value for option in answer.headers.set_headers}
    assert headers == {
        "content-type": b"application/json",
        "x-llm-d-request-dropped-reason": b"why",
    }
    assert exchange.closed
    assert exchange.answer(ROUTE) == []


def test_a_route_to_nowhere_is_503() -> None:
    exchange = Exchange()
    feed(exchange, request_headers(end=True))
    assert immediate(exchange.answer(Route(()))).status.code == 503


# What should not happen.


@pytest.mark.parametrize(
    "mode", [ProcessingMode.NONE, ProcessingMode.STREAMED, ProcessingMode.BUFFERED_PARTIAL]
)
def test_a_gateway_with_an_unusable_mode_is_told(
    mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = Exchange()
    answer = immediate(feed(exchange, request_headers(modes=(mode, 0))))
    assert answer.status.code == 500
    assert "FULL_DUPLEX_STREAMED" in json.loads(answer.body)["error"]["message"]
    assert "request_body_mode" in caplog.text
    # A request without a body needs no body mode.
    assert picked(feed(Exchange(), request_headers(modes=(mode, 0), end=True)))


def test_observability_mode_gets_no_answer() -> None:
    exchange = Exchange()
    message = request_headers(end=True)
    message.observability_mode = True
    assert feed(exchange, message) == []
    assert exchange.closed


@pytest.mark.parametrize(
    "message",
    [
        body("request_body", b"{}", True),
        empty("request_trailers"),
        pb.ProcessingRequest(),
    ],
)
def test_a_message_out_of_turn_before_the_pick_ends_in_an_error(
    message: pb.ProcessingRequest, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = Exchange()
    assert immediate(feed(exchange, message)).status.code == 500
    assert exchange.closed
    assert caplog.records[-1].levelno == logging.ERROR


def test_a_message_out_of_turn_after_the_pick_disturbs_nothing() -> None:
    exchange = Exchange()
    feed(exchange, request_headers(modes=(BUFFERED, 0)))
    feed(exchange, body("request_body", b"{}", True))
    exchange.answer(ROUTE)
    # One answer for each message, or the proxy would wait for it.
    again = parsed(feed(exchange, body("request_body", b"{}", True)))
    assert again == [pb.ProcessingResponse(request_body=pb.BodyResponse())]
    assert exchange.feed(b"\xff\xff") == []
    assert not exchange.closed


# Properties.


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    points = sorted({min(point, len(data)) for point in cuts} | {0, len(data)})
    pieces = [data[a:b] for a, b in itertools.pairwise(points)]
    return pieces or [b""]


bodies = st.one_of(
    st.binary(max_size=300),
    st.integers(0, 3 * BODY_CHUNK_LIMIT).map(lambda size: bytes(i % 251 for i in range(size))),
)
cut_points = st.lists(st.integers(0, 3 * BODY_CHUNK_LIMIT), max_size=5)


def streamed(messages: Sequence[pb.ProcessingResponse], kind: str) -> list[tuple[bytes, bool]]:
    found = []
    for message in messages:
        if message.WhichOneof("response") == kind:
            part = getattr(message, kind).response.body_mutation
            assert part.WhichOneof("mutation") == "streamed_response"
            found.append((part.streamed_response.body, part.streamed_response.end_of_stream))
    return found


def assert_direction(answers: list[pb.ProcessingResponse], side: str, data: bytes) -> None:
    """Headers → body → trailers, every byte once, chunks bounded, the end said exactly once."""
    own = [message for message in answers if kinds([message])[0].startswith(side)]  # type: ignore[union-attr]
    order = {f"{side}_headers": 0, f"{side}_body": 1, f"{side}_trailers": 2}
    ranks = [order[str(kind)] for kind in kinds(own)]
    assert ranks == sorted(ranks)
    assert ranks.count(0) == 1
    chunks = streamed(own, f"{side}_body")
    assert b"".join(chunk for chunk, _ in chunks) == data
    assert all(len(chunk) <= BODY_CHUNK_LIMIT for chunk, _ in chunks)
    ends = [end for _, end in chunks]
    trailers = ranks.count(2)
    assert ends.count(True) + trailers == 1
    assert not any(ends[:-1])


@settings(max_examples=80, deadline=None)
@given(
    request_body=bodies,
    request_cuts=cut_points,
    request_trailers=st.booleans(),
    response_body=bodies,
    response_cuts=cut_points,
    response_trailers=st.booleans(),
    empty_end=st.booleans(),
    replacement=st.none() | bodies,
    metadata=st.booleans(),
)
def test_duplex_conserves_every_byte(
    request_body: bytes,
    request_cuts: list[int],
    request_trailers: bool,
    response_body: bytes,
    response_cuts: list[int],
    response_trailers: bool,
    empty_end: bool,
    replacement: bytes | None,
    metadata: bool,
) -> None:
    def script(
        side: str, data: bytes, cuts: list[int], trailers: bool
    ) -> list[pb.ProcessingRequest]:
        pieces = cut(data, cuts) + ([b""] if empty_end else [])
        last = len(pieces) - 1
        messages = [
            body(f"{side}_body", piece, i == last and not trailers)
            for i, piece in enumerate(pieces)
        ]
        return messages + ([empty(f"{side}_trailers")] if trailers else [])

    exchange = Exchange()
    assert feed(exchange, request_headers()) == []
    answers: list[pb.ProcessingResponse] = []
    picks = 0
    incoming = script("request", request_body, request_cuts, request_trailers)
    for number, message in enumerate(incoming):
        items = feed(exchange, message)
        assert not parsed(items)  # nothing before the pick
        if number == len(incoming) - 1:
            assert picked(items).body == request_body
            picks += 1
            answers += parsed(exchange.answer(Route(("1.1.1.1:1",), body=replacement)))
        else:
            assert items == []
    assert picks == 1
    for message in [
        response_headers(),
        *script("response", response_body, response_cuts, response_trailers),
    ]:
        if metadata:
            message.metadata_context.filter_metadata["x"].fields["y"].string_value = "z"
        got = parsed(feed(exchange, message))
        assert got  # relayed at once
        answers += got
    assert_direction(answers, "request", request_body if replacement is None else replacement)
    assert_direction(answers, "response", response_body)


MESSAGES = [
    request_headers(),
    request_headers(end=True),
    request_headers(modes=(BUFFERED, 0)),
    request_headers(modes=(BUFFERED, ProcessingMode.STREAMED)),
    request_headers(modes=(ProcessingMode.STREAMED, 0)),
    request_headers(modes=None),
    body("request_body", b"abc", False),
    body("request_body", b"abc", True),
    body("request_body", b"", True),
    empty("request_trailers"),
    response_headers(),
    response_headers("not a number"),
    body("response_body", b"xyz", False),
    body("response_body", b"", True),
    empty("response_trailers"),
    pb.ProcessingRequest(),
]


@settings(max_examples=300, deadline=None)
@given(
    script=st.lists(
        st.one_of(
            st.sampled_from([message.SerializeToString() for message in MESSAGES]),
            st.binary(max_size=40),
            st.just("answer"),
            st.just("refuse"),
        ),
        max_size=12,
    ),
    duplex=st.booleans(),
)
def test_nothing_that_comes_in_raises_or_picks_twice(
    script: list[bytes | str], duplex: bool
) -> None:
    exchange = Exchange(duplex=duplex, body_limit=7)
    picks = immediates = 0
    answered_headers = answered_body_end = 0
    for step in script:
        if step == "answer":
            out: Sequence[bytes | PickRequest] = exchange.answer(Route(("1.1.1.1:1",)))
        elif step == "refuse":
            out = exchange.answer(Refusal(429, b"{}"))
        else:
            assert isinstance(step, bytes)
            out = exchange.feed(step)
        assert not any(isinstance(item, PickRequest) for item in out[:-1])
        picks += sum(isinstance(item, PickRequest) for item in out)
        for message in parsed(out):
            kind = message.WhichOneof("response")
            assert kind is not None
            assert immediates == 0, "an answer after the immediate response"
            immediates += kind == "immediate_response"
            answered_headers += kind == "request_headers"
            answered_body_end += (
                message.request_body.response.body_mutation.streamed_response.end_of_stream
            )
    assert picks <= 1
    assert immediates <= 1
    assert answered_headers <= 1
    assert answered_body_end <= 1


@pytest.mark.parametrize(
    ("mode", "ended", "complete"),
    [
        (ProcessingMode.FULL_DUPLEX_STREAMED, False, False),
        (ProcessingMode.FULL_DUPLEX_STREAMED, True, True),
        (ProcessingMode.STREAMED, True, True),
        (ProcessingMode.NONE, False, True),
    ],
)
def test_a_relay_knows_whether_an_answer_was_whole(mode: int, ended: bool, complete: bool) -> None:
    exchange, route = Exchange(), Route(("10.0.0.1:1",))
    message = pb.ProcessingRequest()
    message.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    message.protocol_config.response_body_mode = mode  # type: ignore[assignment]
    message.request_headers.end_of_stream = True
    exchange.feed(message.SerializeToString())
    exchange.answer(route)
    message = pb.ProcessingRequest()
    message.response_headers.headers.headers.add(key=":status", raw_value=b"200")
    exchange.feed(message.SerializeToString())
    message = pb.ProcessingRequest()
    message.response_body.body = b"x"
    message.response_body.end_of_stream = ended
    if mode != ProcessingMode.NONE:
        exchange.feed(message.SerializeToString())
    assert (route.status, route.complete) == (200, complete)
