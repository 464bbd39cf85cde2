"""Whether an engine lives, when what should tell of it has gone quiet.

A hung engine fails nothing: it is ready for Kubernetes until probes have given up on it, idle by
every count, and requests that go there wait. But a stream that is quiet does not mean a hung engine
either: a network policy may cut one port and not the other. So the engine itself is asked, at the
port that requests go to; whatever it answers, it lives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

ASK_S = 1.0
"""Pause between two questions."""
ANSWER_S = 2.0
"""A healthy engine answers at once; one under much load may take a while."""

OnPulse = Callable[[str], None]
"""Told why nothing is heard of the engine, and "" when something is."""


class Pulse:
    """Asks ``url`` for as long as there is doubt. ``session`` belongs to the caller."""

    def __init__(self, session: aiohttp.ClientSession, url: str, on_pulse: OnPulse) -> None:
        self._session = session
        self._url = url
        self._on_pulse = on_pulse
        self._why = ""
        self._asking: asyncio.Task[None] | None = None

    def doubt(self, why: str) -> None:
        """Nothing is heard of the engine, for this reason: ask it, until ``sure``."""
        self._why = why
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())

    def sure(self) -> None:
        """It is heard of."""
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
            self._on_pulse("")

    async def stop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _ask(self) -> None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        while True:
            silence = ""
            try:
                async with self._session.get(self._url, timeout=timeout):
                    pass
            except TimeoutError:
                silence = f"{self._why}, and no answer within {ANSWER_S:g} s"
            except (aiohttp.ClientError, OSError) as error:
                silence = f"{self._why}, and not reachable: {error}"
            self._on_pulse(silence)
            await asyncio.sleep(ASK_S)
