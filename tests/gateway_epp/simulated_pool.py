"""Engines that serve by the clock of the loop they run on, as the gate sees them.

Each runs ``slots`` requests at a time, queues the rest in the order they come, and tells its
figures once a second, as real ones do.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dynamo_epp.endpoints.worker import Worker
from dynamo_kv_router.engine_metrics import EngineFigures
from dynamo_kv_router.load import WorkerLoad
from dynamo_runtime.endpoint import Endpoint

TOLD_EVERY_S = 1.0
MODEL = "m"


def tell(load: WorkerLoad, running: int, waiting: int, now: float) -> None:
    """The engine's figures; its cache is half full at most."""
    load.observe(EngineFigures(running, waiting, 0.5, 0.0), 50, 100, now)


@dataclass(eq=False)
class Engine:
    """Serves a request in ``cost`` × ``second_per_cost`` seconds."""

    worker: Worker
    slots: int
    running: int = 0
    queue: deque[asyncio.Future[None]] = field(default_factory=deque)
    served: list[tuple[float, float]] = field(default_factory=list)  # (time of its end, cost)

    async def serve(self, key: str, seconds: float, cost: float) -> None:
        """The worker takes the request ``key``, which was booked, and answers it."""
        loop = asyncio.get_running_loop()
        self.worker.load.accept(key, int(cost), 0, loop.time())
        try:
            if self.running >= self.slots:
                turn: asyncio.Future[None] = loop.create_future()
                self.queue.append(turn)
                await turn
            else:
                self.running += 1
            try:
                await asyncio.sleep(seconds)
                self.served.append((loop.time(), cost))
            finally:
                if self.queue:
                    self.queue.popleft().set_result(None)
                else:
                    self.running -= 1
        finally:
            self.worker.load.finish(key)

    async def tell(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            tell(self.worker.load, self.running, len(self.queue), loop.time())
            await asyncio.sleep(TOLD_EVERY_S)


class SimulatedPool:
    """Implements ``gate.Endpoints``. Workers can be taken away and given back."""

    def __init__(self, workers: int, slots: int = 8) -> None:
        self.engines = [self._engine(n, slots) for n in range(workers)]
        self.away: set[str] = set()
        self.live_pickers = 1
        self._keys = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    @staticmethod
    def _engine(number: int, slots: int) -> Engine:
        endpoint = Endpoint(f"w-{number}", f"127.0.0.{number + 2}", 8000, stream_port=5557)
        worker = Worker(endpoint, number, WorkerLoad(block_size=16, confirms=True), model=MODEL)
        worker.models = frozenset([MODEL])
        return Engine(worker, slots)

    async def __aenter__(self) -> SimulatedPool:
        self._tasks = [asyncio.create_task(engine.tell()) for engine in self.engines]
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def book(self, cost: float) -> tuple[Engine, str]:
        """Choose the engine with the least in hand and book a request there."""
        here = [engine for engine in self.engines if engine.worker.name not in self.away]
        engine = min(here, key=lambda engine: engine.worker.load.active_requests())
        key = f"p-{next(self._keys)}"
        engine.worker.load.book(key, int(cost), 0, asyncio.get_running_loop().time())
        return engine, key

    # --- gate.Endpoints

    def eligible(self, model: str) -> Iterator[Worker]:
        workers = (engine.worker for engine in self.engines)
        return (w for w in workers if model in w.models and w.name not in self.away)

    def models(self) -> Mapping[str, str]:
        return {name: w.model for w in self.eligible(MODEL) for name in w.models}

    def pickers(self) -> int:
        return self.live_pickers
