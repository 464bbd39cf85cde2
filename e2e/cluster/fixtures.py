"""What tests of the cluster share; a conftest imports the fixtures by name.

A cluster that was up before the tests stays up; one that they started goes with them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

import pytest

from e2e.cluster import settings
from e2e.cluster.cluster import Cluster
from e2e.cluster.settings import Layout


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
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane of the tests' own, without a node: its outages disturb nobody."""
    run = tmp_path_factory.mktemp("plane") / "state"
    found = Cluster(Layout(settings.layout().root, run), {}, with_node=False)
    found.up()
    yield found
    found.down()


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace for one test, gone with all in it when the test ends."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))
    name = f"e2e-{words[:40].strip('-')}-{secrets.token_hex(2)}"
    cluster.kubectl("create", "namespace", name)
    cluster.wait_for(
        lambda: cluster.kubectl("get", "serviceaccount", "default", "-n", name),
        what="its service account",
    )
    yield name
    cluster.kubectl("delete", "namespace", name, timeout=180.0)
