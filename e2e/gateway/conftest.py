"""One cluster for all, and one Gateway for those that ask for it."""

from __future__ import annotations

from e2e.cluster.fixtures import cluster, gateway, istio, namespace, pods

__all__ = ["cluster", "gateway", "istio", "namespace", "pods"]
