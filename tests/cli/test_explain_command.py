"""`dynamo explain` against real status servers, on this machine and through an API server."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from click.testing import Result
from dynamo_cli.explain.pickers import at_urls
from dynamo_cli.explain.show import plain
from dynamo_cli.explain.watching import EVERY_S, PATIENCE_S, watch
from dynamo_cli.explain.words import sentences
from dynamo_cli.main import app
from dynamo_epp.extproc import Route
from dynamo_kv_router.stream.format import Finished
from typer.testing import CliRunner

from tests.gateway_epp.scene import Scene, scene
from tests.gateway_epp.test_debug_page import served
from tests.gateway_epp.test_telling import logged
from tests.runtime.kube_api import KubeApi, failure, serving

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: c
contexts: [{{name: c, context: {{cluster: c, namespace: ns}}}}]
clusters: [{{name: c, cluster: {{server: "{url}"}}}}]
"""


async def explain(*arguments: str) -> Result:
    """The command in a thread of its own, as it brings its own loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["explain", *arguments])


async def asked(*request_ids: str) -> Scene:
    """A picker that was asked, and whose worker and proxy told how it went."""
    s = await scene()
    for number, request_id in enumerate(request_ids, 1):
        s.now[0] += 1
        route = await s.ask(request_id)
        assert isinstance(route, Route)
        worker = s.pool.workers["w-1"]
        s.picker.on_first_token(worker, f"p-{number}")
        s.picker.on_finished(worker, Finished(f"p-{number}", 8, 4, 3))
        s.picker.released(route)
        s.picker.on_access_log(logged(request_id))
    return s


async def test_one_decision_is_told_in_sentences() -> None:
    async with served(await asked("one")) as (url, _):
        result = await explain("one", "--url", url)
    assert result.exit_code == 0
    told = result.output.splitlines()
    assert told[0] == "request one  /v1/chat/completions  m"
    assert told[1] == (
        "w-1 (10.0.0.1:8000) got it: lowest: cost 3 blocks = prefill 1 + decode 2. It cached 1 of "
        "the prompt's 2 blocks and had 0 requests and 0 prefill tokens in hand."
    )
    assert told[2].startswith("w-0 came next: 1 blocks more: prefill +1 (0 blocks cached, ")
    assert told[3] == "The decision is exact (mode kv)."
    assert told[4] == "Ended with status 200, first token after 0.000 s, 0.250 s in all."
    assert told[5] == (
        "Cache: of 8 prompt tokens 4 were predicted to be cached, as the engine reported 4."
    )


async def test_a_refusal_is_told_too() -> None:
    s = await scene()
    await s.ask("bad", b"{")
    async with served(s) as (url, _):
        result = await explain("bad", "--url", url)
    assert "Refused with 400 before there was anything to choose: bad-request" in result.output


async def test_many_candidates_are_told_as_counts() -> None:
    s = await asked("one")
    entry = s.journal.find("one")
    assert entry is not None
    decision = entry.to_json()
    decision["left_out"] = {"ranked lower": 70, "draining": 2}
    decision["candidates"].append({**decision["candidates"][1], "dropped": "not ready"})
    told = sentences(decision)
    assert "70 others ranked lower still." in told[1]
    assert told[2] == "Could not be chosen: 2 draining, 1 not ready."


async def test_a_pair_of_workers_is_told() -> None:
    s = await asked("one")
    entry = s.journal.find("one")
    assert entry is not None
    prefill = {"decision": "prefill-decode", "reason": "", "prefillers": ["10.0.0.7:8000"]}
    told = sentences({**entry.to_json(), "disagg": prefill})
    assert "Prefill and decode: prefill-decode at 10.0.0.7:8000." in told


async def test_the_newest_are_a_table_and_filters_narrow_it() -> None:
    async with served(await asked("one", "two")) as (url, _):
        everything = await explain("--url", url)
        newest = await explain("--url", url, "--last", "1")
        nobody = await explain("--url", url, "--worker", "w-0")
        as_json = await explain("--url", url, "--json", "--model", "m")
    lines = everything.output.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["two", "one"]
    assert "1/2" in lines[1]
    assert "two" in newest.output
    assert "one" not in newest.output
    assert "No decisions yet." in nobody.output
    decisions = json.loads(as_json.output)
    assert [d["request_id"] for d in decisions] == ["two", "one"]
    assert decisions[0]["candidates"][0]["why"]


async def test_replicas_are_merged_and_a_silent_one_is_named() -> None:
    first, second = await asked("a", "b"), await asked("x")
    second.journal.find("x").time = 1001.5  # type: ignore[union-attr]
    async with served(first) as (one, _), served(second) as (two, _):
        both = await explain("--url", one, "--url", two, "--json")
        found = await explain("x", "--url", one, "--url", two)
        half = await explain("--url", one, "--url", "http://127.0.0.1:1")
    merged = json.loads(both.output)
    assert [(d["request_id"], d["picker"]) for d in merged] == [("b", one), ("x", two), ("a", one)]
    assert f"by {two}" in found.output.splitlines()[0]
    assert half.exit_code == 0
    assert "http://127.0.0.1:1: it can't be reached" in half.output
    none = await explain("--url", "http://127.0.0.1:1")
    assert none.exit_code == 1
    assert "can't be reached" in none.output


async def test_what_is_not_kept_is_said_to_be_so() -> None:
    async with served(await scene()) as (url, _):
        result = await explain("nobody", "--url", url)
    assert result.exit_code == 1
    assert "nothing about request 'nobody' is kept" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "u", "--graph", "g"], "three ways to say whom to ask"),
        (["-n", "x"], "name the --graph or the --pool"),
        (["r", "--url", "u", "--watch"], "one request is not watched"),
        (["--url", "u", "-o", "xml"], "neither table nor json"),
    ],
)
async def test_contradictions_are_refused(arguments: list[str], message: str) -> None:
    result = await explain(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_nothing_of_a_client_reaches_the_terminal_as_control() -> None:
    assert plain("a\x1b[31mb\nc") == r"a\x1b[31mb\nc"


async def test_hostile_names_are_shown_as_they_are() -> None:
    s = await scene()
    model = "[red]x[/red]\x1b[2J"
    body = json.dumps({"model": model, "messages": []}).encode()
    await s.ask("r", body)
    async with served(s) as (url, _):
        result = await explain("--url", url)
        one = await explain("r", "--url", url)
    assert r"[red]x[/red]\x1b[2J" in result.output
    assert "\x1b" not in result.output + one.output


# --- watching


async def test_watching_gives_each_decision_once_when_it_has_ended() -> None:
    s = await asked("old", "one")
    given: list[str] = []
    now = [0.0]
    turns: asyncio.Queue[None] = asyncio.Queue()
    waiting = asyncio.Event()

    async def pause(seconds: float) -> None:
        now[0] += seconds
        waiting.set()
        await turns.get()

    async def follow(url: str) -> None:
        async with at_urls([url]) as pickers:
            async for decision in watch(
                pickers, 1, {}, lambda silent: None, clock=lambda: now[0], pause=pause
            ):
                given.append(decision["request_id"])

    async def turn() -> None:
        waiting.clear()
        turns.put_nowait(None)
        await waiting.wait()

    async with served(s) as (url, _):
        following = asyncio.create_task(follow(url))
        await waiting.wait()
        assert given == ["one"]
        s.now[0] += 1
        await s.ask("runs")
        s.now[0] += 1
        await s.ask("bad", b"{")
        await turn()
        assert given == ["one", "bad"]
        s.picker.on_access_log(logged("runs"))
        await s.ask("long")
        await turn()
        assert given == ["one", "bad", "runs"]
        for _ in range(int(PATIENCE_S / EVERY_S)):
            await turn()
        assert given == ["one", "bad", "runs", "long"]
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


# --- in a cluster


def pod(name: str, labels: dict[str, str], **ports: int) -> dict[str, Any]:
    named = [{"name": each, "containerPort": number} for each, number in ports.items()]
    return {
        "metadata": {"name": name, "namespace": "ns", "labels": labels},
        "spec": {"containers": [{"name": "main", "ports": named}]},
        "status": {"phase": "Running"},
    }


@asynccontextmanager
async def cluster(
    scenes: dict[str, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[KubeApi]:
    """An API server that passes requests on to the pickers of two pods."""
    async with serving() as api, aiohttp.ClientSession() as session, AsyncExitStack() as pickers:
        path = tmp_path / "kubeconfig"
        path.write_text(KUBECONFIG.format(url=api.url))
        monkeypatch.setenv("KUBECONFIG", str(path))
        urls = {
            name: (await pickers.enter_async_context(served(s)))[0] for name, s in scenes.items()
        }

        async def proxy(request: web.Request) -> web.Response | None:
            for name, url in urls.items():
                prefix = f"/api/v1/namespaces/ns/pods/{name}:9090/proxy"
                if request.path.startswith(prefix):
                    rest = request.path.removeprefix(prefix)
                    async with session.get(url + rest, params=request.query) as answer:
                        return web.json_response(await answer.json(), status=answer.status)
            return None

        api.interfere = proxy
        yield api


GRAPH = {"nvidia.com/dynamo-graph-deployment-name": "g"}
FRONTEND = {**GRAPH, "nvidia.com/dynamo-component-type": "frontend"}


async def test_all_replicas_of_a_graphs_frontend_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = {"f-0": await asked("a"), "f-1": await asked("b")}
    async with cluster(scenes, tmp_path, monkeypatch) as api:
        for name in scenes:
            api.put("/api/v1/pods", pod(name, FRONTEND, system=9090, http=8000))
        worker = {**GRAPH, "nvidia.com/dynamo-component-type": "worker"}
        api.put("/api/v1/pods", pod("w-0", worker, system=9090))
        result = await explain("--graph", "g", "--json")
        one = await explain("b", "--graph", "g")
        other = await explain("--graph", "other", "-n", "ns")
    assert {d["picker"] for d in json.loads(result.output)} == {"f-0", "f-1"}
    assert "by f-1" in one.output
    assert other.exit_code == 1
    assert "no picker of graph other runs in namespace ns" in other.output


async def test_a_pools_picker_is_found_through_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster({"epp-0": await asked("a")}, tmp_path, monkeypatch) as api:
        api.put(
            "/apis/inference.networking.k8s.io/v1/inferencepools",
            {
                "metadata": {"name": "p", "namespace": "ns"},
                "spec": {"endpointPickerRef": {"name": "p-epp"}},
            },
        )
        api.put(
            "/api/v1/services",
            {
                "metadata": {"name": "p-epp", "namespace": "ns"},
                "spec": {"selector": {"app": "epp"}},
            },
        )
        api.put("/api/v1/pods", pod("epp-0", {"app": "epp"}, metrics=9090))
        result = await explain("--pool", "p")
        missing = await explain("--pool", "q")
    assert " a " in result.output
    assert missing.exit_code == 1
    assert "not found" in missing.output


@pytest.mark.parametrize(
    ("forbidden", "right"),
    [("/proxy/", "get pods/proxy in namespace ns"), ("/pods", "list pods in namespace ns")],
)
async def test_a_missing_right_is_named(
    forbidden: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster({"f-0": await asked("a")}, tmp_path, monkeypatch) as api:
        api.put("/api/v1/pods", pod("f-0", FRONTEND, system=9090))

        async def forbid(request: web.Request) -> web.Response | None:
            if forbidden in request.path:
                return failure(403, "Forbidden", "pods is forbidden: User x cannot")
            return None

        api.interfere = forbid
        result = await explain("--graph", "g")
    assert result.exit_code == 1
    assert f"Needed is the right to {right}" in result.output
    assert "User x cannot" in result.output
