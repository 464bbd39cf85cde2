"""The final state of a namespace, without what differs between two runs of one script."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dynamo_operator.reconcile.gather import CHILDREN, OPTIONAL_CHILDREN
from dynamo_operator.reconcile.ownership import APPLIED_ANNOTATION, owned_fields
from dynamo_operator.reconcile.revisions import KEPT_BESIDE
from dynamo_runtime.kubernetes import resources

from e2e.operator_control.graphs import Json
from e2e.operator_control.world import World

MANAGED = "app.kubernetes.io/managed-by=dynamo-operator"
_OF_SERVERS = ("clusterIP", "clusterIPs")
_COME_AND_STAY = ("RolledBack", "RuntimeUnsupported", "NotRendered", "Adapted")
"""Conditions that stay as False once they have been true."""


async def final_state(world: World, namespace: str) -> dict[str, Any]:
    """Object -> what is to be equal after two runs: specs, what the operator owns, statuses."""
    state: dict[str, Any] = {}
    for graph in await world.list(resources.GRAPHS, namespace):
        name = graph["metadata"]["name"]
        state[f"DynamoGraphDeployment/{name}"] = {
            "spec": graph["spec"],
            "status": graph_status(graph.get("status") or {}),
        }
        state[f"revision of {name}"] = await _current_revision(world, namespace, name)
        state[f"pods of {name}"] = await _pods(world, namespace, name)
    for resource in (*CHILDREN, *OPTIONAL_CHILDREN):
        if resource is resources.CONTROLLER_REVISIONS:
            continue
        for item in await world.list(resource, namespace):
            if is_ours(item):
                metadata = item["metadata"]
                state[f"{resource.kind}/{metadata['name']}"] = child(item)
    return state


def is_ours(item: Json) -> bool:
    metadata = item["metadata"]
    labels = metadata.get("labels") or {}
    owners = metadata.get("ownerReferences") or ()
    return labels.get("app.kubernetes.io/managed-by") == "dynamo-operator" or any(
        owner["kind"] == "DynamoGraphDeployment" for owner in owners
    )


def child(item: Json) -> Json:
    """A child: what the operator applied of it, and how that reads now."""
    metadata = item["metadata"]
    rest = {
        key: value
        for key, value in item.items()
        if key not in ("metadata", "status", "apiVersion", "kind")
    }
    if isinstance(rest.get("spec"), dict):
        rest["spec"] = {k: v for k, v in rest["spec"].items() if k not in _OF_SERVERS}
    return {
        **rest,
        "labels": metadata.get("labels"),
        "annotations": {
            key: value
            for key, value in (metadata.get("annotations") or {}).items()
            # The hash of what was applied covers the owner's uid.
            if key != APPLIED_ANNOTATION and not key.startswith("deployment.kubernetes.io/")
        },
        "owners": [
            {key: value for key, value in owner.items() if key != "uid"}
            for owner in metadata.get("ownerReferences") or ()
        ],
        "owned": _without_uids(owned_fields(item)),
    }


def _without_uids(fields: Json) -> Json:
    """`FieldsV1` name owners by their uid."""
    return {
        ("k:owner" if key.startswith('k:{"uid"') else key): _without_uids(value)
        for key, value in fields.items()
    }


def graph_status(status: Json) -> Json:
    """A status without times and generations, and without what tells of the way there."""
    kept = {
        key: value
        for key, value in status.items()
        if key not in ("conditions", "components", "observedGeneration", "rollingUpdate")
    }
    rolling = status.get("rollingUpdate") or {}
    assert rolling.get("phase", "Completed") == "Completed", rolling
    return {
        **kept,
        "conditions": _conditions(status),
        "components": {
            name: {**component, "conditions": _conditions(component)}
            for name, component in (status.get("components") or {}).items()
        },
    }


def _conditions(status: Json) -> list[Json]:
    return [
        {key: each[key] for key in ("type", "status", "reason", "message")}
        for each in status.get("conditions") or ()
        if not (each["type"] in _COME_AND_STAY and each["status"] == "False")
    ]


async def _current_revision(world: World, namespace: str, name: str) -> Json:
    """The newest revision of a graph; the older ones are what the operator has seen by chance."""
    owned = [
        item
        for item in await world.list(resources.CONTROLLER_REVISIONS, namespace)
        if item["metadata"].get("ownerReferences", [{}])[0].get("name") == name and is_ours(item)
    ]
    assert 1 <= len(owned) <= KEPT_BESIDE + 2, [item["metadata"]["name"] for item in owned]
    newest = max(owned, key=lambda item: int(item["revision"]))
    data = newest["data"]
    return {
        **child(newest),
        "name": newest["metadata"]["name"],
        "revision": "",
        "data": {**data, "spec": _templates_of(data["spec"])},
    }


def _templates_of(spec: Json) -> Json:
    """A spec without its numbers: a revision keeps the first one that had its templates."""
    numbers = ("replicas", "scalingAdapter")
    return {
        **{key: value for key, value in spec.items() if key != "restart"},
        "components": [
            {key: value for key, value in component.items() if key not in numbers}
            for component in spec["components"]
        ],
    }


async def _pods(world: World, namespace: str, name: str) -> Json:
    """Running pods by component."""
    return dict(
        Counter(
            pod["metadata"]["labels"]["nvidia.com/dynamo-component"]
            for pod in await world.list(resources.PODS, namespace)
            if pod["metadata"]["labels"].get("nvidia.com/dynamo-graph-deployment-name") == name
            and pod["status"].get("phase") == "Running"
            and not pod["metadata"].get("deletionTimestamp")
        )
    )


async def orphans(world: World, namespace: str) -> list[str]:
    """Objects of the operator that no living graph owns."""
    living = {graph["metadata"]["uid"] for graph in await world.list(resources.GRAPHS, namespace)}
    found = []
    for resource in (*CHILDREN, *OPTIONAL_CHILDREN):
        for item in await world.list(resource, namespace):
            owners = item["metadata"].get("ownerReferences") or ()
            if is_ours(item) and not any(owner["uid"] in living for owner in owners):
                found.append(f"{resource.kind}/{item['metadata']['name']}")
    return found


async def repeated_events(world: World, namespace: str) -> list[str]:
    """Events that say the same of one graph, whoever told them: one is to stand there, counted."""
    said = Counter(
        (event["involvedObject"]["uid"], event["reason"], event["message"])
        for event in await world.list(resources.EVENTS, namespace)
        if event["involvedObject"].get("kind") == "DynamoGraphDeployment"
    )
    return [f"{count} times {told}" for told, count in said.items() if count > 1]
