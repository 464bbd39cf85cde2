"""A real Kubernetes on a plain machine, for end-to-end tests."""

from e2e.cluster.cluster import ADDONS, Cluster, ClusterError, KubectlError, WaitTimeout

__all__ = ["ADDONS", "Cluster", "ClusterError", "KubectlError", "WaitTimeout"]
