"""Envoy's own account of each request, as it arrives over its access-log stream.

In the frontend no byte of an answer passes through Python; what became of a request is known from
here, for a few microseconds of CPU a request.
"""

from __future__ import annotations

from dataclasses import dataclass

from envoy.config.core.v3 import address_pb2, base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

_FLAGS = tuple(
    field.name
    for field in accesslog_pb2.ResponseFlags.DESCRIPTOR.fields
    if field.message_type is None
)


@dataclass(frozen=True, slots=True)
class AccessEntry:
    """One request as Envoy saw it. Times are seconds from its first byte; ``None``: did not happen.

    The first upstream byte of a streamed answer is its headers, which an engine may send before
    the first token.
    """

    request_id: str
    method: str
    path: str
    status: int  # HTTP status sent to the client; 0 if it left before one was
    flags: tuple[str, ...]  # names of Envoy's ResponseFlags, e.g. "upstream_connection_failure"
    details: str  # Envoy's response_code_details
    upstream: str  # "ip:port" that answered last; "" if none was reached
    attempts: int  # upstream requests made, retries included
    first_byte_s: float | None  # first byte from upstream
    last_byte_s: float | None  # last byte to the client
    request_bytes: int  # body
    response_bytes: int  # body
    routing: str  # how the pick was made, as the picker said


def decode(data: bytes) -> list[AccessEntry]:
    """The HTTP entries of one serialized ``StreamAccessLogsMessage``; none if it is malformed."""
    try:
        message = als_pb2.StreamAccessLogsMessage.FromString(data)
    except DecodeError:
        return []
    return [_entry(entry) for entry in message.http_logs.log_entry]


def _seconds(duration: Duration) -> float:
    return float(duration.seconds) + duration.nanos * 1e-9


def _hostport(address: address_pb2.SocketAddress) -> str:
    host = f"[{address.address}]" if ":" in address.address else address.address
    return f"{host}:{address.port_value}"


def _entry(entry: accesslog_pb2.HTTPAccessLogEntry) -> AccessEntry:
    common, request, response = entry.common_properties, entry.request, entry.response
    address = common.upstream_remote_address.socket_address
    flags: tuple[str, ...] = ()
    if common.HasField("response_flags"):
        raised = common.response_flags
        flags = tuple(name for name in _FLAGS if getattr(raised, name))
    routing = ""
    if "envoy.lb" in common.metadata.filter_metadata:
        fields = common.metadata.filter_metadata["envoy.lb"].fields
        if "x-dynamo-routing" in fields:
            routing = fields["x-dynamo-routing"].string_value
    return AccessEntry(
        request_id=request.request_id,
        method=base_pb2.RequestMethod.Name(request.request_method),
        path=request.path,
        status=response.response_code.value,
        flags=flags,
        details=response.response_code_details,
        upstream=_hostport(address) if address.address else "",
        attempts=common.upstream_request_attempt_count,
        first_byte_s=(
            _seconds(common.time_to_first_upstream_rx_byte)
            if common.HasField("time_to_first_upstream_rx_byte")
            else None
        ),
        last_byte_s=(
            _seconds(common.time_to_last_downstream_tx_byte)
            if common.HasField("time_to_last_downstream_tx_byte")
            else None
        ),
        request_bytes=request.request_body_bytes,
        response_bytes=response.response_body_bytes,
        routing=routing,
    )
