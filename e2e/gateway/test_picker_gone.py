"""A Gateway whose picker is gone does what the pool says, and asks again once it is back.

Of several pickers any may go.
"""

from __future__ import annotations

import aiohttp
import pytest

from e2e.cluster import Cluster
from e2e.cluster.fixtures import Gateway
from e2e.gateway import pools
from e2e.gateway.space import CHANGE_S, Space, asked, eventually, until
from e2e.gateway.traffic import Traffic, ask

POOL, ASKED, PICKERS = "engines", 20, 3
BODY = {"model": "tiny", "prompt": "who is asked?", "max_tokens": 1}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("failure_mode", "status"), [("FailClose", 500), ("FailOpen", 200)])
async def test_the_failure_mode_is_obeyed(
    pods: Cluster, gateway: Gateway, namespace: str, failure_mode: str, status: int
) -> None:
    space, picker = Space(pods, namespace), f"{POOL}-epp"
    space.start(
        pools.engines(POOL, 2),
        *pools.pool(POOL, failure_mode=failure_mode),
        *pools.behind(gateway, POOL, namespace),
        deployments=(POOL, picker),
    )
    url, host = f"http://{gateway.address}", pools.hostname(namespace)
    await space.answering(url, host)
    async with aiohttp.ClientSession(url, headers={"host": host}) as client:

        async def statuses() -> set[int]:
            return {(await ask(client, BODY))[0] for _ in range(ASKED)}

        assert await statuses() == {200}
        assert len(space.decisions(picker)) >= ASKED

        await space.kubectl("scale", f"deployment/{picker}", "--replicas=0")
        await until(lambda: not space.pods(picker), "the picker is gone")
        assert await statuses() == {status}

        await space.kubectl("scale", f"deployment/{picker}", "--replicas=1")
        await space.kubectl("rollout", "status", f"deployment/{picker}", "--timeout=90s")
        await space.answering(url, host)
        await statuses()
        await until(lambda: space.decisions(picker), "it is asked again")


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_pickers_are_replaced_under_load(
    pods: Cluster, gateway: Gateway, namespace: str
) -> None:
    """Three of them share the requests; all three give way to others, and no request is lost."""
    space, picker = Space(pods, namespace), f"{POOL}-epp"
    space.start(
        pools.engines(POOL, 2),
        *pools.pool(POOL, pickers=PICKERS),
        *pools.behind(gateway, POOL, namespace),
        deployments=(POOL, picker),
    )
    url, host = f"http://{gateway.address}", pools.hostname(namespace)
    await space.answering(url, host)

    async def all_decide() -> bool:
        found = space.addresses(picker).values()
        return len(found) == PICKERS and all([await asked(address) > 0 for address in found])

    async with Traffic(url, served="", host=host) as traffic:
        await eventually(all_decide, "every picker is asked")
        traffic.mark("replaced")
        await space.kubectl("rollout", "restart", f"deployment/{picker}")
        limit = f"--timeout={CHANGE_S:g}s"
        await space.kubectl("rollout", "status", f"deployment/{picker}", limit)
        await eventually(all_decide, "every new picker is asked")
    assert traffic.lost == [], traffic.story()
