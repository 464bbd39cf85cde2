"""One engine as a registry knows it: plain data, for policy as well as for I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROLES = ("worker", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine: a pod's address and what the registry says of it."""

    name: str  # pod name, unique in a snapshot
    address: str  # IP
    port: int  # the engine's HTTP port
    role: str = "worker"  # one of ROLES
    ready: bool = False  # the pod's readiness, as its probes say
    terminating: bool = False
    generation: str = ""  # worker hash; "" if the graph has no generations
    stream_port: int | None = None  # our worker stream; None: a stock engine
    status_port: int | None = None  # our launcher's status server
    rank: int | None = None  # which of its pod's engines this port is; None: the pod has one port
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def hostport(self) -> str:
        """``ip:port``, as proxies and headers want it."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"
