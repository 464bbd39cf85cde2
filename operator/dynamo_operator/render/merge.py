"""Merging the platform's defaults with what the author of a graph wrote: the author wins.

The rules are Kubernetes' strategic merge, as far as pods need it: maps merge by key, env and
volumes by name, ports by number and protocol, volume mounts by path, probes and everything else
as a whole. Nothing given is changed in place; what is not touched is shared, not copied.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a map, else an empty one: `null` and absent mean the same."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[Any]:
    """`value`'s items that are not null, if it is a list, else none."""
    return [item for item in value if item is not None] if isinstance(value, list) else []


def present(value: Mapping[str, Any]) -> Json:
    """`value` without keys that hold null."""
    return {key: item for key, item in value.items() if item is not None}


def by_key(defaults: Sequence[Json], user: Iterable[Any], key: str) -> list[Any]:
    """The user's entries, after those defaults whose `key` no entry of the user's has."""
    given = list(user)
    taken = {entry.get(key) for entry in given if isinstance(entry, dict)}
    return [entry for entry in defaults if entry[key] not in taken] + given


def ports(defaults: Sequence[Json], user: Iterable[Any]) -> list[Any]:
    """The user's ports, after those defaults whose number and name both are free.

    A default whose number the user gave another name stays out (server-side apply takes one
    entry for a number and protocol); a default whose name the user gave another number too
    (names are unique in a pod), and what refers to the name follows the user's number. Of two
    defaults that the user's variables moved to one number, the first stays.
    """
    given = list(user)
    numbers = {
        entry.get("containerPort")
        for entry in given
        if isinstance(entry, dict) and entry.get("protocol", "TCP") == "TCP"
    }
    names = {entry.get("name") for entry in given if isinstance(entry, dict)}
    free: list[Any] = []
    for port in defaults:
        if port["containerPort"] not in numbers and port["name"] not in names:
            numbers.add(port["containerPort"])
            free.append(port)
    return free + given


def container(defaults: Json, user: Mapping[str, Any]) -> Json:
    """A container: `defaults` under what the user wrote. `env` is not merged here
    (its order carries meaning: see `environment`)."""
    merged = {**defaults, **present(user)}
    if "ports" in defaults:
        merged["ports"] = ports(defaults["ports"], entries(user.get("ports")))
    if "volumeMounts" in defaults:
        merged["volumeMounts"] = by_key(
            defaults["volumeMounts"], entries(user.get("volumeMounts")), "mountPath"
        )
    return merged


def pod_spec(defaults: Json, user: Mapping[str, Any]) -> Json:
    """A pod's spec: `defaults` under what the user wrote; volumes merge by name."""
    merged = {**defaults, **present(user)}
    if "volumes" in defaults:
        merged["volumes"] = by_key(defaults["volumes"], entries(user.get("volumes")), "name")
    return merged
