"""One cluster, and one Gateway for all tests that ask for it."""

from __future__ import annotations

from e2e.cluster.fixtures import cluster, gateway, namespace, pods

__all__ = ["cluster", "gateway", "namespace", "pods"]
