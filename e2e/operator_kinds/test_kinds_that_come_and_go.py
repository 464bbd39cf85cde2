"""Kinds of other projects that are installed while the operator runs, and taken away again.

On a control plane of its own, without their controllers: what counts is what the API server takes,
and what the operator makes of a kind that is there, or is not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from dynamo_operator.render import names
from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.resources import Resource

from e2e.cluster import addons
from e2e.operator_control import graphs
from e2e.operator_control.conftest import prepared
from e2e.operator_control.graphs import Json
from e2e.operator_control.plane import Plane, told
from e2e.operator_control.process import START_S, Operator
from e2e.operator_control.world import World, condition, until
from e2e.operator_kinds.conftest import DISCOVERY_S

FAKE_NODES = 2


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    made = prepared(tmp_path_factory.mktemp("plane"), FAKE_NODES)
    yield made
    made.down()


@pytest.fixture(scope="module")
def operator(plane: Plane) -> Iterator[Operator]:
    made = Operator(plane, "alpha", extra=("--discovery-seconds", str(DISCOVERY_S)))
    asyncio.run(until("operator leads", made.leads, START_S))
    yield made
    made.close()
    print("--- operator", made.output, sep="\n")  # if a test fails


@pytest_asyncio.fixture
async def world(plane: Plane, operator: Operator) -> AsyncIterator[World]:
    """The plane's objects, with an operator at work."""
    async with await plane.client() as api:
        yield World(plane, api)


@pytest_asyncio.fixture
async def namespace(world: World, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A namespace of this test alone."""
    async with world.namespace(request.node.name.replace("_", "-")) as name:
        yield name


class Kind:
    """The custom resource definition of one kind of an add-on."""

    def __init__(self, plane: Plane, addon: str, kind: Resource) -> None:
        self._cluster = plane.cluster
        found = addons.ADDONS[addon]
        text = (plane.cluster.layout.manifests / found.file).read_text()
        (self._definition,) = [
            manifest
            for manifest in addons.manifests(found, text)
            if manifest["metadata"]["name"] == kind.full_name
        ]

    def install(self) -> None:
        self._cluster.apply(self._definition, server_side=True)

    def remove(self) -> None:
        self._cluster.delete(self._definition)


async def test_leader_worker_sets(plane: Plane, world: World, namespace: str) -> None:
    """A component over several nodes waits for them, and nothing else does."""
    several = graphs.component("Large", "worker", main={"args": ["-tp=2"]})
    several["multinode"] = {"nodeCount": 2}
    await world.apply(graphs.graph("g", namespace, *graphs.aggregated(1), several))

    async def told_why() -> bool:
        found = condition(await world.graph(namespace, "g"), "Degraded")
        return found.get("reason") == "MultinodeNeedsLeaderWorkerSet"

    async def others_run() -> bool:
        status = (await world.graph(namespace, "g"))["status"]["components"]
        return [part["availableReplicas"] for part in status.values()] == [1, 1]

    await until("told what is missing", told_why)
    await until("the others run", others_run)
    graph = await world.graph(namespace, "g")
    assert graph["status"]["state"] == "failed"
    assert condition(graph, "Degraded")["message"] == (
        "Large: several nodes need LeaderWorkerSets, which are not installed"
        " (kubernetes-sigs/lws); the component is left out"
    )
    warnings = [e["reason"] for e in await world.events(namespace, "g") if e["type"] == "Warning"]
    assert warnings.count("MultinodeNeedsLeaderWorkerSet") == 1

    kind = Kind(plane, "lws", resources.LEADER_WORKER_SETS)
    kind.install()

    async def is_made() -> Json | None:
        found = await world.list(resources.LEADER_WORKER_SETS, namespace)
        return next((s for s in found if s["metadata"]["name"].startswith("g-large-group-")), None)

    made = await until("LeaderWorkerSet", is_made)
    assert made["spec"]["leaderWorkerTemplate"]["size"] == 2

    async def no_more() -> bool:
        found = condition(await world.graph(namespace, "g"), "Degraded")
        return found.get("status") == "False"

    await until("nothing is missing", no_more)

    kind.remove()
    await until("told again", told_why)
    await world.quiet(namespace)
    mark = plane.mark()
    await world.edit(namespace, "g", lambda spec: spec["components"].pop())
    await world.settled(namespace, "g")
    assert not [r for r in plane.writes(mark) if r.resource == "leaderworkersets"]
    kind.install()
    await world.quiet(namespace)
    assert await is_made() is None


GATEWAY = "infra/my-gateway"


def behind_a_gateway(namespace: str) -> Json:
    workers = graphs.component("Worker", "worker", 2, main={"args": ["--served-model-name=tiny"]})
    return graphs.graph(
        "g",
        namespace,
        graphs.component("Picker", "epp"),
        workers,
        annotations={"nvidia.com/gateway": GATEWAY},
    )


async def test_gateway_and_metrics(plane: Plane, world: World, namespace: str) -> None:
    """A pool, a route and a monitor: made as soon as their kinds are there, taken by the real API
    server without a word, left alone from then on, and pruned with the picker."""
    await world.apply(behind_a_gateway(namespace))

    async def missing() -> str:
        return str(condition(await world.graph(namespace, "g"), "NotRendered").get("message", ""))

    async def both_missing() -> bool:
        said = await missing()
        return "InferencePoolNotServed: " in said and "HTTPRouteNotServed: " in said

    await until("told what is missing", both_missing)

    Kind(plane, "inference-extension", resources.INFERENCE_POOLS).install()
    Kind(plane, "gateway-api", resources.HTTP_ROUTES).install()
    Kind(plane, "pod-monitor", resources.POD_MONITORS).install()

    async def get(resource: Resource, name: str) -> Json:
        async def found() -> Json | None:
            return await world.find(resource, namespace, name)

        made: Json = await until(f"{resource.kind} {name}", found)
        return made

    pool = await get(resources.INFERENCE_POOLS, "g-pool")
    route = await get(resources.HTTP_ROUTES, "g-route")
    monitor = await get(resources.POD_MONITORS, "g")
    assert pool["spec"]["selector"]["matchLabels"] == {
        names.GRAPH_LABEL: "g",
        names.CLASS_LABEL: "worker",
    }
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]
    picker = pool["spec"]["endpointPickerRef"]
    assert (picker["name"], picker["port"]["number"]) == ("g-picker", 9002)
    (parent,) = route["spec"]["parentRefs"]
    assert (parent["namespace"], parent["name"]) == ("infra", "my-gateway")
    (rule,) = route["spec"]["rules"]
    assert [backend["name"] for backend in rule["backendRefs"]] == ["g-pool"]
    assert {match["path"]["type"] for match in rule["matches"]} == {"Exact"}
    assert monitor["spec"]["selector"]["matchLabels"] == {
        names.GRAPH_LABEL: "g",
        names.METRICS_LABEL: "true",
    }

    async def nothing_missing() -> bool:
        found = condition(await world.graph(namespace, "g"), "NotRendered")
        return found.get("status") == "False"

    await until("nothing is missing", nothing_missing)
    for item in (pool, route, monitor):
        assert not warnings(plane, item), item["kind"]

    await world.quiet(namespace)
    mark = plane.mark()
    # A change that shows in no object: the graph is reconciled, and finds all as it should be.
    await world.patch(
        resources.GRAPHS, namespace, "g", {"metadata": {"annotations": {"example.test/x": "1"}}}
    )
    await world.quiet(namespace)
    assert not plane.writes(mark, namespace), told(plane.writes(mark, namespace))

    await world.edit(namespace, "g", lambda spec: spec["components"].pop(0))

    async def pruned() -> bool:
        kinds = (resources.INFERENCE_POOLS, resources.HTTP_ROUTES)
        return not [item for kind in kinds for item in await world.list(kind, namespace)]

    await until("pool and route pruned", pruned)
    assert await world.find(resources.POD_MONITORS, namespace, "g")

    async def nothing_to_route_to() -> bool:
        what = f"Gateway {GATEWAY} is asked for, but the graph has no frontend and no picker"
        return await missing() == what

    await until("told that the Gateway is asked for in vain", nothing_to_route_to)


def warnings(plane: Plane, item: Json) -> str:
    """What the API server warns of when the object is applied as it was rendered, strictly."""
    bare = {
        "apiVersion": item["apiVersion"],
        "kind": item["kind"],
        "metadata": {
            "name": f"{item['metadata']['name']}-again",
            "namespace": item["metadata"]["namespace"],
        },
        "spec": item["spec"],
    }
    done = plane.cluster.kubectl(
        *("create", "--dry-run=server", "--validate=strict", "-f", "-"), input=json.dumps(bare)
    )
    return done.stderr
