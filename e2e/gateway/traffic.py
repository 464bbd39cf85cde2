"""Requests through a Gateway at a constant rate, and who answered them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

ANSWER_S = 60.0
PATH = "/v1/completions"
TOKENS = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    sent: float
    """Monotonic time at which it left, in seconds."""
    status: int
    """0: there was no whole answer."""
    served: str
    """Address of the pod that answered, without its port."""
    problem: str = ""
    """What was wrong with the first try, if anything was."""
    failed: float = 0.0
    """When that showed: monotonic time in seconds."""


def short(number: int) -> dict[str, Any]:
    """The body of request `number`, unless a test has others."""
    return {"model": "tiny", "prompt": f"request {number}", "max_tokens": TOKENS}


@dataclass(slots=True)
class Traffic:
    """Open loop: each request leaves at its time, whatever became of those before.

    Answers are whole, not streamed: until its first byte every one of them could be had from
    another pod. `async with Traffic(url, served="x-served-by") as traffic: …`.
    """

    url: str
    served: str
    """Response header that tells the address of the pod."""
    rate: float = 20.0
    """Requests a second."""
    body: Callable[[int], dict[str, Any]] = short
    host: str = ""
    """For a Gateway that has several; "" for that of the URL."""
    tries: int = 1
    """How often a request that fails is sent, at once each time."""
    answers: list[Answer] = field(default_factory=list)
    _running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        assert self._running is not None
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    @property
    def lost(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    @property
    def saved(self) -> list[Answer]:
        """Those that failed first, and were answered when they were sent again."""
        return [one for one in self.answers if one.status == 200 and one.problem]

    def since(self, moment: float) -> Counter[str]:
        """Who answered how many of the requests that left after this monotonic time."""
        return Counter(answer.served for answer in self.answers if answer.sent >= moment)

    def story(self) -> str:
        """How many there were, and when and how some of them were lost."""
        first = self.answers[0].sent
        lines = [f"{len(self.answers)} requests, {len(self.lost)} lost"]
        for answer in self.lost[:40]:
            lines.append(f"{answer.sent - first:6.2f} s: {answer.problem}")
        return "\n".join(lines)

    def mark(self, what: str) -> None:
        """A line that is shown if the test fails: what happens now."""
        first = self.answers[0].sent if self.answers else time.monotonic()
        print(f"{time.monotonic() - first:6.2f} s: {what}")

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        headers = {"host": self.host} if self.host else None
        async with (
            aiohttp.ClientSession(self.url, timeout=timeout, headers=headers) as client,
            asyncio.TaskGroup() as requests,
        ):
            began = time.monotonic()
            for number in itertools.count():
                try:
                    await asyncio.sleep(began + number / self.rate - time.monotonic())
                except asyncio.CancelledError:
                    break  # no more of them; those that are under way are read to the end
                requests.create_task(self._one(client, number))

    async def _one(self, client: aiohttp.ClientSession, number: int) -> None:
        sent, body = time.monotonic(), self.body(number)
        status, served, problem, failed = 0, "", "", 0.0
        for _ in range(self.tries):
            status, served, said = await self._try(client, body)
            if status == 200:
                break
            if not problem:
                problem, failed = said, time.monotonic()
        self.answers.append(Answer(sent, status, served, problem, failed))

    async def _try(
        self, client: aiohttp.ClientSession, body: dict[str, Any]
    ) -> tuple[int, str, str]:
        """Status (0 without a whole answer), who answered, and what was wrong."""
        try:
            status, headers, text = await ask(client, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, "", repr(error)
        served = headers.get(self.served, "").partition(":")[0]
        return status, served, "" if status == 200 else f"{status} {text[:200]}"


async def ask(
    client: aiohttp.ClientSession, body: dict[str, Any], path: str = PATH, **headers: str
) -> tuple[int, dict[str, str], str]:
    """One request: status, headers in lower case, and the whole body."""
    async with client.post(path, json=body, headers=headers) as response:
        text = await response.text()
        return response.status, {k.lower(): v for k, v in response.headers.items()}, text
