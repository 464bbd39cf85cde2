"""CRDs, conversion and admission on a real API server: what people get to see with kubectl.

The control plane is one of its own, without a node: the webhook is a process of this machine, which
the CRDs of a shared cluster should not point to. It runs with the rights of its service account, as
`dynamo operator manifests` grants them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamo_crds.conversion import SAID_IN_V1ALPHA1, SAID_IN_V1BETA1
from dynamo_crds.load import KINDS, load_documents
from dynamo_crds.schema import without_null

from e2e.cluster.cluster import Cluster
from e2e.cluster.fixtures import skip_where_nothing_is_started
from e2e.cluster.progress import wait_for
from e2e.cluster.settings import Layout, layout

Json = dict[str, Any]
BAD_FOLDER = Path(__file__).parent / "admission" / "bad"
BAD = sorted(BAD_FOLDER.glob("*.yaml"))
DYNAMO = Path(sys.executable).with_name("dynamo")
SYSTEM = "dynamo-system"
GRAPHS = "dynamographdeployments"
CRD_NAMES = [f"{GRAPHS}.nvidia.com", "dynamographdeploymentscalingadapters.nvidia.com"]
VERSIONS = ("v1alpha1", "v1beta1")
RECORDS = (SAID_IN_V1ALPHA1, SAID_IN_V1BETA1)


@pytest.fixture(scope="module")
def corpora() -> Path:
    folder = os.environ.get("CORPORA")
    if not folder:
        pytest.skip("CORPORA is not set: it names the folder with real manifests")
    return Path(folder)


@pytest.fixture(scope="module")
def new_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Cluster]]:
    """Starts control planes; each takes five seconds."""
    skip_where_nothing_is_started()
    started: list[Cluster] = []

    def start() -> Cluster:
        run = tmp_path_factory.mktemp("cluster") / "run"
        cluster = Cluster(Layout(layout().root, run), {}, with_node=False)
        started.append(cluster)
        cluster.up()
        return cluster

    yield start
    for cluster in started:
        cluster.down()


@pytest.fixture(scope="module")
def cluster(new_cluster: Callable[[], Cluster]) -> Cluster:
    return new_cluster()


def dynamo(
    cluster: Cluster, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DYNAMO, *arguments],
        env={**os.environ, "KUBECONFIG": str(cluster.kubeconfig)},
        capture_output=True,
        text=True,
        check=check,
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def as_account(cluster: Cluster, account: str, folder: Path) -> Path:
    """A kubeconfig that logs in as a service account of the installation."""
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    token = cluster.kubectl("create", "token", account, "-n", SYSTEM).stdout.strip()
    config["users"][0]["user"] = {"token": token}
    path = folder / f"{account}.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Webhook:
    cluster: Cluster
    port: int
    log: Path


@pytest.fixture(scope="module")
def webhook(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    """The installation, its webhook as a process here, the API server pointed to it by URL."""
    folder = tmp_path_factory.mktemp("webhook")
    assert cluster.apply(dynamo(cluster, "operator", "manifests").stdout).stderr == ""
    port, status = free_port(), free_port()
    log = folder / "log"
    command = [
        *(DYNAMO, "operator", "webhook", "--install-crds", "--namespace", SYSTEM),
        *("--kubeconfig", as_account(cluster, "dynamo-operator-webhook", folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--name", "127.0.0.1"),
        *("--system-host", "127.0.0.1", "--system-port", str(status)),
    ]
    with running(command, status, log):
        point_to(cluster, f"https://127.0.0.1:{port}")
        yield Webhook(cluster, port, log)


@contextlib.contextmanager
def running(command: Sequence[str | Path], status: int, log: Path) -> Iterator[None]:
    """A process that gets ready, stops in good order, and was never denied anything."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)

    def ready() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"it ended:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{status}/ready", timeout=5):
                return True
        except OSError:
            return False

    try:
        wait_for(f"{command[1]} {command[2]}", ready, 60.0, explain=log.read_text)
        yield
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 0, log.read_text()
    assert "orbidden" not in log.read_text()


def point_to(cluster: Cluster, url: str) -> None:
    """Replace the Service, behind which no pod runs here, by an address."""
    for name in CRD_NAMES:
        client = {"service": None, "url": f"{url}/convert"}
        patch = {"spec": {"conversion": {"webhook": {"clientConfig": client}}}}
        cluster.kubectl("patch", "crd", name, "--type=merge", "-p", json.dumps(patch))
    at = "/webhooks/0/clientConfig"
    operations = [
        {"op": "remove", "path": f"{at}/service"},
        {"op": "add", "path": f"{at}/url", "value": f"{url}/validate"},
    ]
    cluster.kubectl(
        *("patch", "validatingwebhookconfiguration", "dynamo-operator", "--type=json"),
        *("-p", json.dumps(operations)),
    )

    def asked() -> bool:
        wrong = BAD_FOLDER / "sidecar-that-is-not-there.yaml"
        done = cluster.kubectl("create", "--dry-run=server", "-f", str(wrong), check=False)
        return "frontendSidecar" in done.stderr

    def converts() -> bool:
        return cluster.kubectl("get", f"{GRAPHS}.v1alpha1.nvidia.com", check=False).returncode == 0

    wait_for("the API server to ask the webhook", asked, 30.0)
    wait_for("the API server to convert", converts, 30.0)


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"t{zlib.crc32(request.node.name.encode()):08x}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


# --- the CRDs themselves --------------------------------------------------------------------------


def test_the_crds_are_accepted_without_a_word(new_cluster: Callable[[], Cluster]) -> None:
    """By both ways of `kubectl apply`, by our own, and again; and not where Dynamo's are."""
    cluster = new_cluster()
    printed = dynamo(cluster, "operator", "crds").stdout
    for server_side in (False, True, False):
        done = cluster.apply(printed, server_side=server_side)
        assert done.stderr == ""
    applied = dynamo(cluster, "operator", "crds", "--apply").stdout
    assert applied.splitlines() == [f"{name}: unchanged" for name in CRD_NAMES] or (
        dynamo(cluster, "operator", "crds", "--apply").stdout.count("unchanged") == 2
    )
    for name in CRD_NAMES:
        crd = cluster.get("crd", name)
        conditions = {c["type"]: c["status"] for c in crd["status"]["conditions"]}
        assert conditions["Established"] == "True"
        assert conditions.get("NonStructuralSchema", "False") == "False"
        last = crd["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"]
        assert len(last) < 200_000


def test_dynamos_crds_are_left_alone(new_cluster: Callable[[], Cluster], corpora: Path) -> None:
    cluster = new_cluster()
    files = [corpora / "crds" / f"nvidia.com_{name.split('.')[0]}.yaml" for name in CRD_NAMES]
    for file in files:
        cluster.apply(file, server_side=True)
    before = [cluster.get("crd", name)["metadata"]["generation"] for name in CRD_NAMES]
    done = dynamo(cluster, "operator", "crds", "--apply", check=False)
    assert done.returncode == 1
    for name in CRD_NAMES:
        assert f"- {name}: an installed Dynamo (annotation controller-gen" in done.stderr
    after = [cluster.get("crd", name)["metadata"]["generation"] for name in CRD_NAMES]
    assert after == before
    graph = next(d for d in graphs(corpora) if d[0] == "v1beta1")[1]
    cluster.kubectl("create", "-f", "-", input=json.dumps(graph))
    dynamo(cluster, "operator", "crds", "--apply", "--take-over", "--no-webhook")
    assert cluster.get("dgd", graph["metadata"]["name"])["spec"] == graph["spec"]
    again = dynamo(cluster, "operator", "crds", "--apply", "--no-webhook")
    assert again.stdout.count("unchanged") == 2


# --- both versions --------------------------------------------------------------------------------


def graphs(corpora: Path) -> Iterator[tuple[str, Json]]:
    """Version and manifest of every graph of the corpus; placeholders of namespaces taken out."""
    for file in sorted((corpora / "manifests").glob("*.y*ml")):
        for document in load_documents(file):
            if document.is_graph:
                manifest = without_null(document.data)
                manifest["metadata"].pop("namespace", None)
                yield document.api_version.split("/")[1], manifest


@pytest.mark.timeout(300)
def test_every_graph_of_the_corpus_is_stored_and_read_back(
    webhook: Webhook, namespace: str, corpora: Path
) -> None:
    """In its own version as it was sent; through the other version and back without loss."""
    cluster = webhook.cluster
    sent: dict[str, Json] = {}
    for index, (_, manifest) in enumerate(graphs(corpora)):
        manifest["metadata"]["name"] = f"g{index}"
        sent[f"g{index}"] = manifest
    assert len(sent) >= 100
    write(cluster, "create", namespace, sent.values())
    for other, back in (VERSIONS, VERSIONS[::-1]):
        stored = read_all(cluster, namespace, sent)
        assert {name: said(graph) for name, graph in stored.items()} == {
            name: said(graph) for name, graph in sent.items()
        }
        there = [
            g for name, g in read_in(cluster, namespace, other).items() if is_in(sent[name], back)
        ]
        write(cluster, "replace", namespace, there)
    assert {n: said(g) for n, g in read_all(cluster, namespace, sent).items()} == {
        n: said(g) for n, g in sent.items()
    }


def is_in(manifest: Json, version: str) -> bool:
    return bool(manifest["apiVersion"] == f"nvidia.com/{version}")


def write(cluster: Cluster, verb: str, namespace: str, items: Iterable[Json]) -> None:
    whole = {"apiVersion": "v1", "kind": "List", "items": list(items)}
    cluster.kubectl(verb, "-n", namespace, "-f", "-", input=json.dumps(whole), timeout=200.0)


def read_in(cluster: Cluster, namespace: str, version: str) -> dict[str, Json]:
    items = cluster.get(f"{GRAPHS}.{version}.nvidia.com", "-n", namespace)["items"]
    return {item["metadata"]["name"]: item for item in items}


def read_all(cluster: Cluster, namespace: str, sent: dict[str, Json]) -> dict[str, Json]:
    """Every graph in the version in which it was sent."""
    both = {version: read_in(cluster, namespace, version) for version in VERSIONS}
    return {name: both[g["apiVersion"].split("/")[1]][name] for name, g in sent.items()}


def read(cluster: Cluster, version: str, name: str, namespace: str) -> Json:
    return dict(cluster.get(f"{GRAPHS}.{version}.nvidia.com", name, "-n", namespace))


def said(manifest: Json) -> Json:
    """A graph's spec with its defaults, and what people put into its metadata.

    Annotations hold settings, so they count, but for the records that conversion writes itself.
    """
    model = KINDS[manifest["apiVersion"], manifest["kind"]]
    metadata = {k: v for k, v in manifest["metadata"].items() if k in ("name", "labels")}
    written = manifest["metadata"].get("annotations") or {}
    if annotations := {k: v for k, v in written.items() if k not in RECORDS}:
        metadata["annotations"] = annotations
    full = model.lenient({**manifest, "metadata": metadata})
    return dict(full.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"status"}))


def test_appliers_of_different_versions_keep_to_their_fields(
    webhook: Webhook, namespace: str
) -> None:
    """Server-side apply converts what each manager owns into the others' versions."""
    cluster = webhook.cluster
    service = {
        "componentType": "worker",
        "replicas": 2,
        "envs": [{"name": "LEVEL", "value": "info"}],
        "resources": {"limits": {"gpu": "1"}},
        "extraPodSpec": {"mainContainer": {"image": "dynamo-platform/worker:1"}},
    }
    old = graph("chat", version="v1alpha1", services={"Worker": service}, backendFramework="vllm")
    del old["spec"]["components"]
    apply_as(cluster, namespace, "team", old)
    mine = graph("chat", {"name": "Worker", "minAvailable": 1}, priorityClassName="high")
    apply_as(cluster, namespace, "platform", mine)
    stored = read(cluster, "v1beta1", "chat", namespace)["spec"]
    assert stored["priorityClassName"] == "high"
    (worker,) = stored["components"]
    assert (worker["replicas"], worker["minAvailable"], worker["type"]) == (2, 1, "worker")
    (main,) = worker["podTemplate"]["spec"]["containers"]
    assert main["env"] == [{"name": "LEVEL", "value": "info"}]
    del service["envs"]
    apply_as(cluster, namespace, "team", old)
    served = read(cluster, "v1alpha1", "chat", namespace)["spec"]
    assert served["priorityClassName"] == "high"
    assert served["services"]["Worker"] == {**service, "minAvailable": 1}
    apply_as(cluster, namespace, "platform", graph("chat", {"name": "Worker", "minAvailable": 1}))
    assert "priorityClassName" not in read(cluster, "v1alpha1", "chat", namespace)["spec"]


def apply_as(cluster: Cluster, namespace: str, manager: str, manifest: Json) -> None:
    cluster.kubectl(
        *("apply", "--server-side", f"--field-manager={manager}", "-n", namespace, "-f", "-"),
        input=json.dumps(manifest),
    )


def test_what_kubectl_shows(webhook: Webhook, namespace: str) -> None:
    cluster = webhook.cluster
    for path in ("dgd.spec.components", "dgd.spec.components.podTemplate.spec.containers", "dgdsa"):
        assert "DESCRIPTION" in cluster.kubectl("explain", path).stdout
    cluster.apply(graph("chat", {"name": "Worker", "type": "worker"}), namespace)
    status = {
        "state": "pending",
        "conditions": [
            {
                "type": "Ready",
                "status": "False",
                "reason": "pods_not_ready",
                "message": "ImagePullBackOff on 1 of 1 worker pods",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
    }
    cluster.kubectl(
        *("patch", "dgd", "chat", "-n", namespace, "--subresource=status", "--type=merge"),
        *("-p", json.dumps({"status": status})),
    )
    head, line = cluster.kubectl("get", "dgd", "-n", namespace).stdout.splitlines()
    assert head.split() == ["NAME", "READY", "STATE", "BACKEND", "AGE", "WHY"]
    assert line.startswith("chat   False   pending")
    assert line.endswith("ImagePullBackOff on 1 of 1 worker pods")
    cluster.apply(adapter("chat-worker", "chat", "Worker", replicas=1), namespace)
    cluster.kubectl("scale", "dgdsa/chat-worker", "--replicas=3", "-n", namespace)
    head, line = cluster.kubectl("get", "dgdsa", "-n", namespace).stdout.splitlines()
    assert head.split() == ["NAME", "DGD", "COMPONENT", "REPLICAS", "CURRENT", "AGE"]
    assert line.split()[:4] == ["chat-worker", "chat", "Worker", "3"]


def graph(name: str, *components: Json, version: str = "v1beta1", **spec: Any) -> Json:
    return {
        "apiVersion": f"nvidia.com/{version}",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": name},
        "spec": {"components": list(components), **spec},
    }


def adapter(name: str, of: str, component: str, replicas: int) -> Json:
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeploymentScalingAdapter",
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "dgdRef": {"name": of, "componentName": component}},
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_an_autoscaler_reaches_the_adapter_in_either_version(
    webhook: Webhook, namespace: str, version: str
) -> None:
    """Dynamo's examples address v1alpha1. The autoscaler holds its minimum without any metric."""
    cluster = webhook.cluster
    cluster.apply(adapter("chat-worker", "chat", "Worker", replicas=1), namespace)
    cluster.kubectl(
        *("patch", "dgdsa", "chat-worker", "-n", namespace, "--subresource=status"),
        *("--type=merge", "-p", '{"status": {"replicas": 1, "selector": "app=none"}}'),
    )
    target = {
        "apiVersion": f"nvidia.com/{version}",
        "kind": "DynamoGraphDeploymentScalingAdapter",
        "name": "chat-worker",
    }
    cluster.apply(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "chat"},
            "spec": {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 4},
        },
        namespace,
    )

    def scaled() -> bool:
        found = cluster.get("dgdsa", "chat-worker", "-n", namespace)
        return bool(found["spec"]["replicas"] == 2)

    wait_for("the autoscaler", scaled, 60.0)


# --- what is refused, and how ---------------------------------------------------------------------


@pytest.mark.parametrize("file", BAD, ids=lambda file: file.stem)
def test_a_bad_manifest_is_refused_at_apply(webhook: Webhook, namespace: str, file: Path) -> None:
    """Documents before the last one are what exists when the bad one comes."""
    text = file.read_text()
    expected = [line.removeprefix("# expect: ") for line in text.splitlines() if line[:2] == "# "]
    *before, bad = text.split("---\n")
    for document in before:
        webhook.cluster.apply(document, namespace)
    done = webhook.cluster.kubectl("apply", "-n", namespace, "-f", "-", input=bad, check=False)
    assert done.returncode == 1
    for fragment in expected:
        assert fragment in done.stderr


def test_warnings_reach_kubectl(webhook: Webhook, namespace: str) -> None:
    cluster = webhook.cluster
    worker = {"name": "Worker", "type": "worker", "replicas": 1, "scalingAdapter": {}}
    picker = {
        "name": "Picker",
        "type": "epp",
        "eppConfig": {"configMapRef": {"name": "x", "key": "y"}},
    }
    done = cluster.apply(graph("chat", worker, picker), namespace)
    assert "Warning: spec.components[1].eppConfig is kept but not used" in done.stderr
    done = cluster.apply(graph("chat", {**worker, "replicas": 5}, picker), namespace)
    assert done.stderr.strip() == (
        "Warning: spec.components[0].replicas is ignored while the scaling adapter chat-worker "
        "rules: kubectl scale dgdsa/chat-worker --replicas=5"
    )


def test_quota_denies_nothing(webhook: Webhook, namespace: str) -> None:
    """The cluster's state may change; only what a graph says can be wrong for good."""
    cluster = webhook.cluster
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
    cluster.apply({**quota, "spec": {"hard": {"count/deployments.apps": "0"}}}, namespace)

    def refused() -> bool:
        made = ("create", "deployment", "x", "--image=x", "--dry-run=server", "-n", namespace)
        return cluster.kubectl(*made, check=False).returncode != 0

    wait_for("the quota", refused, 30.0)
    done = cluster.apply(graph("chat", {"name": "Worker", "type": "worker"}), namespace)
    assert "exceeded quota" in done.stderr
    assert "created" in done.stdout


def test_a_dry_run_leaves_nothing(webhook: Webhook, namespace: str) -> None:
    cluster = webhook.cluster
    made = json.dumps(graph("chat", {"name": "Worker", "type": "worker"}))
    cluster.kubectl("apply", "--dry-run=server", "-n", namespace, "-f", "-", input=made)
    for kind in ("dgd", "deployments", "services"):
        assert cluster.get(kind, "-n", namespace)["items"] == []


# --- the installation -----------------------------------------------------------------------------


def test_the_operator_gets_by_with_the_rights_it_is_given(
    webhook: Webhook, namespace: str, tmp_path: Path
) -> None:
    """Pods don't run here; everything up to them does."""
    cluster, status, log = webhook.cluster, free_port(), tmp_path / "log"
    command = [
        *(DYNAMO, "operator", "run", "--namespace", SYSTEM),
        *("--kubeconfig", as_account(cluster, "dynamo-operator", tmp_path)),
        *("--system-host", "127.0.0.1", "--system-port", str(status)),
    ]
    worker = {"name": "Worker", "type": "worker", "scalingAdapter": {}}
    others = [{"name": name.title(), "type": name} for name in ("frontend", "planner", "epp")]
    with running(command, status, log):
        cluster.apply(graph("chat", worker, *others), namespace)

        def reconciled() -> bool:
            kinds = ("deployments", "services", "serviceaccounts", "roles", "dgdsa")
            found = [len(cluster.get(kind, "-n", namespace)["items"]) for kind in kinds]
            stored = cluster.get("dgd", "chat", "-n", namespace)
            return min(found) > 0 and "conditions" in stored.get("status", {})

        wait_for("the graph's objects", reconciled, 60.0, explain=log.read_text)
        cluster.kubectl("scale", "dgdsa/chat-worker", "--replicas=3", "-n", namespace)

        def scaled() -> bool:
            workload = cluster.get("deployment", "chat-worker", "-n", namespace)
            return bool(workload["spec"]["replicas"] == 3)

        wait_for("the adapter to count", scaled, 60.0, explain=log.read_text)
