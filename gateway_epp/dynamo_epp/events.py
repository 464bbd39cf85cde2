"""Events of a picker: on its InferencePool, or on its own pod where it serves no pool.

Only where it may: without the right to create events that is one line in the log, and no more.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from typing import Any

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.events import event
from dynamo_runtime.kubernetes.resources import PODS, Resource

from dynamo_epp.problems import Notice

log = logging.getLogger(__name__)

COMPONENT = "dynamo-picker"


class EventPoster:
    """Posts notices with ``client``. ``pool`` is the InferencePool's (namespace, API group, name);
    None: events are about the pod ``POD_NAME``."""

    def __init__(self, client: KubernetesClient, pool: tuple[str, str, str] | None) -> None:
        self._client = client
        self._pool = pool
        self._pod = os.environ.get("POD_NAME", "")
        self._problem = ""

    async def post(self, notice: Notice) -> None:
        """Tell it, or say in the log why it can't be told."""
        try:
            about = await self._about()
            if about is not None:
                await self._client.create(
                    event(
                        about,
                        notice.kind,
                        notice.reason,
                        notice.message,
                        component=COMPONENT,
                        instance=self._pod,
                        now=datetime.now(UTC),
                    )
                )
            self._problem = ""
        except ApiError as error:
            if str(error) != self._problem:
                log.warning("event %s not posted: %s", notice.reason, error)
            self._problem = str(error)

    async def _about(self) -> dict[str, Any] | None:
        if self._pool is not None:
            namespace, group, name = self._pool
            pools = Resource(f"{group}/v1", "InferencePool", "inferencepools")
            return {**await self._client.get(pools.path(namespace, name))}
        if not self._pod:
            return None
        return {**await self._client.get(PODS.path(self._client.namespace, self._pod))}
