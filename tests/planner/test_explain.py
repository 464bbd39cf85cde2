"""`dynamo planner explain`, against the status server's own routes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web
from dynamo_cli.main import app
from dynamo_planner.config import PlannerConfig
from dynamo_planner.status_routes import Journal, Told
from typer.testing import CliRunner

from tests.planner.simulated_fleet import Loop

CONFIG = PlannerConfig(mode="agg", max_gpu_budget=4)


@pytest.fixture
def planner() -> Iterator[tuple[str, Journal]]:
    """A status server with an empty journal, in a thread: the command has a loop of its own."""
    journal = Journal(CONFIG.model_dump(mode="json"), ("a note",))
    loop, started, port = asyncio.new_event_loop(), threading.Event(), [0]

    async def serve() -> web.AppRunner:
        application = web.Application()
        journal.add_routes(application)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port[0] = runner.addresses[0][1]
        started.set()
        return runner

    def run() -> None:
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(10)
    yield f"http://127.0.0.1:{port[0]}", journal
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def explain(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["planner", "explain", *arguments])
    return result.exit_code, result.output


def test_what_is_seen_decided_and_moved_is_told(planner: tuple[str, Journal]) -> None:
    url, journal = planner
    assert explain("--url", url) == (
        0,
        f"{url}: mode agg, target throughput\n  note: a note\n  nothing has been decided yet\n",
    )
    loop = Loop(CONFIG, lambda now: 40.0)
    loop.run(50)
    journal.told.extend(Told(f"{each.at:.0f} s", each) for each in loop.decisions)
    status, said = explain("--url", url)
    assert status == 0
    assert "  worker: 4 replicas; 1 ready, 1 seen (0.0 s ago), " in said
    assert "    keeps still: waiting for a change that began" in said
    assert "last moves:\n" in said
    assert "Worker  1 → 4  KV cache use is" in said
    told = json.loads(explain("--url", url, "--json", "--last", "1")[1])
    assert [order["replicas"] for order in told["moves"][0]["decision"]["orders"]] == [4]


def test_who_does_not_answer_is_named() -> None:
    status, said = explain("--url", "http://127.0.0.1:1")
    assert status == 1
    assert said.startswith("dynamo planner explain: it can't be reached")
    assert explain("--url", "http://x", "--graph", "g")[0] == 2
