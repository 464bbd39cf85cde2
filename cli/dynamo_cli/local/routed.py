"""Whether the frontends already send requests to the engines.

A pod's readiness says that it could serve. A frontend hears of it a moment later, and whoever asks
in between is told that there is no worker. So to the user a graph is ready when its frontends say
that they route to every engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp
import msgspec

POLL_S = 0.05
REQUEST_S = 1.0
UNROUTED = ("not-ready", "cache-unknown")  # states in which an engine gets no or blind traffic


class _Instance(msgspec.Struct):
    name: str
    state: str


class _Health(msgspec.Struct):
    instances: list[_Instance]


async def until_routed(frontends: Iterable[str], engines: Iterable[str], limit_s: float) -> bool:
    """Wait until each of ``frontends`` (URLs) routes to all ``engines`` (pod names).

    A frontend whose ``/health`` lists no engines is not ours, and is not waited for. False:
    ``limit_s`` seconds were not enough.
    """
    wanted = set(engines)
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    try:
        async with asyncio.timeout(limit_s), aiohttp.ClientSession(timeout=timeout) as client:
            for url in frontends:
                while not await _routes(client, url, wanted):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
    except TimeoutError:
        return False
    return True


async def _routes(client: aiohttp.ClientSession, url: str, wanted: set[str]) -> bool:
    try:
        async with client.get(f"{url}/health") as response:
            health = msgspec.json.decode(await response.read(), type=_Health)
    except TimeoutError:
        return False
    except (msgspec.DecodeError, aiohttp.ClientError, OSError):
        return True
    return wanted <= {one.name for one in health.instances if one.state not in UNROUTED}
