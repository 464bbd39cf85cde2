"""gRPC health checking, protocol ``grpc.health.v1``.

Gateways and probes each ask under a name of their own, and an unknown name breaks real gateways, so
every name that the field uses is known. The two messages are small enough to be written as bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

LIVENESS = "liveness"
READINESS = ("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension")

# HealthCheckResponse{status = 1}
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"

WATCH_INTERVAL_S = 0.25

Context = grpc.aio.ServicerContext[bytes, bytes]


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
        self.ending = False
        """The server is about to stop: watches end, which would hold it up for ever."""

    def status(self, service: str | None) -> bytes:
        if service == LIVENESS:
            return SERVING
        if service in READINESS:
            return SERVING if self._ready() else NOT_SERVING
        return SERVICE_UNKNOWN

    async def check(self, data: bytes, context: Context) -> bytes:
        service = requested_service(data)
        status = self.status(service)
        if status == SERVICE_UNKNOWN:
            names = ", ".join(repr(name) for name in (*READINESS, LIVENESS))
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"unknown service {service!r}; known: {names}"
            )
        return status

    async def watch(self, data: bytes, context: Context) -> None:
        """Each change of the status, looked at every ``WATCH_INTERVAL_S`` seconds."""
        service = requested_service(data)
        sent = b""
        while not self.ending:
            status = self.status(service)
            if status != sent:
                await context.write(status)
                sent = status
            await asyncio.sleep(WATCH_INTERVAL_S)

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        check: Callable[[bytes, Any], Awaitable[bytes]] = self.check
        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health",
            {
                "Check": grpc.unary_unary_rpc_method_handler(check),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
            },
        )
