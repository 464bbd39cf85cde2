"""From the first apply to the last deletion, with real manifests and in namespaces that go away."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from dynamo_crds.load import load_graphs
from dynamo_runtime.kubernetes import resources

from e2e.operator_control.graphs import component, disaggregated, graph
from e2e.operator_control.plane import told
from e2e.operator_control.process import Operator
from e2e.operator_control.world import World, until


async def test_a_deleted_graph_leaves_nothing(
    world: World, namespace: str, operator: Operator
) -> None:
    adapted = component("Adapted", "worker", scalingAdapter={})
    await world.apply(graph("g", namespace, *disaggregated(), adapted))
    await world.settled(namespace, "g")
    kinds = {child["kind"] for child in await world.children(namespace)}
    assert kinds >= {
        "Deployment",
        "Service",
        "ServiceAccount",
        "ControllerRevision",
        "DynamoGraphDeploymentScalingAdapter",
    }
    await world.delete(resources.GRAPHS, namespace, "g")

    async def is_empty() -> bool:
        pods = await world.list(resources.PODS, namespace)
        return not pods and await world.children(namespace) == []

    await until("everything gone", is_empty)
    mark = world.plane.mark()
    await world.quiet(namespace)
    assert world.plane.writes(mark, namespace) == []


async def test_a_graph_deleted_and_made_anew_at_once_is_whole(
    world: World, namespace: str, operator: Operator
) -> None:
    """Of the same name, with another uid: the old one's objects are going, the new one's come."""
    for _ in range(5):
        (made,) = await world.apply(graph("g", namespace))
        await world.settled(namespace, "g")
        await world.delete(resources.GRAPHS, namespace, "g")
    (made,) = await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    await world.quiet(namespace)

    async def is_whole() -> bool:
        children = await world.children(namespace)
        owners = {child["metadata"]["ownerReferences"][0]["uid"] for child in children}
        return owners == {made["metadata"]["uid"]} and len(children) >= 10

    await until("all objects are the new graph's", is_whole)


async def test_a_namespace_deleted_in_the_middle_is_no_error(
    world: World, namespace: str, operator: Operator
) -> None:
    seen = len(operator.lines)
    for number in range(3):
        async with world.namespace(f"{namespace}-{number}") as going:
            await world.apply(*(graph(f"g{each}", going) for each in range(6)))
            if number:
                await world.settled(going, "g0")
        await world.gone(f"{namespace}-{number}")
    await world.quiet()
    loud = [line for line in operator.lines[seen:] if '"level":"ERROR"' in line]
    assert loud == []

    async def is_calm() -> bool:
        failing = await operator.total("dynamo_operator_graphs_failing")
        return failing == 0.0 and await operator.total("workqueue_depth") == 0.0

    await until("nothing fails for what is gone", is_calm)


@pytest.mark.timeout(600)
async def test_real_manifests_come_to_rest(
    world: World, namespace: str, operator: Operator
) -> None:
    """Whatever the API server fills in, writes otherwise or drops: nothing is written twice."""
    folder = os.environ.get("CORPORA")
    if not folder:
        pytest.skip("CORPORA is not set: it names the folder with real manifests")
    seen = len(operator.lines)
    graphs = []
    for number, path in enumerate(sorted((Path(folder) / "manifests").glob("*.yaml"))):
        for index, each in enumerate(load_graphs(path)):
            manifest = each.manifest()
            manifest["metadata"]["namespace"] = namespace
            manifest["metadata"]["name"] = f"g{number}-{index}"
            graphs.append(manifest)
    assert len(graphs) > 100
    await world.apply(*graphs)

    async def are_told() -> bool:
        found = await world.list(resources.GRAPHS, namespace)
        return len(found) == len(graphs) and all(
            (each.get("status") or {}).get("observedGeneration") == each["metadata"]["generation"]
            for each in found
        )

    await until("all graphs have a status", are_told, 180.0)
    await world.quiet(namespace, 10.0, 120.0)
    failures = [line for line in operator.lines[seen:] if "could not be reconciled" in line]
    assert failures == []
    # Touched without a change, each is looked at again, and nothing is written.
    mark = world.plane.mark()
    for each in graphs:
        await world.patch(
            resources.GRAPHS,
            namespace,
            each["metadata"]["name"],
            {"metadata": {"annotations": {"touched": "yes"}}},
        )
    await asyncio.sleep(10.0)  # on purpose: it is about nothing happening
    assert world.plane.writes(mark, namespace) == [], told(world.plane.writes(mark, namespace))
