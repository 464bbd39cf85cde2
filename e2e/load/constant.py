"""Requests at a constant rate, whatever becomes of them: what clients see while things change.

Open loop: request *n* leaves at its time even if those before it hang, so that a standstill shows
as what it is. Each answer is read to its end and has to say what the first answer to the same
prompt said; streamed and whole answers are to agree. Several clients keep connections and begin
anew now and then, because a Service shares out connections, not requests. Nothing is tried twice.

Beside that it asks the frontend again and again how many workers it can route to.

In a process of its own, so that whoever changes things does not slow the load down:
`with ConstantLoad(url) as load: …`, then `load.result`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

CLIENTS = 8
CLIENT_LIFE_S = 8.0
"""So long a client keeps its connections, give or take a half."""
ANSWER_LIMIT_S = 60.0
SAMPLE_EVERY_S = 0.1
MAX_IN_FLIGHT = 3000
"""More than this unanswered: the load is more than the machine can carry, and says so."""
WORDS = ("cache", "prefix", "block", "worker", "token", "router", "naïve", "漢字", "🚀", "λ")
ENDED_WITH = {"stop", "length"}


@dataclass(slots=True)
class Result:
    """What clients saw. Times in seconds since the start."""

    sent: int = 0
    answered: int = 0
    """Whole and right."""
    failures: list[tuple[float, str]] = field(default_factory=list)
    """When the request left, and what became of it."""
    connections: int = 0
    """That clients opened."""
    samples: int = 0
    fewest_routable: int = -1
    """Workers that the frontend could route to, at the worst moment; -1: never sampled."""
    unroutable: list[tuple[float, str]] = field(default_factory=list)
    """Moments at which it could route to none."""
    seconds: float = 0.0
    latency: dict[str, float] = field(default_factory=dict)
    """p50, p99, max of right answers, in seconds."""

    @property
    def rate(self) -> float:
        """Requests per second, as they left."""
        return self.sent / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        kinds = Counter(what for _, what in self.failures)
        lines = [
            f"{self.sent} sent in {self.seconds:.1f} s ({self.rate:.0f}/s), {self.answered} right,"
            f" {len(self.failures)} failed; {self.connections} connections;"
            f" latency {', '.join(f'{k} {v:.3f} s' for k, v in self.latency.items())};"
            f" routable workers ≥ {self.fewest_routable} in {self.samples} samples"
        ]
        lines += [f"  {count}× {what}" for what, count in kinds.most_common(20)]
        lines += [f"  {at:.2f} s {what}" for at, what in self.failures[:20]]
        lines += [f"  {at:.2f} s not routable: {what}" for at, what in self.unroutable[:20]]
        return "\n".join(lines)


class ConstantLoad:
    """The load as a process. Leaving the block ends it and reads `result`."""

    def __init__(
        self, url: str, *, rate: float = 100.0, seed: int = 1, model: str = "tiny"
    ) -> None:
        """`url` of the frontend; `rate` in requests a second."""
        command = [
            *(sys.executable, "-m", "e2e.load.constant", url, "--model", model),
            *("--rate", str(rate), "--seed", str(seed)),
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent
        )
        self._began = 0.0
        self._result: Result | None = None

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "started\n", "the load did not start"
        self._began = time.monotonic()
        return self

    def wait_until(self, seconds: float) -> None:
        """Until so long after its start. Raises `AssertionError` if it gave up before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, self._began + seconds - time.monotonic()))
            raise AssertionError("the load gave up")

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            output, _err = self._process.communicate(timeout=ANSWER_LIMIT_S + 10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        self._result = Result(**json.loads(output))
        print(self._result)  # shown if the test fails

    @property
    def result(self) -> Result:
        assert self._result is not None, "it has not ended"
        return self._result


# --- the process


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, asked for in one way."""

    prompt: int
    body: bytes
    stream: bool


def asks(rng: random.Random, model: str, prompts: int = 40) -> list[Ask]:
    """Each prompt streamed and whole: conversations of some 60 words, answers of 2 to 6 tokens."""
    found = []
    for number in range(prompts):
        text = " ".join(rng.choices(WORDS, k=60))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": rng.randint(2, 6),
        }
        for stream in (False, True):
            options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
            found.append(
                Ask(number, json.dumps({**body, "stream": stream, **options}).encode(), stream)
            )
    return found


class Wrong(Exception):
    """An answer that is none, or another than it should be."""


class Clients:
    """Sessions that are replaced one after the other; an old one ends with its last request."""

    def __init__(self, url: str, rng: random.Random, result: Result) -> None:
        self._url, self._rng, self._result = url, rng, result
        self._sessions = [self._make() for _ in range(CLIENTS)]
        self._until = [rng.uniform(0.0, CLIENT_LIFE_S) for _ in range(CLIENTS)]
        self._users: Counter[aiohttp.ClientSession] = Counter()

    def _make(self) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()

        async def opened(*_: object) -> None:
            self._result.connections += 1

        trace.on_connection_create_end.append(opened)
        return aiohttp.ClientSession(
            self._url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=ANSWER_LIMIT_S),
            trace_configs=[trace],
        )

    def take(self, number: int, now: float) -> aiohttp.ClientSession:
        place = number % CLIENTS
        if now > self._until[place]:
            old = self._sessions[place]
            self._sessions[place] = self._make()
            self._until[place] = now + CLIENT_LIFE_S * self._rng.uniform(0.5, 1.5)
            if not self._users[old]:
                asyncio.get_running_loop().create_task(old.close())
        session = self._sessions[place]
        self._users[session] += 1
        return session

    async def give_back(self, session: aiohttp.ClientSession) -> None:
        self._users[session] -= 1
        if not self._users[session] and session not in self._sessions:
            del self._users[session]
            await session.close()

    async def close(self) -> None:
        for session in self._sessions:
            await session.close()


async def answer(session: aiohttp.ClientSession, ask: Ask) -> tuple[str, str, int, int]:
    """What was said: text, finish reason, prompt and completion tokens. Raises `Wrong`."""
    headers = {"Content-Type": "application/json"}
    async with session.post("/v1/chat/completions", data=ask.body, headers=headers) as response:
        body = await response.read()
        if response.status != 200:
            raise Wrong(f"{response.status}: {body[:300].decode(errors='replace')}")
    if not ask.stream:
        whole = json.loads(body)
        (choice,) = whole["choices"]
        usage = whole["usage"]
        said = choice["message"]["content"], choice["finish_reason"]
    else:
        events = [line[6:] for line in body.decode().split("\n\n") if line.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            raise Wrong(f"the stream was cut after {len(events)} events")
        chunks = [json.loads(event) for event in events[:-1]]
        text, reason, usage = "", "", {}
        for chunk in chunks:
            if "error" in chunk:
                raise Wrong(f"error in the stream: {chunk['error']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
        said = text, reason
    if said[1] not in ENDED_WITH:
        raise Wrong(f"finish reason {said[1]!r}")
    return *said, usage["prompt_tokens"], usage["completion_tokens"]


async def sample(url: str, result: Result, began: float) -> None:
    """Ask a frontend, over a connection of its own, which workers it can route to."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
    while True:
        at = time.monotonic() - began
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"{url}/health", headers={"Connection": "close"}) as response,
            ):
                body = await response.json()
            # A frontend that is about to end says 503 here and goes on taking requests.
            count = len(body["instances"])
            result.samples += 1
            if result.fewest_routable < 0 or count < result.fewest_routable:
                result.fewest_routable = count
            if not count:
                result.unroutable.append((at, str(body)))
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            result.unroutable.append((at, f"{type(error).__name__}: {error}"))
        await asyncio.sleep(SAMPLE_EVERY_S)


async def reachable(url: str) -> None:
    """Until the Service leads to somebody: it may be a moment behind the pods' readiness. Raises
    `TimeoutError`."""
    once = aiohttp.ClientTimeout(total=2.0)
    async with asyncio.timeout(ANSWER_LIMIT_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with (
                    aiohttp.ClientSession(timeout=once) as session,
                    session.get(f"{url}/health") as response,
                ):
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)


async def run(options: argparse.Namespace) -> Result:
    rng = random.Random(options.seed)
    result = Result()
    mix = asks(rng, options.model)
    expected: dict[int, tuple[str, str, int, int]] = {}
    latencies: list[float] = []
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await reachable(options.url)
    began = time.monotonic()
    clients = Clients(options.url, rng, result)
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, ask: Ask) -> None:
        left = time.monotonic()
        session = clients.take(number, left - began)
        try:
            said = await answer(session, ask)
            if said != expected.setdefault(ask.prompt, said):
                raise Wrong(f"another answer: {said} instead of {expected[ask.prompt]}")
            result.answered += 1
            latencies.append(time.monotonic() - left)
        except Wrong as wrong:
            result.failures.append((left - began, str(wrong)))
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            result.failures.append((left - began, f"{type(error).__name__}: {error}"))
        finally:
            await clients.give_back(session)

    sampling = asyncio.create_task(sample(options.url, result, began))
    print("started", flush=True)
    while not stop.is_set():
        task = asyncio.create_task(one(result.sent, rng.choice(mix)))
        running.add(task)
        task.add_done_callback(running.discard)
        result.sent += 1
        if len(running) > MAX_IN_FLIGHT:
            result.failures.append((time.monotonic() - began, "too many unanswered; gave up"))
            break
        wait = began + result.sent / options.rate - time.monotonic()
        if wait > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await stop.wait()
        else:
            await asyncio.sleep(0)
    result.seconds = time.monotonic() - began
    if running:
        await asyncio.wait(running)
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    await clients.close()
    if latencies:
        latencies.sort()
        last = len(latencies) - 1
        result.latency = {
            "p50": latencies[last // 2],
            "p99": latencies[round(last * 0.99)],
            "max": latencies[last],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=1)
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a load that has to wait for the CPU would be none
    result = asyncio.run(run(parser.parse_args()))
    fields = {name: getattr(result, name) for name in Result.__slots__}
    print(json.dumps(fields))


if __name__ == "__main__":
    main()
