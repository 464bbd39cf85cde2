"""The planner out of its image, with the rights that the operator gives it: workers come with the
load and go with it, and no request is lost."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e.operator.space import Json, Space, is_ready

pytestmark = pytest.mark.usefixtures("direct")

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "planner.yaml"
NAME, ADAPTER = "planner", "planner-worker"
AT_ONCE, REQUESTS, TOKENS = 60, 120, 500
ADVISORY = "advisory: true"


class Load:
    """So many requests, some at once: more than one worker's cache holds."""

    def __init__(self, url: str, requests: int = REQUESTS) -> None:
        self._url, self._requests = url, requests
        self.problems: list[str] = []

    async def run(self) -> None:
        places = asyncio.Semaphore(AT_ONCE)
        async with (
            aiohttp.ClientSession(self._url) as client,
            asyncio.TaskGroup() as requests,
        ):
            for number in range(self._requests):
                await places.acquire()
                asking = requests.create_task(self._ask(client, number))
                asking.add_done_callback(lambda _: places.release())

    async def _ask(self, client: aiohttp.ClientSession, number: int) -> None:
        message = {"role": "user", "content": f"{number} " * 60}
        body = {"model": "tiny", "messages": [message], "max_tokens": TOKENS, "ignore_eos": True}
        try:
            async with client.post("/v1/chat/completions", json=body) as response:
                text = await response.text()
                if response.status != 200 or not text.endswith("}"):
                    self.problems.append(f"{number}: {response.status} {text[:200]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self.problems.append(f"{number}: {error!r}")


def told(space: Space, path: str) -> Any:
    """What the planner's status server says."""
    (pod,) = space.pods(NAME, "Planner")
    url = f"http://{pod['status']['podIP']}:9090{path}"
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        return json.load(answer)


def moves(space: Space) -> list[Json]:
    """Its decisions that moved something, the newest first."""
    found: list[Json] = told(space, "/planner/decisions?moved=1")["decisions"]
    return [one["decision"] for one in found]


def ready(space: Space) -> int:
    return sum(map(is_ready, space.pods(NAME, "Worker")))


@pytest.mark.timeout(400)
async def test_workers_come_with_the_load_and_go_with_it(installed_space: Space) -> None:
    space = installed_space
    example = EXAMPLE.read_text()
    space.kubectl("apply", "-f", "-", input=example)
    space.wait_ready(NAME)
    load = Load(space.url(NAME))
    loaded = asyncio.create_task(load.run())
    await asyncio.to_thread(space.until, lambda: ready(space) > 1, "more workers")
    await loaded
    assert load.problems == []
    await asyncio.to_thread(space.until, lambda: ready(space) == 1, "one worker again")
    orders = [order for decision in reversed(moves(space)) for order in decision["orders"]]
    assert all(1 <= order["replicas"] <= 4 for order in orders)
    assert "KV cache use is" in orders[0]["reason"]
    assert space.get("dgdsa", ADAPTER)["spec"]["replicas"] == 1

    # Advisory, it tells what it would do, and does nothing.
    indent = " " * 18
    assert f"{indent}mode: agg\n" in example
    advisory = example.replace(f"{indent}mode: agg\n", f"{indent}mode: agg\n{indent}{ADVISORY}\n")
    space.kubectl("apply", "-f", "-", input=advisory)
    space.wait_ready(NAME)
    load = Load(space.url(NAME), AT_ONCE)
    loaded = asyncio.create_task(load.run())

    def would_scale() -> bool:
        return any(
            role["replicas"] > role["desired"]
            for one in told(space, "/planner/decisions")["decisions"]
            for role in one["decision"]["roles"]
        )

    await asyncio.to_thread(space.until, would_scale, "it would scale")
    await loaded
    assert load.problems == []
    assert space.get("dgdsa", ADAPTER)["spec"]["replicas"] == 1
    assert len(space.pods(NAME, "Worker")) == 1
