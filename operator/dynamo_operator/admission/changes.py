"""What can't be changed once a graph exists, because what runs can't follow.

Both states are looked at in v1beta1's form, components matched by name. What CEL says already
(`minAvailable` is immutable, `restart` unset on create) is the API server's to check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dynamo_crds.problem import show_path

from dynamo_operator.admission.review import Denial, Json
from dynamo_operator.admission.wording import Wording

WORKLOAD_PROVIDER = "nvidia.com/workload-provider"

ANOTHER_GRAPH = "make a graph of another name, or delete this one first"
ANOTHER_COMPONENT = "remove the component and add one of another name"


def forbidden_changes(before: Json, after: Json, wording: Wording) -> Iterator[Denial]:
    """Each field of `after` that may not differ from `before`; both are v1beta1 graphs."""
    old, new = _at(before, "spec"), _at(after, "spec")
    if old.get("backendFramework") != new.get("backendFramework"):
        yield _immutable(
            "spec.backendFramework",
            old.get("backendFramework"),
            new.get("backendFramework"),
            ANOTHER_GRAPH,
        )
    provider = _at(before, "metadata", "annotations").get(WORKLOAD_PROVIDER)
    wanted = _at(after, "metadata", "annotations").get(WORKLOAD_PROVIDER)
    if provider is not None and provider != wanted:
        field = show_path(("metadata", "annotations", WORKLOAD_PROVIDER))
        yield _immutable(field, provider, wanted, ANOTHER_GRAPH)
    known = {c["name"]: c for c in old.get("components") or []}
    spelled = {str(name).lower(): name for name in known}
    for index, component in enumerate(new.get("components") or []):
        name = str(component["name"])
        other = spelled.get(name.lower(), name)
        if other != name:  # one name for the objects of both, and two for their pods
            yield _immutable(wording.component(index, name, "name"), other, name, ANOTHER_COMPONENT)
        elif name in known:
            yield from _component(known[name], component, index, name, wording)


def _component(old: Json, new: Json, index: int, name: str, wording: Wording) -> Iterator[Denial]:
    kind = old.get("type")
    if kind is not None and kind != new.get("type"):
        field = wording.component(index, name, "type")
        yield _immutable(field, kind, new.get("type"), ANOTHER_COMPONENT)
    if (old.get("multinode") is None) != (new.get("multinode") is None):
        was, becomes = (
            ("one node", "several") if old.get("multinode") is None else ("several", "one")
        )
        message = f"can't be changed from {was} to {becomes}; {ANOTHER_COMPONENT}"
        yield Denial(wording.component(index, name, "multinode"), message, "immutable")


def _immutable(field: str, before: Any, after: Any, instead: str) -> Denial:
    message = f"can't be changed from {_shown(before)} to {_shown(after)}; {instead}"
    return Denial(field, message, "immutable")


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def _at(data: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for step in path:
        found = data.get(step)
        if not isinstance(found, Mapping):
            return {}
        data = found
    return data
