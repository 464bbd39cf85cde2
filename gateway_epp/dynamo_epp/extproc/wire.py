"""The few messages a picker sends, encoded without building protobuf objects.

One pick's answer is about twenty nested messages, most of them constant. Written as length-prefixed
bytes they cost a few microseconds; the tests compare each with what the protobuf library makes of
it. Field numbers: ``envoy/service/ext_proc/v3/external_processor.proto``,
``envoy/config/core/v3/base.proto``, ``google/protobuf/struct.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable

from envoy.type.v3 import http_status_pb2

from dynamo_epp.extproc.messages import DESTINATION_HEADER, PICKER_DETAILS, ROUTING_HEADER, Refusal

# A tag is (field number << 3) | 2 for length-delimited fields: 1 → 0x0a, 2 → 0x12, 3 → 0x1a, …
_FIELD = {number: bytes(((number << 3) | 2,)) for number in range(1, 10)}
_F1, _F2, _F3, _F5 = _FIELD[1], _FIELD[2], _FIELD[3], _FIELD[5]

# ProcessingResponse
REQUEST_HEADERS, RESPONSE_HEADERS, REQUEST_BODY, RESPONSE_BODY = 1, 2, 3, 4
REQUEST_TRAILERS, RESPONSE_TRAILERS, IMMEDIATE, DYNAMIC_METADATA = 5, 6, 7, 8

_CLEAR_ROUTE_CACHE = b"\x28\x01"  # CommonResponse.clear_route_cache = true
_OVERWRITE = b"\x18\x02"  # HeaderValueOption.append_action = OVERWRITE_IF_EXISTS_OR_ADD
_END_OF_STREAM = b"\x10\x01"  # StreamedBodyResponse.end_of_stream = true

BODY_CHUNK_LIMIT = 62_000
"""Bytes of body in one message. Envoy recommends less than 64 KiB; llm-d's picker uses this."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_LENGTHS = tuple(_varint(length) for length in range(2048))


def _nested(tag: bytes, payload: bytes) -> bytes:
    length = len(payload)
    return tag + (_LENGTHS[length] if length < 2048 else _varint(length)) + payload


def _text(value: str) -> bytes:
    return value.encode("utf-8", "replace")


def _set_header(name: str, value: str) -> bytes:
    header = _nested(_F1, _text(name)) + _nested(_F3, _text(value))  # key, raw_value
    return _nested(_F1, _nested(_F1, header) + _OVERWRITE)


def header_mutation(set_headers: Iterable[tuple[str, str]], remove: Iterable[str] = ()) -> bytes:
    """``HeaderMutation``; values go to ``raw_value``, existing ones are overwritten."""
    parts = [_set_header(name, value) for name, value in set_headers]
    parts.extend(_nested(_F2, _text(name)) for name in remove)
    return b"".join(parts)


def pick_metadata(destination: str, routing: str) -> bytes:
    """``dynamic_metadata`` with namespace ``envoy.lb``, which must equal the header."""
    inner = _metadata_entry(DESTINATION_HEADER, _nested(_F3, _text(destination)))
    if routing:
        inner += _metadata_entry(ROUTING_HEADER, _nested(_F3, _text(routing)))
    return _nested(_FIELD[DYNAMIC_METADATA], _metadata_entry("envoy.lb", _nested(_F5, inner)))


def _metadata_entry(key: str, value: bytes) -> bytes:
    return _nested(_F1, _nested(_F1, _text(key)) + _nested(_F2, value))


def mutated_headers(mutation: bytes, metadata: bytes = b"") -> bytes:
    """Answer to request headers: apply ``mutation``, choose the route anew."""
    common = _nested(_F2, mutation) + _CLEAR_ROUTE_CACHE
    return _nested(_FIELD[REQUEST_HEADERS], _nested(_F1, common)) + metadata


def mutated_body(mutation: bytes, body: bytes | None, metadata: bytes) -> bytes:
    """Answer to a buffered request body: apply ``mutation``, replace the body unless ``None``."""
    common = _nested(_F2, mutation)
    if body is not None:
        # An empty replacement is written as clear_body, which says so without doubt.
        common += _nested(_F3, _nested(_F1, body) if body else b"\x10\x01")
    common += _CLEAR_ROUTE_CACHE
    return _nested(_FIELD[REQUEST_BODY], _nested(_F1, common)) + metadata


def streamed_body(kind: int, chunk: bytes, end_of_stream: bool) -> bytes:
    """One body chunk in full duplex; ``kind`` is ``REQUEST_BODY`` or ``RESPONSE_BODY``."""
    streamed = _nested(_F1, chunk) if chunk else b""
    return _wrap_streamed(kind, streamed + _END_OF_STREAM if end_of_stream else streamed)


def _wrap_streamed(kind: int, streamed: bytes) -> bytes:
    return _nested(_FIELD[kind], _nested(_F1, _nested(_F3, _nested(_F3, streamed))))


def streamed_chunks(kind: int, body: bytes, end_of_stream: bool) -> list[bytes]:
    """``body`` in chunks of at most ``BODY_CHUNK_LIMIT``; only the last can end the stream.

    An empty body that ends the stream is one empty chunk; one that does not is no chunk at all.
    """
    if not body:
        return [streamed_body(kind, b"", True)] if end_of_stream else []
    if len(body) <= BODY_CHUNK_LIMIT:
        return [streamed_body(kind, body, end_of_stream)]
    starts = range(0, len(body), BODY_CHUNK_LIMIT)
    return [
        streamed_body(
            kind,
            body[start : start + BODY_CHUNK_LIMIT],
            end_of_stream and start == starts[-1],
        )
        for start in starts
    ]


_RESPONSE_BODY_TAG = 0x2A  # ProcessingRequest.response_body
_AFTER_BODY_TAGS = (0x42, 0x4A)  # metadata_context, attributes


def relay_response_body(data: bytes) -> bytes | None:
    """Answer a full-duplex response chunk without parsing it.

    ``HttpBody`` (what comes) and ``StreamedBodyResponse`` (what goes) have the same fields under
    the same numbers, so the bytes are wrapped anew as they are. ``None`` if ``data`` is another
    message, is malformed, or holds more than one chunk may: the careful path decides then.
    """
    if len(data) < 2 or data[0] != _RESPONSE_BODY_TAG:
        return None
    length, shift, start = 0, 0, 1
    while True:
        if start >= len(data) or shift > 28:
            return None
        byte = data[start]
        start += 1
        length |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    end = start + length
    if length > BODY_CHUNK_LIMIT or end > len(data):
        return None
    if end < len(data) and data[end] not in _AFTER_BODY_TAGS:
        return None
    return _wrap_streamed(RESPONSE_BODY, data[start:end]) if _is_chunk(data, start, end) else None


def _is_chunk(data: bytes, start: int, end: int) -> bool:
    """Whether ``data[start:end]`` is ``HttpBody.body`` alone, or with the end of the stream."""
    if end - start <= 2:
        return data[start:end] in (b"", _END_OF_STREAM)
    if data[start] != 0x0A:
        return False
    at, length, shift = start + 1, 0, 0
    while at < end and shift <= 28:
        byte = data[at]
        at += 1
        length |= (byte & 127) << shift
        if byte < 128:
            rest = data[at + length : end]
            return at + length == end or (at + length < end and rest == _END_OF_STREAM)
        shift += 7
    return False


def may_end(relayed: bytes) -> bool:
    """Whether a relayed chunk may be the last: surely not without the flag's bytes at its end."""
    return relayed.endswith(_END_OF_STREAM)


def _empty(kind: int) -> bytes:
    return _nested(_FIELD[kind], b"")


CONTINUE_REQUEST_HEADERS = _empty(REQUEST_HEADERS)
CONTINUE_REQUEST_BODY = _empty(REQUEST_BODY)
CONTINUE_REQUEST_TRAILERS = _empty(REQUEST_TRAILERS)
CONTINUE_RESPONSE_HEADERS = _empty(RESPONSE_HEADERS)
CONTINUE_RESPONSE_BODY = _empty(RESPONSE_BODY)
CONTINUE_RESPONSE_TRAILERS = _empty(RESPONSE_TRAILERS)


def response_headers(set_headers: Iterable[tuple[str, str]], remove: Iterable[str] = ()) -> bytes:
    """Answer to response headers that adds ``set_headers`` and takes away ``remove``."""
    common = _nested(_F2, header_mutation(set_headers, remove))
    return _nested(_FIELD[RESPONSE_HEADERS], _nested(_F1, common))


# Envoy rejects a message with a status outside its enum, and the client would get a 500.
_STATUSES = frozenset(http_status_pb2.StatusCode.values()) - {0}
_DETAILS = _nested(_F5, PICKER_DETAILS.encode())


def immediate(refusal: Refusal) -> bytes:
    """``ImmediateResponse``: the client gets this and the request goes nowhere."""
    status = refusal.status
    if status not in _STATUSES:
        status = 400 if 400 <= status < 500 else 500
    headers = refusal.headers
    if not any(name == "content-type" for name, _ in headers):
        headers = (("content-type", "application/json"), *headers)
    message = _nested(_F1, b"\x08" + _varint(status)) + _nested(_F2, header_mutation(headers))
    if refusal.body:
        message += _nested(_F3, refusal.body)
    message += _DETAILS
    return _nested(_FIELD[IMMEDIATE], message)
