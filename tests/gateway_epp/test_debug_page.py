"""The status server's routes, and the page made of them in a real browser."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from dynamo_epp.explain import Disagg, Kept
from dynamo_epp.extproc import Route
from dynamo_epp.status_routes import add_status_routes
from dynamo_kv_router.choice import Candidate, Decision, How, Policy, RequestSize, Scored
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import StatusServer
from prometheus_client import CollectorRegistry

from tests.gateway_epp import chromium
from tests.gateway_epp.scene import Scene, scene

HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'"

in_a_browser = pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium is installed")


@asynccontextmanager
async def served(s: Scene) -> AsyncIterator[tuple[str, StatusServer]]:
    lifecycle = Lifecycle()
    server = StatusServer(lifecycle, CollectorRegistry(), "127.0.0.1", 0)
    add_status_routes(server.app, lifecycle, s.pool, s.picker, s.journal, 0)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}", server
    finally:
        await server.stop()


async def get(url: str, **params: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url, params=params) as answer:
        return await answer.json()


async def asked() -> Scene:
    """Two picks for the worker that caches the prefix, and two refusals."""
    s = await scene()
    for request_id in ("one", "two"):
        s.now[0] += 1
        route = await s.ask(request_id)
        assert isinstance(route, Route)
        s.picker.released(route)
    s.now[0] += 1
    await s.ask("bad", b"{")
    s.now[0] += 1
    await s.ask("unknown", json.dumps({"model": HOSTILE, "messages": []}).encode())
    return s


async def test_decisions_are_found_by_id_by_worker_and_by_model() -> None:
    async with served(await asked()) as (url, _):

        async def ids(**params: str) -> list[str]:
            found = (await get(f"{url}/debug/decisions", **params))["decisions"]
            return [each["request_id"] for each in found]

        assert await ids() == ["unknown", "bad", "two", "one"]
        assert await ids(limit="1") == ["unknown"]
        assert await ids(request_id="one") == ["one"]
        assert await ids(request_id="bad") == ["bad"]
        assert await ids(request_id="nobody's") == []
        assert await ids(worker="w-1") == ["two", "one"]
        assert await ids(worker="w-0") == []
        assert await ids(model="m") == ["two", "one"]
        assert await ids(model=HOSTILE) == ["unknown"]


async def test_a_candidate_says_in_a_sentence_why_it_lost() -> None:
    async with served(await asked()) as (url, _):
        (one,) = (await get(f"{url}/debug/decisions", request_id="one"))["decisions"]
        best, other = one["candidates"]
        assert (best["name"], other["name"]) == ("w-1", "w-0")
        assert best["why"] == "lowest: cost 3 blocks = prefill 1 + decode 2"
        assert other["why"] == "1 blocks more: prefill +1"
        assert one["worker"] == "w-1"
        (brief,) = (await get(f"{url}/debug/decisions", request_id="one", brief="1"))["decisions"]
        assert brief == {key: one[key] for key in brief}
        assert "candidates" not in brief


async def test_totals_say_how_decisions_were_made_and_what_was_refused() -> None:
    async with served(await asked()) as (url, _):
        assert await get(f"{url}/debug/totals") == {
            "decisions": 2,
            "since": 1001.0,
            "how": {"exact": 2},
            "reasons": {},
            "refused": {"bad-request": 1, "unknown-model": 1},
        }


@pytest.mark.parametrize("limit", ["x", "-1", "1.5", "²"])
async def test_a_limit_that_is_no_number_is_refused(limit: str) -> None:
    async with served(await scene()) as (url, _):
        answer = await get(f"{url}/debug/decisions", limit=limit)
        assert answer["error"]["param"] == "limit"


async def test_the_page_comes_with_a_policy_that_lets_nothing_else_run() -> None:
    async with (
        served(await scene()) as (url, _),
        aiohttp.ClientSession() as session,
        session.get(f"{url}/debug") as answer,
    ):
        page = await answer.text()
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src 'sha256-" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in page
    assert "http://" not in page
    assert "https://" not in page


@in_a_browser
async def test_hostile_names_are_shown_as_they_are_and_run_nowhere(tmp_path: Path) -> None:
    s = await asked()
    worker = s.pool.workers["w-0"]
    worker.models = frozenset({"m", HOSTILE})
    s.now[0] += 1
    asks = {"model": HOSTILE, "messages": [{"role": "user", "content": "x"}]}
    assert isinstance(await s.ask(HOSTILE, json.dumps(asks).encode()), Route)
    async with (
        served(s) as (url, _),
        chromium.opened(f"{url}/debug", tmp_path) as page,
    ):
        await page.until("document.querySelectorAll('#decisions tr').length === 5")
        rows = await page.evaluate(
            "[...document.querySelectorAll('#decisions tr')].map(r => r.innerText)"
        )
        assert HOSTILE in rows[0]
        assert HOSTILE in await page.evaluate("document.getElementById('endpoints').innerText")
        await page.evaluate("document.querySelector('#decisions button').click()")
        await page.until("document.getElementById('detail').innerText.includes('Candidates')")
        assert HOSTILE in await page.evaluate("document.getElementById('detail').innerText")
        assert await page.evaluate("document.title") == "Endpoint picker"
        assert await page.evaluate("document.querySelectorAll('img').length") == 0
        assert await page.evaluate("document.querySelectorAll('script').length") == 1
        assert page.problems == []


@in_a_browser
async def test_the_page_tells_why_each_candidate_lost_and_keeps_up(tmp_path: Path) -> None:
    s = await asked()
    async with (
        served(s) as (url, server),
        chromium.opened(f"{url}/debug#one", tmp_path) as page,
    ):
        await page.until("document.getElementById('detail').innerText.includes('Candidates')")
        text = await page.evaluate("document.getElementById('detail').innerText")
        assert "1 blocks more: prefill +1" in text
        assert "8 tokens = 2 blocks of 4" in text
        assert "4 tokens predicted, none reported" in text
        widths = await page.evaluate(
            "[...document.querySelectorAll('#detail tbody tr:first-child .bar span')]"
            ".map(part => part.style.width)"
        )
        assert widths == ["25%", "50%", "0%"]
        # What has the focus keeps it while the page refreshes itself.
        await page.evaluate("[...document.querySelectorAll('#decisions button')].at(-1).focus()")
        s.now[0] += 1
        await s.ask("three")
        await page.until("document.getElementById('decisions').innerText.includes('three')")
        assert await page.evaluate("document.activeElement.innerText") == "one"
        # A search by worker leaves the others out.
        await page.evaluate("document.querySelector('[name=worker]').value = 'w-0'")
        await page.evaluate("document.getElementById('filter').requestSubmit()")
        await page.until("document.querySelectorAll('#decisions tr').length === 0")
        assert page.problems == []
        await server.stop()
        await page.until("!document.getElementById('problem').hidden")
        assert "can't be reached" in await page.evaluate(
            "document.getElementById('problem').innerText"
        )


@in_a_browser
async def test_scores_of_a_profile_and_a_picked_pair_are_shown(tmp_path: Path) -> None:
    def scored(name: str, prefix: float, queue: float) -> Scored:
        candidate = Candidate(name=name, endpoint="10.0.0.7:8000")
        return Scored(candidate, -(2 * prefix + queue), (prefix, queue))

    s = await scene()
    decision = Decision(
        RequestSize(64, 16),
        Policy(),
        How.EXACT,
        ranked=(scored("best", 1.0, 0.5), scored("next", 0.5, 0.25)),
        dropped=(Candidate(name="out", endpoint="10.0.0.8:8000", dropped="label: no match"),),
        profile="default",
        scorers=(("prefix", 2.0), ("queue", 1.0)),
    )
    assert isinstance(await s.ask("pair"), Route)
    entry = s.journal.get("pair")
    assert entry is not None
    entry.kept = Kept.of(decision)
    entry.disagg = Disagg(
        decision="prefill-decode",
        reason=HOSTILE,
        generation="g",
        routing="",
        prefillers=("10.0.0.7:8000",),
        prefill=Kept.of(decision),
    )
    async with (
        served(s) as (url, _),
        chromium.opened(f"{url}/debug#pair", tmp_path) as page,
    ):
        await page.until("document.querySelectorAll('#detail table').length === 2")
        text = await page.evaluate("document.getElementById('detail').innerText")
        assert "highest: score 2.5 = prefix 2 + queue 0.5" in text
        assert "1.25 lower: prefix -1, queue -0.25" in text
        assert "dropped: label: no match" in text
        assert f"Prefill and decode: prefill-decode {HOSTILE}" in text
        assert await page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.problems == []
