"""Conversations under way all the time, each answer judged against a ledger of the test's own.

The ledger holds what every engine was sent and has answered. A pick is right if its request was
answered in time by an engine that has most of the conversation, if the picker called it exact, and
if what it took to be cached is what the engine found there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

BLOCK = 16
TURNS, FIRST_WORDS, TURN_WORDS, ANSWER_TOKENS = 8, 160, 16, 6
THINK_S = 0.25
"""Between an answer and the next turn; what the engine says of its cache is there long before."""
LATE_S = 2.0
"""Answers begin within milliseconds; one that has not by then is waiting in a wrong place."""
GIVEN_UP_S = 60.0
RETRY_S = 0.25
_WORDS = ("red", "green", "blue", "one", "two", "three", "stone", "river", "cloud", "light")
_ROUTING = re.compile(r"(\S+?);overlap=(\d+)/\d+;")


@dataclass(slots=True, eq=False)
class Attempt:
    """One request as it was sent once. Times are monotonic seconds."""

    conversation: int
    request: int
    """The same for each time that one request is sent."""
    sent: float
    head: float = 0.0
    """The head of a good answer; 0: none came."""
    first: float = 0.0
    """First byte of the answer's body; 0: none came."""
    ended: float = 0.0
    """0: it is under way."""
    problem: str = ""
    """Why there is no whole answer."""
    engine: int = 0
    """Process that answered."""
    routing: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    wrong: str = ""
    """What was wrong with it, answered or not."""

    @property
    def lost(self) -> bool:
        """It had a good answer that broke off. Proxies and clients send nothing again then."""
        return bool(self.problem and self.head)


@dataclass
class Ledger:
    """Conversation -> engine -> prompt tokens of it that this engine has computed."""

    held: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    away: set[int] = field(default_factory=set)
    """Engines that answer nobody at the moment."""

    def forget(self, engine: int) -> None:
        """Its cache is gone."""
        for engines in self.held.values():
            engines.pop(engine, None)

    def engines(self) -> dict[int, int]:
        """Engine -> conversations that it holds."""
        counts: dict[int, int] = defaultdict(int)
        for engines in self.held.values():
            for engine in engines:
                counts[engine] += 1
        return counts

    def judge(self, attempt: Attempt) -> str:
        """What was wrong with an answered attempt; "" if nothing."""
        if attempt.first - attempt.sent > LATE_S:
            return "late"
        told = _ROUTING.match(attempt.routing)
        if told is None or told[1] != "exact":
            return told[1] if told is not None else f"routing told as {attempt.routing!r}"
        said = int(told[2]) * BLOCK
        if said != attempt.cached_tokens:
            return f"said {said} cached tokens, {attempt.cached_tokens} were"
        engines = self.held[attempt.conversation]
        there = {e: tokens // BLOCK * BLOCK for e, tokens in engines.items() if e not in self.away}
        here = there.get(attempt.engine, 0)
        if attempt.cached_tokens < here:
            return f"the engine had {here} tokens and found {attempt.cached_tokens}"
        if here < max(there.values(), default=0):
            return "another engine has the conversation"
        return ""


class Conversations:
    """``count`` of them at a time, to ``url``; `async with Conversations(…) as traffic: …`."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self.ledger = Ledger()
        self.attempts: list[Attempt] = []
        self._url, self._count, self._rng = url, count, random.Random(seed)
        self._numbers, self._requests = itertools.count(), itertools.count()
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=GIVEN_UP_S)
        connector = aiohttp.TCPConnector(force_close=True)  # a cut connection is no request's fault
        self._client = aiohttp.ClientSession(self._url, timeout=timeout, connector=connector)
        for _ in range(self._count):
            self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._ending = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    def _begin(self) -> None:
        task = asyncio.create_task(self._converse(next(self._numbers)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _text(self, words: int) -> str:
        return " ".join(self._rng.choice(_WORDS) for _ in range(words))

    async def _converse(self, number: int) -> None:
        """To its end, or until an answer is cut or late; then another one takes its place."""
        messages = [{"role": "system", "content": f"{number}: {self._text(FIRST_WORDS)}"}]
        in_time = True
        await asyncio.sleep(self._rng.random() * THINK_S)
        for _ in range(TURNS):
            messages.append({"role": "user", "content": self._text(TURN_WORDS)})
            answer, in_time = await self._answer(number, messages)
            if answer is None or not in_time or self._ending:
                break
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(THINK_S)
        if in_time and not self._ending:
            self._begin()

    async def _answer(self, number: int, messages: list[dict[str, str]]) -> tuple[str | None, bool]:
        """The answer, None if there is none; and false if another conversation began meanwhile.

        What failed before an answer began is sent again, as every client does.
        """
        give_up, in_time = time.monotonic() + GIVEN_UP_S, True
        request = next(self._requests)
        while True:
            attempt = Attempt(number, request, time.monotonic())
            self.attempts.append(attempt)
            asking = asyncio.create_task(self._ask(attempt, messages))
            try:
                await asyncio.wait({asking}, timeout=LATE_S)
                if not asking.done() and not attempt.first and in_time and not self._ending:
                    in_time = False
                    self._begin()  # the load goes on beside the one that waits
                answer = await asking
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                attempt.problem = attempt.problem or repr(error)
                answer = None
            finally:
                asking.cancel()
            attempt.ended = time.monotonic()
            attempt.wrong = attempt.problem or self.ledger.judge(attempt)
            if not attempt.problem:
                held = self.ledger.held[number]
                held[attempt.engine] = max(held.get(attempt.engine, 0), attempt.prompt_tokens)
            self._changed.set()
            if answer is not None or attempt.lost or time.monotonic() > give_up:
                return answer, in_time
            await asyncio.sleep(RETRY_S)

    async def _ask(self, attempt: Attempt, messages: list[dict[str, str]]) -> str | None:
        body = {
            "model": "tiny",
            "messages": messages,
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, ended = "", False
        async with self._client.post("/v1/chat/completions", json=body) as response:
            attempt.engine = int(response.headers.get("x-engine", 0))
            attempt.routing = response.headers.get("x-dynamo-routing", "")
            if response.status != 200:
                attempt.problem = f"{response.status} {(await response.text())[:200]}"
                return None
            attempt.head = time.monotonic()
            async for line in response.content:
                attempt.first = attempt.first or time.monotonic()
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    ended = True
                elif data:
                    text += _take(json.loads(data), attempt)
        if not ended:
            attempt.problem = "the answer broke off"
            return None
        return text

    # --- what came of it

    def since(self, moment: float) -> list[Attempt]:
        """Those under way at that monotonic time, and all after it, in the order of sending."""
        return [one for one in self.attempts if one.sent >= moment or not 0 < one.ended < moment]

    async def changed(self, limit_s: float) -> None:
        """Until something has ended, at most so long."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), limit_s)

    async def until_right(self, moment: float, *, enough: int = 20, limit_s: float = 40.0) -> float:
        """Seconds from ``moment`` to the sending of the first request from which on all are right.

        Waits until so many in a row were right. Raises AssertionError if it takes too long.
        """
        while True:
            seconds, row = unbroken(self.attempts, moment, time.monotonic())
            if row >= enough:
                return seconds
            assert time.monotonic() - moment < limit_s, "\n".join(self.story(moment))
            await self.changed(0.2)

    async def until_answered(self, more: int, limit_s: float = 40.0) -> None:
        """Until so many that are sent from now on are answered, right or wrong."""
        now = time.monotonic()
        while sum(one.sent >= now and one.ended > 0 for one in self.attempts) < more:
            assert time.monotonic() - now < limit_s, "\n".join(self.story(now))
            await self.changed(0.2)

    async def until_served_by(self, engine: int, moment: float, limit_s: float = 40.0) -> float:
        """Seconds from ``moment`` to the first request that this engine answers."""
        while True:
            for one in self.attempts:
                if one.sent >= moment and one.engine == engine and one.first:
                    return one.first - moment
            assert time.monotonic() - moment < limit_s, f"engine {engine} gets nothing"
            await self.changed(0.2)

    def story(self, moment: float) -> Iterable[str]:
        for one in self.since(moment)[-60:]:
            how = one.wrong if one.ended else "under way"
            yield f"{one.sent - moment:7.3f} s: {one.conversation} {how} {one.routing} {one.engine}"


def _take(event: dict[str, Any], attempt: Attempt) -> str:
    """The text in one event of a stream."""
    if usage := event.get("usage"):
        attempt.prompt_tokens = usage["prompt_tokens"]
        attempt.cached_tokens = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def unbroken(attempts: Iterable[Attempt], moment: float, now: float) -> tuple[float, int]:
    """(seconds from ``moment`` to the first of the last unbroken row of right ones, its length).

    What has been under way for long is wrong already; what has not may become so, and nothing
    behind it counts yet.
    """
    first, row, wrong = 0.0, 0, False
    for one in sorted(attempts, key=lambda one: one.sent):
        if one.sent < moment:
            continue
        waits = not one.ended and not one.first
        if one.wrong or (waits and now - one.sent > LATE_S):
            row, wrong = 0, True
        elif waits:
            break
        elif one.ended:
            row += 1
            if row == 1:
                first = one.sent - moment if wrong else 0.0
    return first, row
