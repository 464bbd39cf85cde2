"""One cluster for all, one Gateway for those that ask for it, and the kinds that pools need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.cluster import Cluster, addons
from e2e.cluster.fixtures import (
    cluster,
    gateway,
    istio,
    module_namespace,
    namespace,
    pods,
)
from e2e.operator.conftest import usable, with_crds

__all__ = [
    "cluster",
    "gateway",
    "istio",
    "module_namespace",
    "namespace",
    "pods",
    "usable",
    "with_crds",
]


@pytest.fixture(scope="package")
def inference_pools(own_pods: Cluster) -> Iterator[Cluster]:
    """The cluster, with pools; afterwards only if it had them before: others test that they come.

    For tests that reach pods and Services from this machine.
    """
    addon = addons.ADDONS["inference-extension"]
    kinds = addons.manifests(addon, (own_pods.layout.manifests / addon.file).read_text())
    served = own_pods.kubectl("get", "crd", "-o", "name").stdout
    new = [name for name in addons.definitions(kinds) if f"/{name}\n" not in served]
    own_pods.install_addon("inference-extension")
    yield own_pods
    if new:
        own_pods.kubectl("delete", "crd", *new)
