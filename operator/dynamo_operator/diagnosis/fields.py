"""Reads from raw objects that never raise: what is missing or of a wrong type reads as nothing.

Pods and workloads come from the API server, whose schema guarantees their shape, but the status
must also survive an object of a newer version or one that somebody's webhook has mangled.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from dynamo_operator.render.merge import entries, mapping

INT32_MAX = 2**31 - 1


def at(value: Any, *path: str) -> Any:
    """The value at `path`, or None."""
    for step in path:
        value = mapping(value).get(step)
    return value


def text(value: Any, *path: str) -> str:
    """The text at `path`, or ""."""
    found = at(value, *path)
    return found if isinstance(found, str) else ""


def count(value: Any, *path: str, default: int = 0) -> int:
    """The number at `path` as a count: within 0 … 2³¹-1; `default` where there is none."""
    found = at(value, *path)
    if not isinstance(found, int) or isinstance(found, bool):
        return default
    return max(0, min(found, INT32_MAX))


def moment(value: Any, *path: str) -> datetime | None:
    """The time at `path`; None where there is none, or one that names no zone."""
    try:
        found = datetime.fromisoformat(text(value, *path))
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def items(value: Any, *path: str) -> Iterator[Mapping[str, Any]]:
    """The objects in the list at `path`."""
    return (item for item in entries(at(value, *path)) if isinstance(item, dict))


def label(value: Any, name: str) -> str:
    """A label of an object or of a pod template."""
    return text(value, "metadata", "labels", name)


def condition(value: Any, type: str) -> Mapping[str, Any]:
    """The condition of that type in an object's status; empty if it has none."""
    return next((c for c in items(value, "status", "conditions") if c.get("type") == type), {})
