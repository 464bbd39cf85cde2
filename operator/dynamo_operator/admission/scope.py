"""Namespaces that belong to an operator of their own.

An operator restricted to namespaces keeps a Lease in each, which tells a cluster-wide one to leave
it alone; admission goes by the same mark, so that no graph has two judges.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.lease import Observation, expired, observe
from dynamo_runtime.kubernetes.resources import LEASES

from dynamo_operator.marker import MARKER

LOOKUP_LIMIT_S = 2.0
LEFT_BEHIND = timedelta(minutes=5)
"""A mark that says it was renewed so long ago is nobody's, however its clock goes."""


def holds(seen: Observation, now: datetime) -> bool:
    """Whether the mark is kept alive. `now` is aware, of the clock that `seen.at` is of.

    As with every lease, what counts is that it moves by the observer's own clock: machines' clocks
    differ. But reviews are rare, and a mark whose keeper is gone may never have been looked at, so
    its own word counts where that leaves no doubt.
    """
    if seen.lease is None or expired(seen.lease, seen.at, now.timestamp()):
        return False
    try:
        renewed = datetime.fromisoformat(str(seen.lease["spec"].get("renewTime")))
    except ValueError:
        return False
    return renewed.tzinfo is not None and now < renewed + LEFT_BEHIND


class Marks:
    """The marks as they were at the last look, to know which of them move."""

    def __init__(self, client: KubernetesClient) -> None:
        self._client = client
        self._seen: dict[str, Observation] = {}

    async def hold(self, namespace: str, now: datetime) -> bool:
        """Whether another operator answers for `namespace`; no, if that can't be found out: better
        two judges than none."""
        path = LEASES.path(namespace, MARKER)
        try:
            lease = await self._client.request("GET", path, timeout_s=LOOKUP_LIMIT_S)
        except ApiError as error:
            if error.status == 404:
                self._seen.pop(namespace, None)
            return False
        seen = observe(self._seen.get(namespace), lease, now.timestamp())
        self._seen[namespace] = seen
        return holds(seen, now)
