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
from dynamo_runtime.discovery import Endpoint, EndpointSource
from dynamo_runtime.kubernetes.labels import COMPONENT

from dynamo_planner.observe import Reading
from dynamo_planner.observe.page import Figures, figures
from dynamo_planner.sources.source import Pods

log = logging.getLogger(__name__)

MOST_AT_ONCE = 64
LARGEST_PAGE = 16 << 20
ASK_AGAIN_S = 1.0


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
    """Asks the workers of ``endpoints``; ``run`` follows them until it is cancelled."""

    def __init__(
        self,
        endpoints: EndpointSource,
        *,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = endpoints
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._endpoints: tuple[Endpoint, ...] | None = None
        self._asked: dict[str, _Asked] = {}
        self._turns = asyncio.Semaphore(MOST_AT_ONCE)
        self.registry_problem = ""
        """Why the registry can't be asked, as its source tells; the last list stays in force."""

    @property
    def problem(self) -> str:
        if self._endpoints is None:
            return self.registry_problem or "nobody has told yet which workers there are"
        return self.registry_problem

    async def run(self) -> None:
        """Follow which workers there are."""
        while True:
            async for snapshot in self._source.snapshots():
                self._endpoints = snapshot
                present = {endpoint.name for endpoint in snapshot}
                for name in self._asked.keys() - present:
                    del self._asked[name]
            await asyncio.sleep(ASK_AGAIN_S)

    def pods(self, component: str) -> Pods:
        ready = terminating = 0
        for endpoint in self._endpoints or ():
            if endpoint.labels.get(COMPONENT) == component:
                terminating += endpoint.terminating
                ready += endpoint.ready and not endpoint.terminating
        return Pods(ready, terminating)

    async def readings(self) -> tuple[Reading, ...]:
        endpoints = self._endpoints or ()
        # A session a look: workers close idle connections sooner than the next one comes.
        async with aiohttp.ClientSession(timeout=self._timeout) as client:
            await asyncio.gather(*(self._ask(client, endpoint) for endpoint in endpoints))
        now = self._clock()
        return tuple(self._reading(endpoint, now) for endpoint in endpoints)

    def _reading(self, endpoint: Endpoint, now: float) -> Reading:
        asked = self._asked.get(endpoint.name)
        known = asked.figures if asked is not None else Figures()
        return Reading(
            worker=endpoint.name,
            component=endpoint.labels.get(COMPONENT, ""),
            ready=endpoint.ready,
            terminating=endpoint.terminating,
            age_s=now - asked.at if asked is not None else None,
            running=known.running,
            waiting=known.waiting,
            kv_usage=known.kv_usage,
            kv_tokens=known.kv_tokens,
            queued_tokens=known.queued_tokens,
            context_tokens=asked.context_tokens if asked is not None else None,
            counters=known.counters,
        )

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
