"""What can be set on an operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dynamo_runtime.kubernetes import lease

from dynamo_operator.render import Platform


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Settings of one operator process."""

    namespaces: tuple[str, ...] = ()
    """Namespaces whose graphs it takes care of. Empty: all, except those that a restricted operator
    has marked as its own."""
    namespace: str = ""
    """Its own namespace, for the leader lease; "" for that of its pod or of the kubeconfig."""
    identity: str = ""
    """Name in the lease and the log; the pod's name, with something random added, by default."""
    kubeconfig: Path | None = None
    """Instead of the pod's service account."""
    leader_elect: bool = True
    """Whether to wait for the lease. Off only where nobody else can run."""
    lease_seconds: int = round(lease.DURATION_S)
    """How long the others wait when the leader is silent. Longer where the API server is slow at
    times: a leader that can't renew for two thirds of it stops to write."""
    workers: int = 8
    """Graphs that are reconciled at the same time; of one namespace among several half as many."""
    pull_secret_namespaces: tuple[str, ...] = ()
    """Namespaces in which Secrets of the type `kubernetes.io/dockerconfigjson` may be read, to find
    the pull secrets of images by their registry."""
    discovery_seconds: float = 60.0
    """How often the API server is asked which optional kinds it serves; one that is installed later
    (LeaderWorkerSets, InferencePools) is used from then on. And whose the CRDs are: where a Dynamo
    has been installed, the process ends."""
    platform: Platform = field(default_factory=Platform)
    status_host: str = "0.0.0.0"
    status_port: int = 9090
    """Of probes and metrics."""

    @property
    def restricted(self) -> bool:
        return bool(self.namespaces)
