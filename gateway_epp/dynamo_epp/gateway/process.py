"""The life of a picker behind a Gateway: it starts, serves, drains and stops.

The ports are open from the beginning, so that probes get an answer with a reason; readiness comes
with the first list of endpoints and goes with the InferencePool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from dynamo_runtime import open_files
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import AddressInUse, StatusServer
from prometheus_client import CollectorRegistry, Gauge

from dynamo_epp.extproc import Picker
from dynamo_epp.frontend.supervisor import ServingPicker
from dynamo_epp.gateway import tls
from dynamo_epp.gateway.conformance import SERVED, ConformancePicker
from dynamo_epp.gateway.settings import GatewaySettings
from dynamo_epp.server import PickerServer

log = logging.getLogger(__name__)


class PoolPicker(ServingPicker, Protocol):
    """What this process needs of a picker."""

    absent: str
    """Why there is nothing to pick from for reasons of configuration; "" if there is."""


async def run_picker(
    settings: GatewaySettings,
    lifecycle: Lifecycle,
    make_picker: Callable[[CollectorRegistry], PoolPicker],
) -> int:
    """Serve until ``lifecycle.stop_requested``, drain, and return the exit status.

    What prevents the start is one line in the log and status 1.
    """
    open_files.raise_limit()  # pods, their streams and metrics, and whoever asks
    try:
        async with contextlib.AsyncExitStack() as stack:
            await _serve(settings, lifecycle, make_picker, stack)
    except (AddressInUse, OSError, tls.InvalidCertificate) as error:
        log.error("%s", error)
        lifecycle.request_stop(str(error))
        return 1
    return 0


async def _serve(
    settings: GatewaySettings,
    lifecycle: Lifecycle,
    make_picker: Callable[[CollectorRegistry], PoolPicker],
    stack: contextlib.AsyncExitStack,
) -> None:
    secured = tls.server_context(settings.tls, tls.now())
    registry = CollectorRegistry()
    picker = make_picker(registry)
    status = StatusServer(lifecycle, registry, settings.host, settings.status_port)
    stack.push_async_callback(picker.stop)
    picker.add_routes(status.app)
    await status.start()
    stack.push_async_callback(status.stop)

    asked: Picker = ConformancePicker(picker) if settings.conformance_headers else picker
    server = PickerServer(
        asked,
        ready=lambda: lifecycle.ready,
        body_limit=settings.body_limit,
        duplex=True,
        decision_header=settings.decision_header,
        served_header=SERVED if settings.conformance_headers else "",
    )
    stream_gauge(registry).set_function(lambda: server.streams)
    stack.push_async_callback(server.stop, 0)
    health = _address(settings.host, settings.health_port) if settings.health_port else None
    lifecycle.set_not_ready("waiting for the first list of endpoints")
    await server.start(
        _address(settings.host, settings.grpc_port), health_address=health, tls=secured
    )
    starting = asyncio.create_task(picker.start(lambda endpoints: None))
    stopping = asyncio.create_task(lifecycle.stop_requested.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            if not picker.absent:
                lifecycle.set_ready()
            log.info("serving ext_proc on %s:%d", settings.host, settings.grpc_port)
            await stopping
            await _drain(settings, server)
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


def stream_gauge(registry: CollectorRegistry) -> Gauge:
    return Gauge(
        "dynamo_epp_ext_proc_streams",
        "Requests whose stream is open at the moment.",
        registry=registry,
    )


async def _drain(settings: GatewaySettings, server: PickerServer) -> None:
    """Readiness is gone already. Let the Gateway see that, then let running requests end."""
    accepting = min(settings.drain_accept_seconds, settings.drain_seconds)
    if accepting:
        log.info("taking requests for another %g s", accepting)
        await asyncio.sleep(accepting)
    running = server.streams
    await server.stop(settings.drain_seconds - accepting)
    if running:
        log.info("%d requests were running; the last has ended or was cut", running)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
