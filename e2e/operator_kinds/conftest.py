"""One namespace with one operator for all tests of this folder that need pods."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster
from e2e.cluster.fixtures import cluster, pods
from e2e.operator.operators import HostOperator
from e2e.operator.space import Space

__all__ = ["cluster", "pods"]

CRDS = Path(__file__).parents[2] / "crds"
DISCOVERY_S = 0.5
"""So soon the operators notice a kind that is installed."""


@pytest.fixture(scope="package")
def bare_space(own_pods: Cluster) -> Iterator[Space]:
    """The namespace, before its operator is started."""
    if not own_pods.kubectl("get", "crd", "dynamographdeployments.nvidia.com", check=False).stdout:
        # An API server that has just started may not describe itself yet, which kubectl wants.
        own_pods.wait_for(lambda: own_pods.apply(CRDS, server_side=True), what="CRDs applied")
    space = Space(own_pods, f"kinds-{secrets.token_hex(2)}")
    space.create()
    yield space
    space.delete()


@pytest.fixture(scope="package")
def operator(bare_space: Space) -> Iterator[HostOperator]:
    """Takes care of the namespace, and may read Secrets there."""
    flags = ("--pull-secrets", bare_space.name, "--discovery-seconds", str(DISCOVERY_S))
    with HostOperator(bare_space, *flags) as running:
        yield running


@pytest.fixture(scope="package")
def space(bare_space: Space, operator: HostOperator) -> Space:
    """A namespace whose graphs are taken care of."""
    return bare_space
