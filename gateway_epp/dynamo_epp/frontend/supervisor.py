"""The life of a frontend: picker, Envoy and status server start, serve, drain and stop as one.

Only Envoy's port is public. Picker and Envoy meet on unix sockets in a private directory, so that
two frontends on one machine can't get into each other's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web
from dynamo_runtime import open_files
from dynamo_runtime.discovery import Endpoint
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import AddressInUse, StatusServer, bind
from dynamo_runtime.unsent import until_sent
from prometheus_client import CollectorRegistry

from dynamo_epp.extproc import Picker
from dynamo_epp.frontend.bootstrap import ACCESS_LOG_FLUSH_S, Sockets, bootstrap, dump, write_eds
from dynamo_epp.frontend.envoy import Envoy, EnvoyFailed
from dynamo_epp.frontend.settings import FrontendSettings
from dynamo_epp.server import AccessEntry, PickerServer

log = logging.getLogger(__name__)

_UNIX_PATH_LIMIT = 100  # bytes; the kernel allows 107
_IDLE_POLL_S = 0.05


class ServingPicker(Picker, Protocol):
    """What a frontend needs of a picker beside the choice itself."""

    def add_routes(self, app: web.Application) -> None:
        """Add ``GET /v1/models`` and ``GET /v1/models/{id}`` (and what else it wants to show) to
        the status server."""
        ...

    async def start(self, publish: Callable[[Sequence[Endpoint]], None]) -> None:
        """Begin to watch the endpoints; return when the first snapshot is known. ``publish`` takes
        each snapshot, the first one included, before any of its endpoints is picked."""
        ...

    def logged(self, entry: AccessEntry) -> None:
        """One request has ended, in Envoy's words (some 0.1 s later)."""
        ...

    async def stop(self) -> None: ...


async def run_frontend(
    settings: FrontendSettings,
    lifecycle: Lifecycle,
    make_picker: Callable[[CollectorRegistry], ServingPicker],
) -> int:
    """Serve until ``lifecycle.stop_requested``, drain, and return the exit status.

    ``make_picker`` gets the registry whose metrics are served. What prevents the start is one
    line in the log and status 1; so is an Envoy that ends by itself.
    """
    open_files.raise_limit()  # each request takes two descriptors of Envoy's
    try:
        async with contextlib.AsyncExitStack() as stack:
            await _serve(settings, lifecycle, make_picker, stack)
    except (AddressInUse, EnvoyFailed, OSError) as error:
        log.error("%s", error)
        lifecycle.request_stop(str(error))
        return 1
    return 0


async def _serve(
    settings: FrontendSettings,
    lifecycle: Lifecycle,
    make_picker: Callable[[CollectorRegistry], ServingPicker],
    stack: contextlib.AsyncExitStack,
) -> None:
    _check_port(settings)
    sockets = Sockets(Path(stack.enter_context(_private_directory())))
    sockets.bootstrap.write_text(dump(bootstrap(settings, sockets)))
    write_eds(sockets.eds, ())

    registry = CollectorRegistry()
    picker = make_picker(registry)
    status = StatusServer(lifecycle, registry, settings.status_host, settings.status_port)
    stack.push_async_callback(picker.stop)
    picker.add_routes(status.app)
    await status.start()
    stack.push_async_callback(status.stop)

    envoy = await Envoy.start(
        sockets, concurrency=settings.concurrency, log_level=settings.envoy_log_level
    )
    server = PickerServer(
        picker,
        ready=lambda: lifecycle.ready,
        on_access=picker.logged,
        body_limit=settings.body_limit,
    )
    stack.push_async_callback(server.stop, 1.0)
    stack.push_async_callback(envoy.stop)
    await server.start(f"unix:{sockets.picker}")

    supervision = _Supervision(envoy, lifecycle)
    stack.push_async_callback(supervision.end)
    lifecycle.set_not_ready("waiting for the first list of endpoints")
    publish = functools.partial(write_eds, sockets.eds)
    if not await supervision.step(picker.start(publish)):
        return
    lifecycle.set_not_ready("waiting for Envoy to listen")
    if not await supervision.step(envoy.live()):
        return
    lifecycle.set_ready()
    log.info("serving on http://%s:%d", settings.http_host, settings.http_port)
    await supervision.step(lifecycle.stop_requested.wait())
    await supervision.step(_drain(settings, envoy), interruptible=False)


class _Supervision:
    """Awaits one thing while two others may happen: a stop request, and the end of Envoy."""

    def __init__(self, envoy: Envoy, lifecycle: Lifecycle) -> None:
        self._ended = asyncio.create_task(envoy.ended())
        self._stop = asyncio.create_task(lifecycle.stop_requested.wait())

    async def step(self, work: Coroutine[Any, Any, object], *, interruptible: bool = True) -> bool:
        """Whether ``work`` was done before a stop was requested. Raises what it raises, and
        ``EnvoyFailed`` if Envoy ends meanwhile."""
        task = asyncio.create_task(work)
        watched: set[asyncio.Task[Any]] = {task, self._ended}
        if interruptible:
            watched.add(self._stop)
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                raise self._ended.result()
            if not task.done():
                return False
            task.result()
            return True
        finally:
            await _cancel(task)

    async def end(self) -> None:
        await _cancel(self._ended)
        await _cancel(self._stop)


async def _cancel(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


async def _drain(settings: FrontendSettings, envoy: Envoy) -> None:
    """Readiness is gone already. Let load balancers see that, then let running requests end."""
    await envoy.announce_drain()
    if settings.drain_accept_seconds:
        log.info("accepting requests for another %g s", settings.drain_accept_seconds)
        await asyncio.sleep(settings.drain_accept_seconds)
    await envoy.stop_accepting()
    began = time.monotonic()
    try:
        async with asyncio.timeout(settings.drain_seconds):
            while active := await envoy.active_requests():
                log.debug("waiting for %d requests", active)
                await asyncio.sleep(_IDLE_POLL_S)
    except TimeoutError:
        log.warning(
            "%d requests still run after %g s of draining; cutting them",
            await envoy.active_requests(),
            settings.drain_seconds,
        )
        return
    # Answers that have ended may still be on their way to slow readers.
    limit = settings.drain_seconds - (time.monotonic() - began)
    if left := await until_sent(settings.http_host, settings.http_port, limit):
        log.warning("%d bytes of answers were never taken", left)
    await asyncio.sleep(ACCESS_LOG_FLUSH_S)  # the last requests' entries are on their way, too


def _check_port(settings: FrontendSettings) -> None:
    """Envoy's own complaint about a taken port is a page long; say it in a line before."""
    try:
        bind(settings.http_host, settings.http_port).close()
    except AddressInUse as error:
        raise AddressInUse(
            f"{error}; choose another with --http-port or DYN_HTTP_PORT, or --http-host"
        ) from error


def _private_directory() -> tempfile.TemporaryDirectory[str]:
    """Mode 0700, and short enough for the names of unix sockets."""
    for parent in (None, "/tmp"):
        directory = tempfile.TemporaryDirectory(prefix="dynamo-", dir=parent)
        if len(directory.name) < _UNIX_PATH_LIMIT - len("/admin.sock"):
            return directory
        directory.cleanup()
    raise OSError("no directory for temporary files has a path short enough for unix sockets")
