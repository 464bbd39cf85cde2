"""What the tests with real pods share: a cluster, the platform on it, namespaces of their own."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster
from e2e.cluster.fixtures import UNREACHED, cluster, pods
from e2e.operator.operators import HostOperator
from e2e.operator.platform import ROOT, Platform, installed
from e2e.operator.space import IMAGE_PREFIX, Space

__all__ = ["cluster", "pods"]

CRDS = tuple(
    f"{plural}.nvidia.com"
    for plural in ("dynamographdeployments", "dynamographdeploymentscalingadapters")
)


@pytest.fixture(scope="session")
def usable(pods: Cluster) -> Iterator[Cluster]:
    """The cluster, if things may be installed there.

    Somebody's has to be offered by saying where it pulls our images from, and is left alone if it
    has Dynamo's CRDs: they, and what stands in them, would go with those of the tests.
    """
    if not pods.is_foreign:
        yield pods
        return
    if not IMAGE_PREFIX:
        pytest.skip(
            "KUBECONFIG is set, and nothing is installed there unless E2E_IMAGE_PREFIX says where "
            "that cluster pulls the platform's images from: registry.example/dynamo-platform/"
        )
    if pods.kubectl("get", "crd", *CRDS, "--ignore-not-found", "-o", "name").stdout:
        pytest.skip("KUBECONFIG is set, and that cluster has Dynamo's CRDs: they are left alone")
    yield pods
    pods.kubectl("delete", "crd", *CRDS, "--ignore-not-found", timeout=180.0)


@pytest.fixture(scope="session")
def direct(pods: Cluster) -> None:
    """For tests that ask pods at their addresses, or for minutes whatever becomes of single pods:
    a tunnel of kubectl's ends with the pod that it leads to."""
    if pods.is_foreign:
        pytest.skip(UNREACHED)


@pytest.fixture(scope="session")
def with_crds(usable: Cluster) -> Cluster:
    """The cluster, with our CRDs."""
    if not usable.kubectl("get", "crd", CRDS[0], check=False).stdout:
        usable.apply(ROOT / "crds", server_side=True)
    return usable


@pytest.fixture(scope="session")
def platform(usable: Cluster) -> Iterator[Platform]:
    """Operator and webhook in their own images, for the whole cluster."""
    with installed(usable) as found:
        yield found


def _space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
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
