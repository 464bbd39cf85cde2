"""Whether the CRDs are there and whose they are, asked for now and then.

A Dynamo that is installed later takes them over, and its operator the graphs with them: two masters
would undo each other's work without end.
"""

from __future__ import annotations

import asyncio
import logging

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient

from dynamo_operator.install.crds import check_owner

log = logging.getLogger(__name__)


class OwnCrds:
    """Looks at the CRDs of graphs and adapters; `run` does so every `every_s` seconds."""

    def __init__(self, client: KubernetesClient, every_s: float) -> None:
        self.missing = ""
        """Which are not there, and what to do about it; "" if they are, or that can't be seen."""
        self._client = client
        self._every_s = every_s
        self._hidden = False

    async def look(self) -> None:
        """Ask once. Raises `ForeignCrds` if they are another operator's, `ApiError` if the API
        server can't tell. An account that may not look (of a restricted operator, perhaps) goes on
        without."""
        try:
            names = await check_owner(self._client)
        except ApiError as error:
            if error.status not in (401, 403):
                raise
            if not self._hidden:
                log.info("whose the CRDs are can't be seen: %s", error)
            self._hidden, names = True, []
        missing = (
            f"no CustomResourceDefinition {', '.join(names)}: the webhook of a cluster-wide "
            "installation makes them, or `dynamo operator crds --apply --no-webhook`"
        )
        if names and missing != self.missing:
            log.warning("%s", missing)
        self.missing = missing if names else ""

    async def run(self) -> None:
        """Ask again and again until cancelled; an outage changes nothing. Raises `ForeignCrds`."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.look()
            except ApiError as error:
                log.debug("the CRDs could not be looked at: %s", error)
