"""What the tests with real pods share: a cluster, the platform on it, namespaces of their own."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster
from e2e.cluster.fixtures import cluster, pods
from e2e.operator.operators import HostOperator
from e2e.operator.platform import ROOT, Platform, installed
from e2e.operator.space import Space

__all__ = ["cluster", "pods"]


@pytest.fixture(scope="session")
def with_crds(pods: Cluster) -> Cluster:
    """The cluster, with our CRDs."""
    if not pods.kubectl("get", "crd", "dynamographdeployments.nvidia.com", check=False).stdout:
        pods.apply(ROOT / "crds", server_side=True)
    return pods


@pytest.fixture(scope="session")
def platform(pods: Cluster) -> Iterator[Platform]:
    """Operator and webhook in their own images, for the whole cluster."""
    with installed(pods) as found:
        yield found


def _space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    if cluster.is_foreign:
        pytest.skip("pods and Services of a cluster that isn't ours can't be reached from here")
    words = re.sub(r"[^a-z0-9]+", "-", Path(request.node.name).stem.lower().removeprefix("test"))
    space = Space(cluster, f"pods{words[:40].rstrip('-')}-{secrets.token_hex(2)}")
    space.create()
    yield space
    space.delete()


@pytest.fixture
def bare_space(with_crds: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    """A namespace that no operator is started for."""
    yield from _space(with_crds, request)


@pytest.fixture
def space(bare_space: Space) -> Iterator[Space]:
    """A namespace whose graphs an operator of this machine takes care of."""
    with HostOperator(bare_space):
        yield bare_space


@pytest.fixture(scope="module")
def module_space(with_crds: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    """The same, one for all tests of a file."""
    for space in _space(with_crds, request):
        with HostOperator(space):
            yield space


@pytest.fixture
def installed_space(platform: Platform, bare_space: Space) -> Space:
    """A namespace whose graphs the installed platform takes care of."""
    return bare_space
