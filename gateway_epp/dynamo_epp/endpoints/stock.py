"""Follows engines that have no launcher of ours: stock vLLM pods.

What our workers tell by themselves has to be asked for here: models over HTTP, queue and cache
usage from metrics, and the cache itself from the engine's raw events, through the same normaliser
that our launcher uses. What the engine announced before this picker began is had back only as far
as its replay goes; while something is missing, the worker counts as approximate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
from dynamo_kv_router import engine_metrics

from dynamo_epp.endpoints.pool import Pool
from dynamo_epp.endpoints.worker import Worker

log = logging.getLogger(__name__)

SCRAPE_S = 1.0
TIMEOUT_S = 3.0


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class StockFollower:
    """One stock engine, asked once a second. ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        pool: Pool,
        worker: Worker,
        session: aiohttp.ClientSession,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._session = session
        self._clock = clock
        self._url = f"http://{worker.endpoint.hostport}"
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._ask()
            except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
                self._pool.forget_cache(self._worker, f"the engine can't be asked: {error}")
            await asyncio.sleep(SCRAPE_S)

    async def _get(self, path: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with self._session.get(self._url + path, timeout=timeout) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def _ask(self) -> None:
        page = (await self._get("/metrics")).decode(errors="replace")
        models = msgspec.json.decode(await self._get("/v1/models"), type=_Models).data
        config: dict[str, Any] = engine_metrics.cache_config(page)
        del config, models
