"""The cluster's objects: waiting for what they become, and comparing what they became."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from dynamo_operator.reconcile.gather import CHILDREN, OPTIONAL_CHILDREN
from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import Resource

from e2e.operator_control.graphs import Json
from e2e.operator_control.plane import Plane

INTERVAL_S = 0.1
EDIT_EVERY_S = 10.0
MANAGER = "e2e"


class NotInTime(AssertionError):
    """Something did not come true in time."""


async def until(what: str, predicate: Callable[[], Awaitable[Any]], timeout_s: float = 30.0) -> Any:
    """The first true answer of `predicate`; an API server that fails counts as not yet."""
    deadline = time.monotonic() + timeout_s
    seen: Any = None
    while True:
        try:
            if seen := await predicate():
                return seen
        except (ApiError, OSError) as error:
            seen = error
        if time.monotonic() > deadline:
            raise NotInTime(f"{what}: not within {timeout_s:g} s; last seen: {seen!r}")
        await asyncio.sleep(INTERVAL_S)


class World:
    """The objects of one plane, for one test."""

    def __init__(self, plane: Plane, api: KubernetesClient) -> None:
        self.plane = plane
        self.api = api

    # --- one object

    async def find(self, resource: Resource, namespace: str, name: str) -> Json | None:
        """The object; None if there is none."""
        try:
            return await self.api.get(resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def get(self, resource: Resource, namespace: str, name: str) -> Json:
        return await self.api.get(resource.path(namespace, name))

    async def list(self, resource: Resource, namespace: str | None = None) -> list[Json]:
        """Objects of one kind; kinds that are not served have none."""
        try:
            listed = await self.api.get(resource.path(namespace))
        except ApiError as error:
            if error.status == 404:
                return []
            raise
        return [
            {"apiVersion": resource.api_version, "kind": resource.kind, **item}
            for item in listed["items"]
        ]

    async def apply(self, *manifests: Json, manager: str = MANAGER) -> list[Json]:
        """What `kubectl apply --server-side` does."""
        return [await self.api.apply(each, field_manager=manager) for each in manifests]

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Json, manager: str = MANAGER
    ) -> Json:
        """A merge patch: somebody edits."""
        path = resource.path(namespace, name)
        return await self.api.merge_patch(path, body, field_manager=manager)

    async def scale(
        self, resource: Resource, namespace: str, name: str, replicas: int, manager: str = MANAGER
    ) -> None:
        """Through the scale subresource, as autoscalers do."""
        path = resource.path(namespace, name, "scale")
        await self.api.merge_patch(path, {"spec": {"replicas": replicas}}, field_manager=manager)

    async def delete(self, resource: Resource, namespace: str, name: str) -> None:
        path = resource.path(namespace, name)
        await self.api.delete(path, propagation="Background")

    # --- namespaces

    @contextlib.asynccontextmanager
    async def namespace(self, name: str) -> AsyncIterator[str]:
        """A namespace that is deleted in the end."""
        await self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        try:
            yield name
        finally:
            with contextlib.suppress(ApiError):
                await self.api.delete(resources.NAMESPACES.path(name=name))

    async def gone(self, namespace: str, timeout_s: float = 60.0) -> None:
        """Delete the namespace and wait until nothing of it is left.

        Kubernetes looks at a namespace in which pods were left again after half of their grace
        period, which for engines is minutes; or when somebody edits it.
        """
        path = resources.NAMESPACES.path(name=namespace)
        with contextlib.suppress(ApiError):
            await self.api.delete(path)
        edits = itertools.count()
        due = time.monotonic()

        async def is_gone() -> bool:
            nonlocal due
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + EDIT_EVERY_S
                    note = {"metadata": {"annotations": {"test/looked": str(next(edits))}}}
                    await self.api.merge_patch(path, note, field_manager=MANAGER)
                await self.api.get(path)
            except ApiError as error:
                return error.status == 404
            return False

        await until(f"namespace {namespace} gone", is_gone, timeout_s)

    # --- graphs

    async def graph(self, namespace: str, name: str) -> Json:
        return await self.get(resources.GRAPHS, namespace, name)

    async def edit(self, namespace: str, name: str, change: Callable[[Json], object]) -> Json:
        """Change a graph's spec in place, as `kubectl edit` does; again after a conflict."""
        while True:
            found = await self.graph(namespace, name)
            change(found["spec"])
            try:
                return await self.api.replace(
                    resources.GRAPHS.path(namespace, name), found, field_manager=MANAGER
                )
            except ApiError as error:
                if error.status != 409:
                    raise

    async def settled(
        self, namespace: str, *names: str, state: str = "successful", timeout_s: float = 60.0
    ) -> None:
        """Wait until the graphs' current generations are in this state."""
        for name in names:

            async def is_settled(name: str = name) -> bool:
                return is_in_state(await self.graph(namespace, name), state)

            await until(f"graph {namespace}/{name} {state}", is_settled, timeout_s)

    async def quiet(
        self, namespace: str | None = None, seconds: float = 3.0, timeout_s: float = 60.0
    ) -> None:
        """Wait until the operators have written nothing for so long."""
        deadline = time.monotonic() + timeout_s
        while True:
            mark = self.plane.mark()
            await asyncio.sleep(seconds)
            written = self.plane.writes(mark, namespace)
            if not written:
                return
            if time.monotonic() > deadline:
                raise NotInTime(f"still written after {timeout_s:g} s: {written[-20:]}")

    async def events(self, namespace: str, name: str) -> list[Json]:
        """Events about a graph, oldest first."""
        found = [
            event
            for event in await self.list(resources.EVENTS, namespace)
            if event["involvedObject"].get("kind") == "DynamoGraphDeployment"
            and event["involvedObject"]["name"] == name
        ]
        return sorted(found, key=lambda event: int(event["metadata"]["resourceVersion"]))

    async def children(self, namespace: str) -> list[Json]:
        """All objects of the kinds that the operator makes that a graph owns, of whatever name."""
        found = []
        for resource in (*CHILDREN, *OPTIONAL_CHILDREN):
            for item in await self.list(resource, namespace):
                owners = item["metadata"].get("ownerReferences") or ()
                if any(owner["kind"] == "DynamoGraphDeployment" for owner in owners):
                    found.append(item)
        return found


def is_in_state(graph: Json, state: str) -> bool:
    """Whether the graph's status is about its current generation, and says this."""
    status = graph.get("status") or {}
    return (
        status.get("observedGeneration") == graph["metadata"]["generation"]
        and status.get("state") == state
    )


def condition(graph: Json, type: str) -> Json:
    """A condition of the graph; {} if it has none of that type."""
    conditions = (graph.get("status") or {}).get("conditions") or ()
    return next((dict(each) for each in conditions if each["type"] == type), {})


def deployments(items: Iterable[Json]) -> dict[str, Json]:
    """The Deployments among some objects, by name."""
    return {item["metadata"]["name"]: item for item in items if item["kind"] == "Deployment"}


def as_text(value: Any) -> str:
    """For messages and comparisons: JSON that is equal if the value is."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
