"""Whatever happens to the operator and its API server, the end is that of an undisturbed run."""

from __future__ import annotations

import asyncio
import difflib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from dynamo_runtime.kubernetes import resources

from e2e.operator_control.conftest import prepared
from e2e.operator_control.plane import Plane, told
from e2e.operator_control.process import START_S, Operator
from e2e.operator_control.script import play, script, settled
from e2e.operator_control.state import final_state, orphans, repeated_events
from e2e.operator_control.world import World, as_text, is_in_state, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("STORM_SEED", "1"))
GRAPHS, STEPS = 10, 30
KILLS = int(os.environ.get("STORM_KILLS", "50"))
OUTAGE_S = float(os.environ.get("STORM_OUTAGE_SECONDS", "120"))
NAMESPACE = "ctl-play"
"""The same for each run: it shows in what is rendered."""
CONDITIONS = (
    "The operator is a process that is started again at once, with all rights. But for the row that"
    " names the lease it runs with `--no-leader-elect`: a kill costs no waiting for a lease, and"
    " nobody stands by. While the API server is away, so are kwok and the controller manager, which"
    " would take the silence for dead nodes; so no pod changes meanwhile. Pods are kwok's: none"
    " runs."
)
"""What a reader of the report has to know of how this differs from an installation."""
REPORTS = Path(__file__).parents[2] / "docs" / "reports"

Storm = Callable[["Supervised"], Awaitable[None]]


class Supervised:
    """An operator that is started again whenever it ends, as a Deployment does."""

    def __init__(self, plane: Plane, *extra: str) -> None:
        self._plane = plane
        self._extra = extra
        self.current = self._start()
        self.lines: list[str] = []
        self.starts = 1
        self._task = asyncio.create_task(self._keep())

    def _start(self) -> Operator:
        return Operator(self._plane, "alpha", extra=self._extra)

    async def _keep(self) -> None:
        while True:
            await self.current.ended(3600.0)
            self._retire()
            self.current = self._start()
            self.starts += 1

    def _retire(self) -> None:
        self.current.close()
        self.lines += self.current.lines

    async def leads(self) -> None:
        async def does() -> bool:
            return await self.current.leads()

        await until("operator leads", does, START_S)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._retire()


@pytest.fixture(scope="module")
def storm_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    made = prepared(tmp_path_factory.mktemp("plane"), 6)
    yield made
    made.down()


@pytest_asyncio.fixture
async def storm_world(storm_plane: Plane) -> AsyncIterator[World]:
    async with await storm_plane.client() as api:
        yield World(storm_plane, api)


async def run(
    world: World, storm: Storm | None, *extra: str, pace: float = 1.0
) -> tuple[dict[str, Any], Supervised]:
    """Play the script from an empty namespace, with a storm beside it; the final state."""
    await world.gone(NAMESPACE, 120.0)
    async with world.namespace(NAMESPACE):
        operator = Supervised(world.plane, *extra)
        try:
            await operator.leads()
            acts = script(SEED, GRAPHS, STEPS)
            async with asyncio.TaskGroup() as group:
                group.create_task(play(world, NAMESPACE, acts, SEED, pace))
                if storm is not None:
                    group.create_task(_to_the_end(storm, operator))
            for name in acts:
                await settled(world, NAMESPACE, name)

            async def are_gone() -> bool:
                return await orphans(world, NAMESPACE) == []

            await until("no object without a living graph", are_gone, 120.0)
            await world.quiet(NAMESPACE, 5.0, 120.0)
            state = await final_state(world, NAMESPACE)
            assert await repeated_events(world, NAMESPACE) == []

            # One that starts now finds its work done.
            mark = world.plane.mark()
            operator.current.kill()
            await operator.leads()
            await asyncio.sleep(10.0)  # on purpose: it is about nothing happening
            written = world.plane.writes(mark, NAMESPACE)
            assert written == [], told(written)
        except BaseException:
            await explain(world, operator)
            raise
        finally:
            await operator.close()
        await world.gone(NAMESPACE, 120.0)
    return state, operator


async def explain(world: World, operator: Supervised) -> None:
    """Print what there is to see of a run that failed."""
    print("--- operator", *operator.lines[-50:], *operator.current.lines[-100:], sep="\n")
    for item in await world.list(resources.GRAPHS, NAMESPACE):
        if not is_in_state(item, "successful"):
            print("--- graph", as_text(item), sep="\n")
    for item in await world.list(resources.DEPLOYMENTS, NAMESPACE):
        spec, status = item["spec"], item.get("status")
        print("--- deployment", item["metadata"]["name"], spec["replicas"], as_text(status))


async def _to_the_end(storm: Storm, operator: Supervised) -> None:
    await storm(operator)


_calm: dict[str, Any] = {}


async def calm(world: World) -> dict[str, Any]:
    """The final state of an undisturbed run, made once."""
    if not _calm:
        _calm.update((await run(world, None, pace=0.3))[0])
    return _calm


def assert_equal(state: dict[str, Any], expected: dict[str, Any]) -> None:
    lines = difflib.unified_diff(
        as_text(expected).splitlines(), as_text(state).splitlines(), "calm", "stormy", n=6
    )
    different = "\n".join(lines)
    assert not different, different[:20000]


@asynccontextmanager
async def reported(what: str) -> AsyncIterator[list[str]]:
    """Lines for the dated report of what the storms did, written if the test passes."""
    lines: list[str] = []
    began = time.monotonic()
    yield lines
    path = REPORTS / f"{time.strftime('%Y-%m-%d')}-operator-storms.md"
    if not path.exists():
        path.write_text(
            f"# Operator in storms, {time.strftime('%Y-%m-%d')}\n\n"
            f"{GRAPHS} graphs, {STEPS} steps each, drawn from the seed {SEED}: created, edited,"
            " scaled, restarted, damaged, deleted. After each storm everything in the namespace"
            " (specs, what the operator owns, statuses, pods) equalled the end of an undisturbed"
            " run, no object was left without a living graph, no two events said the same, and"
            f" an operator started then wrote nothing.\n\n{CONDITIONS}\n\n"
            "| storm | what happened | took |\n"
            "|---|---|---|\n"
        )
    with path.open("a") as file:
        file.write(f"| {what} | {' '.join(lines)} | {time.monotonic() - began:.0f} s |\n")


async def test_killed_at_random_points(storm_world: World) -> None:
    expected = await calm(storm_world)
    rng = random.Random(SEED)

    async def storm(operator: Supervised) -> None:
        for _ in range(KILLS):
            await operator.leads()
            await asyncio.sleep(rng.uniform(0.0, 4.0))
            operator.current.kill()
            await asyncio.sleep(rng.uniform(0.0, 1.0))

    async with reported("SIGKILL at random points") as lines:
        state, operator = await run(storm_world, storm, "--no-leader-elect")
        assert operator.starts > KILLS
        assert_equal(state, expected)
        lines.append(f"{KILLS} kills, each 0 to 4 s after it had begun to reconcile.")


async def test_an_api_server_that_is_away_for_minutes(storm_world: World) -> None:
    expected = await calm(storm_world)
    plane = storm_world.plane

    async def storm(operator: Supervised) -> None:
        await asyncio.sleep(20.0)
        await asyncio.to_thread(plane.lose_apiserver)
        await asyncio.sleep(OUTAGE_S)
        await asyncio.to_thread(plane.restore_apiserver)
        await asyncio.sleep(5.0)
        for _ in range(5):  # and then it is not well for a while
            await asyncio.to_thread(plane.lose_apiserver)
            await asyncio.to_thread(plane.restore_apiserver)
            await asyncio.sleep(4.0)

    async with reported("API server away") as lines:
        state, operator = await run(storm_world, storm, "--no-leader-elect")
        assert operator.starts == 2, "it needed a restart"  # but for the one at the end of `run`
        assert_equal(state, expected)
        lines.append(
            f"Away for {OUTAGE_S:.0f} s, then five times for as long as it takes to start;"
        )
        lines.append("the operator went on without a restart.")

    async with reported("the same with a leader lease") as lines:
        state, operator = await run(storm_world, storm)
        assert operator.starts == 2, "it needed a restart"
        assert_equal(state, expected)
        lines.append("It wrote nothing without the lease, and took it again without a restart.")


async def test_a_history_that_is_gone(storm_world: World) -> None:
    expected = await calm(storm_world)
    plane = storm_world.plane
    relists = 0.0

    async def storm(operator: Supervised) -> None:
        nonlocal relists
        for _ in range(6):
            await asyncio.sleep(8.0)
            operator.current.pause()  # it hears nothing, while others go on
            await asyncio.sleep(6.0)
            await asyncio.to_thread(plane.cluster.compact_etcd)
            await asyncio.to_thread(plane.lose_apiserver)  # its watches break
            await asyncio.to_thread(plane.restore_apiserver)
            await asyncio.sleep(3.0)
            await asyncio.to_thread(plane.cluster.compact_etcd)
            operator.current.resume()
        await asyncio.sleep(10.0)
        relists = await operator.current.total("dynamo_operator_informer_relists")

    async with reported("etcd compacted, watches broken, 410") as lines:
        state, operator = await run(storm_world, storm, "--no-leader-elect")
        assert operator.starts == 2, "it needed a restart"
        assert_equal(state, expected)
        assert relists > 0, "no watch was refused: this showed nothing"
        lines.append(f"Six times; caches listed anew {relists:.0f} times.")
