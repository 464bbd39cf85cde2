"""What passes between the protocol and whoever picks: plain data, no protobuf.

A picker never sees an Envoy message, so that it can be tested, replayed and explained without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

DESTINATION_HEADER = "x-gateway-destination-endpoint"
ROUTING_HEADER = "x-dynamo-routing"
REQUEST_ID_HEADER = "x-request-id"

PICKER_DETAILS = "endpoint_picker"
"""Envoy's ``response_code_details`` of responses that come from the picker itself."""

ROUTING_HEADER_PREFIXES = (DESTINATION_HEADER, "x-dynamo-")
ROUTING_HEADERS = frozenset(
    {
        "x-data-parallel-host-port",
        "x-data-parallel-rank",
        "x-encoder-hosts-ports",
        "x-kv-cache-source-host-port",
        "x-prefiller-host-port",
    }
)
"""Headers that steer a picker, a sidecar or an engine. Only a picker may set them: from a client
they would choose a worker, or make an engine fetch another host's cache."""


def steers_routing(name: str) -> bool:
    """Whether the header ``name`` (lower case) is for pickers to set and clients to keep off."""
    return name.startswith(ROUTING_HEADER_PREFIXES) or name in ROUTING_HEADERS


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's first lines."""

    method: str
    path: str  # with the query string
    headers: Mapping[str, str]  # lower-case names; repeated ones joined by ","


@dataclass(frozen=True, slots=True)
class PickRequest:
    """The question: where should this request go?"""

    head: RequestHead
    body: bytes | None  # None: the request has no body
    subset: tuple[str, ...] | None = None
    """The only endpoints (``ip:port``, or a bare ``ip`` for all its ports) that may be chosen, by
    the gateway's subset hint. Empty: none may. ``None``: no hint, any endpoint of the pool."""


@dataclass(slots=True)
class Route:
    """The answer: endpoints, best first, and what to change on the way there."""

    endpoints: tuple[str, ...]  # "ip:port"; the proxy goes down the list when it retries
    set_headers: tuple[tuple[str, str], ...] = ()
    remove_headers: tuple[str, ...] = ()
    body: bytes | None = None  # replaces the request's body
    response_headers: tuple[tuple[str, str], ...] = ()  # for the client, where answers are relayed
    restore_model: tuple[str, str] | None = None
    """(the engine's name, the client's): a relayed answer gets the latter back."""
    routing: str = ""  # how the decision was made, for ROUTING_HEADER
    booking: object = None  # the picker's own
    unseen: bool = False
    """Filled in as it goes out: the answer's body will not come here, and perhaps nothing of it."""
    status: int = 0  # filled in by a relayed response: its HTTP status
    served: str = ""  # filled in by a relayed response: the endpoint that answered, if told
    complete: bool = False
    """Filled in by a relayed response: its end has passed through, or would not have come here."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The other answer: an HTTP response from the picker itself."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Picker(Protocol):
    """Whoever chooses. ``released`` follows each returned ``Route`` exactly once."""

    async def pick(self, request: PickRequest) -> Route | Refusal:
        """Choose. May be cancelled when the client leaves while this runs; nothing is released
        then, so what was booked here must be undone here."""
        ...

    def answered(self, route: Route) -> None:
        """The answer has begun: ``route.status`` and ``route.served`` are known. Only of relayed
        answers (full duplex), and at most once, before ``released``."""
        ...

    def released(self, route: Route) -> None:
        """The request has ended: answered, failed or abandoned."""
        ...
