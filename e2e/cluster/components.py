"""The command lines and configuration files of the cluster's components: plain data.

The same control plane runs in both shapes: as a node of its own (root; with kubelet, containerd and
kube-proxy, in namespaces) and as plain processes on loopback (without root; no pods).
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.settings import (
    NODE,
    PAUSE_IMAGE,
    Layout,
    Network,
)

HERE = Path(__file__).parent
CLIENT_LIMITS = ("--kube-api-qps=500", "--kube-api-burst=1000")
"""By its default limits the controller manager needs 50 s for 1,000 pods."""


@dataclass(frozen=True, slots=True)
class Component:
    """A process that the supervisor keeps running."""

    name: str
    argv: tuple[str, ...]
    after: str = ""
    """What must be there before it starts: an https URL that answers 200, or the path of a file."""
    wanted: bool = True
    """Whether it starts by itself."""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "argv": list(self.argv),
            "after": self.after,
            "wanted": self.wanted,
        }


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the control plane listens."""

    api_host: str
    api_port: int
    etcd_port: int
    etcd_peer_port: int

    @property
    def server(self) -> str:
        return f"https://{self.api_host}:{self.api_port}"

    @property
    def etcd(self) -> str:
        return f"http://127.0.0.1:{self.etcd_port}"


def node_addresses(network: Network) -> Addresses:
    """Where it listens inside a node."""
    return Addresses(network.node_ip, 6443, 2379, 2380)


def control_plane(
    layout: Layout, at: Addresses, data: str, has_node: bool, apiserver_flags: Sequence[str] = ()
) -> list[Component]:
    """etcd (its data in the folder `data`), API server (with further flags), controller manager,
    scheduler, kwok."""
    pki, program = layout.pki, str(layout.bin / "devcluster")
    peer = f"http://127.0.0.1:{at.etcd_peer_port}"
    listen = "0.0.0.0" if has_node else "127.0.0.1"
    etcd = Component(
        "etcd",
        (
            program,
            "etcd",
            f"--data-dir={data}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={at.etcd}",
            f"--advertise-client-urls={at.etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        ),
    )
    apiserver = Component(
        "apiserver",
        (
            program,
            "apiserver",
            f"--etcd-servers={at.etcd}",
            f"--bind-address={listen}",
            f"--advertise-address={at.api_host}",
            f"--secure-port={at.api_port}",
            f"--service-cluster-ip-range={layout.network.services}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            f"--cert-dir={layout.state}/apiserver",
            f"--client-ca-file={pki}/ca.crt",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            # Logs and exec: the kubelet by address, as nothing resolves its name.
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-certificate-authority={pki}/ca.crt",
            f"--kubelet-client-certificate={pki}/admin.crt",
            f"--kubelet-client-key={pki}/admin.key",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={pki}/service-accounts.key",
            f"--service-account-signing-key-file={pki}/service-accounts.key",
            # Extension API servers (APIService), reached pod by pod like webhooks.
            f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
            f"--proxy-client-key-file={pki}/front-proxy-client.key",
            "--enable-aggregator-routing",
            # A loopback address is no valid endpoint of the Service `kubernetes`.
            *(() if has_node else ("--endpoint-reconciler-type=none",)),
            *apiserver_flags,
        ),
    )
    controllers = Component(
        "controller-manager",
        (
            program,
            "controller-manager",
            f"--kubeconfig={layout.state}/controller-manager.kubeconfig",
            "--bind-address=127.0.0.1",
            *(() if has_node else ("--secure-port=0",)),
            "--leader-elect=false",
            "--use-service-account-credentials",
            f"--service-account-private-key-file={pki}/service-accounts.key",
            f"--root-ca-file={pki}/ca.crt",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
            # Autoscalers decide every 2 s instead of 15, and of pods that are seconds old.
            "--horizontal-pod-autoscaler-sync-period=2s",
            "--horizontal-pod-autoscaler-initial-readiness-delay=2s",
            "--horizontal-pod-autoscaler-cpu-initialization-period=5s",
            *CLIENT_LIMITS,
        ),
        after=f"{at.server}/readyz",
    )
    scheduler = Component(
        "scheduler",
        (
            program,
            "scheduler",
            f"--kubeconfig={layout.state}/scheduler.kubeconfig",
            "--bind-address=127.0.0.1",
            *(() if has_node else ("--secure-port=0",)),
            "--leader-elect=false",
            *CLIENT_LIMITS,
        ),
        after=f"{at.server}/readyz",
    )
    kwok = Component(
        "kwok",
        (
            str(layout.bin / "kwok"),
            f"--config={layout.manifests}/kwok.yaml",
            f"--kubeconfig={layout.kubeconfig}",
            f"--node-ip={at.api_host}",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-lease-duration-seconds=40",
            *(() if has_node else ("--server-address=",)),
        ),
        after=f"{at.server}/readyz",
        wanted=False,
    )
    return [etcd, apiserver, controllers, scheduler, kwok]


def node(layout: Layout, at: Addresses) -> list[Component]:
    """containerd, kubelet and kube-proxy; and on demand what stands in for a load balancer."""
    program, state = str(layout.bin / "devcluster"), layout.state
    return [
        Component(
            "containerd",
            (str(layout.bin / "containerd"), f"--config={state}/containerd.toml"),
        ),
        Component(
            "kubelet",
            (
                program,
                "kubelet",
                f"--config={state}/kubelet.yaml",
                f"--kubeconfig={state}/kubelet.kubeconfig",
                f"--node-ip={at.api_host}",
                f"--hostname-override={NODE}",
            ),
            after=str(layout.containerd_socket),
        ),
        Component(
            "proxy",
            (
                program,
                "proxy",
                f"--kubeconfig={state}/proxy.kubeconfig",
                "--proxy-mode=nftables",
                f"--cluster-cidr={layout.network.pods}",
                f"--hostname-override={NODE}",
                "--conntrack-max-per-core=0",
                "--nodeport-addresses=primary",
            ),
            after=f"{at.server}/readyz",
        ),
        Component(
            "balancer",
            (
                sys.executable,
                str(HERE / "balancer.py"),
                program,
                "kubectl",
                str(layout.kubeconfig),
            ),
            after=f"{at.server}/readyz",
            wanted=False,
        ),
    ]


def write_node_files(layout: Layout) -> None:
    """Configuration of containerd, of the pods' network and of the kubelet."""
    state = layout.state
    (state / "containerd.toml").write_text(
        textwrap.dedent(f"""\
            version = 3
            root = "/var/lib/containerd"
            state = "/run/containerd"
            [grpc]
              address = "{layout.containerd_socket}"
            [plugins.'io.containerd.cri.v1.runtime']
              # A machine without CAP_SYS_RESOURCE may not lower the score.
              restrict_oom_score_adj = true
            [plugins.'io.containerd.cri.v1.images'.pinned_images]
              sandbox = "{PAUSE_IMAGE}"
            [plugins.'io.containerd.cri.v1.runtime'.cni]
              bin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]
              conf_dir = "{state}/cni"
            [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
              runtime_type = "io.containerd.runc.v2"
            """)
    )
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": layout.network.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    (state / "cni").mkdir(exist_ok=True)
    (state / "cni" / "10-bridge.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]}, indent=1)
    )
    kubelet = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "failSwapOn": False,
        # A pull from a registry that never answers must not hold up those behind it.
        "serializeImagePulls": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.network.name}",
        "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{layout.pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{layout.pki}/kubelet-server.crt",
        "tlsPrivateKeyFile": f"{layout.pki}/kubelet-server.key",
        "clusterDNS": [layout.network.dns_ip],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        # What lies on the disk is not this cluster's: it never evicts or collects for it.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "maxPods": 250,
        "nodeStatusUpdateFrequency": "5s",
        # How soon a changed ConfigMap or Secret is in its volumes; a minute by default.
        "syncFrequency": "10s",
    }
    (state / "kubelet.yaml").write_text(json.dumps(kubelet, indent=1))
