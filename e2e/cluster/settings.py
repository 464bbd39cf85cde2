"""Of what the cluster is made and where it lives: versions, addresses, folders.

Everything is below one folder of the cache. `bin`, `images` and `manifests` are kept and carry the
version they were made from; `state` is one run of a cluster and gone after it.
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
ISTIO = "0.0.0-20260827124520-eed52ebb66ad"
"""Its module has no tags: the commit's time and name."""
ISTIO_RELEASE = "1.31-alpha"
"""What that commit becomes, as its control plane and agent name themselves."""
LLM_D_SIM = "0.10.2"
GO = "1.27.3"
"""The toolchain that is installed from PyPI where the machine has no Go."""

GO_SUMS = {"sigs.k8s.io/metrics-server": "h1:Zlsi3sBWEtFKCD3+xSysThvXyLQ363rUAlqpnsY5JwI="}
"""Module -> its hash, where the checksum database may not know it. This one was computed from the
files of the repository's tag, and equals the module proxy's."""

CLUSTERS = 16
"""How many can run on one machine."""
NODE = "devnode"
GPUS = 8
"""Pretended `nvidia.com/gpu` of the node, and of each kwok node."""

PAUSE_IMAGE = "localhost/pause:1"
COREDNS_IMAGE = f"localhost/coredns:{COREDNS}"
BUSYBOX_IMAGE = "docker.io/library/busybox:1"
METRICS_SERVER_IMAGE = f"localhost/metrics-server:{METRICS_SERVER}"
LWS_IMAGE = f"localhost/lws-controller:{LWS}"
ISTIO_IMAGE = f"localhost/istio-pilot:{ISTIO}"
ISTIO_PROXY_IMAGE = f"localhost/istio-proxy:{ISTIO}"
ECHO_IMAGE = "localhost/echo-basic:1"
LLM_D_SIM_IMAGE = f"localhost/llm-d-inference-sim:{LLM_D_SIM}"


@dataclass(frozen=True, slots=True)
class Network:
    """Names and addresses on this machine of cluster `number`; no two clusters share any."""

    number: int = 0

    @property
    def name(self) -> str:
        """Of the node's network namespace, of the machine's end of the pair of interfaces into it,
        and of the parent of the pods' control groups."""
        return f"dynamo-e2e{self.suffix}"

    @property
    def suffix(self) -> str:
        """What tells this cluster's names from those of number 0."""
        return f"-{self.number}" if self.number else ""

    @property
    def host_ip(self) -> str:
        """The machine, as the node sees it."""
        return f"10.89.{self.number}.1"

    @property
    def node_ip(self) -> str:
        return f"10.89.{self.number}.2"

    @property
    def pods(self) -> str:
        return f"10.88.{16 * self.number}.0/20"

    @property
    def services(self) -> str:
        return f"10.96.{16 * self.number}.0/20"

    @property
    def service_ip(self) -> str:
        """The Service `kubernetes`."""
        return f"10.96.{16 * self.number}.1"

    @property
    def dns_ip(self) -> str:
        return f"10.96.{16 * self.number}.10"


@dataclass(frozen=True, slots=True)
class Layout:
    """The cluster's folders."""

    root: Path
    run: Path | None = None
    """Folder of one run, for a control plane beside the usual one; None: `state` below `root`."""
    network: Network = Network()

    @property
    def bin(self) -> Path:
        """Programs; beside each `NAME.version` says what it was built from."""
        return self.root / "bin"

    @property
    def images(self) -> Path:
        """docker-archive files; all of them are imported when the cluster starts."""
        return self.root / "images"

    @property
    def further_images(self) -> Path:
        """docker-archive files that are imported when something asks for them."""
        return self.root / "further-images"

    @property
    def manifests(self) -> Path:
        """Manifests out of Go modules: kwok's stages, custom resource definitions, add-ons."""
        return self.root / "manifests"

    @property
    def state(self) -> Path:
        """One run of the cluster."""
        return self.run or self.root / f"state{self.network.suffix}"

    @property
    def pki(self) -> Path:
        """Keys and certificates of this run."""
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        """One file a component, and the pods' logs below `pods`."""
        return self.state / "log"

    @property
    def failure(self) -> Path:
        """Logs of the last start that failed."""
        return self.state.with_name(f"last-failure{self.network.suffix}")

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
    """The folders below `$DYNAMO_CACHE`, else `$XDG_CACHE_HOME/dynamo`, else `~/.cache/dynamo`.

    `$DYNAMO_CLUSTER` is the cluster's number, 0 to 15: several can run beside each other.
    """
    number = env.get("DYNAMO_CLUSTER") or "0"
    if not number.isdecimal() or int(number) >= CLUSTERS:
        raise ValueError(f"DYNAMO_CLUSTER={number!r}: a number from 0 to {CLUSTERS - 1}")
    xdg = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(env.get("DYNAMO_CACHE") or xdg / "dynamo").absolute() / "cluster"
    return Layout(root, network=Network(int(number)))
