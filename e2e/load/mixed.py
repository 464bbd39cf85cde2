"""Mixed requests through a frontend: every byte of both bodies is accounted for.

Run by `dynamo up GRAPH --exec`. Sends ``--requests`` requests of every kind that the frontend
takes, streamed and not, of 100 bytes to 400 KB, whole and chunked; a part of the clients leaves in
the middle. Then compares with what the engines noted (``body_digest``): each request that was
answered is there exactly once with the same bytes in both directions, none was lost, doubled or
cut, and no booking is left behind. Exit status 0 if so.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp

WORDS = (
    "cache",
    "prefix",
    "block",
    "worker",
    "token",
    "naïve",
    "漢字",
    "🚀",
    "λ",
    "route",
    "drain",
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request and how to send it."""

    name: str
    path: str
    body: bytes
    chunked: bool
    leaves: bool  # the client goes away after the first bytes of the answer


@dataclass(frozen=True, slots=True)
class Got:
    """What the client saw."""

    status: int
    asked: str  # SHA-256 of the request body
    answered: str  # SHA-256 of the response body
    size: int


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def ask(number: int, rng: random.Random, conversations: list[list[dict[str, str]]]) -> Ask:
    """Request ``number`` of the mix."""
    stream = rng.random() < 0.5
    base = {"model": "tiny", "max_tokens": rng.randint(1, 24), "stream": stream}
    kind = rng.random()
    if kind < 0.6:
        messages = rng.choice(conversations)
        path, body = "/v1/chat/completions", {**base, "messages": messages}
        if stream and rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        if rng.random() < 0.05:
            body["cache_salt"] = f"tenant-{number % 3}"
    elif kind < 0.75:
        path, body = "/v1/completions", {**base, "prompt": text(rng, rng.randint(1, 300))}
    elif kind < 0.85:
        tokens = [rng.randrange(5, 1500) for _ in range(rng.randint(1, 500))]
        path, body = "/v1/completions", {**base, "prompt": tokens}
    elif kind < 0.9:
        path, body = "/v1/embeddings", {"model": "tiny", "input": text(rng, rng.randint(1, 50))}
    elif kind < 0.91:
        # A large body that the engine refuses: too long a prompt. Its refusal has bytes too.
        path, body = "/v1/completions", {**base, "prompt": text(rng, rng.randint(20_000, 60_000))}
    else:
        path = "/v1/chat/completions"
        parts = [{"type": "text", "text": text(rng, 20)}, {"type": "text", "text": "end"}]
        body = {**base, "messages": [{"role": "user", "content": parts}]}
    return Ask(
        f"mix-{number}",
        path,
        json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(),
        chunked=rng.random() < 0.3,
        leaves=stream and rng.random() < 0.02,
    )


async def chunks(body: bytes, rng: random.Random) -> AsyncIterator[bytes]:
    position = 0
    while position < len(body):
        size = rng.choice((1, 100, 4096, 70_000))
        yield body[position : position + size]
        position += size


async def send(session: aiohttp.ClientSession, url: str, one: Ask, rng: random.Random) -> Got | str:
    """The client's view; a word instead if there is no whole answer."""
    headers = {"x-request-id": one.name, "content-type": "application/json"}
    data = chunks(one.body, rng) if one.chunked else one.body
    answered, size = hashlib.sha256(), 0
    try:
        async with session.post(url + one.path, data=data, headers=headers) as answer:
            async for part in answer.content.iter_any():
                answered.update(part)
                size += len(part)
                if one.leaves:
                    return "left"
            if answer.headers.get("x-request-id") != one.name:
                return "other request id"
            asked = hashlib.sha256(one.body).hexdigest()
            return Got(answer.status, asked, answered.hexdigest(), size)
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"


def noted(folder: Path) -> dict[str, list[tuple[str, str, bool]]]:
    """Request id -> what engines noted of it, once for each time one saw it."""
    seen: dict[str, list[tuple[str, str, bool]]] = defaultdict(list)
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            name, asked, answered, complete = line.split()
            seen[name].append((asked, answered, complete == "1"))
    return seen


async def bookings_left(session: aiohttp.ClientSession, status_url: str) -> float:
    async with session.get(status_url + "/debug/workers") as answer:
        return sum(worker["active_requests"] for worker in (await answer.json())["workers"])


async def run(options: argparse.Namespace) -> int:
    rng = random.Random(options.seed)
    conversations = []
    for number in range(60):
        messages: list[dict[str, str]] = [{"role": "system", "content": text(rng, 80)}]
        for turn in range(rng.randint(1, 5)):
            messages.append({"role": "user", "content": f"{number} {turn} {text(rng, 40)}"})
            conversations.append(list(messages))
            messages.append({"role": "assistant", "content": text(rng, 40)})
    asks = [ask(number, rng, conversations) for number in range(options.requests)]
    results: dict[str, Got | str] = {}
    queue = iter(asks)
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=options.concurrency)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def client(number: int) -> None:
            mine = random.Random(number)
            for one in queue:
                results[one.name] = await send(session, options.url, one, mine)

        await asyncio.gather(*(client(number) for number in range(options.concurrency)))
        left = await bookings_left(session, options.status_url)
        for _ in range(100):  # reports of the last requests are on their way
            if left == 0:
                break
            await asyncio.sleep(0.1)
            left = await bookings_left(session, options.status_url)
    return judge(asks, results, noted(Path(options.digests)), left)


def judge(
    asks: list[Ask],
    results: dict[str, Got | str],
    seen: dict[str, list[tuple[str, str, bool]]],
    bookings: float,
) -> int:
    problems: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for one in asks:
        got, notes = results.get(one.name), seen.get(one.name, [])
        if one.leaves and not isinstance(got, Got):
            kinds["left"] += 1
            continue
        if not isinstance(got, Got):
            problems[f"no whole answer: {got}"] += 1
            continue
        kinds[f"{got.status}"] += 1
        if len(notes) != 1:
            problems[f"seen by engines {len(notes)} times"] += 1
            continue
        ((asked, answered, complete),) = notes
        if asked != got.asked:
            problems["request body differs"] += 1
        if answered != got.answered:
            problems["response body differs"] += 1
        if not complete:
            problems["the engine did not finish"] += 1
    unknown = len(seen.keys() - {one.name for one in asks})
    if unknown:
        problems["requests that nobody sent"] += unknown
    if bookings:
        problems[f"{bookings:g} bookings left behind"] += 1
    print(f"{len(asks)} requests: {dict(kinds)}; problems: {dict(problems) or 'none'}")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", default=os.environ.get("DYNAMO_URL"))
    parser.add_argument("--status-url", required=False)
    parser.add_argument("--digests", required=True)
    options = parser.parse_args()
    if options.status_url is None:
        options.status_url = options.url.rsplit(":", 1)[0] + ":9090"
    return asyncio.run(run(options))


if __name__ == "__main__":
    sys.exit(main())
