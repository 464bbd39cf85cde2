"""Scaling by the scale subresource of the graph's scaling adapters.

In a cluster the API server answers, on one machine the local runner, at the same paths with the
same objects: to the planner there is no difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
from dynamo_runtime.kubernetes.client import ApiError
from dynamo_runtime.kubernetes.resources import ADAPTERS

from dynamo_planner.config.model import Role

FIELD_MANAGER = "dynamo-planner"


class InvalidComponents(ValueError):
    """A list of components that does not say what it should."""


class Scalable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A component that may be scaled."""

    name: str  # as the graph has it
    role: Role
    adapter: str  # name of its DynamoGraphDeploymentScalingAdapter
    gpus: int = 1  # of one replica


def scalables(text: str) -> tuple[Scalable, ...]:
    """The components in ``text``, a JSON list. Raises ``InvalidComponents``."""
    try:
        found = msgspec.json.decode(text, type=list[Scalable])
    except msgspec.DecodeError as error:
        raise InvalidComponents(
            f"DYN_PLANNER_COMPONENTS: {error}; it is a list such as "
            '[{"name": "Worker", "role": "worker", "adapter": "graph-worker", "gpus": 1}]'
        ) from error
    if len({each.name for each in found}) < len(found):
        raise InvalidComponents("DYN_PLANNER_COMPONENTS: two components have one name")
    return tuple(found)


class Connector(Protocol):
    """Knows the components' scales and sets them."""

    @property
    def components(self) -> Sequence[Scalable]: ...

    async def desired(self) -> Mapping[str, int]:
        """Component -> replicas that its scale asks for. Raises ``ApiError``."""
        ...

    async def scale(self, component: str, replicas: int) -> None:
        """Raises ``ApiError``; after ``ApiUnreachable`` nobody knows whether it took effect."""
        ...


class ScaleApi(Protocol):
    """What a `KubernetesClient` has; errors are its `ApiError`."""

    async def get(self, path: str) -> dict[str, Any]: ...

    async def merge_patch(
        self, path: str, body: Mapping[str, Any], *, field_manager: str | None = None
    ) -> dict[str, Any]: ...


class ScaleConnector:
    """``components`` by their adapters in ``namespace``."""

    def __init__(self, api: ScaleApi, namespace: str, components: Sequence[Scalable]) -> None:
        self._api = api
        self.components = components
        self._paths = {
            each.name: ADAPTERS.path(namespace, each.adapter, "scale") for each in components
        }

    async def desired(self) -> dict[str, int]:
        names = list(self._paths)
        scales = await asyncio.gather(*(self._api.get(self._paths[name]) for name in names))
        return {name: _replicas(scale) for name, scale in zip(names, scales, strict=True)}

    async def scale(self, component: str, replicas: int) -> None:
        body = {"spec": {"replicas": replicas}}
        await self._api.merge_patch(self._paths[component], body, field_manager=FIELD_MANAGER)


def _replicas(scale: Mapping[str, Any]) -> int:
    """``spec.replicas``, which is left out where it is 0."""
    spec = scale.get("spec")
    found = (spec if isinstance(spec, dict) else {}).get("replicas", 0)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ApiError(200, "InvalidAnswer", f"a scale with {found!r} replicas")
    return found
