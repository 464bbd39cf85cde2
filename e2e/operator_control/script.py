"""What people do to graphs, drawn from a seed: create, edit, scale, restart, damage, delete.

A script leads to one final state, whatever the operator misses meanwhile. Where the operator has to
have seen a state before the next step (what an adapter begins with, and what stays when it goes),
the step waits for it: nobody could tell otherwise what should come of it.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.client import ApiError, ApiUnreachable

from e2e.operator_control.graphs import Json, component, disaggregated, graph
from e2e.operator_control.world import World, deployments, is_in_state, until

SETTLE_S = 400.0
"""A step may wait so long: the operator may be down and the API server, too."""
AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that somebody does to one graph, `pause` seconds after the one before."""

    pause: float
    spec: Json | None = None
    """The graph's spec from now on; None: another kind of step."""
    delete: bool = False
    scale: tuple[str, int] | None = None
    """Component and number for its scaling adapter."""
    damage: str = ""
    """"delete" or "edit": what happens to one of the graph's objects."""
    settled: bool = False
    """Whether the graph has to be settled before this."""


@dataclass(slots=True)
class _Author:
    """One graph's imagined author."""

    rng: random.Random
    components: list[Json] = field(default_factory=list)
    restarts: int = 0
    exists: bool = False
    adapted_once: set[str] = field(default_factory=set)
    """Components that have had an adapter: their numbers have a history."""
    to_be_seen: bool = False
    """Whether the next step is to wait until the last one was seen."""

    def begin(self) -> None:
        self.restarts = 0
        self.exists = True
        self.adapted_once = set()
        if self.rng.random() < 0.4:
            self.components = disaggregated(self.rng.randint(1, 2), self.rng.randint(1, 2))
        else:
            self.components = [
                component("Frontend", "frontend"),
                component("Worker", "worker", self.rng.randint(1, 3), main={"args": ["--speed=1"]}),
            ]

    def spec(self) -> Json:
        spec: Json = {"components": copy.deepcopy(self.components)}
        if self.restarts:
            spec["restart"] = {"id": f"r{self.restarts}"}
        return spec

    def adapted(self) -> list[Json]:
        return [each for each in self.components if "scalingAdapter" in each]

    def plain(self) -> list[Json]:
        return [each for each in self.components if "scalingAdapter" not in each]

    def step(self, last: bool) -> Step:
        waits, self.to_be_seen = self.to_be_seen, False
        step = self._step(last)
        return replace(step, settled=step.settled or waits)

    def _step(self, last: bool) -> Step:
        rng = self.rng
        pause = rng.uniform(0.0, 5.0)
        if not self.exists:
            self.begin()
            return Step(pause, spec=self.spec())
        draw = rng.random()
        if draw < 0.30:
            workers = [each for each in self.components if each["type"] != "frontend"]
            chosen = rng.choice(workers)
            main = chosen["podTemplate"]["spec"]["containers"][0]
            main["args"] = [f"--speed={rng.randint(1, 4)}"]
            return Step(pause, spec=self.spec())
        if draw < 0.50:
            chosen = rng.choice(self.plain())
            chosen["replicas"] = rng.randint(0 if rng.random() < 0.1 else 1, 3)
            self.to_be_seen = chosen["name"] in self.adapted_once
            return Step(pause, spec=self.spec())
        if draw < 0.60:
            names = [each["name"] for each in self.components]
            if "Extra" in names:
                self.components = [each for each in self.components if each["name"] != "Extra"]
            else:
                extra = component("Extra", "worker", main={"args": ["--speed=9"]})
                self.components.append(extra)
            return Step(pause, spec=self.spec(), settled=True)
        if draw < 0.72:
            adapted = self.adapted()
            if adapted and rng.random() < 0.7:
                scale = adapted[0]["name"], rng.randint(1, 4)
                return Step(pause, scale=scale, settled=True)
            chosen = rng.choice(adapted or self.plain())
            if "scalingAdapter" in chosen:
                del chosen["scalingAdapter"]
            else:
                chosen["scalingAdapter"] = {}
                self.adapted_once.add(chosen["name"])
            return Step(pause, spec=self.spec(), settled=True)
        if draw < 0.79:
            self.restarts += 1
            return Step(pause, spec=self.spec())
        if draw < 0.95 or last:
            return Step(pause, damage=rng.choice(["delete", "edit"]))
        self.exists = False
        return Step(pause, delete=True)


def script(seed: int, graphs: int, steps: int) -> dict[str, list[Step]]:
    """Name of a graph -> its steps in order."""
    return {f"g{number}": list(_steps(f"{seed}/{number}", steps)) for number in range(graphs)}


def _steps(seed: str, steps: int) -> Iterator[Step]:
    author = _Author(random.Random(seed))
    for number in range(steps):
        yield author.step(last=number >= steps - 2)


async def play(
    world: World, namespace: str, script: dict[str, list[Step]], seed: int, pace: float
) -> None:
    """Do all of it, each graph for itself; `pace` multiplies the pauses."""
    async with asyncio.TaskGroup() as group:
        for name, steps in script.items():
            group.create_task(_play_one(world, namespace, name, steps, seed, pace))


async def _play_one(
    world: World, namespace: str, name: str, steps: list[Step], seed: int, pace: float
) -> None:
    rng = random.Random(f"{seed}/{name}")
    for step in steps:
        await asyncio.sleep(step.pause * pace)
        if step.settled or step.scale:
            await settled(world, namespace, name)
        while True:
            try:
                await _do(world, namespace, name, step, rng)
                break
            except ApiUnreachable:
                pass
            except ApiError as error:
                if error.status not in (409, 429) and error.status < 500:
                    raise
            await asyncio.sleep(AGAIN_S)


async def _do(world: World, namespace: str, name: str, step: Step, rng: random.Random) -> None:
    path = resources.GRAPHS.path(namespace, name)
    if step.spec is not None:
        found = await world.find(resources.GRAPHS, namespace, name)
        if found is None:
            await world.api.create({**graph(name, namespace), "spec": step.spec})
        else:
            await world.api.replace(path, {**found, "spec": step.spec})
    elif step.delete:
        if await world.find(resources.GRAPHS, namespace, name) is not None:
            await world.api.delete(path, propagation="Background")
    elif step.scale is not None:
        component, number = step.scale
        adapter = f"{name}-{component.lower()}"
        await world.scale(resources.ADAPTERS, namespace, adapter, number)
        await settled(world, namespace, name)
    else:
        await _damage(world, namespace, name, step.damage, rng)


async def _damage(world: World, namespace: str, name: str, how: str, rng: random.Random) -> None:
    owned = [
        child
        for child in await world.children(namespace)
        if child["metadata"]["ownerReferences"][0]["name"] == name
        # An adapter's number is its own: what is deleted with it is lost.
        and child["kind"] not in ("ControllerRevision", "DynamoGraphDeploymentScalingAdapter")
    ]
    # A Deployment remembers what its adapter said, and what a removed one left.
    if how == "delete":
        owned = [child for child in owned if child["kind"] != "Deployment"]
    if not owned:
        return
    child = rng.choice(owned)
    path = resources.of(child).path_of(child)
    try:
        if how == "delete":
            await world.api.delete(path, propagation="Background")
        else:
            labels = {"nvidia.com/dynamo-graph-deployment-name": "damaged"}
            await world.api.merge_patch(path, {"metadata": {"labels": labels}})
    except ApiError as error:
        if error.status != 404:
            raise


async def settled(world: World, namespace: str, name: str) -> None:
    """Wait until the graph runs what it wants, with its adapters' numbers."""

    async def is_settled() -> bool:
        found = await world.find(resources.GRAPHS, namespace, name)
        if found is None:
            return True
        adapters = {
            item["metadata"]["name"]: item["spec"]["replicas"]
            for item in await world.list(resources.ADAPTERS, namespace)
            if item["spec"]["dgdRef"]["name"] == name
        }
        wanted = {
            f"{name}-{each['name'].lower()}"
            for each in found["spec"]["components"]
            if "scalingAdapter" in each
        }
        running: dict[str, int] = {}
        for deployment in deployments(await world.list(resources.DEPLOYMENTS, namespace)).values():
            label = deployment["metadata"]["labels"].get("nvidia.com/dynamo-component", "")
            key = f"{name}-{label.lower()}"
            owner = (deployment["metadata"].get("ownerReferences") or [{}])[0].get("name")
            if owner == name:
                running[key] = running.get(key, 0) + deployment["spec"]["replicas"]
        return (
            is_in_state(found, "successful")
            and set(adapters) == wanted
            and all(running.get(key) == number for key, number in adapters.items())
        )

    await until(f"{namespace}/{name} settled", is_settled, SETTLE_S)
