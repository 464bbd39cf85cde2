"""What the tests with real pods share: a cluster, the platform on it, namespaces of their own."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster
from e2e.operator.operators import HostOperator
from e2e.operator.space import Space

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    found = Cluster()
    found.up()
    if not found.has_pods:
        pytest.skip(found.why_no_pods)
    found.apply(ROOT / "crds", server_side=True)
    return found


def _space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    words = re.sub(r"[^a-z0-9]+", "-", Path(request.node.name).stem.lower().removeprefix("test"))
    space = Space(cluster, f"pods{words[:40].rstrip('-')}-{secrets.token_hex(2)}")
    space.create()
    yield space
    space.delete()


@pytest.fixture
def bare_space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    """A namespace that no operator is started for."""
    yield from _space(cluster, request)


@pytest.fixture
def space(bare_space: Space) -> Iterator[Space]:
    """A namespace whose graphs are taken care of."""
    with HostOperator(bare_space):
        yield bare_space


@pytest.fixture(scope="module")
def module_space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Space]:
    """One for all tests of a file."""
    for space in _space(cluster, request):
        with HostOperator(space):
            yield space
