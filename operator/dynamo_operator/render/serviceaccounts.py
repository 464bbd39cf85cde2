"""Service accounts and their rights: as few as the component's job takes.

A frontend and a picker watch pods and tell people of problems, a picker also watches what people
say of models; a planner watches pods and sets the scale of the graph's own adapters; a worker asks
Kubernetes for nothing and gets no account.
"""

from collections.abc import Sequence

from dynamo_operator.render import names, notes
from dynamo_operator.render.merge import Json
from dynamo_operator.render.notes import Notes
from dynamo_operator.render.parts import Graph, Part

_WATCH = ["get", "list", "watch"]
_RBAC = "rbac.authorization.k8s.io"


def _watched(group: str, *resources: str) -> Json:
    return {"apiGroups": [group], "resources": [*resources], "verbs": [*_WATCH]}


def _told() -> Json:
    return {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}


def _rules(part: Part, graph: Graph, parts: Sequence[Part]) -> list[Json]:
    match part.kind:
        case "frontend":
            return [_watched("", "pods"), _told()]
        case "epp":
            rules = (_watched(group, *names.MODEL_RULES) for group in names.MODEL_RULE_GROUPS)
            return [_watched("", "pods"), *rules, _told()]
        case "planner":
            adapters = sorted(
                names.adapter_name(graph.name, other.spec.name)
                for other in parts
                if other.spec.scaling_adapter is not None
            )
            if not adapters:  # without names the rule would reach every adapter
                return []
            return [
                _watched("", "pods"),
                {
                    "apiGroups": [names.GROUP],
                    "resources": ["dynamographdeploymentscalingadapters/scale"],
                    "resourceNames": adapters,
                    "verbs": ["get", "patch", "update"],
                },
            ]
    return []


def account(part: Part, graph: Graph) -> Json | None:
    """The component's ServiceAccount; None if it needs none or its author named another."""
    if not part.own_account:
        return None
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": graph.metadata(part.service_account, part.labels),
    }


def role(part: Part, graph: Graph, parts: Sequence[Part], noted: Notes) -> list[Json]:
    """Role and RoleBinding for the service account of the component's pods, whoever made it."""
    rules = _rules(part, graph, parts)
    if not rules:
        if part.kind == "planner":
            message = "no component has a scalingAdapter, so the planner may scale nothing"
            noted.add(part.spec.name, notes.NOTHING_TO_SCALE, message)
        return []
    name = names.object_name(graph.name, part.spec.name)
    metadata = graph.metadata(name, part.labels)
    subject = {
        "kind": "ServiceAccount",
        "name": part.service_account,
        "namespace": graph.namespace,
    }
    return [
        {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "metadata": metadata, "rules": rules},
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": _RBAC, "kind": "Role", "name": name},
            "subjects": [subject],
        },
    ]
