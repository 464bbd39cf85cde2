"""Which optional kinds the API server serves, asked for now and then.

Discovery is open to every account, so no right is needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import Resource

log = logging.getLogger(__name__)


def group_kind(resource: Resource) -> str:
    """`group/Kind`, as `Platform.apis` has it."""
    return f"{resource.group}/{resource.kind}"


class ServedApis:
    """Keeps `served` current for the kinds it is asked about."""

    def __init__(
        self,
        client: KubernetesClient,
        kinds: Iterable[Resource],
        on_change: Callable[[frozenset[str]], None],
        every_s: float,
    ) -> None:
        """`on_change` gets what is served now, whenever that is not what it was; `run` asks every
        `every_s` seconds."""
        self._client = client
        self._kinds = tuple(kinds)
        self._on_change = on_change
        self._every_s = every_s
        self.served: frozenset[str] = frozenset()

    async def look(self) -> None:
        """Ask once. Raises `ApiError` if the API server can't tell."""
        found = set()
        for kind in self._kinds:
            try:
                listed = await self._client.get(f"/apis/{kind.api_version}")
            except ApiError as error:
                if error.status == 404:
                    continue
                raise
            if any(entry.get("kind") == kind.kind for entry in listed.get("resources") or ()):
                found.add(group_kind(kind))
        if found != self.served:
            log.info("optional kinds that are served: %s", ", ".join(sorted(found)) or "none")
            self.served = frozenset(found)
            self._on_change(self.served)

    async def run(self) -> None:
        """Ask again and again until cancelled; an outage changes nothing."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.look()
            except ApiError as error:
                log.debug("kinds could not be looked up: %s", error)
