"""What every source of endpoints promises, and what an endpoint must be to be passed on."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from typing import Protocol

from dynamo_runtime.endpoint import ROLES, Endpoint


class EndpointSource(Protocol):
    """Anything that knows the endpoints."""

    def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        """The first snapshot at once, then one for each change, until cancelled."""
        ...


def problem_of(endpoint: Endpoint) -> str:
    """What is wrong with one endpoint, "" if nothing. A proxy that is given a whole list refuses
    all of it for one bad address."""
    if endpoint.role not in ROLES:
        return f"role {endpoint.role!r} is unknown; use one of {', '.join(ROLES)}"
    for name in ("port", "stream_port", "status_port"):
        port = getattr(endpoint, name)
        if port is not None and not 0 < port < 65536:
            return f"{name} is {port}; it must be from 1 to 65535"
    try:
        if endpoint.address:  # "": the pod has none yet
            ipaddress.ip_address(endpoint.address)
    except ValueError:
        return f"address {endpoint.address!r} is no IP address"
    return ""
