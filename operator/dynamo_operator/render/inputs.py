"""What a graph's author says about the pods of each component, as a hash.

It tells an author's change, which is rendered afresh, from an operator's upgrade, which replaces no
pod: a hash stays the same whatever operator reads the graph, and while only numbers, restarts or
other components change. Setting `nvidia.com/adopt-rendering` changes all of them.
"""

from collections.abc import Mapping
from typing import Any

from dynamo_crds.v1beta1 import GraphSpec

from dynamo_operator.render import names
from dynamo_operator.render.canonical import short_hash
from dynamo_operator.render.parts import WORKER_ROLES

_READ_FOR_PODS = (
    names.METRICS_ANNOTATION,
    names.EXECUTOR_ANNOTATION,
    names.PULL_SECRETS_ANNOTATION,
    names.ADOPT_ANNOTATION,
)
"""Annotations of the graph object that change what its pods are."""

_NOT_IN_PODS = ("replicas", "scalingAdapter", "minAvailable")
"""Fields of a component that show in none of its own pods."""


def template_inputs(
    spec: GraphSpec, annotations: Mapping[str, str], roles: Mapping[str, str]
) -> dict[str, str]:
    """Component -> 8 hex digits over all that can show in its pods.

    `annotations` are the graph object's; `roles`: component -> role, of those that run. A component
    has its own fields, what the graph says for all, and what it learns of others: a picker whether
    it pairs prefill and decode workers, a planner which workers it may scale.
    """
    written = spec.manifest()
    components: list[dict[str, Any]] = written.pop("components", [])
    written.pop("restart", None)
    shared = short_hash([written, _read(annotations)])
    own = {
        component["name"]: short_hash(
            [shared, {key: value for key, value in component.items() if key not in _NOT_IN_PODS}]
        )
        for component in components
    }
    scaled = {
        component.name: own[component.name]
        for component in spec.components
        if component.scaling_adapter is not None and roles.get(component.name) in WORKER_ROLES
    }
    split = {"prefill", "decode"} <= set(roles.values())
    learned = {"planner": scaled, "frontend": split, "epp": split}
    return {
        name: short_hash([inputs, heard]) if (heard := learned.get(roles.get(name, ""))) else inputs
        for name, inputs in own.items()
    }


def whole_inputs(spec: GraphSpec, annotations: Mapping[str, str]) -> str:
    """One hash for all components, as older operators recorded it: 8 hex digits."""
    written = spec.manifest()
    written.pop("restart", None)
    for component in written.get("components", []):
        component.pop("replicas", None)
        component.pop("scalingAdapter", None)
    return short_hash([written, _read(annotations)])


def _read(annotations: Mapping[str, str]) -> dict[str, str]:
    return {key: annotations[key] for key in _READ_FOR_PODS if key in annotations}
