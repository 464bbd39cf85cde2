"""A thousand graphs on one operator: what it takes to settle them, to keep them, to start again."""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dynamo_runtime.kubernetes import resources

from e2e.operator_control.conftest import prepared
from e2e.operator_control.graphs import Json, graph
from e2e.operator_control.plane import WRITES, Plane, Request
from e2e.operator_control.process import START_S, Operator
from e2e.operator_control.world import World, is_in_state, until

GRAPHS = int(os.environ.get("SCALE_GRAPHS", "1000"))
NAMESPACES = 20
PODS = 3
"""Of each graph: a frontend and two workers."""
NODES = GRAPHS * PODS // 90 + 1
SETTLE_S = 1800.0
IDLE_S = 60.0
AT_A_TIME = 16
REPORTS = Path(__file__).parents[2] / "docs" / "reports"


@pytest.fixture
def big_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    made = prepared(tmp_path_factory.mktemp("plane"), NODES)
    yield made
    made.down()


@pytest.fixture
def start(big_plane: Plane) -> Iterator[Callable[[], Operator]]:
    started: list[Operator] = []

    def make() -> Operator:
        started.append(Operator(big_plane, "alpha", extra=["--log-level", "WARNING"]))
        return started[-1]

    yield make
    for each in started:
        each.close()
        print("--- operator", each.output, sep="\n")


def places() -> list[tuple[str, str]]:
    """Namespace and name of each graph."""
    return [(f"ctl-scale-{number % NAMESPACES}", f"g{number}") for number in range(GRAPHS)]


async def apply_all(world: World) -> None:
    """Apply all graphs, so many at a time."""
    for number in range(NAMESPACES):
        name = f"ctl-scale-{number}"
        await world.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    left = places()

    async def work() -> None:
        while left:
            namespace, name = left.pop()
            await world.api.create(graph(name, namespace))

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_A_TIME):
            group.create_task(work())


async def all_settled(world: World) -> bool:
    found = await world.list(resources.GRAPHS)
    ready = sum(is_in_state(item, "successful") for item in found)
    return ready == GRAPHS


def kind(request: Request) -> str:
    """What a request was for, as the report sums it up."""
    if request.resource == "leases":
        return "lease"
    if request.verb == "watch":
        return "watch"
    if not request.resource or request.resource == "customresourcedefinitions":
        return "discovery"
    if request.verb in ("get", "list"):
        return "reads"
    if request.resource.endswith("/status"):
        return "statuses"
    return "events" if request.resource == "events" else "objects written"


def summed(requests: list[Request]) -> Counter[str]:
    return Counter(kind(request) for request in requests)


def load() -> str:
    return f"{os.getloadavg()[1]:.1f}"


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_a_thousand_graphs(big_plane: Plane, start: Callable[[], Operator]) -> None:
    async with await big_plane.client() as api:
        world = World(big_plane, api)
        await apply_all(world)

        # All at once: the graphs are there, then the operator comes.
        mark = big_plane.mark()
        operator = start()
        await until("operator leads", operator.leads, START_S)
        began, empty = time.monotonic(), operator.memory
        await until("all graphs successful", lambda: all_settled(world), SETTLE_S)
        settle_s, settle_cpu = time.monotonic() - began, operator.cpu_seconds
        await world.quiet(None, 5.0, 120.0)
        requests = summed(big_plane.requests(mark))
        metrics = await operator.metrics()
        reconciles = metrics[
            "controller_runtime_reconcile_total", ("dynamographdeployment", "success")
        ]
        full = operator.memory

        # At rest.
        mark, cpu = big_plane.mark(), operator.cpu_seconds
        await asyncio.sleep(IDLE_S)  # on purpose: it is about nothing happening
        idle_cpu = (operator.cpu_seconds - cpu) / IDLE_S
        idle = big_plane.requests(mark)
        assert not [r for r in idle if kind(r) in ("reads", "objects written", "statuses")], idle

        # One graph among all is changed.
        latencies = []
        for namespace, name in places()[:20]:
            latencies.append(await _latency(world, namespace, name))

        # Another operator takes over and finds everything done.
        await until("all graphs successful", lambda: all_settled(world), 120.0)
        await world.quiet(None, 5.0, 120.0)
        operator.terminate()
        assert await operator.ended() == 0
        mark = big_plane.mark()
        began = time.monotonic()
        again = start()

        async def is_caught_up() -> bool:
            return await again.total("controller_runtime_reconcile_total") >= GRAPHS

        await until("caught up", is_caught_up, 300.0)
        restart_s, restart_cpu, restarted = (
            time.monotonic() - began,
            again.cpu_seconds,
            again.memory,
        )
        await asyncio.sleep(10.0)  # on purpose: writes would come now
        after = big_plane.requests(mark)
        written = [r for r in after if r.verb in WRITES and r.resource != "leases"]
        assert written == []

        assert settle_s < 900.0, "minutes on one core"
        per_graph = {name: requests[name] / GRAPHS for name in sorted(requests)}
        report = f"""\
# Operator at scale, {time.strftime("%Y-%m-%d")}

{GRAPHS} graphs in {NAMESPACES} namespaces, each a frontend and two workers: {GRAPHS * PODS} pods on
{NODES} fake nodes. One operator process on one core of {os.cpu_count()}, which API server, etcd,
controllers and scheduler share; {platform.machine()}, Python {platform.python_version()}; load
average {load()} at the end.

| what | seen |
|---|---|
| all graphs there, operator starts: until all were `successful` | {settle_s:.0f} s |
| … its CPU time | {settle_cpu:.0f} s, {settle_cpu / GRAPHS * 1000:.0f} ms a graph |
| … reconciles a graph | {reconciles / GRAPHS:.1f} |
| resident memory: before, after | {empty / 2**20:.0f} MiB, {full / 2**20:.0f} MiB |
| at rest for {IDLE_S:.0f} s: CPU | {idle_cpu * 100:.1f} % of a core |
| … requests | {", ".join(f"{count} {what}" for what, count in sorted(summed(idle).items()))} |
| a graph edited: until its Deployment has changed, median of {len(latencies)} | \
{statistics.median(latencies) * 1000:.0f} ms, worst {max(latencies) * 1000:.0f} ms |
| operator started anew: until every graph was looked at | {restart_s:.1f} s, \
{restart_cpu:.1f} s of CPU |
| … writes | {len(written)} |
| … resident memory | {restarted / 2**20:.0f} MiB |

Requests a graph while settling: \
{", ".join(f"{value:.2f} {name}" for name, value in per_graph.items())}.
"""
        print(report)
        path = REPORTS / f"{time.strftime('%Y-%m-%d')}-operator-scale.md"
        path.write_text(report)


async def _latency(world: World, namespace: str, name: str) -> float:
    """Seconds from an edit of the graph's answer to the Deployment's change."""

    def change(spec: Json) -> None:
        spec["components"][1]["replicas"] = 1

    began = time.monotonic()
    await world.edit(namespace, name, change)
    path = resources.DEPLOYMENTS.path(namespace, f"{name}-worker")
    while (await world.api.get(path))["spec"]["replicas"] != 1:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    return time.monotonic() - began
