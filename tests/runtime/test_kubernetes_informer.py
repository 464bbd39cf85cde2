"""Informers: whatever happens to server and connection, the cache ends up equal to the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from dynamo_runtime.kubernetes.informer import Informer, Informers
from dynamo_runtime.kubernetes.resources import CONFIG_MAPS, NODES, PODS
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.kube_api import KubeApi, failure, serving

Json = dict[str, Any]
COLLECTION = "/api/v1/configmaps"
FAST = (0.001, 0.005)
LABELS = {"app": "x"}


def config_map(name: str, value: str = "", *, namespace: str = "a", **labels: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "labels": labels or LABELS},
        "data": {"value": value},
    }


class Changes:
    """What ``on_change`` told: folded it must give the cache."""

    def __init__(self) -> None:
        self.told: list[tuple[Json | None, Json | None]] = []
        self.folded: dict[tuple[str, str], Json] = {}
        self.moved = asyncio.Event()

    def __call__(self, old: Json | None, new: Json | None) -> None:
        item = new or old
        assert item is not None
        key = (item["metadata"].get("namespace", ""), item["metadata"]["name"])
        assert self.folded.get(key) == old, "what changed is not what was told before"
        assert old != new
        self.told.append((old, new))
        if new is None:
            del self.folded[key]
        else:
            self.folded[key] = new
        self.moved.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.moved.clear()
                await self.moved.wait()


@asynccontextmanager
async def following(api: KubeApi, **options: Any) -> AsyncIterator[tuple[Informer, Changes]]:
    changes = Changes()
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        options = {"on_change": changes, "rng": random.Random(1), "backoff_s": FAST, **options}
        informer = Informer(client, CONFIG_MAPS, **options)
        task = asyncio.create_task(informer.run())
        try:
            yield informer, changes
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0)


def server_has(api: KubeApi, **labels: str) -> dict[tuple[str, str], Json]:
    return {
        (namespace, name): item
        for (collection, namespace, name), item in api.objects.items()
        if collection == COLLECTION and labels.items() <= item["metadata"].get("labels", {}).items()
    }


NAMES = [f"c{number}" for number in range(5)]
WRITES = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(NAMES), st.sampled_from("xyz")),
    st.tuples(st.just("relabel"), st.sampled_from(NAMES), st.sampled_from("xy")),
    st.tuples(st.just("delete"), st.sampled_from(NAMES)),
)
TROUBLE = st.one_of(
    st.tuples(st.sampled_from(["compact", "bookmark", "drop", "end", "await", "cut"])),
    st.tuples(st.just("fail"), st.sampled_from([410, 429, 500, 503, 504])),
    st.tuples(st.just("breathe"), st.integers(1, 40)),
)
AWAY = st.tuples(st.just("away"), st.lists(WRITES, min_size=1, max_size=5), st.booleans())
"""Writes that no watch sees, with or without their history being compacted."""


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(WRITES | TROUBLE | AWAY, min_size=3, max_size=30),
    before=st.sets(st.sampled_from(NAMES)),
    page=st.sampled_from([1, 2, 500]),
    piece=st.sampled_from([7, 1 << 20]),
    gone_as_event=st.booleans(),
    selector=st.sampled_from(["", "app=x"]),
)
def test_the_cache_ends_up_as_the_server_is(
    steps: list[tuple[Any, ...]],
    before: set[str],
    page: int,
    piece: int,
    gone_as_event: bool,
    selector: str,
) -> None:
    async def run() -> None:
        async with serving() as api:
            api.piece, api.gone_as_event = piece, gone_as_event
            for name in before:
                api.put(COLLECTION, config_map(name))
            wanted = {"app": "x"} if selector else {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("dynamo_runtime.kubernetes.informer.PAGE", page)
                patch.setattr("dynamo_runtime.kubernetes.client.WAIT_LIMIT_S", 0.001)
                async with following(api, label_selector=selector) as (informer, changes):
                    for step in steps:
                        await take(api, step, informer, changes, wanted)
                    api.failures.clear()
                    await asyncio.wait_for(informer.synced.wait(), 10)
                    await changes.until(lambda: changes.folded == server_has(api, **wanted))
                    assert informer.objects == changes.folded == server_has(api, **wanted)

    asyncio.run(run())


async def take(
    api: KubeApi,
    step: tuple[Any, ...],
    informer: Informer,
    changes: Changes,
    wanted: dict[str, str],
) -> None:
    match step:
        case ("put", name, value):
            api.put(COLLECTION, config_map(name, value))
        case ("relabel", name, app):
            api.put(COLLECTION, config_map(name, app=app))
        case ("delete", name):
            if (COLLECTION, "a", name) in api.objects:
                api.delete(COLLECTION, "a", name)
        case ("away", writes, compacted):
            await asyncio.wait_for(informer.synced.wait(), 10)
            await changes.until(lambda: changes.folded == server_has(api, **wanted))
            api.drop_watches()
            for write in writes:
                await take(api, write, informer, changes, wanted)
            if compacted:
                api.compact()
        case ("compact",):
            api.compact()
        case ("bookmark",):
            api.bookmark()
        case ("drop",):
            api.drop_watches()
        case ("end",):
            api.end_watches()
        case ("fail", status):
            api.fail(int(status))
        case ("cut",):
            api.failures.append(cut)
        case ("breathe", turns):
            for _ in range(int(turns)):
                await asyncio.sleep(0)  # the server and the informer each get a turn
        case ("await",):
            await asyncio.wait_for(informer.synced.wait(), 10)
            await changes.until(lambda: changes.folded == server_has(api, **wanted))


def cut(request: Any) -> None:
    """The connection breaks instead of an answer."""
    request.transport.abort()


# --- the rules one by one -------------------------------------------------------------------------


async def test_what_vanished_while_nobody_watched_is_reported_as_deleted() -> None:
    async with serving() as api:
        for name in ("kept", "gone"):
            api.put(COLLECTION, config_map(name))
        async with following(api) as (informer, changes):
            await changes.until(lambda: len(changes.folded) == 2)
            await api.watch_opened.wait()
            api.drop_watches()
            gone = api.objects[COLLECTION, "a", "gone"]
            api.delete(COLLECTION, "a", "gone")
            api.compact()
            await changes.until(lambda: len(changes.folded) == 1)
            assert changes.told[-1] == (gone, None)
            assert len(changes.told) == 3, "what did not change is not told again"
            assert informer.relists == 1


async def test_a_broken_watch_goes_on_where_it_was() -> None:
    async with serving() as api, following(api) as (informer, changes):
        for end in (api.drop_watches, api.end_watches, api.drop_watches):
            await api.watch_opened.wait()
            api.watch_opened.clear()
            end()
            api.put(COLLECTION, config_map(f"c{len(changes.told)}"))
            await changes.until(lambda: changes.folded == server_has(api))
        assert (informer.lists, informer.relists) == (1, 0)


async def test_bookmarks_move_the_version_along() -> None:
    """Else a watch on something that never changes would be compacted away."""
    async with serving() as api, following(api) as (informer, changes):
        await api.watch_opened.wait()
        heard = informer.last_heard
        for number in range(3):
            api.put("/api/v1/secrets", config_map(f"other-{number}"))
        api.bookmark()
        await until(lambda: informer.last_heard != heard)
        api.compact()
        api.watch_opened.clear()
        api.drop_watches()
        await api.watch_opened.wait()
        api.put(COLLECTION, config_map("new"))
        await changes.until(lambda: len(changes.told) == 1)
        assert informer.lists == 1


async def test_pages_that_expire_are_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_runtime.kubernetes.informer.PAGE", 1)

    def expired(request: Any) -> Any:
        if "continue" in request.query:
            return failure(410, "Expired", "too old")
        api.failures.append(expired)
        return None

    async with serving() as api:
        for name in NAMES:
            api.put(COLLECTION, config_map(name))
        api.failures.append(expired)
        async with following(api) as (informer, _):
            await asyncio.wait_for(informer.synced.wait(), 10)
            assert informer.objects == server_has(api)
    assert "limit" not in api.seen[2].query


async def test_a_version_from_the_future_is_given_up() -> None:
    """As after etcd was restored from a backup."""
    async with serving() as api, following(api) as (informer, _):
        await api.watch_opened.wait()
        too_large = {"reason": "ResourceVersionTooLarge", "message": "Too large"}
        api.say(
            {
                "type": "ERROR",
                "object": {
                    "kind": "Status",
                    "code": 504,
                    "reason": "Timeout",
                    "details": {"causes": [too_large]},
                },
            }
        )
        api.watch_opened.clear()
        await api.watch_opened.wait()
        assert informer.lists == 2


async def test_a_silent_watch_ends_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real API server says nothing, not even a bookmark, to who watches from the future."""
    monkeypatch.setattr("dynamo_runtime.kubernetes.informer.SILENCE_S", 0.02)
    async with serving() as api, following(api) as (informer, _):
        await until(lambda: informer.relists == 2)


async def test_a_refresh_sees_what_a_hung_watch_keeps_back() -> None:
    async with serving() as api, following(api) as (informer, changes):
        api.put(COLLECTION, config_map("old"))
        await changes.until(lambda: changes.folded == server_has(api))
        api.watches.clear()  # it stays open and says nothing
        api.delete(COLLECTION, "a", "old")
        api.put(COLLECTION, config_map("new"))
        api.fail(500, times=2)
        await asyncio.wait_for(informer.refresh(), 10)
        assert changes.folded == server_has(api) != {}
        # It watches anew from there.
        api.put(COLLECTION, config_map("newer"))
        await changes.until(lambda: changes.folded == server_has(api))


@pytest.mark.parametrize("status", [403, 500])
async def test_refused_watches_end_in_a_list(status: int) -> None:
    def refuse(request: Any) -> Any:
        if "watch" in request.query and informer.lists < 2:
            api.failures.append(refuse)
            return failure(status, "Injected", "no watch")
        return None

    async with serving() as api, following(api) as (informer, changes):
        await asyncio.wait_for(informer.synced.wait(), 10)
        api.failures.append(refuse)
        api.end_watches()
        api.put(COLLECTION, config_map("new"))
        await changes.until(lambda: changes.folded == server_has(api))
        await until(lambda: informer.lists == 2)


async def test_objects_are_cut_and_left_out() -> None:
    def transform(item: Json) -> Json | None:
        if item["data"]["value"] == "bad":
            raise ValueError("a bug")
        if item["data"]["value"] == "hidden":
            return None
        return {"metadata": {"name": item["metadata"]["name"], "namespace": "a"}}

    async with serving() as api, following(api, transform=transform) as (informer, changes):
        short = {"metadata": {"name": "c", "namespace": "a"}}
        for value, wanted in (("1", short), ("2", short), ("hidden", None), ("3", short)):
            api.put(COLLECTION, config_map("c", value))
            mark = api.put(COLLECTION, config_map(f"mark-{value}"))["metadata"]["name"]
            await changes.until(lambda: ("a", mark) in changes.folded)  # noqa: B023
            assert informer.objects.get(("a", "c")) == wanted
        of_c = [(old, new) for old, new in changes.told if short in (old, new)]
        assert of_c == [(None, short), (short, None), (None, short)]
        api.put(COLLECTION, config_map("c", "bad"))  # what can't be cut is left out, too
        await changes.until(lambda: ("a", "c") not in changes.folded)


async def test_a_handler_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    names: list[str] = []
    done = asyncio.Event()

    def on_change(_: Json | None, new: Json | None) -> None:
        assert new is not None
        names.append(new["metadata"]["name"])
        if names == ["c0", "c1"]:
            done.set()
        raise RuntimeError("a bug")

    async with serving() as api, following(api, on_change=on_change) as (informer, _):
        api.put(COLLECTION, config_map("c0"))
        await asyncio.wait_for(informer.synced.wait(), 10)
        api.put(COLLECTION, config_map("c1"))
        await asyncio.wait_for(done.wait(), 10)
    assert "a change could not be handled" in caplog.text


async def test_a_missing_right_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    problems: list[str] = []
    said = asyncio.Event()

    def on_problem(problem: str) -> None:
        problems.append(problem)
        said.set()

    async with serving() as api:
        api.failures += [lambda _: failure(403, "Forbidden", "configmaps is forbidden")] * 5
        async with following(api, namespace="a", on_problem=on_problem) as (informer, _):
            await said.wait()
            assert informer.problem == (
                "needs a role that allows list and watch of configmaps in namespace a: "
                "configmaps is forbidden"
            )
            await asyncio.wait_for(informer.synced.wait(), 10)
            assert problems == [problems[0], ""]
            assert informer.problem == ""
    assert caplog.text.count("needs a role") == 1


async def test_an_api_server_that_is_away_is_a_problem_until_it_is_back() -> None:
    async with serving() as api, following(api) as (informer, changes):
        api.put(COLLECTION, config_map("c0"))
        await changes.until(lambda: len(changes.folded) == 1)
        api.failures += [cut] * 3
        await api.watch_opened.wait()
        api.watch_opened.clear()
        api.drop_watches()
        await until(lambda: informer.problem != "")
        assert len(informer.objects) == 1
        await api.watch_opened.wait()
        # Over as soon as the server agrees to watch, before anything happens.
        await until(lambda: not informer.problem)
        assert informer.lists == 1


async def test_informers_of_several_namespaces_and_kinds_are_one() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        for namespace in "abc":
            api.put(COLLECTION, config_map("c", namespace=namespace))
        api.put("/api/v1/nodes", {"metadata": {"name": "n"}})
        informers = Informers(client, namespaces=["a", "b"], rng=random.Random(1))
        informers.add(CONFIG_MAPS)
        informers.add(NODES)
        informers.add(PODS)
        task = asyncio.create_task(informers.run())
        await asyncio.wait_for(informers.synced(), 10)
        found = {item["metadata"]["namespace"] for item in informers.objects(CONFIG_MAPS)}
        assert found == {"a", "b"}
        assert informers.get(CONFIG_MAPS, "b", "c") is not None
        assert informers.get(CONFIG_MAPS, "c", "c") is None
        node = informers.get(NODES, "", "n")
        assert node is not None
        assert (node["apiVersion"], node["kind"]) == ("v1", "Node"), "as in events"
        assert list(informers.objects(PODS)) == []
        assert informers.problems == []
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
