"""Parameters of plugins, as they stand under ``parameters:`` in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dynamo_crds.schema import Model, Rule, Violation


class Parameters(Model):
    """Base of all parameters: camelCase in files, unknown fields refused."""


class NoParameters(Parameters):
    """For plugins that have nothing to set."""


def must(field: str, holds: Callable[[dict[str, Any]], bool], message: str, expected: str) -> Rule:
    """A rule over several fields. ``holds`` gets what is set, of whatever type."""

    def check(data: Any) -> Iterator[Violation]:
        if not isinstance(data, dict):
            return
        try:
            broken = not holds(data)
        except (TypeError, KeyError):
            return  # a wrong type, a missing field: told elsewhere
        if broken:
            yield Violation((field,), data.get(field), expected)

    return Rule(message, check=check)
