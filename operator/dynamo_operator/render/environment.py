"""Environment variables of a container: three layers in one list whose order carries meaning.

Kubernetes expands `$(NAME)` in a value only if NAME stands earlier in the list. Layers (the
platform's variables, the graph's `env`, the component's `env`) override each other by name, and
a list with one entry for each name can't simply be concatenated: an override that moves may
leave a reference before what it refers to. So the result is ordered such that every reference
that the concatenated layers would have resolved is resolved, to the winning value.
"""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from dynamo_operator.render.merge import Json, entries, mapping

MAIN = "main"
"""Name of the container that a component is."""

_REFERENCE = re.compile(r"(\$\$)|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")


def references(value: Any) -> Sequence[str]:
    """Names that `value` refers to as `$(NAME)`; `$$(NAME)` is an escaped dollar, no reference."""
    if not isinstance(value, str) or "$(" not in value:
        return ()
    return [match[2] for match in _REFERENCE.finditer(value) if match[2]]


def merged(*layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers (weakest first) as one list with one entry for each name, the last one winning.

    Order: that of the winning entries in the concatenated layers, except that an entry which
    something before it refers to, and could refer to in the concatenation, moves before that.
    Of overrides that refer to each other in a circle, one keeps an unresolved reference.
    """
    flat: list[Mapping[str, Any]] = [
        entry for layer in layers for entry in layer if isinstance(entry, dict)
    ]
    winner: dict[Any, int] = {}
    first: dict[Any, int] = {}
    for position, entry in enumerate(flat):
        name = entry.get("name")
        winner[name] = position
        first.setdefault(name, position)

    if len(winner) == len(flat):
        return flat  # nothing is overridden, so the concatenation is right as it is

    ordered: list[Mapping[str, Any]] = []
    placed: set[Any] = set()

    def place(name: Any) -> None:
        waiting = [name]
        while waiting:
            entry = flat[winner[waiting[-1]]]
            placed.add(waiting[-1])
            needed = next(
                (
                    other
                    for other in references(entry.get("value"))
                    if other not in placed
                    and other in winner
                    and first[other] < winner[waiting[-1]]
                ),
                None,
            )
            if needed is None:
                ordered.append(entry)
                waiting.pop()
            else:
                waiting.append(needed)

    for position, entry in enumerate(flat):
        name = entry.get("name")
        if winner[name] == position and name not in placed:
            place(name)
    return ordered


def literal(env: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """The last literal value of `name` in `env`, or None (absent, or taken from elsewhere)."""
    for entry in reversed(env):
        if entry.get("name") == name:
            value = entry.get("value")
            return value if isinstance(value, str) else None
    return None


def number(env: Sequence[Mapping[str, Any]], name: str, default: int) -> int:
    """The literal whole number that `env` gives `name`, else `default`."""
    value = literal(env, name)
    return int(value) if value is not None and value.isascii() and value.isdigit() else default


def variable(name: str, value: str) -> Json:
    return {"name": name, "value": value}


def field(name: str, path: str) -> Json:
    """A variable that takes its value from the pod's own fields."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def with_variable(template: Json, variable: Mapping[str, Any], unless: AbstractSet[str]) -> Json:
    """The pod template with `variable` in its container `main`, where that has none of `unless`."""
    spec = template["spec"]
    containers = [
        {**container, "env": _added(entries(mapping(container).get("env")), variable, unless)}
        if mapping(container).get("name") == MAIN
        else container
        for container in entries(spec.get("containers"))
    ]
    return {**template, "spec": {**spec, "containers": containers}}


def _added(
    env: Sequence[Json], variable: Mapping[str, Any], unless: AbstractSet[str]
) -> list[Mapping[str, Any]]:
    own = {mapping(entry).get("name") for entry in env}
    return [*env] if own & unless else [*env, variable]
