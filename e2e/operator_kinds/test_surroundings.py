"""What stands around a graph's pods: who reaches them, what they may do, what protects them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from e2e.operator import graphs
from e2e.operator.space import GRAPH_LABEL, Json, Space, is_ready, uids

GRAPH = "around"
TYPE_LABEL = "nvidia.com/dynamo-component-type"
MODEL_NAME = "org/tiny"
LOOK = """\
import json, os, pathlib
def writable(path):
    try:
        pathlib.Path(path, "x").touch()
    except OSError:
        return False
    return True
print(json.dumps({
    "token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token"),
    "user": os.getuid(),
    "root": writable("/opt"),
    "tmp": writable("/tmp"),
    "capabilities": [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff")],
    "stuck": [l.split()[1] for l in open("/proc/self/status") if l.startswith("NoNewPrivs")],
}))
"""
"""What a process of a pod finds itself to be."""


@pytest.fixture(scope="module")
def around(space: Space) -> Iterator[Space]:
    """The namespace, and a graph of a frontend and two workers, ready."""
    space.apply(
        graphs.graph(
            GRAPH,
            graphs.frontend(),
            graphs.worker(2, fields={"modelRef": {"name": MODEL_NAME}}),
        )
    )
    space.wait_ready(GRAPH)
    yield space
    space.kubectl("delete", "dgd", GRAPH, "--ignore-not-found")


def selector(labels: Json) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


def looks(space: Space, component: str) -> Json:
    """What a process finds in a pod of a component."""
    pod = space.pods(GRAPH, component)[0]["metadata"]["name"]
    found: Json = json.loads(space.kubectl("exec", pod, "-c", "main", "--", "python3", "-c", LOOK))
    return found


def may(space: Space, account: str, verb: str, resource: str, namespace: str = "") -> bool:
    """Whether a service account of the namespace may do something, there or elsewhere."""
    user = f"system:serviceaccount:{space.name}:{account}"
    kind, _, subresource = resource.partition("/")
    done = space.cluster.kubectl(
        *("auth", "can-i", verb, kind, f"--subresource={subresource}", f"--as={user}"),
        *("-n", namespace or space.name),
        check=False,
    )
    return done.stdout.strip() == "yes"


@pytest.mark.timeout(240)
def test_policies_let_pickers_in_and_nobody_else(around: Space) -> None:
    """The network of this cluster enforces none: what counts is whom they mean."""
    (policy,) = around.list("networkpolicy", f"{GRAPH_LABEL}={GRAPH}")
    spec = policy["spec"]
    assert uids(around.list("pods", selector(spec["podSelector"]["matchLabels"]))) == uids(
        around.pods(GRAPH, "Worker")
    )
    from_pods, from_anywhere = spec["ingress"]
    (source,) = from_pods["from"]
    (expression,) = source["podSelector"]["matchExpressions"]
    assert (expression["key"], expression["operator"]) == (TYPE_LABEL, "In")
    admitted = around.list(
        "pods",
        f"{selector(source['podSelector']['matchLabels'])},"
        f"{TYPE_LABEL} in ({','.join(expression['values'])})",
    )
    assert uids(admitted) == uids(around.pods(GRAPH, "Frontend"))
    assert "from" not in from_anywhere
    assert [port["port"] for port in from_anywhere["ports"]] == [9090]


@pytest.mark.timeout(240)
def test_services_reach_the_pods(around: Space) -> None:
    (model,) = [
        service["metadata"]["name"]
        for service in around.list("service", f"{GRAPH_LABEL}={GRAPH}")
        if service["spec"]["clusterIP"] == "None"
    ]
    for service, component in (
        (f"{GRAPH}-frontend", "Frontend"),
        (f"{GRAPH}-worker", "Worker"),
        (model, "Worker"),
    ):
        slices = around.list("endpointslice", f"kubernetes.io/service-name={service}")
        addresses = {ip for part in slices for end in part["endpoints"] for ip in end["addresses"]}
        pods = around.pods(GRAPH, component)
        assert addresses == {pod["status"]["podIP"] for pod in pods}, service


@pytest.mark.timeout(240)
def test_a_frontend_watches_pods_and_a_worker_asks_nothing(around: Space) -> None:
    account = f"{GRAPH}-frontend"
    (frontend,) = around.pods(GRAPH, "Frontend")
    assert frontend["spec"]["serviceAccountName"] == account
    assert all(may(around, account, verb, "pods") for verb in ("get", "list", "watch"))
    for verb, resource in (
        ("get", "secrets"),
        ("list", "configmaps"),
        ("create", "pods"),
        ("delete", "pods"),
        ("create", "pods/exec"),
        ("get", "pods/log"),
        ("get", "dynamographdeployments"),
        ("list", "nodes"),
    ):
        assert not may(around, account, verb, resource), f"{verb} {resource}"
    assert not may(around, account, "list", "pods", "kube-system")

    worker = around.pods(GRAPH, "Worker")[0]
    assert worker["spec"]["automountServiceAccountToken"] is False
    assert worker["spec"]["serviceAccountName"] == "default"
    assert not around.exists("role", f"{GRAPH}-worker")
    assert looks(around, "Frontend")["token"]
    assert not looks(around, "Worker")["token"]


@pytest.mark.timeout(240)
def test_containers_can_do_little(around: Space) -> None:
    for component in ("Frontend", "Worker"):
        found = looks(around, component)
        assert found["user"] == 65532
        assert not found["root"], "the root file system is read-only"
        assert found["tmp"]
        assert found["capabilities"] == ["0000000000000000"]
        assert found["stuck"] == ["1"], "no new privileges"


@pytest.mark.timeout(240)
def test_a_drain_takes_one_worker_at_a_time(around: Space) -> None:
    assert [b["metadata"]["name"] for b in around.list("pdb", f"{GRAPH_LABEL}={GRAPH}")] == [
        f"{GRAPH}-worker"
    ]
    status = around.until(
        lambda: (s := around.get("pdb", f"{GRAPH}-worker")["status"])["disruptionsAllowed"] and s,
        "the budget allows a disruption",
    )
    assert (status["expectedPods"], status["currentHealthy"], status["desiredHealthy"]) == (2, 2, 1)
    first, second = (pod["metadata"]["name"] for pod in around.pods(GRAPH, "Worker"))
    assert not evict(around, first)
    assert "Cannot evict pod as it would violate the pod's disruption budget" in evict(
        around, second
    )
    around.until(
        lambda: len(found := around.pods(GRAPH, "Worker")) == 2 and all(map(is_ready, found)),
        "the evicted worker is replaced",
    )
    assert second in {pod["metadata"]["name"] for pod in around.pods(GRAPH, "Worker")}


def evict(space: Space, pod: str) -> str:
    """Ask for a pod's eviction, as `kubectl drain` does; what the API server complains of."""
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": space.name},
    }
    path = f"/api/v1/namespaces/{space.name}/pods/{pod}/eviction"
    done = space.cluster.kubectl(
        *("create", "--raw", path, "-f", "-"), input=json.dumps(body), check=False
    )
    return done.stderr
