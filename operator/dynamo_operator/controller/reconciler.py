"""One graph brought in order: observe, plan, carry out, tell.

Level-triggered: all it gets is a key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.client import ApiError, ApiUnreachable, KubernetesClient
from dynamo_runtime.kubernetes.events import event, tell
from pydantic import ValidationError

from dynamo_operator.reconcile.apply import Applier, NamespaceGoing
from dynamo_operator.reconcile.gather import GraphIndex, GraphKey
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.reconcile.plan import Plan, Refused
from dynamo_operator.reconcile.planning import ADAPTER, plan
from dynamo_operator.render import Platform
from dynamo_operator.status.adapters import adapter_status
from dynamo_operator.status.events import EventText, events
from dynamo_operator.status.status import graph_status

log = logging.getLogger(__name__)

COMPONENT = "dynamo-operator"


class NotInOrder(Exception):
    """Something was refused; the graph is tried again after a while."""

    def __init__(self, message: str, writes: int) -> None:
        super().__init__(message)
        self.writes = writes


@dataclass(frozen=True, slots=True)
class Done:
    """What a reconcile did."""

    writes: int = 0
    """Requests that changed an object of the graph."""
    look_again_s: float | None = None
    """The graph is due in so many seconds, even if nothing changes."""


class Reconciler:
    """Reconciles graphs of `index`. `platform` gives the platform for a namespace and the kinds
    that are served; `clock` the wall-clock time, in UTC."""

    def __init__(
        self,
        client: KubernetesClient,
        index: GraphIndex,
        *,
        platform: Callable[[str], Platform],
        identity: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._index = index
        self._platform = platform
        self._identity = identity
        self._clock = clock
        self._applier = Applier(client, index)
        self._uids: dict[GraphKey, str] = {}

    async def reconcile(self, key: GraphKey) -> Done:
        """Bring the graph in order. Raises `ApiError` and `NotInOrder`: try again later."""
        raw = self._index.raw(key)
        known = self._uids.get(key)
        if known is not None and (raw is None or raw["metadata"]["uid"] != known):
            del self._uids[key]
            self._index.forget(*key)
            self._applier.forget(known)
        if raw is None or raw["metadata"].get("deletionTimestamp"):
            return Done()
        self._uids[key] = raw["metadata"]["uid"]
        platform = self._platform(key[0])
        try:
            observed = self._index.observe(raw, platform.apis or frozenset(), self._clock())
        except ValidationError as error:
            await self._cannot_read(raw, error)
            return Done()
        wanted = plan(observed, platform)
        try:
            applied = await self._applier.carry_out(observed, wanted)
        except NamespaceGoing:
            return Done()
        # The answers to what was just written tell more than the caches do.
        after = observed
        if applied.writes:
            after = self._index.observe(raw, observed.apis, observed.at)
        await self._tell(after, applied.plan)
        if applied.plan.refused:
            first = applied.plan.refused[0]
            raise NotInOrder(f"{first.object}: {first.message}", applied.writes)
        return Done(applied.writes, wanted.look_again_s)

    async def _cannot_read(self, raw: Json, error: ValidationError) -> None:
        """A stored graph that this version's models don't take: said, and left as it is."""
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()[:3]
        )
        bare = {**raw, "spec": {"components": []}}
        observed = replace(self._index.observe(bare, frozenset()), raw=raw)
        refused = Refused(f"DynamoGraphDeployment/{observed.name}", problems)
        await self._tell(observed, Plan(refused=(refused,)))

    # --- status and events

    async def _tell(self, observed: Observed, done: Plan) -> None:
        now = self._clock()
        old = observed.status
        new = graph_status(observed, done, now)
        if new != old:
            path = resources.GRAPHS.path_of(observed.raw, "status")
            if not await self._write_status(path, observed.raw, new):
                return
            for text in events(old, new, done):
                await self._post(observed, text, now)
        for adapter in observed.of_kind(ADAPTER):
            status = adapter_status(adapter, observed, done, now)
            if status != (adapter.get("status") or {}):
                await self._write_status(
                    resources.ADAPTERS.path_of(adapter, "status"), adapter, status
                )

    async def _write_status(self, path: str, item: Json, status: Mapping[str, Any]) -> bool:
        """Whether the status was written; an object that is gone or another one has none to."""
        operations = [
            {"op": "test", "path": "/metadata/uid", "value": item["metadata"]["uid"]},
            {"op": "add", "path": "/status", "value": status},
        ]
        try:
            answer = await self._client.json_patch(path, operations)
        except ApiUnreachable:
            raise
        except ApiError as error:
            # A failed `test` is a 422 without details; one about the status has them.
            if error.status == 404 or (error.status == 422 and not error.body.get("details")):
                return False
            raise
        if item["kind"] == ADAPTER:
            self._index.wrote(answer)
        else:
            self._index.wrote_graph(answer)
        return True

    async def _post(self, observed: Observed, text: EventText, now: datetime) -> None:
        """An Event for people. It is lost rather than a reason to fail."""
        told = event(
            observed.raw,
            text.type,
            text.reason,
            text.message,
            component=COMPONENT,
            instance=self._identity,
            now=now,
        )
        try:
            await tell(self._client, told)
        except ApiUnreachable:
            raise
        except ApiError as error:
            if not error.namespace_ends:
                log.warning("event %s not posted: %s", text.reason, error)
