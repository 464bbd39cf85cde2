"""Three frontends spread the load nearly as one does, over our workers and over stock engines.

The short form, in real processes; `benchmarks/replicas` has many more requests in virtual time. Two
models, one on workers under our launcher and one on bare engines, get the same requests twice:
through one of the frontends, then through all three. What is in hand is what the engines say.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import aiohttp
import pytest
from dynamo_kv_router.engine_metrics import figures
from dynamo_runtime.discovery import Endpoint, write_endpoints

from e2e.faults.deployment import (
    HTTP_PORT,
    STATUS_PORT,
    STREAM_PORT,
    Program,
    eventually,
    free_address,
)

MODELS = ("ours", "stock")
WORKERS, FRONTENDS = 6, 3
RATE, SECONDS, SETTLE_S = 25.0, 7.0, 1.5
"""Requests a second for each model; each takes a second."""
LOOK_S = 0.2
OURS, STOCK = 1.15, 1.2
"""Of one frontend's spread. By chance (Poisson, four each on six workers) it would be 1.3 times
that."""
PROFILE = {
    "prefill_tokens_per_s": 20_000.0,
    "prefill_overhead_s": 0.005,
    "decode": [{"batch": 1, "step_s": 0.02}, {"batch": 64, "step_s": 0.02}],
}


class Engines:
    """Of both models, and frontends that know them by a file."""

    def __init__(self, folder: Path) -> None:
        profile, endpoints = folder / "profile.json", folder / "endpoints.json"
        profile.write_text(json.dumps(PROFILE))
        self.urls: dict[str, list[str]] = {model: [] for model in MODELS}
        self.programs: list[tuple[Program, str]] = []
        told = []
        for model in MODELS:
            for number in range(WORKERS):
                name, address = f"{model}-{number}", free_address()
                url = f"http://{address}:{HTTP_PORT}"
                sim = [f"--timing-profile={profile}", f"--served-model-name={model}"]
                env = {"POD_NAME": name, "DYN_HTTP_HOST": address, "DYN_SYSTEM_HOST": address}
                if model == "ours":
                    argv = [sys.executable, "-m", "dynamo_workers.worker", "sim", *sim]
                    ports = {"stream_port": STREAM_PORT, "status_port": STATUS_PORT}
                else:
                    listens = [f"--host={address}", f"--port={HTTP_PORT}"]
                    argv = [sys.executable, "-m", "dynamo_workers.sim", *sim, *listens]
                    ports = {}
                self.urls[model].append(url)
                self.programs.append((Program(argv, env), f"{url}/health"))
                told.append(Endpoint(name, address, HTTP_PORT, ready=True, **ports))
        write_endpoints(endpoints, told)
        self.frontends: list[str] = []
        self.status: list[str] = []
        for _ in range(FRONTENDS):
            address = free_address()
            env = {
                "DYN_HTTP_HOST": address,
                "DYN_SYSTEM_HOST": address,
                "DYN_ENVOY_CONCURRENCY": "1",
                "TMPDIR": str(folder),
            }
            command = (sys.executable, "-m", "dynamo_cli.main", "frontend")
            self.status.append(f"http://{address}:{STATUS_PORT}")
            frontend = Program((*command, "--endpoints-file", str(endpoints)), env)
            self.frontends.append(f"http://{address}:{HTTP_PORT}")
            self.programs.append((frontend, f"{self.status[-1]}/ready"))

    async def known(self, client: aiohttp.ClientSession) -> None:
        """Wait until every frontend has heard of every engine, and can tell its prompts' tokens."""

        async def routable() -> bool:
            models = [json.loads(await get(client, f"{url}/v1/models")) for url in self.frontends]
            states = [json.loads(await get(client, f"{url}/debug/workers")) for url in self.status]
            return all({one["id"] for one in each["data"]} == {*MODELS} for each in models) and all(
                all(worker["models"] for worker in each["workers"]) for each in states
            )

        await eventually(routable, 60.0)


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Engines]:
    engines = Engines(folder)
    async with AsyncExitStack() as stack:
        for program, _ in engines.programs:
            stack.push_async_callback(program.close)
            await program.start()
        for program, url in engines.programs:
            await program.answering(url)
        yield engines


@dataclass
class Spread:
    """Of each look at the engines of a model: the fullest over the mean."""

    requests: list[float] = field(default_factory=list)
    cache: list[float] = field(default_factory=list)

    def look(self, requests: Sequence[float], cache: Sequence[float]) -> None:
        for spreads, values in ((self.requests, requests), (self.cache, cache)):
            if any(values):
                spreads.append(max(values) / mean(values))


@asynccontextmanager
async def watched(
    client: aiohttp.ClientSession, engines: dict[str, list[str]]
) -> AsyncIterator[dict[str, Spread]]:
    """The spread over the engines of each model, from now to the end of the block."""
    spreads = {model: Spread() for model in engines}

    async def look(model: str) -> None:
        pages = await asyncio.gather(*(get(client, f"{url}/metrics") for url in engines[model]))
        told = [said for page in pages if (said := figures(page)) is not None]
        assert len(told) == WORKERS
        spreads[model].look([f.running + f.waiting for f in told], [f.cache_usage for f in told])

    async def for_ever() -> None:
        while True:
            await asyncio.gather(*(look(model) for model in engines))
            await asyncio.sleep(LOOK_S)

    watching = asyncio.create_task(for_ever())
    try:
        yield spreads
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def get(client: aiohttp.ClientSession, url: str) -> str:
    async with client.get(url) as answer:
        answer.raise_for_status()
        return await answer.text()


async def spread(
    client: aiohttp.ClientSession, frontends: Sequence[str], engines: dict[str, list[str]]
) -> dict[str, Spread]:
    """What comes of the same requests through these frontends."""
    rng, loop = random.Random(5), asyncio.get_running_loop()
    began, due = loop.time(), 0.0

    async def ask(model: str, words: int, tokens: int, at: int) -> None:
        prompt = f"{len(frontends)} frontends, {words} words: " + "again and " * words
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        url = f"{frontends[at % len(frontends)]}/v1/completions"
        async with client.post(url, json=body) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()

    async with asyncio.TaskGroup() as requests, watched(client, engines) as spreads:
        while due < SECONDS:
            await asyncio.sleep(began + due - loop.time())
            if due < SETTLE_S:
                for one in spreads.values():
                    one.requests.clear()
                    one.cache.clear()
            words, tokens, at = rng.randint(20, 200), rng.randint(30, 70), rng.randrange(60)
            for model in MODELS:
                requests.create_task(ask(model, words, tokens, at))
            due += rng.expovariate(RATE)
    return spreads


@pytest.mark.timeout(240)
async def test_three_frontends_spread_the_load_nearly_as_one_does() -> None:
    connector = aiohttp.TCPConnector(limit=0)
    # Directly in /tmp: Envoy's sockets lie in it, and a socket's path has to be short.
    with tempfile.TemporaryDirectory(prefix="replicas-", dir="/tmp") as folder:
        async with (
            running(Path(folder)) as it,
            aiohttp.ClientSession(connector=connector) as client,
        ):
            await it.known(client)
            one = await spread(client, it.frontends[:1], it.urls)
            three = await spread(client, it.frontends, it.urls)
    for model, limit in zip(MODELS, (OURS, STOCK), strict=True):
        for what in ("requests", "cache"):
            alone, together = (mean(getattr(seen[model], what)) for seen in (one, three))
            print(f"{model}, {what}: {alone:.2f} and {together:.2f}: {together / alone:.2f}")
            assert together <= limit * alone, (model, what)
