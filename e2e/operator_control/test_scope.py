"""Each graph has exactly one master at every moment, whoever comes, goes, hangs or dies.

All the while graphs are edited, so that a second master would show in the audit log.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

import pytest
from dynamo_operator.marker import DURATION_S as MARKER_DURATION_S
from dynamo_operator.marker import MARKER
from dynamo_runtime.kubernetes import resources

from e2e.operator_control.conftest import StartOperator
from e2e.operator_control.graphs import Json, graph
from e2e.operator_control.plane import Request
from e2e.operator_control.process import START_S, Operator
from e2e.operator_control.world import World, until

EDIT_EVERY_S = 0.3
SLACK_S = 20.0
"""For a machine that does much else."""
LEASE_S = 8


@asynccontextmanager
async def edited(world: World, *namespaces: str) -> AsyncIterator[None]:
    """The graph `g` of each namespace is changed again and again."""

    async def edit() -> None:
        for number in itertools.count():

            def change(spec: Json, number: int = number) -> None:
                spec["components"][1]["replicas"] = 1 + number % 4

            for namespace in namespaces:
                await world.edit(namespace, "g", change)
            await asyncio.sleep(EDIT_EVERY_S)

    task = asyncio.create_task(edit())
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def masters(writes: list[Request]) -> list[str]:
    """The accounts that wrote, in turn: `alpha, beta` if one took over from the other."""
    ordered = sorted(writes, key=lambda write: write.at)
    return [account for account, _ in itertools.groupby(ordered, lambda write: write.account)]


def at(request: Request) -> datetime:
    return datetime.fromisoformat(request.at)


class Watch:
    """Who writes in a namespace, from now on."""

    def __init__(self, world: World, namespace: str) -> None:
        self._world = world
        self._namespace = namespace
        self._since = world.plane.mark()

    @property
    def writes(self) -> list[Request]:
        return self._world.plane.writes(self._since, self._namespace)

    async def last_is(self, account: str, timeout_s: float) -> None:
        """Wait until `account` is the one that writes."""

        async def is_last() -> bool:
            found = self.writes
            return bool(found) and found[-1].account == account

        await until(f"{account} writes in {self._namespace}", is_last, timeout_s)


@pytest.mark.timeout(300)
async def test_a_restricted_operator_beside_a_cluster_wide_one(
    world: World, namespace: str, start_operator: StartOperator
) -> None:
    async with world.namespace(f"{namespace}-other") as other:
        await world.apply(graph("g", namespace), graph("g", other))
        wide = start_operator("alpha", lease="ctl-system")
        await world.settled(namespace, "g", timeout_s=START_S)
        mine, theirs = Watch(world, namespace), Watch(world, other)
        async with edited(world, namespace, other):
            # It takes its namespace from the one that has all.
            restricted = start_operator("beta", namespaces=[namespace], lease=namespace)
            await mine.last_is("beta", START_S)
            assert masters(mine.writes) == ["alpha", "beta"]

            # It dies: nobody is master until its marker has expired, then the other one is.
            restricted.kill()
            marker = await world.get(resources.LEASES, namespace, MARKER)
            await mine.last_is("alpha", MARKER_DURATION_S + SLACK_S)
            assert masters(mine.writes) == ["alpha", "beta", "alpha"]
            first = next(
                each
                for each in mine.writes
                if each.account == "alpha" and at(each) > at(_last(mine.writes, "beta"))
            )
            renewed = datetime.fromisoformat(marker["spec"]["renewTime"])
            assert (at(first) - renewed).total_seconds() >= MARKER_DURATION_S

            # It comes back, and gets what is its own.
            again = start_operator("beta", namespaces=[namespace], lease=namespace)
            await mine.last_is("beta", START_S)

            # It is stopped in order while a replica stands by: the namespace stays theirs.
            standby = start_operator("gamma", namespaces=[namespace], lease=namespace)
            await until("standby ready", standby.is_ready, START_S)
            again.terminate()
            assert await again.ended() == 0
            await mine.last_is("gamma", SLACK_S)
        await world.settled(namespace, "g")
        await world.settled(other, "g")
        assert masters(mine.writes) == ["alpha", "beta", "alpha", "beta", "gamma"]
        assert masters(theirs.writes) == ["alpha"]
        assert wide.running


def _last(writes: list[Request], account: str) -> Request:
    return [each for each in writes if each.account == account][-1]


@pytest.mark.timeout(300)
async def test_replicas_of_one_operator(
    world: World, namespace: str, start_operator: StartOperator
) -> None:
    await world.apply(graph("g", namespace))
    options = {
        "namespaces": [namespace],
        "lease": namespace,
        "extra": ["--lease-seconds", str(LEASE_S)],
    }
    alpha = start_operator("alpha", **options)
    await until("alpha leads", alpha.leads, START_S)
    beta = start_operator("beta", **options)
    await until("beta stands by", beta.is_ready, START_S)
    watch = Watch(world, namespace)
    async with edited(world, namespace):
        await watch.last_is("alpha", SLACK_S)
        assert not await beta.leads()

        # Told to stop, it hands over at once.
        alpha.terminate()
        assert await alpha.ended() == 0
        await watch.last_is("beta", SLACK_S)
        pause = at(_first(watch.writes, "beta")) - at(_last(watch.writes, "alpha"))
        assert pause.total_seconds() < LEASE_S, "it does not have to expire"

        # Killed, its lease has to expire.
        gamma = start_operator("gamma", **options)
        await until("gamma stands by", gamma.is_ready, START_S)
        beta.kill()
        await watch.last_is("gamma", LEASE_S + SLACK_S)

        # Hung for longer than its lease lasts, it has lost it, and knows when it comes to.
        alpha = start_operator("alpha", **options)
        await until("alpha stands by", alpha.is_ready, START_S)
        gamma.pause()
        await watch.last_is("alpha", LEASE_S + SLACK_S)
        gamma.resume()
        await until("gamma leads no more", lambda: _is_out(gamma))
        await asyncio.sleep(2.0)  # on purpose: so that it would show
    assert masters(watch.writes) == ["alpha", "beta", "gamma", "alpha"]
    await world.settled(namespace, "g")


async def _is_out(operator: Operator) -> bool:
    """Whether it has ended, or stands by."""
    return not operator.running or not await operator.leads()


def _first(writes: list[Request], account: str) -> Request:
    return next(each for each in writes if each.account == account)
