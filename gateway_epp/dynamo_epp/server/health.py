"""gRPC health checking, protocol ``grpc.health.v1``.

Gateways and probes each ask under a name of their own, and an unknown name breaks real gateways, so
every name that the field uses is known. The two messages are small enough to be written as bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_epp.server.transport import Call, Handler, Status

LIVENESS = "liveness"
READINESS = ("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension")

# HealthCheckResponse{status = 1}
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"

WATCH_INTERVAL_S = 0.25


def requested_service(data: bytes) -> str | None:
    """``HealthCheckRequest.service``; ``None`` if ``data`` is no such message."""
    if not data:
        return ""
    # Field 1, length-delimited. A length above 127 needs a second byte; no name here is that long.
    if len(data) < 2 or data[0] != 0x0A or data[1] != len(data) - 2:
        return None
    return data[2:].decode("utf-8", "replace")


class Health:
    """``ready`` is asked anew for each answer."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready

    def status(self, service: str | None) -> bytes:
        if service == LIVENESS:
            return SERVING
        if service in READINESS:
            return SERVING if self._ready() else NOT_SERVING
        return SERVICE_UNKNOWN

    def accept(self, call: Call, path: str) -> Handler | None:
        """The handler of a call of this service; None if ``path`` is another's."""
        match path:
            case "/grpc.health.v1.Health/Check":
                return _Check(self, call)
            case "/grpc.health.v1.Health/Watch":
                return _Watch(self, call)
        return None


class _Check:
    """One question, one answer."""

    lasting = False

    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call

    def message(self, data: bytes) -> None:
        service = requested_service(data)
        status = self._health.status(service)
        if status == SERVICE_UNKNOWN:
            names = ", ".join(repr(name) for name in (*READINESS, LIVENESS))
            self._call.finish(Status.NOT_FOUND, f"unknown service {service!r}; known: {names}")
        self._call.send(status)
        self._call.finish()

    def unreadable(self, status: Status, reason: str) -> None:
        pass

    def half_closed(self) -> None:
        self._call.finish(Status.INTERNAL, "a health check without a question")

    def broken(self) -> None:
        pass


class _Watch:
    """Each change of a status, looked at every ``WATCH_INTERVAL_S`` seconds."""

    lasting = True

    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call
        self._service: str | None = ""
        self._sent = b""
        self._next: asyncio.TimerHandle | None = None

    def message(self, data: bytes) -> None:
        self._service = requested_service(data)
        if self._next is None:
            self._look()

    def _look(self) -> None:
        if self._call.finished:
            return
        status = self._health.status(self._service)
        if status != self._sent:
            self._call.send(status)
            self._sent = status
        self._next = asyncio.get_running_loop().call_later(WATCH_INTERVAL_S, self._look)

    def unreadable(self, status: Status, reason: str) -> None:
        pass

    def half_closed(self) -> None:
        pass  # the question was all that the client had to say

    def broken(self) -> None:
        if self._next is not None:
            self._next.cancel()
