"""Follows our own workers: their stream becomes index entries, load and outcomes.

The worker is the truth about itself, so whatever its stream says replaces what the picker thought.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import aiohttp
from dynamo_kv_router.engine_metrics import EngineFigures
from dynamo_kv_router.stream.format import (
    Accepted,
    Cleared,
    Event,
    Finished,
    FirstToken,
    Info,
    Load,
    Removed,
    Snapshot,
    Stored,
    WorkerInfo,
    unpack_keys,
)
from dynamo_kv_router.stream.subscriber import WorkerSubscriber

from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.pulse import Pulse
from dynamo_epp.endpoints.worker import Worker

SILENT_S = 3.0
"""A launcher asks its engine once a second; one that has had no answer for so long is not believed
to have an engine that works."""


class RequestWatcher(Protocol):
    """Whom a stream tells about requests, of whichever picker."""

    def on_accepted(self, worker: Worker, booking: str, blind_window_s: float | None) -> None: ...

    def on_first_token(self, worker: Worker, booking: str) -> None: ...

    def on_prefillers_failed(
        self, worker: Worker, booking: str, addresses: tuple[str, ...]
    ) -> None:
        """``worker`` asked those prefill workers (``ip:port``) in vain. Comes before what follows:
        first token, or end."""
        ...

    def on_finished(self, worker: Worker, event: Finished) -> None: ...

    def on_described(self, worker: Worker, info: WorkerInfo) -> None:
        """The worker told what it is; its tokenizer may have to be fetched."""
        ...

    def on_lost(self, worker: Worker, reason: str) -> None:
        """The stream broke off; ``worker`` is still ``live`` if it was until now."""
        ...

    def on_resynced(self, worker: Worker) -> None:
        """What the worker has in hand is told anew, or never again: requests that are not among
        its accepted ones ended unseen."""
        ...


class StreamFollower:
    """One worker's stream, applied to the pool. ``clock`` gives monotonic seconds.

    ``on_pulse`` hears why the worker does not live, or "" if it does, whenever that was in doubt;
    ``session`` is what its engine is asked with and belongs to the caller.
    """

    def __init__(
        self,
        pool: Pool,
        worker: Worker,
        watcher: RequestWatcher,
        *,
        session: aiohttp.ClientSession,
        subscriber: str,
        clock: Callable[[], float],
        on_pulse: Callable[[Worker, str], None] = lambda worker, silence: None,
    ) -> None:
        endpoint = worker.endpoint
        if endpoint.stream_port is None:
            raise ValueError(f"{endpoint.name} has no worker stream")
        self._pool = pool
        self._worker = worker
        self._watcher = watcher
        self._clock = clock
        host = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
        self._subscriber = WorkerSubscriber(
            endpoint.name, f"tcp://{host}:{endpoint.stream_port}", self, subscriber=subscriber
        )
        self._pulse = Pulse(
            session,
            f"http://{endpoint.hostport}/health",
            lambda silence: on_pulse(worker, silence),
        )

    async def start(self) -> None:
        await self._subscriber.start()

    async def stop(self) -> None:
        await self._subscriber.stop()
        await self._pulse.stop()
        self._worker.load.reset_accepted()
        self._watcher.on_resynced(self._worker)

    def on_snapshot(self, _: str, snapshot: Snapshot) -> None:
        worker, now = self._worker, self._clock()
        self._describe(snapshot.info)
        self._pool.index.clear(worker.slot)
        self._pool.index.store(worker.slot, unpack_keys(snapshot.keys))
        worker.load.reset_accepted()
        for request in snapshot.bookings:
            window = worker.load.accept(
                request.booking, request.prompt_tokens, request.cached_tokens, now
            )
            self._watcher.on_accepted(worker, request.booking, window)
            if request.first_token:
                worker.load.first_token(request.booking)
        self._watcher.on_resynced(worker)
        self._apply_load(snapshot.load)
        self._set_live(snapshot.info)

    def _describe(self, info: WorkerInfo) -> None:
        self._pool.describe(
            self._worker,
            model=info.model,
            models=info.models,
            loras=info.loras,
            block_size=info.block_size,
            total_blocks=info.total_blocks,
            max_model_len=info.max_model_len,
        )
        self._watcher.on_described(self._worker, info)

    def _set_live(self, info: WorkerInfo) -> None:
        self._pool.set_live(
            self._worker,
            info.exact_events,
            "" if info.exact_events else "its launcher can't chain all of the engine's events",
        )

    def _apply_load(self, load: Load) -> None:
        view = self._worker.load
        view.pickers = max(1, load.pickers)
        view.draining = load.draining
        if load.age_s >= 0:  # the launcher has seen figures of its engine
            total = load.kv_blocks_total
            usage = load.kv_blocks_used / total if total else 0.0
            figures = EngineFigures(load.running, load.waiting, usage, 0.0)
            view.observe(figures, load.kv_blocks_used, total, self._clock() - load.age_s)
        if load.age_s >= SILENT_S:
            self._pulse.doubt(f"its launcher had no answer from the engine for {load.age_s:.0f} s")
        else:
            self._pulse.sure()

    def on_events(self, _: str, events: list[Event]) -> None:
        worker, index, now = self._worker, self._pool.index, self._clock()
        for event in events:
            match event:
                case Stored(keys=keys):
                    index.store(worker.slot, unpack_keys(keys))
                case Removed(keys=keys):
                    index.remove(worker.slot, unpack_keys(keys))
                case Cleared():
                    index.clear(worker.slot)
                case Accepted(booking=key, prompt_tokens=prompt, cached_tokens=cached):
                    window = worker.load.accept(key, prompt, cached, now)
                    self._watcher.on_accepted(worker, key, window)
                case FirstToken(booking=key, prefillers_failed=failed):
                    worker.load.first_token(key)
                    if failed:
                        self._watcher.on_prefillers_failed(worker, key, failed)
                    self._watcher.on_first_token(worker, key)
                case Finished(booking=key, prefillers_failed=failed):
                    worker.load.finish(key)
                    if failed:
                        self._watcher.on_prefillers_failed(worker, key, failed)
                    self._watcher.on_finished(worker, event)
                case Load():
                    self._apply_load(event)
                case Info(info=info):
                    self._describe(info)
                    self._set_live(info)

    def on_doubt(self, _: str, reason: str) -> None:
        worker = self._worker
        self._pool.set_live(worker, False, f"{reason}; its snapshot is awaited")

    def on_lost(self, _: str, reason: str) -> None:
        self._pulse.doubt(reason)
        self._worker.load.reset_accepted()
        self._watcher.on_lost(self._worker, reason)
        self._pool.forget_cache(self._worker, f"stream lost: {reason}")
