"""What can be set on a frontend, with the reasons for the defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


def default_concurrency() -> int:
    """Envoy threads: two serve thousands of streams, and cores belong to the picker too."""
    return min(2, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    """All times are seconds, all sizes bytes."""

    http_host: str = "0.0.0.0"
    """Bind address of the OpenAI-compatible API."""
    http_port: int = 8000
    status_host: str = "0.0.0.0"
    """Bind address of the picker's status server (`/metrics`, `/ready`, `/v1/models`)."""
    status_port: int = 9090
    concurrency: int = field(default_factory=default_concurrency)
    """Threads of Envoy."""
    body_limit: int = 32 * 1024 * 1024
    """A larger request body is answered with 413. Images in chats make bodies of megabytes."""
    stream_idle_timeout: float = 600.0
    """A stream on which nothing moves for this long ends with an error. It bounds the time to the
    first token and the gap between tokens, so it has to be longer than the longest prefill; what it
    catches are engines that died without closing their connections."""
    pick_timeout: float = 600.0
    """How long a request may wait for the picker (it queues requests under load)."""
    connect_timeout: float = 2.0
    """After this the next endpoint of the picker's list is tried."""
    retries: int = 3
    """Endpoints tried after the first, before the first byte of an answer, as far as the picker's
    list goes."""
    upstream_idle_timeout: float = 4.0
    """Idle connections to engines are closed after this long. Uvicorn closes them after 5 s, and a
    request sent in that moment would be lost: the proxy has to be first."""
    decision_header: bool = False
    """Put how the pick was made on responses (`x-dynamo-routing`). Only where clients are trusted:
    it tells one tenant what is in another's cache."""
    drain_seconds: float = 30.0
    """On SIGTERM running requests get this long to end."""
    drain_accept_seconds: float = 0.0
    """On SIGTERM new requests are still accepted for this long, until every load balancer has seen
    that this frontend is not ready."""
    envoy_log_level: str = "warning"
