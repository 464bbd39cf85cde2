"""What is wrong with a manifest, said so that its author can mend it.

A problem names the file, the field's path as it stands in the manifest, the value found and the
value expected. Pydantic's errors are turned into that form here, and nowhere else.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dynamo_crds.schema import (
    QUANTITY_EXPECTED,
    QUANTITY_PATTERN,
    Model,
    Path,
    Violation,
    manifest_name,
    model_at,
    violations,
    without_null,
)

_PLAIN_KEY = re.compile(r"^[A-Za-z_][-A-Za-z0-9_]*$")

_LABEL = "lower-case letters, digits and dashes, no dash at the ends"
_PATTERNS = {
    QUANTITY_PATTERN: QUANTITY_EXPECTED,
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": _LABEL,
    r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$": _LABEL,
    r"^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$": "letters, digits and dashes, no dash at the ends",
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$": (
        "lower-case letters, digits, dashes and dots, beginning and ending with a letter or digit"
    ),
    r"^(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})$": (
        "a version MAJOR.MINOR.PATCH such as 1.6.1"
    ),
}


def show_path(path: Path) -> str:
    """`("spec", "components", 1, "replicas")` as `spec.components[1].replicas`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.match(step):
            text += f".{step}" if text else step
        else:
            text += f"[{json.dumps(step)}]"
    return text


def show_value(value: Any) -> str:
    """A value as short JSON, cut after 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake.

    `document` counts from 0 within the file (and is shown from 1). `path` is empty if the whole
    document is meant.
    `value` is what was found, None if nothing was there. `line` counts from 1, None if unknown.
    """

    file: str
    document: int
    path: str
    value: Any
    expected: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        parts = [where]
        if self.document:
            parts.append(f"document {self.document + 1}")
        if self.path:
            parts.append(self.path)
        text = ": ".join(parts) + f": {self.message}"
        found = "nothing" if self.value is None else show_value(self.value)
        return f"{text}: found {found}, expected {self.expected}" if self.expected else text


class InvalidManifest(ValueError):
    """A manifest that cannot be used; `problems` says all that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that `word` was probably meant to be, or None if none is like it.

    `cutoff` is difflib's: 1 demands equality but for case.
    """
    names = list(known)
    by_lower = {name.lower(): name for name in names}
    if word.lower() in by_lower:
        return by_lower[word.lower()]
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def or_list(words: Iterable[str]) -> str:
    """`a, b or c`."""
    items = list(words)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " or " + items[-1]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem that does not know its file yet."""

    path: Path
    value: Any
    expected: str
    message: str


def findings(model: type[Model], data: Any) -> list[Finding]:
    """Everything that is wrong with `data` (JSON-like, as a manifest has it) as a `model`."""
    found: list[Finding] = []
    try:
        model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        found.extend(_from_pydantic(model, details) for details in error.errors())
    found.extend(_from_violation(v) for v in violations(model, without_null(data)))
    unique: dict[tuple[Path, str], Finding] = {}
    for finding in found:
        unique.setdefault((finding.path, finding.message), finding)
    return list(unique.values())


def _from_violation(violation: Violation) -> Finding:
    return Finding(violation.path, violation.value, violation.expected, violation.message)


def _from_pydantic(model: type[Model], details: ErrorDetails) -> Finding:
    path = tuple(step for step in details["loc"] if step != "[key]")
    context: Mapping[str, Any] = details.get("ctx", {})
    value: Any = details["input"]
    kind = details["type"]
    if kind == "missing":
        return Finding(path, None, f"the field {path[-1]}", "required field is missing")
    if kind == "extra_forbidden":
        return _unknown_field(model, path, value)
    if kind == "rule":
        return Finding(path, value, str(context["expected"]), str(context["rule"]))
    expected = _expectation(kind, context, value)
    if value is None:
        return Finding(path, None, expected, "null is not a value here")
    return Finding(path, value, expected, _MESSAGES.get(kind, "wrong value"))


_MESSAGES = {
    "string_type": "wrong type",
    "int_type": "wrong type",
    "int_from_float": "wrong type",
    "float_type": "wrong type",
    "bool_type": "wrong type",
    "list_type": "wrong type",
    "dict_type": "wrong type",
    "model_type": "wrong type",
    "model_attributes_type": "wrong type",
    "greater_than_equal": "too small",
    "less_than_equal": "too large",
    "too_long": "too many",
    "too_short": "too few",
    "string_too_long": "too long",
    "string_too_short": "too short",
    "string_pattern_mismatch": "malformed",
    "quantity": "malformed",
    "literal_error": "not allowed",
}


def _expectation(kind: str, context: Mapping[str, Any], value: Any) -> str:
    match kind:
        case "string_type":
            return f"a text{_quoting(value)}"
        case "int_type" | "int_from_float":
            return "an integer" + (" without quotes" if isinstance(value, str) else "")
        case "float_type":
            return "a number" + (" without quotes" if isinstance(value, str) else "")
        case "bool_type":
            return "true or false" + (" without quotes" if isinstance(value, str) else "")
        case "list_type":
            return "a list (items that begin with a dash)"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "a mapping (key: value)"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "too_long":
            return f"at most {context['max_length']} entries"
        case "string_too_long":
            return f"at most {context['max_length']} characters"
        case "string_too_short":
            return "a text that is not empty"
        case "string_pattern_mismatch":
            return _PATTERNS.get(context["pattern"], f"a text that matches {context['pattern']}")
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            guess = nearest(value, allowed) if isinstance(value, str) else None
            hint = f" (did you mean {guess}?)" if guess else ""
            return or_list(name or '""' for name in allowed) + hint
    return str(context.get("expected", kind))


def _quoting(value: Any) -> str:
    if isinstance(value, bool):
        return f': put it in quotes, "{str(value).lower()}"'
    if isinstance(value, int | float):
        return f': put it in quotes, "{value}"'
    return ""


def _unknown_field(model: type[Model], path: Path, value: Any) -> Finding:
    name, owner = str(path[-1]), model_at(model, path[:-1])
    if owner is None:
        return Finding(path, value, "no such field", "unknown field")
    known = [manifest_name(key, field) for key, field in owner.model_fields.items()]
    instead = owner.elsewhere.get(name)
    if instead is not None:
        return Finding(path, value, instead, "unknown field")
    guess = nearest(name, known)
    expected = f"{guess} (nearest known field)" if guess else "one of " + ", ".join(sorted(known))
    return Finding(path, value, expected, "unknown field")


def located(finding: Finding, file: str, document: int, line: int | None) -> Problem:
    """The finding as a problem of a file."""
    return Problem(
        file,
        document,
        show_path(finding.path),
        finding.value,
        finding.expected,
        finding.message,
        line,
    )


def under(finding: Finding, prefix: Path) -> Finding:
    """The finding seen from an object that holds its object at `prefix`."""
    return replace(finding, path=prefix + finding.path)
