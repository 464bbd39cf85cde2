"""Where objects of each kind live: the REST paths of what this platform reads and writes.

A table instead of discovery: the kinds are known, and a table costs no request at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnknownKind(LookupError):
    """A manifest of a kind that the platform does not handle; the message names it."""


_NO_NAME = ("", ".", "..")
"""Names that a path would take for something else: names can come from people's manifests."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of object as one API version serves it."""

    api_version: str  # "v1", "apps/v1"
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """The API group; "" for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def full_name(self) -> str:
        """``plural.group``, as kubectl and CRD names have it: ``deployments.apps``, ``pods``."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(
        self,
        namespace: str | None = None,
        name: str | None = None,
        subresource: str | None = None,
    ) -> str:
        """The path of an object, or, without ``name``, of the collection.

        Without ``namespace`` that is the collection of all namespaces. Raises ``ValueError`` where
        an object of a namespaced kind is addressed without one, and for what can be no name.
        """
        root = "/apis" if self.group else "/api"
        parts = [root, self.api_version]
        if self.namespaced:
            if namespace is None and name is not None:
                raise ValueError(f"{self.kind} {name!r} is namespaced, but no namespace is given")
            if namespace is not None:
                parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        for part in (namespace, name):
            if part is not None and (part in _NO_NAME or "/" in part or "%" in part):
                raise ValueError(f"{self.kind} {part!r}: that is no name an object can have")
        return "/".join(parts)

    def path_of(self, manifest: Mapping[str, Any], subresource: str | None = None) -> str:
        """The path of the object that ``manifest`` describes."""
        metadata = manifest["metadata"]
        return self.path(metadata.get("namespace"), metadata["name"], subresource)


_RBAC = "rbac.authorization.k8s.io/v1"
_OURS = "nvidia.com/v1beta1"

PODS = Resource("v1", "Pod", "pods")
SERVICES = Resource("v1", "Service", "services")
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
SECRETS = Resource("v1", "Secret", "secrets")
SERVICE_ACCOUNTS = Resource("v1", "ServiceAccount", "serviceaccounts")
PVCS = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
EVENTS = Resource("v1", "Event", "events")
NAMESPACES = Resource("v1", "Namespace", "namespaces", namespaced=False)
NODES = Resource("v1", "Node", "nodes", namespaced=False)
DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")
REPLICA_SETS = Resource("apps/v1", "ReplicaSet", "replicasets")
STATEFUL_SETS = Resource("apps/v1", "StatefulSet", "statefulsets")
CONTROLLER_REVISIONS = Resource("apps/v1", "ControllerRevision", "controllerrevisions")
ROLES = Resource(_RBAC, "Role", "roles")
ROLE_BINDINGS = Resource(_RBAC, "RoleBinding", "rolebindings")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
PDBS = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICIES = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
POD_MONITORS = Resource("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")
INFERENCE_POOLS = Resource("inference.networking.k8s.io/v1", "InferencePool", "inferencepools")
HTTP_ROUTES = Resource("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes")
LEADER_WORKER_SETS = Resource("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "leaderworkersets")
GRAPHS = Resource(_OURS, "DynamoGraphDeployment", "dynamographdeployments")
ADAPTERS = Resource(
    _OURS, "DynamoGraphDeploymentScalingAdapter", "dynamographdeploymentscalingadapters"
)
CRDS = Resource(
    "apiextensions.k8s.io/v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
VALIDATING_WEBHOOKS = Resource(
    "admissionregistration.k8s.io/v1",
    "ValidatingWebhookConfiguration",
    "validatingwebhookconfigurations",
    namespaced=False,
)
API_SERVICES = Resource("apiregistration.k8s.io/v1", "APIService", "apiservices", namespaced=False)

_ALL = {
    (resource.api_version, resource.kind): resource
    for resource in list(globals().values())
    if isinstance(resource, Resource)
}


def of(manifest: Mapping[str, Any]) -> Resource:
    """Where the object that ``manifest`` describes lives. Raises ``UnknownKind``."""
    version, kind = manifest.get("apiVersion"), manifest.get("kind")
    try:
        return _ALL[str(version), str(kind)]
    except KeyError:
        name = (manifest.get("metadata") or {}).get("name")
        raise UnknownKind(
            f"apiVersion {version!r}, kind {kind!r} (of {name!r}) is none of the kinds that this "
            "platform handles; see dynamo_runtime.kubernetes.resources"
        ) from None
