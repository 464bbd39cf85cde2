"""Follows engines that have no launcher of ours: stock vLLM pods.

What our workers tell by themselves has to be asked for here: models over HTTP, queue and cache
usage from metrics, and the cache itself from the engine's raw events, through the same normaliser
that our launcher uses. What the engine announced before this picker began is had back only as far
as its replay goes; while something is missing, the worker counts as approximate.

The three fail by themselves. Without metrics an engine is as good as before: its cache is followed
on, and its load is what this picker sends there, once the last figures are too old to be believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import msgspec
from dynamo_kv_router import engine_metrics
from dynamo_kv_router.engine_events import REPLAY_TIMEOUT_S, EngineEventSource
from dynamo_kv_router.engine_metrics import EngineFigures
from dynamo_kv_router.keys import model_seed
from dynamo_kv_router.normaliser import Normaliser

from dynamo_epp.endpoints.inbox import EventInbox
from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker

log = logging.getLogger(__name__)

SCRAPE_S = 1.0
FIGURES_S = 0.25
"""Its load is read more often: what other pickers send to it shows nowhere else."""
UNANSWERED_S = 0.25
"""Pause before an engine that did not answer yet is asked again."""
TIMEOUT_S = 3.0
UNHEARD = "the engine worked before the picker listened, and replays nothing of that"
SILENT_AFTER = 2
"""Questions in a row without any answer after which the engine counts as silent."""
LOST_AFTER = 3
"""Unanswered questions in a row after which what is known of the cache is void."""


_NO_ANSWER = (TimeoutError, aiohttp.ClientConnectionError, OSError)
"""Errors of questions that nobody answered, well or badly."""


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _EventSource(msgspec.Struct):
    """One entry of vLLM's `/kv_event_sources`, which maps ranks to these."""

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""


@dataclass(frozen=True, slots=True)
class _Description:
    """What an engine is. Another description means that another engine answers."""

    model: str
    block_size: int
    total_blocks: int
    max_model_len: int


class StockFollower:
    """One stock engine. ``session`` and ``inbox``, where engines bring their events if they don't
    let themselves be asked, belong to the caller; ``clock`` gives monotonic seconds.

    ``on_asked`` hears each time whether the engine answered well ("") or what was wrong,
    ``on_pulse`` whether it answered at all ("") or why not. Both from its first answer on: a
    backend without an engine's models is judged by its requests alone. Metrics are no part of it.
    """

    def __init__(
        self,
        pool: Pool,
        worker: Worker,
        session: aiohttp.ClientSession,
        *,
        inbox: EventInbox | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_asked: Callable[[Worker, str], None] = lambda worker, problem: None,
        on_pulse: Callable[[Worker, str], None] = lambda worker, silence: None,
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._session = session
        self._inbox = inbox
        self._clock = clock
        self._on_asked = on_asked
        self._on_pulse = on_pulse
        self._url = f"http://{worker.endpoint.hostport}"
        self._asking: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._normalisers: dict[int, Normaliser] = {}  # by slot; one for each rank
        self._unheard: set[int] = set()  # slots of which no event has come
        self._replayed_by = 0.0  # until when a replay may still tell of the past
        self._description: _Description | None = None
        self._cache_config: dict[str, str] = {}  # as its metrics last said
        self._has_answered = False
        self._no_events = ""  # why the cache can't be followed; "" if it can

    async def start(self) -> None:
        self._asking = asyncio.create_task(self._ask_for_ever())

    async def stop(self) -> None:
        for task in (self._asking, self._listening):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # --- what is asked for

    async def _ask_for_ever(self) -> None:
        unanswered = silent = 0
        while True:
            try:
                await self._ask()
                unanswered = silent = 0
                self._has_answered = True
                self._on_pulse(self._worker, "")
                self._on_asked(self._worker, "")
            except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
                what = str(error) or "timeout"
                unanswered += 1
                silent = silent + 1 if isinstance(error, _NO_ANSWER) else 0
                if self._has_answered and silent:
                    if silent >= SILENT_AFTER:
                        self._on_pulse(self._worker, f"no answer to {silent} questions: {what}")
                elif self._has_answered:
                    self._on_pulse(self._worker, "")
                    self._on_asked(self._worker, f"not answered: {what}")
                if unanswered == LOST_AFTER and self._description is not None:
                    await self._forget(f"the engine can't be asked: {what}")
            except Exception as error:  # the worker must not stay as it was for ever
                problem = f"what the engine answers is not understood: {error!r}"
                if self._worker.problem != problem:
                    log.exception("%s: %s", self._worker.name, problem)
                await self._forget(problem)
            well = self._description is not None and not unanswered
            await (self._watch_load() if well else asyncio.sleep(UNANSWERED_S))

    async def _get(self, path: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with self._session.get(self._url + path, timeout=timeout) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def _metrics_page(self) -> str | None:
        """None: they can't be had at the moment. A backend may have none ("")."""
        problem, page = "", ""
        try:
            page = (await self._get("/metrics")).decode(errors="replace")
        except aiohttp.ClientResponseError as error:
            if error.status >= 500:
                problem = f"its metrics can't be had: {error.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = f"its metrics can't be had: {error or 'timeout'}"
        if problem and not self._worker.load_problem:
            log.warning("%s: %s", self._worker.name, problem)
        self._worker.load_problem = problem
        return None if problem else page

    async def _ask(self) -> None:
        models = msgspec.json.decode(await self._get("/v1/models"), type=_Models).data
        base = next((model for model in models if model.parent is None), None)
        if base is None:
            return
        asked_at = self._clock()
        page = await self._metrics_page()
        if page is not None:
            self._cache_config = engine_metrics.cache_config(page)
        config = self._cache_config
        description = _Description(
            base.id,
            _number(config.get("block_size")),
            _number(config.get("num_gpu_blocks")),
            base.max_model_len or 0,
        )
        self._pool.describe(
            self._worker,
            model=base.id,
            models=[model.id for model in models],
            loras=[model.id for model in models if model.parent is not None],
            block_size=description.block_size,
            total_blocks=description.total_blocks,
            max_model_len=description.max_model_len,
        )
        if description != self._description:
            await self._forget("another engine answers")
            self._description = description
            await self._listen(description)
        elif self._listening is not None and self._listening.done():
            ended = self._listening.exception()
            log.error("%s: its events are not followed any more", self._worker.name, exc_info=ended)
            await self._forget("its events could not be followed")
            self._description = description
            await self._listen(description)
        elif self._listening is None and self._brings_events():
            await self._listen(description)
        if page is None:
            self._worker.load.grow_old(self._clock())
            return
        figures = self._read_figures(page, description.total_blocks, asked_at)
        if self._listening is not None and self._unheard and self._clock() >= self._replayed_by:
            # No replay and no event yet: only an engine that has done nothing caches nothing.
            idle = figures is not None and not (
                figures.first_tokens or figures.running or figures.waiting
            )
            self._pool.set_live(self._worker, idle, "" if idle else UNHEARD)

    async def _watch_load(self) -> None:
        """Until the next question. What is not understood tells nothing: that question does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_S):
                while True:
                    await asyncio.sleep(FIGURES_S)
                    asked_at = self._clock()
                    page = await self._metrics_page()
                    if page is not None and self._description is not None:
                        with contextlib.suppress(ValueError):
                            self._read_figures(page, self._description.total_blocks, asked_at)

    def _read_figures(self, page: str, blocks: int, at: float) -> EngineFigures | None:
        load, figures = self._worker.load, engine_metrics.figures(page)
        if figures is not None:
            load.observe(figures, round(figures.cache_usage * blocks), blocks, at)
        else:
            load.forget_figures()
        for rank in self._worker.ranks:
            rank.reported = figures.by_rank.get(rank.number, 0) if figures is not None else 0
        return figures

    # --- what is listened to

    async def _listen(self, description: _Description) -> None:
        sources = await self._event_sources()
        if not sources:
            self._no_events = self._no_events or "the engine publishes no KV events"
        elif not description.block_size:
            self._no_events = "the engine does not say its block size"
        else:
            self._no_events = ""
        self._worker.tracked = not self._no_events
        if self._no_events:
            if self._worker.problem != self._no_events:
                log.warning("%s: %s", self._worker.name, self._no_events)
            self._pool.set_live(self._worker, False, self._no_events)
            return
        ranks = sorted(sources) if len(sources) > 1 else []
        self._pool.set_ranks(self._worker, ranks)
        slots = {rank.number: rank.slot for rank in self._worker.ranks}
        by_slot = {slots.get(rank, self._worker.slot): one for rank, one in sources.items()}
        self._normalisers = {
            slot: Normaliser(
                description.block_size, lambda lora: model_seed(description.model, lora)
            )
            for slot in by_slot
        }
        self._unheard = set(by_slot)
        replays = any(source.replays for source in by_slot.values())
        self._replayed_by = self._clock() + REPLAY_TIMEOUT_S if replays else 0.0
        self._listening = asyncio.create_task(self._follow_all(by_slot))

    def _brings_events(self) -> bool:
        return self._inbox is not None and self._inbox.heard(self._worker)

    async def _event_sources(self) -> dict[int, EngineEventSource]:
        """Rank -> its events; empty if there are none, with the reason in ``_no_events``."""
        self._no_events = ""
        sources = await self._told_sources()
        address = self._worker.endpoint.address
        sent = [one for one in sources.values() if not binds(one.endpoint, address)]
        if not sent and (sources or not self._brings_events()):
            return {number: self._dialled(source) for number, source in sources.items()}
        if self._inbox is None:
            self._no_events = (
                f"the engine sends its events to {sent[0].endpoint}, and this picker has no port "
                "for them (--kv-events-bind)"
            )
            return {}
        if len(sources) > 1:
            self._no_events = "the engine sends events of several ranks without telling them apart"
            return {}
        self._no_events = ""
        replay = sent[0].replay_endpoint if sent else None
        return {
            0: EngineEventSource(
                self._worker.name,
                self._reachable(replay) if replay else None,
                messages=self._inbox.unread(self._worker),
            )
        }

    def _dialled(self, source: _EventSource) -> EngineEventSource:
        replay = source.replay_endpoint
        return EngineEventSource(
            self._reachable(source.endpoint),
            self._reachable(replay) if replay else None,
            topic=source.topic,
        )

    def _reachable(self, endpoint: str) -> str:
        return reachable(endpoint, self._worker.endpoint.address)

    async def _told_sources(self) -> dict[int, _EventSource]:
        try:
            sources = msgspec.json.decode(
                await self._get("/kv_event_sources"), type=dict[str, _EventSource]
            )
        except aiohttp.ClientResponseError as error:
            self._no_events = f"the engine does not tell its event sockets ({error.status})"
            return {}
        rank = self._worker.endpoint.rank
        if rank is not None and str(rank) in sources:
            sources = {str(rank): sources[str(rank)]}
        return {int(number): source for number, source in sources.items()}

    async def _follow_all(self, sources: dict[int, EngineEventSource]) -> None:
        async with asyncio.TaskGroup() as group:
            for slot, source in sources.items():
                group.create_task(self._follow(slot, source, self._normalisers[slot]))

    async def _follow(self, slot: int, source: EngineEventSource, normaliser: Normaliser) -> None:
        worker, index = self._worker, self._pool.index
        async for item in source.batches():
            changes = normaliser.apply(item)
            if changes.cleared:
                index.clear(slot)
            if changes.removed:
                index.remove(slot, list(changes.removed))
            if changes.stored:
                index.store(slot, list(changes.stored))
            self._unheard.discard(slot)
            if self._unheard:
                continue  # of another rank; its past is not known yet
            inexact = next((n for n in self._normalisers.values() if not n.exact), None)
            if not worker.live or worker.exact != (inexact is None):
                why = inexact.why_not_exact if inexact is not None else ""
                self._pool.set_live(worker, inexact is None, why)

    async def _forget(self, problem: str) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None
        self._description = None
        self._normalisers = {}
        self._pool.forget_cache(self._worker, problem)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def binds(endpoint: str, address: str) -> bool:
    """Whether the engine at ``address`` binds its event socket there and waits to be asked; else it
    connects, and sends by itself. Source: vLLM's ``ZmqEventPublisher``; others bind addresses of
    their own, too."""
    if endpoint.startswith(("ipc://", "inproc://")) or "*" in endpoint or "::" in endpoint:
        return True
    return endpoint.removeprefix("tcp://").rpartition(":")[0] == address


def reachable(endpoint: str, address: str) -> str:
    """The address to connect to for one that an engine binds.

    ``tcp://*:5557`` is bound on all addresses of the pod at ``address``; a Unix socket
    (``ipc://…``) is on this machine or nowhere.
    """
    if not endpoint.startswith("tcp://"):
        return endpoint
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host in ("*", "0.0.0.0", "[::]", "::"):
        host = f"[{address}]" if ":" in address else address
    return f"tcp://{host}:{port}"
