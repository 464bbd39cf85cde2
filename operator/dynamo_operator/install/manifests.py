"""The manifests of an installation, in the order to apply them.

Pure, as rendering is: equal settings give equal bytes. The CRDs are not among them, because they
may be somebody else's: a cluster-wide webhook installs them when it starts, and refuses those of
others; where there is none, `dynamo operator crds --apply --no-webhook` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_operator.install import workloads
from dynamo_operator.install.rights import ADAPTERS, GRAPHS, OURS, labels, rights
from dynamo_operator.install.settings import OPERATOR, WEBHOOK, Installation

Json = dict[str, Any]

WEBHOOK_NAME = "graphs.dynamo-operator.nvidia.com"


def manifests(installation: Installation) -> list[Json]:
    """What `kubectl apply` takes to install the operator."""
    result = [*rights(installation), workloads.operator(installation)]
    if installation.namespace not in installation.watch_namespaces:
        # One that has graphs is somebody's: not ours to label, and to delete with the operator.
        result.insert(0, _namespace(installation))
    if installation.webhook:
        if installation.cert_manager:
            result += workloads.certificate(installation)
        result += workloads.webhook(installation)
        result.append(
            webhook_configuration(
                installation.cluster_name(OPERATOR),
                installation.namespace,
                installation.watch_namespaces,
            )
        )
    return result


def _namespace(installation: Installation) -> Json:
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": installation.namespace, "labels": enforced},
    }


def webhook_configuration(name: str, namespace: str, only: Sequence[str] = ()) -> Json:
    """Tells the API server what to ask about; the webhook itself fills in whom to trust.

    `only` restricts it to graphs in these namespaces.
    """
    webhook: Json = {
        "name": WEBHOOK_NAME,
        "admissionReviewVersions": ["v1"],
        "clientConfig": {
            "service": {
                "name": WEBHOOK,
                "namespace": namespace,
                "path": "/validate",
                "port": 443,
            }
        },
        "rules": [
            {
                "apiGroups": [OURS],
                "apiVersions": ["v1alpha1", "v1beta1"],
                "operations": ["CREATE", "UPDATE"],
                "resources": [GRAPHS, ADAPTERS],
                "scope": "Namespaced",
            }
        ],
        # Policy lets everything pass that is being deleted. Asked about it, a webhook that is away
        # would keep the garbage collector from taking its finalizers off.
        "matchConditions": [
            {"name": "stays", "expression": "!has(object.metadata.deletionTimestamp)"}
        ],
        "failurePolicy": "Fail",
        "matchPolicy": "Equivalent",
        "sideEffects": "None",
        "timeoutSeconds": 10,
    }
    if only:
        named = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": [*only]}
        webhook["namespaceSelector"] = {"matchExpressions": [named]}
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": name, "labels": labels(WEBHOOK)},
        "webhooks": [webhook],
    }
