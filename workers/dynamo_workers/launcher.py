"""One worker: an engine as a child process, and what pickers need to know of it as a stream.

The launcher stands beside the data path, not in it. It starts the engine with sockets for its KV
events and its load, turns the events into block keys, publishes keys, load and a snapshot to every
picker that subscribes, answers the pod's probes, and lets running requests finish before it stops
the engine. As process 1 of a container it also buries orphans.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import msgspec
import zmq
import zmq.asyncio
from aiohttp import web
from dynamo_kv_router import engine_metrics
from dynamo_kv_router.engine_events import EngineBatch, EngineEventSource, Missed
from dynamo_kv_router.keys import model_seed
from dynamo_kv_router.normaliser import Normaliser
from dynamo_kv_router.stream.format import Accepted, Finished, FirstToken, Load, WorkerInfo
from dynamo_kv_router.stream.publisher import WorkerPublisher
from dynamo_runtime.child import Child, signal_group
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import AddressInUse, StatusServer, bind
from dynamo_runtime.unsent import until_sent
from prometheus_client import CollectorRegistry

from dynamo_workers import orphans
from dynamo_workers.engines.base import Description, Engine, EngineUnclear, Models, Place
from dynamo_workers.guard import Guard
from dynamo_workers.in_flight import Flights, RequestEvent
from dynamo_workers.metrics import WorkerMetrics
from dynamo_workers.readiness import judge
from dynamo_workers.settings import Settings

log = logging.getLogger(__name__)

HEALTH_POLL_S = 0.2  # while the engine starts
CHECK_S = 1.0  # health, metrics and load of a running engine
MODELS_EVERY = 5  # checks between two looks at the list of adapters
SILENT_CHECKS = 3  # health checks without an answer that make an engine unhealthy
DRAIN_POLL_S = 0.05
TAIL_LINES = 40  # of the engine's output, repeated when it dies
UNIX_PATH_BYTES = 107  # a unix socket's address has no room for more


class EngineHung(Exception):
    """An engine runs and does nothing."""


async def run_launcher(
    engine: Engine, settings: Settings, lifecycle: Lifecycle, *, adopt_orphans: bool = False
) -> int:
    """Run one worker until it is told to stop or its engine ends; return the exit status.

    0: stopped on request, every request served. 1: stopped on request with requests cut, or a
    start that can't work. Otherwise the engine ended by itself, and this is its status (128 + the
    signal's number if it was killed; 1 if it claimed success).
    """
    folder = _socket_folder()
    try:
        return await Launcher(engine, settings, lifecycle, folder, adopt_orphans).run()
    except AddressInUse as error:
        log.error("%s", error)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _socket_folder() -> Path:
    """A fresh folder for sockets whose paths are short enough to be addresses."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        folder = Path(tempfile.mkdtemp(prefix="dyn-", dir=parent))
        if len(os.fsencode(folder / "reports")) <= UNIX_PATH_BYTES:
            return folder
        folder.rmdir()
    raise AssertionError("a path in /tmp is short")


class Launcher:
    """The parts of one worker and what they share. ``run`` is called once."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        lifecycle: Lifecycle,
        folder: Path,
        adopt_orphans: bool,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._lifecycle = lifecycle
        self._adopt_orphans = adopt_orphans
        self._folder = folder
        self._place = Place(
            host=settings.http_host,
            port=settings.http_port,
            events=f"ipc://{folder}/events",
            replay=f"ipc://{folder}/replay",
            reports=f"ipc://{folder}/reports",
        )
        registry = CollectorRegistry()
        self._metrics = WorkerMetrics(registry)
        self._status = StatusServer(lifecycle, registry, settings.system_host, settings.system_port)
        self._status.app.router.add_get("/worker", self._show_worker)
        self._status.app.router.add_get("/tokenizer/{name:.+}", self._serve_tokenizer)
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._flights = Flights()
        self._reported = False  # the middleware has said anything at all
        self._page = ""  # the engine's metrics, last scraped
        self._figures: engine_metrics.EngineFigures | None = None  # what is read off them
        self._status.foreign_metrics = lambda: self._page
        # Known once the engine is healthy.
        self._description: Description | None = None
        self._models: Models | None = None  # as last asked: adapters come and go
        self._publisher: WorkerPublisher | None = None
        self._normaliser: Normaliser | None = None

    async def run(self) -> int:
        lifecycle, settings = self._lifecycle, self._settings
        if self._adopt_orphans:
            orphans.adopt()
        lifecycle.set_not_ready("the engine is starting")
        # Found out here it is one clear line; found out by an engine it is a page, a minute later.
        bind(settings.http_host, settings.http_port).close()
        bind(settings.system_host, settings.stream_port).close()
        await self._status.start()
        context = zmq.asyncio.Context()
        reports = context.socket(zmq.PULL)
        reports.bind(self._place.reports)
        try:
            argv = self._engine.argv(self._place)
            log.info("starting the engine: %s", " ".join(argv))
            child = await Child.start(argv, env=self._engine.env(self._place), on_line=self._line)
            guard = await Guard.start(child.pid, self._folder)
            try:
                return await self._supervise(child, guard, reports)
            finally:
                if child.returncode is None:
                    await child.stop(0.0)
                # An engine's helpers may outlive it; the port and the memory are theirs.
                signal_group(child.pid, signal.SIGKILL)
                await guard.release()
        finally:
            if self._publisher is not None:
                await self._publisher.stop()
            reports.close(linger=0)
            context.term()
            await self._status.stop()

    def _line(self, line: str) -> None:
        self._tail.append(line)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    async def _supervise(self, child: Child, guard: Guard, reports: zmq.asyncio.Socket) -> int:
        ended = asyncio.create_task(child.wait())
        stop = asyncio.create_task(self._lifecycle.stop_requested.wait())
        serving = asyncio.create_task(self._serve({child.pid, guard.pid}, reports))
        tasks = (ended, stop, serving)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not stop.done() and serving.done() and not ended.done():
                error = _cause(serving)
                expected = isinstance(error, EngineUnclear | EngineHung | OSError)
                log.error("the worker can't go on: %s", error, exc_info=None if expected else error)
                hung = isinstance(error, EngineHung)
                await child.stop(0.0 if hung else self._settings.stop_grace_s)
                return 1
            if ended.done():
                return self._engine_ended(ended.result())
            return await self._drain(child, ended)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _engine_ended(self, status: int) -> int:
        self._lifecycle.set_not_ready("the engine ended")
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        log.error("the engine %s; its last lines:\n%s", how, "\n".join(self._tail))
        return 128 - status if status < 0 else status or 1

    # while the engine runs

    async def _serve(self, own: set[int], reports: zmq.asyncio.Socket) -> None:
        """From start to stop: never returns, raises if the worker can't do its work."""
        timeout = aiohttp.ClientTimeout(total=self._settings.health_timeout_s)
        async with aiohttp.ClientSession(timeout=timeout) as client:
            await self._until_healthy(client)
            description = await self._engine.describe(client, self._place)
            self._description, self._models = description, description.models
            if description.files.reason:
                log.warning("no tokenizer for pickers: %s", description.files.reason)
            model = description.models.names[0]
            normaliser = self._normaliser = Normaliser(
                description.block_size, lambda lora: model_seed(model, lora)
            )
            publisher = WorkerPublisher(
                self._settings.stream_address,
                self._worker_info(),
                on_pickers=self._metrics.pickers.set,
            )
            await publisher.start()
            self._publisher = publisher
            log.info(
                "%s serves %s: %d blocks of %d tokens; stream on %s",
                self._settings.name,
                ", ".join(description.models.names),
                description.total_blocks,
                description.block_size,
                publisher.endpoint,
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_events(publisher, normaliser))
                group.create_task(self._follow_reports(reports))
                group.create_task(self._check(client, publisher))
                if self._adopt_orphans:
                    group.create_task(self._reap(own))

    async def _until_healthy(self, client: aiohttp.ClientSession) -> None:
        began = said = time.monotonic()
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with client.get(f"{self._place.url}/health") as response:
                    if response.status == 200:
                        break
            if time.monotonic() - said >= 30.0:
                said = time.monotonic()
                log.info("the engine is still starting, %.0f s so far", said - began)
            await asyncio.sleep(HEALTH_POLL_S)
        self._metrics.engine_healthy.set(1)
        log.info("the engine is healthy after %.1f s", time.monotonic() - began)

    def _worker_info(self) -> WorkerInfo:
        description, models, normaliser = self._description, self._models, self._normaliser
        assert description is not None
        assert models is not None
        assert normaliser is not None
        return WorkerInfo(
            worker=self._settings.name,
            model=models.names[0],
            models=list(models.names),
            loras=list(models.adapters),
            block_size=description.block_size,
            total_blocks=description.total_blocks,
            max_model_len=description.max_model_len,
            max_num_batched_tokens=description.max_num_batched_tokens,
            runtime=self._engine.runtime,
            tokenizer=description.files.digests,
            tokenizer_settings=description.tokenizer_settings,
            exact_events=normaliser.exact,
        )

    async def _follow_events(self, publisher: WorkerPublisher, normaliser: Normaliser) -> None:
        """The engine's own events become blocks in the stream, for as long as it runs."""
        source = EngineEventSource(self._place.events, self._place.replay)
        unchained = 0
        async for item in source.batches():
            changes = normaliser.apply(item)
            if changes.cleared:
                publisher.clear()
            if changes.removed:
                publisher.remove(list(changes.removed))
            if changes.stored:
                publisher.store(list(changes.stored))
            if isinstance(item, EngineBatch):
                self._metrics.events.inc(len(item.events))
            elif isinstance(item, Missed):
                self._metrics.missed.inc(item.last - item.first + 1)
            self._metrics.unchained.inc(normaliser.unchained - unchained)
            unchained = normaliser.unchained
            if normaliser.exact != publisher.session.info.exact_events:
                why = normaliser.why_not_exact
                level = logging.WARNING if why else logging.INFO
                log.log(
                    level, "cached blocks are known %s", f"in part: {why}" if why else "exactly"
                )
                publisher.set_info(self._worker_info())
            self._metrics.exact.set(normaliser.exact)

    async def _follow_reports(self, socket: zmq.asyncio.Socket) -> None:
        decode = msgspec.msgpack.Decoder(list).decode
        while True:
            payload = await socket.recv()
            assert isinstance(payload, bytes)
            try:
                events = self._flights.apply(decode(payload))
            except (msgspec.DecodeError, ValueError) as error:
                log.warning("a report from the engine was skipped: %s", error)
                continue
            self._reported = True
            self._tell(events)

    def _tell(self, events: list[RequestEvent]) -> None:
        publisher, metrics, flights = self._publisher, self._metrics, self._flights
        assert publisher is not None
        for event in events:
            match event:
                case Accepted(booking, prompt_tokens, cached_tokens):
                    publisher.accepted(booking, prompt_tokens, cached_tokens)
                case FirstToken(booking, prefillers_failed):
                    publisher.first_token(booking, prefillers_failed)
                case Finished():
                    metrics.requests.inc()
                    publisher.finished(
                        event.booking,
                        prompt_tokens=event.prompt_tokens,
                        cached_tokens=event.cached_tokens,
                        completion_tokens=event.completion_tokens,
                        status=event.status,
                        prefillers_failed=event.prefillers_failed,
                    )
        if events:
            metrics.in_flight.set(len(flights))
        for outcome, count in flights.remote_prefills.items():
            metrics.remote_prefills.labels(outcome).inc(count)
        metrics.prefiller_failures.inc(flights.prefiller_failures)
        flights.remote_prefills.clear()
        flights.prefiller_failures = 0

    async def _check(self, client: aiohttp.ClientSession, publisher: WorkerPublisher) -> None:
        """Once a second: health, the engine's own figures, load, readiness."""
        loop = asyncio.get_running_loop()
        healthy_since = time.monotonic()
        answered_at = loop.time()
        silent = rounds = 0
        while True:
            unhealthy = ""
            try:
                async with client.get(f"{self._place.url}/health") as response:
                    if response.status != 200:
                        unhealthy = f"the engine's /health answers {response.status}"
                silent, answered_at = 0, loop.time()
                async with client.get(f"{self._place.url}/metrics") as response:
                    self._page = await response.text()
                self._figures = engine_metrics.figures(self._page)
                if rounds % MODELS_EVERY == 0:
                    self._models = await self._engine.models(client, self._place)
                    publisher.set_info(self._worker_info())
            except TimeoutError:
                silent += 1
                self._page = ""
                if silent >= SILENT_CHECKS:
                    unhealthy = f"the engine has not answered {silent} checks in a row"
                quiet_s = loop.time() - answered_at
                if 0 < self._settings.hung_s <= quiet_s:
                    raise EngineHung(
                        f"it hangs: no answer to a check for {quiet_s:.0f} s"
                    ) from None
            except (aiohttp.ClientError, EngineUnclear) as error:
                unhealthy = f"the engine can't be reached: {error}"
                self._page = ""
            rounds += 1
            self._metrics.engine_healthy.set(not unhealthy)
            if self._figures is not None:
                self._tell(self._flights.engine_counted(self._figures.first_tokens))
            # Our own counts are of this moment; what they are worth depends on the engine's.
            publisher.set_load(self._load(), answered_at)
            self._judge(unhealthy, publisher, time.monotonic() - healthy_since)
            if publisher.picker_seen.is_set():
                await asyncio.sleep(CHECK_S)
            else:
                # The first picker opens the worker at once.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(publisher.picker_seen.wait(), CHECK_S)

    def _judge(self, unhealthy: str, publisher: WorkerPublisher, healthy_for_s: float) -> None:
        lifecycle = self._lifecycle
        verdict = judge(
            unhealthy,
            picker_seen=publisher.picker_seen.is_set(),
            healthy_for_s=healthy_for_s,
            without_picker_s=self._settings.ready_without_picker_s,
        )
        if lifecycle.stop_requested.is_set():
            return
        if (verdict.ready, verdict.reason) != (lifecycle.ready, lifecycle.reason):
            level = logging.WARNING if unhealthy or verdict.without_picker else logging.INFO
            log.log(level, "%s", verdict.reason or "ready: a picker has subscribed")
        self._metrics.ready_without_picker.set(verdict.without_picker)
        if verdict.ready:
            lifecycle.set_ready()
            lifecycle.reason = verdict.reason
        else:
            lifecycle.set_not_ready(verdict.reason)

    def _load(self) -> Load:
        """The load as of this moment: our own count of requests, the engine's of its cache."""
        description, flights, figures = self._description, self._flights, self._figures
        assert description is not None
        assert self._publisher is not None
        decode_blocks = flights.blocks(description.block_size)
        metrics = self._metrics
        metrics.in_flight.set(len(flights))
        metrics.prefill_tokens.set(flights.prefill_tokens)
        metrics.decode_blocks.set(decode_blocks)
        metrics.reports_dropped.set(flights.dropped_reports)
        metrics.blocks_cached.set(self._publisher.session.cached_blocks)
        usage = figures.cache_usage if figures else 0.0
        return Load(
            running=figures.running if figures else 0,
            waiting=figures.waiting if figures else 0,
            active_prefill_tokens=flights.prefill_tokens,
            active_decode_blocks=decode_blocks,
            active_requests=len(flights),
            kv_blocks_used=round(usage * description.total_blocks),
            kv_blocks_total=description.total_blocks,
        )

    async def _reap(self, own: set[int]) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._metrics.orphans.inc(len(orphans.reap(own)))

    # the end

    async def _drain(self, child: Child, ended: asyncio.Task[int]) -> int:
        """Let what runs finish, then stop the engine. By itself it would cut running streams."""
        settings = self._settings
        self._metrics.draining.set(1)
        if self._publisher is not None:
            self._publisher.set_draining()
            cut = await self._until_idle(ended)
        else:
            cut = 0  # not up yet: nobody was sent here
        if ended.done():
            return self._engine_ended(ended.result())
        if cut:
            log.warning("%d requests still run after %g s: cutting them", cut, settings.drain_s)
        status = await child.stop(settings.stop_grace_s)
        log.info("the engine has stopped with status %d", status)
        return 1 if cut else 0

    async def _until_idle(self, ended: asyncio.Task[int]) -> int:
        """Wait for the last request, at most the drain limit; return how many still run."""
        began = quiet_since = time.monotonic()
        running = self._running()
        log.info("draining: %d requests run", running)
        while not ended.done():
            moment = time.monotonic()
            running = self._running()
            if running:
                quiet_since = moment
            elif moment - quiet_since >= self._settings.drain_quiet_s:
                await self._until_sent(self._settings.drain_s - (moment - began))
                return 0
            if moment - began >= self._settings.drain_s:
                return running
            await asyncio.wait({ended}, timeout=DRAIN_POLL_S)
        return running

    async def _until_sent(self, limit_s: float) -> None:
        """Wait for readers that are slow: answers that have ended may still be on their way."""
        left = await until_sent(self._settings.http_host, self._settings.http_port, limit_s)
        if left:
            log.warning("%d bytes of answers were never taken", left)

    def _running(self) -> int:
        """Requests in the engine; its own late figure where the middleware never said a word."""
        if self._reported or self._figures is None:
            return len(self._flights)
        return self._figures.running + self._figures.waiting

    # what the status server shows

    async def _show_worker(self, _: web.Request) -> web.Response:
        if self._publisher is None or self._description is None:
            body: dict[str, object] = {"error": self._lifecycle.reason}
            status = 503
        else:
            session = self._publisher.session
            body = msgspec.structs.asdict(session.info) | {
                "tokenizer_reason": self._description.files.reason,
                "stream": self._publisher.endpoint,
                "epoch": session.epoch,
                "seq": session.seq,
                "blocks_cached": session.cached_blocks,
                "pickers": self._publisher.picker_count,
                "load": msgspec.structs.asdict(self._load()),
                "in_flight": [msgspec.structs.asdict(one) for one in session.bookings],
            }
            status = 200
        return web.Response(
            status=status, body=msgspec.json.encode(body), content_type="application/json"
        )

    async def _serve_tokenizer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        files = self._description.files if self._description is not None else None
        if files is None or name not in files.digests:
            reason = files.reason if files else self._lifecycle.reason
            return web.Response(
                status=404, text=f"{name} is not served: {reason or 'no such file'}"
            )
        headers = {"ETag": f'"{files.digests[name]}"', "Content-Type": "application/octet-stream"}
        if name in files.texts:
            return web.Response(body=files.texts[name], headers=headers)
        return web.FileResponse(files.paths[name], headers=headers)


def _cause(task: asyncio.Task[None]) -> BaseException | None:
    """What ended ``task``, out of the group it may be wrapped in."""
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
