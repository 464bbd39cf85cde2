"""What operator and webhook may do: what they do, and nothing else.

The operator may not read pods' logs, nor Secrets (except where pull secrets are allowed); it makes
one for each graph with prefill and decode workers, and can't look at it afterwards. It grants
rights to graphs' pods by Roles, and Kubernetes lets it grant only what it has, so it has those too.
The webhook creates workloads only with `dryRun`; rights don't know the difference, so it has its
own account, apart from the operator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_operator.install.settings import CERTIFICATE, CRD_NAMES, OPERATOR, WEBHOOK, Installation
from dynamo_operator.marker import MARKER
from dynamo_operator.render.names import MODEL_RULE_GROUPS, MODEL_RULES

Json = dict[str, Any]

RBAC = "rbac.authorization.k8s.io"
OURS = "nvidia.com"
GRAPHS = "dynamographdeployments"
ADAPTERS = "dynamographdeploymentscalingadapters"

_READ = ("get", "list", "watch")
_KEEP = (*_READ, "create", "patch", "delete")

CHILDREN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("configmaps", "persistentvolumeclaims", "serviceaccounts", "services")),
    ("apps", ("controllerrevisions", "deployments")),
    (RBAC, ("rolebindings", "roles")),
    ("policy", ("poddisruptionbudgets",)),
    ("networking.k8s.io", ("networkpolicies",)),
    ("leaderworkerset.x-k8s.io", ("leaderworkersets",)),
    ("inference.networking.k8s.io", ("inferencepools",)),
    ("gateway.networking.k8s.io", ("httproutes",)),
    ("monitoring.coreos.com", ("podmonitors",)),
    (OURS, (ADAPTERS,)),
)
"""Group and kinds of everything that a graph is rendered to."""


def rule(
    group: str, resources: Sequence[str], verbs: Sequence[str], names: Sequence[str] = ()
) -> Json:
    """One rule of a role."""
    result: Json = {"apiGroups": [group], "resources": [*resources], "verbs": [*verbs]}
    if names:
        result["resourceNames"] = [*names]
    return result


def operator_rules() -> list[Json]:
    """In every namespace whose graphs the operator takes care of."""
    return [
        rule(OURS, [GRAPHS], _READ),
        rule(OURS, [f"{GRAPHS}/finalizers"], ["update"]),  # to name a graph as an owner
        rule(OURS, [f"{ADAPTERS}/status", f"{GRAPHS}/status"], ["patch"]),
        *(rule(group, kinds, _KEEP) for group, kinds in CHILDREN),
        rule("", ["pods"], _READ),
        rule("", ["secrets"], ["create"]),  # what prefill and decode workers share; never read
        rule("", ["events"], ["create", "patch"]),
        # Not for itself: what graphs' planners and pickers are granted.
        rule(OURS, [f"{ADAPTERS}/scale"], ["get", "patch", "update"]),
        *(rule(group, MODEL_RULES, _READ) for group in MODEL_RULE_GROUPS),
    ]


def webhook_rules() -> list[Json]:
    """In every namespace whose graphs the webhook reviews: dry runs."""
    return [
        rule("apps", ["deployments"], ["create"]),
        rule("", ["services"], ["create"]),
        rule("leaderworkerset.x-k8s.io", ["leaderworkersets"], ["create"]),
    ]


def rights(installation: Installation) -> list[Json]:
    """Accounts, roles and bindings."""
    place = installation.namespace
    result = [_account(OPERATOR, place)]
    result += _scoped(installation, OPERATOR, operator_rules(), _operator_cluster(installation))
    result += _role(place, f"{OPERATOR}-lease", _own_lease(), OPERATOR, place)
    for namespace in installation.watch_namespaces:
        name = f"{OPERATOR}-marker"
        result += _role(namespace, name, _own_marker(), OPERATOR, place)
    for namespace in installation.pull_secrets:
        secrets = [rule("", ["secrets"], _READ)]
        result += _role(namespace, f"{OPERATOR}-pull-secrets", secrets, OPERATOR, place)
    if installation.webhook:
        result.append(_account(WEBHOOK, place))
        result += _scoped(installation, WEBHOOK, webhook_rules(), _webhook_cluster(installation))
        if not installation.cert_manager:
            result += _role(place, f"{WEBHOOK}-certificate", _own_certificate(), WEBHOOK, place)
    return result


def _operator_cluster(installation: Installation) -> list[Json]:
    rules = [rule("apiextensions.k8s.io", ["customresourcedefinitions"], ["get"], CRD_NAMES)]
    if not installation.restricted:
        rules.append(rule("coordination.k8s.io", ["leases"], _READ, [MARKER]))
    return rules


def _webhook_cluster(installation: Installation) -> list[Json]:
    configuration = [installation.cluster_name(OPERATOR)]
    kinds = ["validatingwebhookconfigurations"]
    rules = [rule("admissionregistration.k8s.io", kinds, ["get", "patch"], configuration)]
    if not installation.restricted:
        verbs = ["create", "get", "patch", "update"]
        rules += [
            rule("apiextensions.k8s.io", ["customresourcedefinitions"], verbs, CRD_NAMES),
            rule("coordination.k8s.io", ["leases"], ["get"], [MARKER]),
        ]
    return rules


def _own_lease() -> list[Json]:
    return [
        rule("coordination.k8s.io", ["leases"], ["create"]),  # a POST has no name yet
        rule("coordination.k8s.io", ["leases"], ["get", "update"], [OPERATOR]),
    ]


def _own_marker() -> list[Json]:
    return [rule("coordination.k8s.io", ["leases"], ["create", "get", "patch"], [MARKER])]


def _own_certificate() -> list[Json]:
    return [
        rule("", ["secrets"], ["create"]),  # a POST has no name yet
        rule("", ["secrets"], ["get", "update"], [CERTIFICATE]),
    ]


def _scoped(
    installation: Installation, name: str, rules: list[Json], cluster: list[Json]
) -> list[Json]:
    """`rules` where the graphs are, `cluster` everywhere."""
    result: list[Json] = []
    if installation.restricted:
        for namespace in installation.watch_namespaces:
            result += _role(namespace, name, rules, name, installation.namespace)
        rules = []
    return result + _cluster_role(installation, name, [*rules, *cluster])


def _account(name: str, namespace: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace, "labels": labels(name)},
    }


def _role(namespace: str, name: str, rules: list[Json], account: str, place: str) -> list[Json]:
    metadata = {"name": name, "namespace": namespace, "labels": labels(account)}
    return [
        {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": metadata, "rules": rules},
        _binding("Role", name, metadata, account, place),
    ]


def _cluster_role(installation: Installation, account: str, rules: list[Json]) -> list[Json]:
    name = installation.cluster_name(account)
    metadata = {"name": name, "labels": labels(account)}
    return [
        {"apiVersion": f"{RBAC}/v1", "kind": "ClusterRole", "metadata": metadata, "rules": rules},
        _binding("ClusterRole", name, metadata, account, installation.namespace),
    ]


def _binding(kind: str, role: str, metadata: Json, account: str, place: str) -> Json:
    return {
        "apiVersion": f"{RBAC}/v1",
        "kind": f"{kind}Binding",
        "metadata": metadata,
        "roleRef": {"apiGroup": RBAC, "kind": kind, "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": place}],
    }


def labels(name: str) -> dict[str, str]:
    """Labels of an installed object that belongs to operator or webhook. Not `managed-by`: that
    marks what the operator itself has made."""
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "dynamo-operator"}
