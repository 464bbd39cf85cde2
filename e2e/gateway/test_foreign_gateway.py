"""Our picker behind an Envoy that is none of ours, before pods that know nothing of it."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp
import pytest

from e2e.cluster import Cluster
from e2e.gateway import envoy, pools
from e2e.gateway.envoy import Backend
from e2e.gateway.space import CHANGE_S, Space, asked, eventually, until
from e2e.gateway.traffic import Traffic, ask

POOL, PICKER = "engines", "engines-epp"
SPLIT, WEIGHTS = 400, (70, 30)
ADAPTER, ASKED = "sql", 8
WORDS = " ".join(f"word{number}" for number in range(60))
EVENTS = (
    "--kv-events-config",
    json.dumps(
        {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": "tcp://*:5557",
            "replay_endpoint": "tcp://*:5558",
        }
    ),
)
KILL_ENGINE, KILL_PICKER = "--served-model-name", "--pool-name"
LONG_ANSWERS = 100
"""Tokens: a second, so that some are under way at any moment."""


@pytest.fixture(scope="module")
def space(inference_pools: Cluster, module_namespace: str) -> Space:
    """A pool of two engines with two pickers, behind the gateway `gateway`."""
    found = Space(inference_pools, module_namespace)
    found.start(
        *pools.pool(POOL, 8000, "--fallback-endpoints=2", "--decision-header", pickers=2),
        pools.engines(POOL, 2, *EVENTS),
    )
    found.start(
        *envoy.manifests("gateway", [Backend.of(inference_pools, module_namespace, POOL)]),
        deployments=(POOL, PICKER, "gateway"),
    )
    return found


@pytest.mark.timeout(300)
async def test_an_adapters_requests_go_where_it_is(space: Space) -> None:
    """And its prefixes are its own: the same words to the base model are not cached by them."""
    lora = ("--enable-lora", "--lora-modules", f"{ADAPTER}=/adapters/{ADAPTER}")
    space.start(pools.engines(ADAPTER, 1, *EVENTS, *lora, app=POOL), deployments=(ADAPTER,))
    (home,) = space.addresses(ADAPTER, label="deployment").values()
    async with aiohttp.ClientSession(space.url("gateway")) as client:

        async def served(model: str, prompt: str) -> tuple[str, str]:
            """Who answered, and how it was chosen."""
            body = {"model": model, "prompt": prompt, "max_tokens": 1}
            status, head, text = await ask(client, body)
            assert status == 200, text
            return head[envoy.SERVED].partition(":")[0], head["x-dynamo-routing"]

        async def both_know() -> bool:
            """Which picker is asked is the gateway's to choose."""
            for _ in range(ASKED):
                body = {"model": ADAPTER, "prompt": "ready?", "max_tokens": 1}
                if (await ask(client, body))[0] != 200:
                    return False
            return True

        await eventually(both_know, "both pickers know who has the adapter")
        found = [await served(ADAPTER, f"{number} {WORDS}") for number in range(ASKED)]
        assert {address for address, _ in found} == {home}
        again = [await served(ADAPTER, f"{number} {WORDS} and?") for number in range(ASKED)]
        assert {address for address, _ in again} == {home}
        assert not [how for _, how in again if not how.startswith("exact;overlap=")]
        assert not [how for _, how in again if how.startswith("exact;overlap=0/")]

        base = [await served("tiny", f"{number} {WORDS} and?") for number in range(2 * ASKED)]
        assert {address for address, _ in base} - {home}
        assert [how for _, how in base if not how.startswith("exact;overlap=0/")] == []

        status, _, text = await ask(client, {"model": "nobody", "prompt": "?", "max_tokens": 1})
        assert status == 404, text
    await space.kubectl("delete", f"deployment/{ADAPTER}", "--wait=false")


@pytest.mark.timeout(300)
async def test_one_of_two_pickers_goes_and_what_a_retry_can_save_is_saved(space: Space) -> None:
    """Killed, it takes with it what it relays, and nothing else; drained, it takes nothing."""
    await space.answering(space.url("gateway"))

    def slow(number: int) -> dict[str, object]:
        limits = {"max_tokens": LONG_ANSWERS, "ignore_eos": True}
        return {"model": "tiny", "prompt": f"request {number}", **limits}

    async with Traffic(space.url("gateway"), envoy.SERVED, body=slow, tries=2) as traffic:

        async def all_asked(what: str) -> None:
            """Until every picker has been asked anew."""
            traffic.mark(what)
            async with asyncio.timeout(CHANGE_S):
                for address in space.addresses(PICKER).values():
                    before = await asked(address)
                    while (now := await asked(address)) <= max(before, 0):
                        before = min(before, now)
                        await asyncio.sleep(0.1)

        await all_asked("both pickers are asked")
        await until(lambda: traffic.answers, "answers come")

        traffic.mark("kill")
        killed, drained = space.addresses(PICKER)
        began = time.monotonic()
        await space.kill(killed, KILL_PICKER)
        over = time.monotonic()
        await space.kubectl("rollout", "status", f"deployment/{PICKER}", f"--timeout={CHANGE_S:g}s")
        await all_asked("the killed one is asked again")
        await until(lambda: traffic.saved, "what it relayed is answered by the other one")
        again = time.monotonic()
        await until(lambda: traffic.since(again), "what was under way has been answered")
        assert traffic.lost == [], traffic.story()
        cut = traffic.saved
        # What left after its end found the other one.
        assert [one for one in cut if one.sent > over or one.failed < began] == []

        traffic.mark("drain")
        await space.kubectl("delete", "pod", drained)  # returns when it is gone
        await space.kubectl("rollout", "status", f"deployment/{PICKER}", f"--timeout={CHANGE_S:g}s")
        await all_asked("another takes the place of the drained one")
    assert traffic.lost == [], traffic.story()
    assert traffic.saved == cut, "a drained one loses nothing"


@pytest.mark.timeout(400)
async def test_pods_come_and_go_and_no_request_is_lost(space: Space) -> None:
    """Scaled up, one engine killed, one pod drained, scaled down: all under load."""
    await space.answering(space.url("gateway"))
    async with Traffic(space.url("gateway"), envoy.SERVED) as traffic:

        async def served_by_all(what: str) -> None:
            """Until every pod that is to stay has answered a request that left after now."""
            traffic.mark(what)
            moment = time.monotonic()
            expected = set(space.addresses("engines").values())
            await until(
                lambda: set(traffic.since(moment)) >= expected,
                what,
                lambda: (expected, traffic.since(moment), traffic.lost[:5]),
            )

        await served_by_all("both pods serve")

        await space.kubectl("scale", "deployment/engines", "--replicas=4")
        await space.kubectl("rollout", "status", "deployment/engines", f"--timeout={CHANGE_S:g}s")
        await served_by_all("four pods serve")

        traffic.mark("kill")
        victim, address = next(iter(space.addresses("engines").items()))
        await space.kill(victim, KILL_ENGINE)
        await space.kubectl("rollout", "status", "deployment/engines", f"--timeout={CHANGE_S:g}s")
        await served_by_all("the killed one serves again")

        traffic.mark("drain")
        drained, address = next(iter(space.addresses("engines").items()))
        await space.kubectl("delete", "pod", drained)  # returns when it is gone
        moment = time.monotonic()
        await space.kubectl("rollout", "status", "deployment/engines", f"--timeout={CHANGE_S:g}s")
        await served_by_all("another takes the place of the drained one")
        assert address not in traffic.since(moment)

        traffic.mark("scaled down")
        await space.kubectl("scale", "deployment/engines", "--replicas=1")
        await until(
            lambda: len(set(traffic.since(time.monotonic() - 1.0))) == 1,
            "one pod serves",
            lambda: traffic.since(time.monotonic() - 1.0),
        )
    assert traffic.lost == [], traffic.story()


@pytest.mark.timeout(300)
async def test_two_pools_share_by_weight(space: Space) -> None:
    """Each request is decided by the picker of the pool that the gateway chose by weight, and is
    answered by a pod of that pool, though the client names the pods of both."""
    weights = {"heavy": WEIGHTS[0], "light": WEIGHTS[1]}
    space.start(
        *(item for name in weights for item in pools.pool(name, 8000, "--conformance-headers")),
        *(pools.engines(name, 1) for name in weights),
    )
    backends = [Backend.of(space.cluster, space.name, *each) for each in weights.items()]
    space.start(
        *envoy.manifests("split", backends),
        deployments=(*weights, *(f"{name}-epp" for name in weights), "split"),
    )
    url = space.url("split")
    own = {name: set(space.addresses(name).values()) for name in weights}
    body = {"model": "tiny", "prompt": "which pool?", "max_tokens": 1}
    missing = set().union(*own.values())

    async def all_answer() -> bool:
        async with aiohttp.ClientSession(url) as client:
            _, head, _ = await ask(client, body)
        missing.discard(head.get(envoy.SERVED, "").partition(":")[0])
        return not missing

    await eventually(all_answer, "both pools answer")

    async def decided() -> dict[str, float]:
        """How much each pool's picker has."""
        pickers = {name: space.addresses(f"{name}-epp").values() for name in weights}
        return {name: await asked(address) for name, (address,) in pickers.items()}

    steer = ",".join(sorted(own["heavy"] | own["light"]))
    before = await decided()
    async with aiohttp.ClientSession(url) as client:
        headers = {"test-epp-endpoint-selection": steer}
        answers = [await ask(client, body, **headers) for _ in range(SPLIT)]
    assert [status for status, _, _ in answers if status != 200] == []
    served = [head[envoy.SERVED].partition(":")[0] for _, head, _ in answers]
    hits = {name: sum(address in own[name] for address in served) for name in weights}
    assert sum(hits.values()) == SPLIT
    after = await decided()
    assert {name: after[name] - before[name] for name in weights} == hits
    # Five standard deviations of a binomial share.
    expected = SPLIT * WEIGHTS[1] / sum(WEIGHTS)
    assert abs(hits["light"] - expected) < 5 * (expected * WEIGHTS[0] / sum(WEIGHTS)) ** 0.5
