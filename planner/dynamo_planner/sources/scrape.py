"""Readings by asking each worker for its metrics page: where there is no Prometheus.

The last page that was good is kept with its age, so that one answer that fails is a reading that is
five seconds old, and not a worker that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import msgspec
from dynamo_runtime.discovery import Endpoint

from dynamo_planner.observe import Reading
from dynamo_planner.observe.page import Figures, figures
from dynamo_planner.sources.workers import Workers, reading

log = logging.getLogger(__name__)

MOST_AT_ONCE = 64
LARGEST_PAGE = 16 << 20


class _Model(msgspec.Struct):
    max_model_len: float | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(slots=True)
class _Asked:
    """What a worker said last."""

    figures: Figures
    at: float
    context_tokens: float | None = None
    failing: bool = False


class DirectScrape:
    """Asks each of ``workers``."""

    def __init__(
        self,
        workers: Workers,
        *,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._asked: dict[str, _Asked] = {}
        self._turns = asyncio.Semaphore(MOST_AT_ONCE)

    async def readings(self) -> tuple[Reading, ...]:
        endpoints = self._workers.endpoints
        for gone in self._asked.keys() - {endpoint.name for endpoint in endpoints}:
            del self._asked[gone]
        # A session a look: workers close idle connections sooner than the next one comes.
        async with aiohttp.ClientSession(timeout=self._timeout) as client:
            await asyncio.gather(*(self._ask(client, endpoint) for endpoint in endpoints))
        now = self._clock()
        return tuple(self._reading(endpoint, now) for endpoint in endpoints)

    def _reading(self, endpoint: Endpoint, now: float) -> Reading:
        asked = self._asked.get(endpoint.name)
        if asked is None:
            return reading(endpoint, None, None)
        return reading(endpoint, asked.figures, now - asked.at, asked.context_tokens)

    async def _ask(self, client: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        before = self._asked.get(endpoint.name)
        async with self._turns:
            # The launcher's page has the engine's in it, and says how much is still to be computed.
            port = endpoint.port if endpoint.status_port is None else endpoint.status_port
            page, problem = await self._get(client, f"{_base(endpoint, port)}/metrics")
            found = figures(page.decode(errors="replace"))
            if found is None:
                problem = problem or "its metrics page tells no load"
            else:
                asked = _Asked(found, self._clock(), before.context_tokens if before else None)
                if asked.context_tokens is None:
                    asked.context_tokens = await self._context(client, endpoint)
                self._asked[endpoint.name] = asked
        failed = before is not None and before.failing
        if problem and endpoint.ready and not endpoint.terminating and not failed:
            log.warning("worker %s can't be asked: %s", endpoint.name, problem)
        if problem and before is not None:
            before.failing = endpoint.ready
        elif failed:
            log.info("worker %s answers again", endpoint.name)

    async def _context(self, client: aiohttp.ClientSession, endpoint: Endpoint) -> float | None:
        """Longest request of the engine's models, tokens; it does not change while it runs."""
        body, _ = await self._get(client, f"{_base(endpoint, endpoint.port)}/v1/models")
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except msgspec.DecodeError:
            return None
        return max((m.max_model_len for m in models if m.max_model_len), default=None)

    async def _get(self, client: aiohttp.ClientSession, url: str) -> tuple[bytes, str]:
        """Body and "", or nothing and why not."""
        try:
            async with client.get(url, allow_redirects=False) as answer:
                if answer.status != 200:
                    return b"", f"{url}: {answer.status}"
                body = bytearray()
                async for chunk in answer.content.iter_any():
                    body += chunk
                    if len(body) > LARGEST_PAGE:
                        return b"", f"{url}: more than {LARGEST_PAGE >> 20} MiB"
                return bytes(body), ""
        except TimeoutError:
            return b"", f"{url}: no answer within {self._timeout.total:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return b"", f"{url}: {error}"


def _base(endpoint: Endpoint, port: int) -> str:
    host = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
    return f"http://{host}:{port}"
