"""Our picker behind an Envoy that is none of ours, before pods that know nothing of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from e2e.cluster import Cluster
from e2e.gateway import envoy, pools
from e2e.gateway.envoy import Backend
from e2e.gateway.space import CHANGE_S, Space, until
from e2e.gateway.traffic import Traffic, ask

SPLIT, WEIGHTS = 200, (70, 30)
KILL_ENGINE = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if b"--served-model-name" in (process / "cmdline").read_bytes().split(bytes(1)):
        os.kill(int(process.name), signal.SIGKILL)
"""


@pytest.fixture(scope="module", autouse=True)
def inference_pools(pods: Cluster) -> Iterator[None]:
    """The kind is served; afterwards only if it was before: others test that it comes."""

    def definitions() -> set[str]:
        return set(pods.kubectl("get", "crd", "-o", "name").stdout.split())

    before = definitions()
    pods.install_addon("inference-extension")
    yield
    if new := definitions() - before:
        pods.kubectl("delete", *sorted(new))


@pytest.mark.timeout(400)
async def test_pods_come_and_go_and_no_request_is_lost(pods: Cluster, namespace: str) -> None:
    """Scaled up, one engine killed, one pod drained, scaled down: all under load."""
    space = Space(pods, namespace)
    space.start(
        *pools.pool("engines", 8000, "--fallback-endpoints=2"),
        pools.engines("engines", 2),
        *envoy.manifests("gateway", [Backend("engines")]),
        deployments=("engines", "engines-epp", "gateway"),
    )
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
        await space.kubectl("exec", victim, "--", "python", "-c", KILL_ENGINE)
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


async def asked(space: Space, pool: str) -> float:
    """Decisions that the pool's picker has made."""
    (address,) = space.addresses(f"{pool}-epp").values()
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://{address}:{pools.STATUS_PORT}/metrics") as response,
    ):
        page = await response.text()
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "dynamo_epp_decisions_total"
    )


@pytest.mark.timeout(300)
async def test_two_pools_share_by_weight(pods: Cluster, namespace: str) -> None:
    """Each request is decided by the picker of the pool that the gateway chose by weight, and is
    answered by a pod of that pool, though the client names the pods of both."""
    space = Space(pods, namespace)
    names = ("heavy", "light")
    space.start(
        *(item for name in names for item in pools.pool(name, 8000, "--conformance-headers")),
        *(pools.engines(name, 1) for name in names),
        *envoy.manifests(
            "gateway",
            [Backend(name, weight) for name, weight in zip(names, WEIGHTS, strict=True)],
        ),
        deployments=(*names, *(f"{name}-epp" for name in names), "gateway"),
    )
    await space.answering(space.url("gateway"))
    own = {name: set(space.addresses(name).values()) for name in names}
    steer = ",".join(sorted(own["heavy"] | own["light"]))
    before = {name: await asked(space, name) for name in names}
    body = {"model": "tiny", "prompt": "which pool?", "max_tokens": 1}
    async with aiohttp.ClientSession(space.url("gateway")) as client:
        headers = {"test-epp-endpoint-selection": steer}
        answers = [await ask(client, body, **headers) for _ in range(SPLIT)]
    assert [status for status, _, _ in answers if status != 200] == []
    served = [head[envoy.SERVED].partition(":")[0] for _, head, _ in answers]
    hits = {name: sum(address in own[name] for address in served) for name in names}
    assert sum(hits.values()) == SPLIT
    assert {name: await asked(space, name) - before[name] for name in names} == hits
    # Four standard deviations of a binomial share.
    expected = SPLIT * WEIGHTS[1] / sum(WEIGHTS)
    assert abs(hits["light"] - expected) < 4 * (expected * WEIGHTS[0] / sum(WEIGHTS)) ** 0.5
