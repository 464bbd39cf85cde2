"""The pool: endpoint snapshots in, workers with load and cached prefixes out.

The pool connects to pods before they are ready, so that a worker is known by the time it may be
chosen; our workers even wait for that before they report ready. It keeps one flat prefix index for
all of them, each in a slot of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from dynamo_kv_router.index import BlockIndex
from dynamo_kv_router.load import WorkerLoad
from dynamo_runtime.discovery import Endpoint, EndpointSource

from dynamo_epp.endpoints.worker import Rank, Worker

log = logging.getLogger(__name__)

SOURCE_RETRY_S = 1.0
"""Pause before a source of endpoints that failed is asked anew."""


class Follower(Protocol):
    """Keeps one worker's state current until stopped."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Pool:
    """All workers of one picker.

    ``follow`` makes the follower of a worker (stream or stock). ``on_endpoints`` is called with
    each snapshot before the workers change (the frontend tells Envoy its addresses there).
    """

    def __init__(
        self,
        source: EndpointSource,
        follow: Callable[[Pool, Worker], Follower],
        on_endpoints: Callable[[tuple[Endpoint, ...]], None] = lambda _: None,
    ) -> None:
        self.index = BlockIndex()
        self.workers: dict[str, Worker] = {}  # by pod name
        self.changed = asyncio.Event()  # set at every change of a worker; waiters clear it
        self._source = source
        self._follow = follow
        self._on_endpoints = on_endpoints
        self._followers: dict[str, Follower] = {}
        self._free_slots: list[int] = []
        self._slots = 0
        self._task: asyncio.Task[None] | None = None
        self.synced = asyncio.Event()  # the first snapshot has been applied

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.apply(())

    async def _run(self) -> None:
        # A pool that follows nothing any more would send requests to pods that are long gone.
        while True:
            try:
                async for snapshot in self._source.snapshots():
                    await self._take(snapshot)
            except Exception:
                log.exception("the source of endpoints failed; beginning anew")
            await asyncio.sleep(SOURCE_RETRY_S)

    async def _take(self, snapshot: tuple[Endpoint, ...]) -> None:
        try:
            self._on_endpoints(snapshot)
            await self.apply(snapshot)
        except Exception:
            log.exception("endpoint snapshot not applied")

    async def apply(self, snapshot: Iterable[Endpoint]) -> None:
        """Bring the workers in step with ``snapshot``."""
        wanted = {endpoint.name: endpoint for endpoint in snapshot}
        for name, worker in list(self.workers.items()):
            new = wanted.get(name)
            if new is None or _moved(worker.endpoint, new):
                await self._remove(worker)
        for name, endpoint in wanted.items():
            known = self.workers.get(name)
            if known is None:
                try:
                    await self._add(endpoint)
                except ValueError as error:  # an address that can't be connected to
                    log.error("worker %s can't be followed: %s", name, error)
            else:
                known.endpoint = endpoint
        self.synced.set()
        self.changed.set()

    async def _add(self, endpoint: Endpoint) -> None:
        slot = self._take_slot()
        confirms = endpoint.stream_port is not None
        worker = Worker(endpoint, slot, WorkerLoad(block_size=1, confirms=confirms))
        self.workers[endpoint.name] = worker
        follower = self._followers[endpoint.name] = self._follow(self, worker)
        await follower.start()
        log.info("worker %s at %s joined", endpoint.name, endpoint.hostport)

    async def _remove(self, worker: Worker) -> None:
        del self.workers[worker.name]
        follower = self._followers.pop(worker.name, None)
        if follower is not None:
            await follower.stop()
        for slot in worker.slots:
            self.index.clear(slot)
            self._free_slots.append(slot)
        log.info("worker %s at %s left", worker.name, worker.endpoint.hostport)

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._slots += 1
        return self._slots - 1

    def set_ranks(self, worker: Worker, numbers: Iterable[int]) -> None:
        """The worker has a cache for each of these data-parallel ranks; none: a single one."""
        for rank in worker.ranks:
            self.index.clear(rank.slot)
            self._free_slots.append(rank.slot)
        worker.ranks = tuple(Rank(number, self._take_slot()) for number in numbers)

    def cached_blocks(self, worker: Worker) -> int:
        """Blocks that the index has of the worker, summed over its caches."""
        return sum(self.index.blocks(slot) for slot in worker.slots)

    def forget_cache(self, worker: Worker, problem: str) -> None:
        """What the index held of the worker is void."""
        for slot in worker.slots:
            self.index.clear(slot)
        worker.live = worker.exact = False
        worker.problem = problem
        self.changed.set()

    def describe(
        self,
        worker: Worker,
        *,
        model: str,
        models: Iterable[str],
        loras: Iterable[str],
        block_size: int,
        total_blocks: int,
        max_model_len: int,
    ) -> None:
        """The worker told what it is."""
        worker.model = model
        worker.models = frozenset(models) | {model}
        worker.loras = frozenset(loras)
        worker.block_size = worker.load.block_size = max(1, block_size)
        worker.total_blocks = total_blocks
        worker.max_model_len = max_model_len
        self.changed.set()

    def set_live(self, worker: Worker, exact: bool, problem: str = "") -> None:
        """The index is current for this worker."""
        worker.live, worker.exact, worker.problem = True, exact, problem
        self.changed.set()

    def serving(self, model: str) -> list[Worker]:
        """The workers that serve ``model`` (all of them if it is ""), ready or not."""
        return [w for w in self.workers.values() if not model or model in w.models]

    def models(self, *, ready: bool) -> dict[str, list[Worker]]:
        """Model name -> workers that serve it, of those that are ready or of all."""
        served: dict[str, list[Worker]] = {}
        for worker in self.workers.values():
            endpoint = worker.endpoint
            if ready and (not endpoint.ready or endpoint.terminating):
                continue
            for model in worker.models:
                served.setdefault(model, []).append(worker)
        return served

    def undescribed(self) -> int:
        """Workers that have not told what they serve, and still may."""
        return sum(not w.models and not w.endpoint.terminating for w in self.workers.values())

    def warm(self) -> bool:
        """Every ready worker has told what it is and what it caches."""
        return self.synced.is_set() and all(
            worker.live for worker in self.workers.values() if worker.endpoint.ready
        )

    async def wait_warm(self, timeout_s: float) -> bool:
        """Wait until ``warm``; false if that took longer than ``timeout_s`` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.warm():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            return False
        return True


def _moved(old: Endpoint, new: Endpoint) -> bool:
    """The pod is another one under the same name."""
    return (old.address, old.port, old.stream_port, old.status_port, old.generation) != (
        new.address,
        new.port,
        new.stream_port,
        new.status_port,
        new.generation,
    )
