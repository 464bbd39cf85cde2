"""What tests of the cluster share; a conftest imports the fixtures by name.

A cluster that was up before the tests stays up; one that they started goes with them.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from e2e.cluster import settings
from e2e.cluster.cluster import Cluster
from e2e.cluster.settings import Layout

UNREACHED = "KUBECONFIG is set: this test needs a cluster of our own, with ways to pods and back"
UNBROKEN = "KUBECONFIG is set: this test starts a control plane of its own on this machine"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The usual cluster, or the one that `KUBECONFIG` names; with or without pods."""
    found = Cluster()
    was_up = found.is_up
    found.up()
    yield found
    if not was_up:
        found.down()


@pytest.fixture(scope="session")
def pods(cluster: Cluster) -> Cluster:
    """The usual cluster, for tests that need pods to run; without them they are skipped."""
    if cluster.why_no_pods:
        pytest.skip(cluster.why_no_pods)
    return cluster


@pytest.fixture(scope="session")
def own_pods(cluster: Cluster) -> Cluster:
    """The same without `KUBECONFIG`: for tests that reach pods and Services at their addresses, are
    reached by them, load images, or install what others would notice."""
    if cluster.is_foreign:
        pytest.skip(UNREACHED)
    if cluster.why_no_pods:
        pytest.skip(cluster.why_no_pods)
    return cluster


def skip_where_nothing_is_started() -> None:
    """For tests with control planes of their own."""
    if Cluster().is_foreign:
        pytest.skip(UNBROKEN)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane of the tests' own, without a node: its outages disturb nobody."""
    skip_where_nothing_is_started()
    run = tmp_path_factory.mktemp("plane") / "state"
    found = Cluster(Layout(settings.layout().root, run), {}, with_node=False)
    found.up()
    yield found
    found.down()


@dataclass(frozen=True, slots=True)
class Gateway:
    """A Gateway that takes HTTPRoutes from all namespaces."""

    name: str
    namespace: str
    address: str
    """Where the machine and pods reach its port 80."""


@pytest.fixture(scope="session")
def istio(own_pods: Cluster) -> Cluster:
    """The usual cluster with Istio, which is built first where it is missing: minutes, once."""
    own_pods.install_addon("istio")
    return own_pods


@pytest.fixture(scope="session")
def gateway(istio: Cluster) -> Iterator[Gateway]:
    """A Gateway of Istio's, with an address."""
    name = namespace = "e2e-gateway"
    listener = {
        "name": "http",
        "port": 80,
        "protocol": "HTTP",
        "allowedRoutes": {"namespaces": {"from": "All"}},
    }
    manifest = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"gatewayClassName": "istio", "listeners": [listener]},
    }
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    istio.apply([space, manifest])
    command = ("wait", "gateway", name, "-n", namespace, "--for=condition=Programmed")
    istio.wait_for(lambda: istio.kubectl(*command), what="Gateway programmed")
    (address,) = istio.get("gateway", name, "-n", namespace)["status"]["addresses"]
    yield Gateway(name, namespace, address["value"])
    istio.kubectl("delete", "namespace", namespace, timeout=180.0)


@contextlib.contextmanager
def a_namespace(cluster: Cluster, words: str) -> Iterator[str]:
    """A namespace with some of `words` in its name; afterwards it is gone with all in it."""
    words = re.sub(r"[^a-z0-9]+", "-", words.lower())
    name = f"e2e-{words[:40].strip('-')}-{secrets.token_hex(2)}"
    cluster.kubectl("create", "namespace", name)
    cluster.wait_for(
        lambda: cluster.kubectl("get", "serviceaccount", "default", "-n", name),
        what="its service account",
    )
    yield name
    cluster.remove_namespace(name)


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace for one test."""
    with a_namespace(cluster, request.node.name.removeprefix("test_")) as name:
        yield name


@pytest.fixture(scope="module")
def module_namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace for the tests of one file, which find there what those before them left."""
    with a_namespace(cluster, request.path.stem.removeprefix("test_")) as name:
        yield name
