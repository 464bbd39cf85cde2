"""One cluster for all, one Gateway for those that ask for it, and the kinds that pools need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.cluster import Cluster, addons
from e2e.cluster.fixtures import cluster, gateway, istio, module_namespace, namespace, pods
from e2e.operator.conftest import with_crds

__all__ = ["cluster", "gateway", "istio", "module_namespace", "namespace", "pods", "with_crds"]


@pytest.fixture(scope="package")
def inference_pools(pods: Cluster) -> Iterator[Cluster]:
    """The cluster, with pools; afterwards only if it had them before: others test that they come.

    For tests that reach pods and Services from this machine.
    """
    if pods.is_foreign:
        pytest.skip("pods and Services of a cluster that isn't ours can't be reached from here")

    addon = addons.ADDONS["inference-extension"]
    kinds = addons.manifests(addon, (pods.layout.manifests / addon.file).read_text())
    served = pods.kubectl("get", "crd", "-o", "name").stdout
    new = [name for name in addons.definitions(kinds) if f"/{name}\n" not in served]
    pods.install_addon("inference-extension")
    yield pods
    if new:
        pods.kubectl("delete", "crd", *new)
