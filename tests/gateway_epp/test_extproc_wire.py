"""Each hand-encoded message against the protobuf library."""

from __future__ import annotations

from dynamo_epp.extproc import Refusal, wire
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

names = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=20)
values = st.text(max_size=300).filter(lambda text: "\ud800" not in text)
pairs = st.lists(st.tuples(names, values), max_size=6)


def mutate(mutation: pb.HeaderMutation, headers: list[tuple[str, str]], remove: list[str]) -> None:
    for name, value in headers:
        option = mutation.set_headers.add()
        option.header.key, option.header.raw_value = name, value.encode("utf-8", "replace")
        option.append_action = 2  # type: ignore[assignment]
    mutation.remove_headers.extend(remove)


def lb(message: pb.ProcessingResponse, destination: str, routing: str) -> None:
    fields = message.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    fields["x-gateway-destination-endpoint"].string_value = destination
    if routing:
        fields["x-dynamo-routing"].string_value = routing


@settings(max_examples=100, deadline=None)
@given(headers=pairs, remove=st.lists(names, max_size=4), destination=names, routing=values)
def test_mutated_headers(
    headers: list[tuple[str, str]], remove: list[str], destination: str, routing: str
) -> None:
    expected = pb.ProcessingResponse()
    common = expected.request_headers.response
    common.header_mutation.SetInParent()
    mutate(common.header_mutation, headers, remove)
    common.clear_route_cache = True
    lb(expected, destination, routing)
    mutation = wire.header_mutation(headers, remove)
    got = wire.mutated_headers(mutation, wire.pick_metadata(destination, routing))
    assert pb.ProcessingResponse.FromString(got) == expected


@settings(max_examples=50, deadline=None)
@given(headers=pairs, body=st.none() | st.binary(max_size=70_000))
def test_mutated_body(headers: list[tuple[str, str]], body: bytes | None) -> None:
    expected = pb.ProcessingResponse()
    common = expected.request_body.response
    common.header_mutation.SetInParent()
    mutate(common.header_mutation, headers, [])
    common.clear_route_cache = True
    if body:
        common.body_mutation.body = body
    elif body == b"":
        common.body_mutation.clear_body = True
    lb(expected, "a:1", "")
    got = wire.mutated_body(wire.header_mutation(headers), body, wire.pick_metadata("a:1", ""))
    assert pb.ProcessingResponse.FromString(got) == expected


@given(
    chunk=st.binary(max_size=500), end=st.booleans(), kind=st.sampled_from(["request", "response"])
)
def test_streamed_body(chunk: bytes, end: bool, kind: str) -> None:
    expected = pb.ProcessingResponse()
    part = getattr(expected, f"{kind}_body").response.body_mutation.streamed_response
    part.SetInParent()
    part.body, part.end_of_stream = chunk, end
    number = wire.REQUEST_BODY if kind == "request" else wire.RESPONSE_BODY
    assert pb.ProcessingResponse.FromString(wire.streamed_body(number, chunk, end)) == expected


@settings(deadline=None)
@given(
    chunk=st.binary(max_size=500) | st.integers(0, 70_000).map(bytes),
    end=st.booleans(),
    metadata=st.booleans(),
)
def test_relayed_without_parsing(chunk: bytes, end: bool, metadata: bool) -> None:
    message = pb.ProcessingRequest()
    message.response_body.SetInParent()
    message.response_body.body, message.response_body.end_of_stream = chunk, end
    if metadata:
        message.metadata_context.filter_metadata["a"].fields["b"].string_value = "c"
    got = wire.relay_response_body(message.SerializeToString())
    if len(chunk) > wire.BODY_CHUNK_LIMIT:
        assert got is None
    elif got is not None:  # None is allowed close to the limit
        expected = wire.streamed_body(wire.RESPONSE_BODY, chunk, end)
        assert pb.ProcessingResponse.FromString(got) == pb.ProcessingResponse.FromString(expected)
    else:
        assert len(chunk) > wire.BODY_CHUNK_LIMIT - 16


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"\x2a" + tail))
def test_what_is_no_response_chunk_is_never_relayed_as_one(data: bytes) -> None:
    got = wire.relay_response_body(data)
    if got is not None:
        # Whatever was relayed was at least framed as the response body it claims to be.
        assert data[0] == 0x2A
        assert len(got) >= 8


@given(
    status=st.sampled_from([200, 400, 404, 413, 429, 500, 503]),
    body=st.binary(max_size=300),
    headers=pairs,
)
def test_immediate(status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
    expected = pb.ProcessingResponse()
    expected.immediate_response.status.code = status  # type: ignore[assignment]
    expected.immediate_response.body = body
    expected.immediate_response.details = "endpoint_picker"
    sent = headers
    if not any(name == "content-type" for name, _ in headers):
        sent = [("content-type", "application/json"), *headers]
    mutate(expected.immediate_response.headers, sent, [])
    got = wire.immediate(Refusal(status, body, tuple(headers)))
    assert pb.ProcessingResponse.FromString(got) == expected
