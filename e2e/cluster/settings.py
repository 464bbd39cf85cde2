"""Of what the cluster is made and where it lives: versions, addresses, folders.

Everything is below one folder of the cache. `bin`, `images`, `manifests` and `pki` are kept and
carry the version they were made from; `state` is one run of the cluster and gone after it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KUBERNETES = "1.36.3"
"""The control plane, kubelet, kube-proxy and kubectl, linked into one program with etcd."""
CONTAINERD = "2.3.7"
COREDNS = "1.14.7"
KWOK = "0.8.0"
LWS = "0.8.0"
METRICS_SERVER = "0.8.0"
GATEWAY_API = "1.6.3"
INFERENCE_EXTENSION = "1.6.0"
PROMETHEUS_OPERATOR = "0.92.1"
GO = "1.27.3"
"""The toolchain that is installed from PyPI where the machine has no Go."""

GO_SUMS = {"sigs.k8s.io/metrics-server": "h1:Zlsi3sBWEtFKCD3+xSysThvXyLQ363rUAlqpnsY5JwI="}
"""Module -> its hash, where the checksum database may not know it. This one was computed from the
files of the repository's tag, and equals the module proxy's."""

NETNS = "dynamo-e2e"
"""Network namespace of the node, and the machine's end of the pair of interfaces into it."""
HOST_IP, NODE_IP, PREFIX = "10.89.0.1", "10.89.0.2", 30
POD_NETWORK, SERVICE_NETWORK = "10.88.0.0/16", "10.96.0.0/16"
SERVICE_IP, DNS_IP = "10.96.0.1", "10.96.0.10"
NODE = "devnode"
GPUS = 8
"""Pretended `nvidia.com/gpu` of the node, and of each kwok node."""

CGROUP = "dynamo-e2e"
"""Parent of the pods' control groups."""

PAUSE_IMAGE = "localhost/pause:1"
COREDNS_IMAGE = f"localhost/coredns:{COREDNS}"
BUSYBOX_IMAGE = "docker.io/library/busybox:1"
METRICS_SERVER_IMAGE = f"localhost/metrics-server:{METRICS_SERVER}"
LWS_IMAGE = f"localhost/lws-controller:{LWS}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The cluster's folders."""

    root: Path
    run: Path | None = None
    """Folder of one run, for a cluster beside the usual one; None: `state` below `root`."""

    @property
    def bin(self) -> Path:
        """Programs; beside each `NAME.version` says what it was built from."""
        return self.root / "bin"

    @property
    def images(self) -> Path:
        """docker-archive files; all of them are imported when the cluster starts."""
        return self.root / "images"

    @property
    def manifests(self) -> Path:
        """Manifests out of Go modules: kwok's stages, custom resource definitions, add-ons."""
        return self.root / "manifests"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def state(self) -> Path:
        """One run of the cluster."""
        return self.run or self.root / "state"

    @property
    def logs(self) -> Path:
        """One file a component, and the pods' logs below `pods`."""
        return self.state / "log"

    @property
    def failure(self) -> Path:
        """Logs of the last start that failed."""
        return self.state.with_name("last-failure")

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def containerd_socket(self) -> Path:
        return self.state / "containerd.sock"

    @property
    def control_socket(self) -> Path:
        """Where the supervisor takes commands."""
        return self.state / "node.sock"

    @property
    def go(self) -> Path:
        """Go's caches and, where the machine has none, Go."""
        return self.root.parent / "go"


def layout(env: Mapping[str, str] = os.environ) -> Layout:
    """The folders below `$DYNAMO_CACHE`, else `$XDG_CACHE_HOME/dynamo`, else `~/.cache/dynamo`."""
    xdg = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Layout(Path(env.get("DYNAMO_CACHE") or xdg / "dynamo").absolute() / "cluster")
