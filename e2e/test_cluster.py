"""The test cluster itself: pods run and talk, images load, fake nodes scale, outages pass, and
nothing is left of it."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Cluster, KubectlError, archive, machine, settings
from e2e.cluster.fixtures import cluster, namespace, plane, skip_where_nothing_is_started
from e2e.cluster.progress import wait_for
from e2e.cluster.settings import Layout, Network

__all__ = ["cluster", "namespace", "plane"]

SPARE = 15
"""Number of a cluster that nobody else uses."""


def pod(name: str, *command: str, gpus: int = 0, image: str = settings.BUSYBOX_IMAGE) -> Any:
    container: dict[str, Any] = {"name": "main", "image": image, "imagePullPolicy": "Never"}
    container["command"] = list(command)
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 5},
    }


def wait_ready(on: Cluster, namespace: str, *names: str) -> None:
    limits = ("--for=condition=Ready", "--timeout=90s")
    on.kubectl("wait", "-n", namespace, *(f"pod/{name}" for name in names), *limits)


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from the machine")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def machine_url(own_pods: Cluster) -> Iterator[str]:
    """A server on this machine, where pods reach it, as webhooks are reached."""
    server = ThreadingHTTPServer((own_pods.host_ip, 0), Hello)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://{own_pods.host_ip}:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_pods_serve_and_talk(own_pods: Cluster, namespace: str, machine_url: str) -> None:
    serve = "mkdir /www && echo hello from a pod > /www/index.html && httpd -f -p 8080 -h /www"
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    own_pods.apply(
        [pod("web", "sh", "-c", serve), service, pod("client", "sleep", "1000")], namespace
    )
    wait_ready(own_pods, namespace, "web", "client")

    def fetch(url: str) -> str:
        command = ("exec", "-n", namespace, "client", "--", "timeout", "5", "wget", "-qO-", url)
        return own_pods.kubectl(*command).stdout

    own_pods.wait_for(lambda: "from a pod" in fetch("http://web"), what="the Service")
    for name in ("web", f"web.{namespace}", f"web.{namespace}.svc.cluster.local"):
        assert fetch(f"http://{name}") == "hello from a pod\n"
    assert fetch(machine_url) == "hello from the machine"
    address = own_pods.get("service", "web", "-n", namespace)["spec"]["clusterIP"]
    from_machine = subprocess.run(
        ["curl", "-s", "--noproxy", "*", "--max-time", "5", f"http://{address}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert from_machine.stdout == "hello from a pod\n"


def test_gpus_are_counted(own_pods: Cluster, namespace: str) -> None:
    own_pods.apply([pod("fits", "sleep", "1000", gpus=1)], namespace)
    wait_ready(own_pods, namespace, "fits")
    own_pods.apply([pod("too-many", "sleep", "1000", gpus=settings.GPUS)], namespace)

    def message() -> str:
        conditions = own_pods.get("pod", "too-many", "-n", namespace)["status"].get(
            "conditions", []
        )
        return " ".join(condition.get("message", "") for condition in conditions)

    own_pods.wait_for(lambda: "Insufficient nvidia.com/gpu" in message(), what="refusal")


def test_an_image_is_loaded(own_pods: Cluster, namespace: str, tmp_path: Path) -> None:
    tag = "docker.io/e2e/loaded:1"
    archive.write(
        *(tmp_path / "loaded.tar", tag, {"/bin/busybox": Path("/bin/busybox")}, []),
        platform.machine(),
    )
    (tmp_path / "loaded.tar.names").write_text(f"{tag}\ndocker.io/e2e/also:1\n")
    own_pods.load_image(tmp_path / "loaded.tar")
    for name in ("loaded", "also"):
        image = f"e2e/{name}:1"
        own_pods.apply([pod(name, "/bin/busybox", "sleep", "1000", image=image)], namespace)
    wait_ready(own_pods, namespace, "loaded", "also")


def test_add_ons_work(own_pods: Cluster) -> None:
    own_pods.install_addon("lws")
    own_pods.install_addon("metrics-server")
    own_pods.wait_for(
        lambda: settings.NODE in own_pods.kubectl("top", "node").stdout, 60.0, "figures"
    )


def test_kinds_of_others_are_installed(plane: Cluster) -> None:
    for name in ("gateway-api", "inference-extension", "pod-monitor"):
        plane.install_addon(name)
    kinds = plane.kubectl("api-resources", "-o", "name").stdout.split()
    assert "httproutes.gateway.networking.k8s.io" in kinds
    assert "inferencepools.inference.networking.k8s.io" in kinds
    assert "podmonitors.monitoring.coreos.com" in kinds


def test_fake_nodes_take_pods(plane: Cluster) -> None:
    plane.add_kwok_nodes(20)
    template = pod("many", "true")
    del template["apiVersion"], template["kind"]
    template["metadata"] = {"labels": {"app": "many"}}
    template["spec"]["tolerations"] = [{"key": "kwok", "operator": "Exists"}]
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "many"},
        "spec": {
            "replicas": 100,
            "selector": {"matchLabels": {"app": "many"}},
            "template": template,
        },
    }
    plane.apply(deployment)
    plane.wait_deployment("many", "default", 90.0)
    plane.delete(deployment)
    plane.remove_kwok_nodes()
    assert plane.get("nodes")["items"] == []


def test_an_outage_of_the_api_server(plane: Cluster) -> None:
    plane.kubectl("create", "configmap", "kept", "--from-literal=a=b")
    plane.stop_apiserver()
    assert not plane.is_ready()
    with pytest.raises(KubectlError, match="refused"):
        plane.kubectl("get", "configmap", "kept")
    plane.start_apiserver()
    assert plane.get("configmap", "kept")["data"] == {"a": "b"}
    plane.kubectl("delete", "configmap", "kept")


def test_a_compaction_forgets_what_was(plane: Cluster) -> None:
    path = "/api/v1/namespaces/default/configmaps"

    def exactly(version: str) -> str:
        return f"{path}?resourceVersion={version}&resourceVersionMatch=Exact"

    listed = json.loads(plane.kubectl("get", "--raw", path).stdout)
    version = listed["metadata"]["resourceVersion"]
    plane.kubectl("get", "--raw", exactly(version))
    plane.kubectl("create", "configmap", "newer")
    plane.stop_apiserver()
    assert plane.compact_etcd() > int(version)
    plane.start_apiserver()
    with pytest.raises(KubectlError, match=r"too old resource version|Expired|compacted"):
        plane.kubectl("get", "--raw", exactly(version))
    plane.kubectl("delete", "configmap", "newer")


def test_with_kubeconfig_set_nothing_is_started(plane: Cluster, tmp_path: Path) -> None:
    foreign = Cluster(Layout(tmp_path), {"KUBECONFIG": str(plane.kubeconfig)})
    assert foreign.is_foreign
    foreign.kubectl_command = plane.kubectl_command  # type: ignore[method-assign]
    foreign.up()
    foreign.down()
    assert plane.is_ready()
    assert list(tmp_path.iterdir()) == []


# --- nothing is left


def left_of(layout: Layout) -> list[str]:
    """What there is on this machine of a cluster: processes, mounts, network, control groups."""
    name, state = layout.network.name, str(layout.state)
    found = [state] if layout.state.exists() else []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if state in line:
            found.append(line)
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [line for line in mounts if state in line or f"/netns/{name} " in line]
    if os.geteuid() == 0:
        links = json.loads(machine.ip("-json", "link", "show"))
        routes = json.loads(machine.ip("-json", "route", "show"))
        found += [link["ifname"] for link in links if link["ifname"] == name]
        found += [route["dst"] for route in routes if route.get("dev") == name]
        found += [entry for entry in machine.namespaces() if entry == name]
        groups = [parent / name for parent in machine.cgroup_parents()]
        found += [str(group) for group in groups if group.exists()]
    return found


def sysctls() -> dict[str, str]:
    return {name: (machine.PROC_SYS / name).read_text() for name in machine.SYSCTLS}


@pytest.fixture
def spare() -> Iterator[Layout]:
    skip_where_nothing_is_started()
    layout = Layout(settings.layout().root, network=Network(SPARE))
    yield layout
    Cluster(layout, {}).down()


@pytest.mark.parametrize("how", ["down", "interrupted", "killed", "killed without a record"])
def test_nothing_is_left(spare: Layout, how: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    env["DYNAMO_CLUSTER"] = str(SPARE)
    alone = not machine.namespaces()
    before = sysctls()
    command = [sys.executable, "-m", "e2e.cluster"]
    up = subprocess.Popen([*command, "up"], env=env, stderr=subprocess.PIPE, text=True)
    if how == "down":
        _, said = up.communicate(timeout=300)
        assert up.returncode == 0, said
    else:
        sign = spare.containerd_socket if os.geteuid() == 0 else spare.control_socket
        wait_for("a start under way", sign.exists, 60.0)
        up.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGKILL)
        up.communicate(timeout=60)
    if how == "killed without a record":
        (spare.state / "run.json").unlink(missing_ok=True)
    if how != "interrupted":
        subprocess.run([*command, "down"], env=env, check=True)
    # Processes that were killed take a moment to be gone.
    wait_for("nothing left", lambda: not left_of(spare), 20.0, explain=lambda: str(left_of(spare)))
    if alone:
        assert sysctls() == before
