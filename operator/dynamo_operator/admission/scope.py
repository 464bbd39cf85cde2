"""Namespaces that belong to an operator of their own.

An operator restricted to namespaces keeps a Lease in each, which tells a cluster-wide one to leave
it alone; admission goes by the same mark, so that no graph has two judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import LEASES

from dynamo_operator.marker import DURATION_S, MARKER

LOOKUP_LIMIT_S = 2.0


def holds(lease: Mapping[str, Any], now: datetime) -> bool:
    """Whether the mark is kept alive: renewed no longer ago than it lasts. `now` is aware."""
    spec = lease.get("spec")
    if not isinstance(spec, Mapping) or not spec.get("holderIdentity"):
        return False
    try:
        renewed = datetime.fromisoformat(str(spec.get("renewTime")))
    except ValueError:
        return False
    if renewed.tzinfo is None:
        return False
    lasts = spec.get("leaseDurationSeconds")
    seconds = lasts if isinstance(lasts, int) else DURATION_S
    return now <= renewed + timedelta(seconds=seconds)


async def is_marked(client: KubernetesClient, namespace: str, now: datetime) -> bool:
    """Whether another operator answers for `namespace`; no, if that can't be found out."""
    path = LEASES.path(namespace, MARKER)
    try:
        lease = await client.request("GET", path, timeout_s=LOOKUP_LIMIT_S)
    except ApiError:
        return False
    return holds(lease, now)
