"""One request's conversation with Envoy, as a state machine without I/O.

Two shapes, told apart by the ``protocol_config`` of the first message:

*Buffered and held* (our own frontend): request headers, then the whole body in one message; the
response never comes here. Headers are answered with CONTINUE, the body with the pick. Then the
exchange stays silent until Envoy ends the stream together with the response, which tells when a
request was over without any byte of the answer being relayed.

*Full duplex* (a foreign gateway): Envoy streams body and trailers as they arrive. The answer to the
headers must carry the pick, because header mutations of body answers have no effect in this mode;
so it is deferred until the body is complete. The exchange relays to the very end: bytes that
were not sent back are lost to the upstream, and leaving early loses answers.

Rules: ``processing_mode.proto`` and ``external_processor.proto`` of Envoy, and the endpoint picker
protocol 1.0 of the Gateway API Inference Extension.
"""

from __future__ import annotations

import enum
import logging
import re
import uuid
from collections.abc import Callable

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.message import DecodeError

from dynamo_epp.extproc import wire
from dynamo_epp.extproc.messages import (
    DESTINATION_HEADER,
    REQUEST_ID_HEADER,
    ROUTING_HEADER,
    PickRequest,
    Refusal,
    RequestHead,
    Route,
    steers_routing,
)
from dynamo_epp.extproc.restore import ModelRestorer, can_restore
from dynamo_epp.requests.errors import error_body

log = logging.getLogger(__name__)

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
SERVED_NAMESPACE = "envoy.lb"
SERVED_KEY = "x-gateway-destination-endpoint-served"

_RESPONSE_HEADERS = (":status", "content-type", "content-encoding")  # those that are looked at
_STATUS = re.compile(r"[0-9]{1,3}")
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@+/=~-]{1,128}")


class _State(enum.Enum):
    HEADERS = "request headers"
    BODY = "request body"
    PICKING = "the pick"
    ANSWERED = "the end of the stream"
    CLOSED = "nothing more"


def new_request_id() -> str:
    return str(uuid.uuid4())


class Exchange:
    """Feed it what Envoy says; send Envoy what it returns, in order.

    ``feed`` returns serialized ``ProcessingResponse`` messages and at most once in its life a
    ``PickRequest``, always last; call ``answer`` with the outcome. Neither ever raises, whatever
    comes in: what breaks the protocol ends in an immediate response while one is still of use,
    and in a log line afterwards. ``closed`` says that the stream can be ended.

    ``duplex`` is the shape to assume of a proxy too old to send ``protocol_config``.
    ``body_limit`` (bytes) bounds what full duplex collects; over it the client gets 413.
    ``decision_header`` puts how the pick was made on relayed responses, ``served_header`` (a name)
    the endpoint that answered, if the proxy tells.
    """

    __slots__ = (
        "_body",
        "_body_limit",
        "_decision_header",
        "_duplex_request",
        "_duplex_response",
        "_has_body",
        "_head",
        "_make_request_id",
        "_request_id",
        "_response_unseen",
        "_restorer",
        "_route",
        "_served_header",
        "_state",
        "_subset",
        "_trailers",
        "_unusable",
    )

    def __init__(
        self,
        *,
        duplex: bool = False,
        body_limit: int = 32 * 1024 * 1024,
        decision_header: bool = False,
        served_header: str = "",
        make_request_id: Callable[[], str] = new_request_id,
    ) -> None:
        self._duplex_request = duplex
        self._duplex_response = duplex
        self._response_unseen = False  # its body does not come here
        self._body_limit = body_limit
        self._decision_header = decision_header
        self._served_header = served_header
        self._make_request_id = make_request_id
        self._state = _State.HEADERS
        self._head = RequestHead("", "", {})
        self._subset: tuple[str, ...] | None = None
        self._request_id = ""  # set if the request came without a usable one
        self._body: bytes | bytearray = b""  # as far as it has come
        self._has_body = False
        self._trailers = False  # request trailers wait for the pick
        self._unusable = ""  # why a request body can't be received in the proxy's configuration
        self._route: Route | None = None
        self._restorer: ModelRestorer | None = None  # the answer's model name is put back

    @property
    def closed(self) -> bool:
        """Nothing that may still come will be answered."""
        return self._state is _State.CLOSED

    @property
    def shape(self) -> str:
        """``full-duplex`` or ``buffered``."""
        return "full-duplex" if self._duplex_request else "buffered"

    def feed(self, data: bytes) -> list[bytes | PickRequest]:
        """Take one serialized ``ProcessingRequest``."""
        state = self._state
        if state is _State.ANSWERED and self._duplex_response and self._restorer is None:
            relayed = wire.relay_response_body(data)
            if relayed is not None and not wire.may_end(relayed):
                return [relayed]
        if state is _State.CLOSED:
            return []
        try:
            message = pb.ProcessingRequest.FromString(data)
        except DecodeError:
            return self._violation("a message that is no ProcessingRequest")
        kind = message.WhichOneof("request")
        if state is _State.HEADERS:
            if message.observability_mode:
                # Envoy doesn't wait for answers then and wants none.
                self._state = _State.CLOSED
                return []
            if message.HasField("protocol_config"):
                self._learn_shape(message.protocol_config)
        if kind == "request_headers":
            return self._request_headers(message)
        if kind == "request_body":
            return self._request_body(message.request_body)
        if kind == "request_trailers":
            return self._request_trailers()
        if kind == "response_headers":
            return self._response_headers(message)
        if kind == "response_body":
            return self._response_body(message.response_body)
        if kind == "response_trailers":
            return self._response_trailers()
        return self._violation("a message without content")

    def answer(self, outcome: Route | Refusal) -> list[bytes]:
        """Take the outcome of the pick; return what to send."""
        if self._state is not _State.PICKING:
            return []
        if isinstance(outcome, Route) and not outcome.endpoints:
            outcome = Refusal(503, error_body(503, "no endpoint is available"))
        if isinstance(outcome, Refusal):
            self._close()
            return [wire.immediate(outcome)]
        self._state = _State.ANSWERED
        self._route = outcome
        outcome.unseen = self._response_unseen
        destination = ",".join(outcome.endpoints)
        mutation = self._header_mutation(outcome, destination)
        metadata = wire.pick_metadata(destination, outcome.routing)
        body = outcome.body
        answers: list[bytes]
        if not self._has_body:
            answers = [wire.mutated_headers(mutation, metadata)]
        elif self._duplex_request:
            answers = [wire.mutated_headers(mutation, metadata)]
            if body is None:
                body = bytes(self._body)
            answers += wire.streamed_chunks(wire.REQUEST_BODY, body, not self._trailers)
        else:
            answers = [wire.mutated_body(mutation, body, metadata)]
        if self._trailers:
            answers.append(wire.CONTINUE_REQUEST_TRAILERS)
        self._body = b""
        return answers

    def _learn_shape(self, config: pb.ProtocolConfiguration) -> None:
        request, response = config.request_body_mode, config.response_body_mode
        self._duplex_request = request == ProcessingMode.FULL_DUPLEX_STREAMED
        self._duplex_response = response == ProcessingMode.FULL_DUPLEX_STREAMED
        self._response_unseen = response == ProcessingMode.NONE
        if not self._duplex_request and request != ProcessingMode.BUFFERED:
            self._unusable = ProcessingMode.BodySendMode.Name(request)

    def _request_headers(self, message: pb.ProcessingRequest) -> list[bytes | PickRequest]:
        if self._state is not _State.HEADERS:
            return self._violation("request headers twice")
        headers: dict[str, str] = {}
        for header in message.request_headers.headers.headers:
            name = header.key.lower()
            raw = header.raw_value
            value = raw.decode("utf-8", "replace") if raw else header.value
            known = headers.get(name)
            headers[name] = value if known is None else f"{known},{value}"
        if not _SANE_REQUEST_ID.fullmatch(headers.get(REQUEST_ID_HEADER, "")):
            self._request_id = headers[REQUEST_ID_HEADER] = self._make_request_id()
        self._head = RequestHead(headers.pop(":method", ""), headers.pop(":path", ""), headers)
        if message.HasField("metadata_context"):
            self._subset = _subset_hint(message.metadata_context)
        if message.request_headers.end_of_stream:
            return self._pick(None)
        if self._unusable:
            log.error(
                "the proxy's ext_proc filter has request_body_mode %s: set FULL_DUPLEX_STREAMED "
                "(with request_trailer_mode SEND) or BUFFERED",
                self._unusable,
            )
            self._close()
            return [
                wire.immediate(
                    Refusal(
                        500,
                        error_body(
                            500,
                            f"the gateway sends request bodies as {self._unusable}, which an "
                            "endpoint picker can't use; FULL_DUPLEX_STREAMED or BUFFERED is needed",
                        ),
                    )
                )
            ]
        self._state = _State.BODY
        # In full duplex the answer to the headers carries the pick and has to wait for the body.
        return [] if self._duplex_request else [wire.CONTINUE_REQUEST_HEADERS]

    def _request_body(self, body: pb.HttpBody) -> list[bytes | PickRequest]:
        if self._state is not _State.BODY:
            return self._violation("a request body out of turn", wire.CONTINUE_REQUEST_BODY)
        chunk = body.body
        self._has_body = True
        if len(self._body) + len(chunk) > self._body_limit:
            self._close()
            message = f"the request's body is larger than {self._body_limit} bytes"
            return [
                wire.immediate(Refusal(413, error_body(413, message, code="request_too_large")))
            ]
        if not self._duplex_request:
            # BUFFERED is the whole body in one message; without end_of_stream if trailers follow.
            return self._pick(chunk)
        if not self._body:  # as a rule one chunk holds all of it
            self._body = chunk
        elif chunk:
            if not isinstance(self._body, bytearray):
                self._body = bytearray(self._body)
            self._body += chunk
        return self._pick(self._whole()) if body.end_of_stream else []

    def _request_trailers(self) -> list[bytes | PickRequest]:
        if self._state is _State.PICKING and not self._duplex_request and not self._trailers:
            self._trailers = True
            return []
        if self._state is not _State.BODY or not self._duplex_request:
            return self._violation("request trailers out of turn", wire.CONTINUE_REQUEST_TRAILERS)
        # With trailers no chunk has end_of_stream: the trailers are the end of the body.
        self._trailers = self._has_body = True
        return self._pick(self._whole())

    def _whole(self) -> bytes:
        self._body = bytes(self._body)
        return self._body

    def _pick(self, body: bytes | None) -> list[bytes | PickRequest]:
        self._state = _State.PICKING
        return [PickRequest(self._head, body, self._subset)]

    def _header_mutation(self, route: Route, destination: str) -> bytes:
        set_headers = [(DESTINATION_HEADER, destination)]
        if self._request_id:
            set_headers.append((REQUEST_ID_HEADER, self._request_id))
        set_headers.extend(route.set_headers)
        if route.body is not None and self._has_body and not self._duplex_request:
            # Envoy compares it with the new body, and fails the request if they differ.
            set_headers.append(("content-length", str(len(route.body))))
        ours = {name for name, _ in set_headers}
        remove = [name for name in self._head.headers if steers_routing(name) and name not in ours]
        remove.extend(route.remove_headers)
        return wire.header_mutation(set_headers, remove)

    def _response_headers(self, message: pb.ProcessingRequest) -> list[bytes | PickRequest]:
        self._leave_pick()
        route = self._route
        if route is None:
            return [wire.CONTINUE_RESPONSE_HEADERS]
        headers: dict[str, str] = {}
        for header in message.response_headers.headers.headers:
            if header.key in _RESPONSE_HEADERS:
                headers[header.key] = header.raw_value.decode("ascii", "replace") or header.value
        route.complete = message.response_headers.end_of_stream or self._response_unseen
        status = headers.get(":status", "")
        route.status = int(status) if _STATUS.fullmatch(status) else 0
        if message.HasField("metadata_context"):
            route.served = _served(message.metadata_context)
        set_headers = list(route.response_headers)
        remove: list[str] = []
        if self._decision_header and route.routing:
            set_headers.append((ROUTING_HEADER, route.routing))
        if self._served_header and route.served:
            set_headers.append((self._served_header, route.served))
        if route.restore_model is not None and self._duplex_response:
            types = headers.get("content-type", ""), headers.get("content-encoding", "")
            if can_restore(*types):
                self._restorer = ModelRestorer(*route.restore_model)
                remove.append("content-length")
        if set_headers or remove:
            return [wire.response_headers(set_headers, remove)]
        return [wire.CONTINUE_RESPONSE_HEADERS]

    def _response_body(self, body: pb.HttpBody) -> list[bytes | PickRequest]:
        self._leave_pick()
        self._note_end(body)
        if not self._duplex_response:
            return [wire.CONTINUE_RESPONSE_BODY]
        data = body.body
        if self._restorer is not None:
            data = self._restorer.feed(data, body.end_of_stream)
        chunks = wire.streamed_chunks(wire.RESPONSE_BODY, data, body.end_of_stream)
        # An empty chunk that ends nothing still gets its answer.
        return [*(chunks or [wire.streamed_body(wire.RESPONSE_BODY, b"", False)])]

    def _note_end(self, body: pb.HttpBody) -> None:
        if body.end_of_stream and self._route is not None:
            self._route.complete = True

    def _response_trailers(self) -> list[bytes | PickRequest]:
        self._leave_pick()
        if self._route is not None:
            self._route.complete = True
        held = b"" if self._restorer is None else self._restorer.flush()
        chunks = wire.streamed_chunks(wire.RESPONSE_BODY, held, False)
        return [*chunks, wire.CONTINUE_RESPONSE_TRAILERS]

    def _leave_pick(self) -> None:
        """A response before the answer is the proxy's own (a timeout, a limit, a client gone):
        the request goes nowhere, and answers to it would only confuse the proxy."""
        if self._state is not _State.ANSWERED:
            self._state = _State.ANSWERED
            self._body = b""

    def _violation(self, what: str, answer: bytes | None = None) -> list[bytes | PickRequest]:
        """``answer`` keeps a proxy going that waits for exactly one answer a message."""
        if self._state is _State.ANSWERED:
            log.warning("the proxy sent %s after its turn; ignored", what)
            return [answer] if answer is not None and not self._duplex_request else []
        log.error("the proxy sent %s while waiting for %s", what, self._state.value)
        self._close()
        message = f"the gateway broke the external processing protocol: {what}"
        return [wire.immediate(Refusal(500, error_body(500, message)))]

    def _close(self) -> None:
        self._state = _State.CLOSED
        self._body = b""


def _subset_hint(metadata: base_pb2.Metadata) -> tuple[str, ...] | None:
    """A list of strings or one CSV string: gateways differ in how they write it."""
    if SUBSET_NAMESPACE not in metadata.filter_metadata:
        return None
    fields = metadata.filter_metadata[SUBSET_NAMESPACE].fields
    if SUBSET_KEY not in fields:
        return None
    value = fields[SUBSET_KEY]
    kind = value.WhichOneof("kind")
    if kind == "list_value":
        texts = [item.string_value for item in value.list_value.values]
    else:
        texts = [value.string_value] if kind == "string_value" else []
    return tuple(part for text in texts for part in map(str.strip, text.split(",")) if part)


def _served(metadata: base_pb2.Metadata) -> str:
    if SERVED_NAMESPACE not in metadata.filter_metadata:
        return ""
    fields = metadata.filter_metadata[SERVED_NAMESPACE].fields
    return str(fields[SERVED_KEY].string_value) if SERVED_KEY in fields else ""
