"""Whether an object still is what was applied, told from the object alone.

Server-side apply records which fields each manager owns. A field that somebody else changes leaves
our record, so two facts tell that nothing is to be done: the object carries the hash of the
manifest that would be applied now, and our record still covers every field of it. No default that
the API server fills in, no quantity that it writes another way and no field that others add
matters, and nothing has to be remembered: a restarted operator that finds its work done writes
nothing.

Source: Kubernetes' server-side apply and the `FieldsV1` format of structured-merge-diff.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dynamo_operator.reconcile.observed import Json
from dynamo_operator.render.canonical import short_hash

FIELD_MANAGER = "dynamo-operator"
ROLLOUT_MANAGER = "dynamo-operator-rollout"
"""Shrinks workloads of earlier generations, whose other fields stay as they were applied."""
APPLIED_ANNOTATION = "nvidia.com/dynamo-applied"
"""On every object: hash of the manifest that was applied."""

Path = tuple[str, ...]


def stamped(manifest: Json) -> Json:
    """`manifest` with its own hash as an annotation; the argument is not changed."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), APPLIED_ANNOTATION: short_hash(manifest)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def is_applied(desired: Json, live: Mapping[str, Any] | None) -> bool:
    """Whether applying `desired` (stamped) would change nothing of `live`."""
    if live is None or live["metadata"].get("deletionTimestamp"):
        return False
    mark = desired["metadata"]["annotations"][APPLIED_ANNOTATION]
    if (live["metadata"].get("annotations") or {}).get(APPLIED_ANNOTATION) != mark:
        return False
    return next(lost(desired, live), None) is None


def lost(desired: Json, live: Mapping[str, Any]) -> Iterator[Path]:
    """Paths of `desired` that our field manager does not own in `live` any more."""
    owned = owned_fields(live)
    for key, value in desired.items():
        if key in ("apiVersion", "kind"):
            continue
        if key == "metadata":  # names and namespaces belong to nobody
            value = {k: v for k, v in value.items() if k not in ("name", "namespace")}
        yield from _lost(value, owned.get(f"f:{key}"), (key,))


def owned_fields(live: Mapping[str, Any]) -> Json:
    """`FieldsV1` of our manager's applied fields of the object itself, not of a subresource."""
    for entry in live["metadata"].get("managedFields") or ():
        if (
            entry.get("manager") == FIELD_MANAGER
            and entry.get("operation") == "Apply"
            and not entry.get("subresource")
        ):
            fields: Json = entry.get("fieldsV1") or {}
            return fields
    return {}


def is_left_behind(live: Mapping[str, Any]) -> bool:
    """Whether we applied the object for a graph that was deleted without it
    (`kubectl delete --cascade=orphan`): nobody owns it, and a graph of that name finds it again."""
    return not live["metadata"].get("ownerReferences") and bool(owned_fields(live))


def writers(live: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    """(manager, subresource) of everyone who owns the field at `path` (names of fields only)."""
    found = []
    for entry in live["metadata"].get("managedFields") or ():
        fields: Any = entry.get("fieldsV1") or {}
        for name in path:
            fields = fields.get(f"f:{name}") if isinstance(fields, dict) else None
        if fields is not None:
            found.append((str(entry.get("manager", "")), str(entry.get("subresource", ""))))
    return found


def _lost(desired: Any, fields: Any, path: Path) -> Iterator[Path]:
    """Paths below `path` that `fields` does not cover.

    `fields` is the `FieldsV1` node of that path; None if it is not owned. A node without children
    owns the value as a whole (scalars, atomic maps and lists).
    """
    if desired is None:
        return  # null and absent are the same
    if fields is None:
        # The API server drops what is empty, so nobody can own it.
        if desired not in ({}, []):
            yield path
        return
    children = [key for key in fields if key != "."]
    if not children:
        return
    if isinstance(desired, dict):
        for key, value in desired.items():
            yield from _lost(value, fields.get(f"f:{key}"), (*path, key))
    elif isinstance(desired, list):
        yield from _lost_items(desired, fields, path)


def _lost_items(desired: list[Any], fields: Json, path: Path) -> Iterator[Path]:
    keyed = [(json.loads(key[2:]), node) for key, node in fields.items() if key.startswith("k:")]
    values = {key[2:] for key in fields if key.startswith("v:")}
    for index, item in enumerate(desired):
        here = (*path, str(index))
        if isinstance(item, dict):
            # A key that the manifest leaves out has been filled in (a port's protocol).
            node = next(
                (
                    node
                    for key, node in keyed
                    if all(item.get(name, value) == value for name, value in key.items())
                ),
                None,
            )
            if node is None:
                yield here
            else:
                yield from _lost(item, node, here)
        elif values and json.dumps(item, ensure_ascii=False) not in values:
            yield here
