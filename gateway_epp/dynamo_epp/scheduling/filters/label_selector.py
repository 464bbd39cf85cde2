"""Keeps pods by their labels: by a Kubernetes label selector, or by the values of one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from dynamo_crds.schema import StringMap, Text
from dynamo_kv_router.choice import Candidate
from pydantic import Field

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters


class Requirement(Parameters):
    key: Text
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = Field(default_factory=list)

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value in self.values
            case "NotIn":
                return value is None or value not in self.values
            case "Exists":
                return value is not None
        return value is None


class LabelSelectorParameters(Parameters):
    match_labels: StringMap = Field(default_factory=dict)
    match_expressions: list[Requirement] = Field(default_factory=list)


class LabelSelector:
    """All of ``matchLabels`` and ``matchExpressions`` must hold; empty, it keeps everybody."""

    def __init__(self, parameters: LabelSelectorParameters) -> None:
        self._equal = parameters.match_labels.items()
        self._requirements = parameters.match_expressions

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        return [self._reason(ask.labels(candidate)) for candidate in candidates]

    def _reason(self, labels: Mapping[str, str]) -> str:
        for key, value in self._equal:
            if labels.get(key) != value:
                return f"label {key} is {labels.get(key, 'not there')!r}, not {value!r}"
        for requirement in self._requirements:
            if not requirement.holds(labels):
                return f"label {requirement.key}: {requirement.operator} does not hold"
        return ""


class LabelParameters(Parameters):
    label: Text
    valid_values: list[str] = Field(default_factory=list)
    allows_no_label: bool = False


class LabelFilter:
    """Keeps pods whose ``label`` has one of ``validValues``, and those without it if
    ``allowsNoLabel``. What Dynamo's configurations tell roles apart by."""

    def __init__(self, parameters: LabelParameters) -> None:
        self._label = parameters.label
        self._values = frozenset(parameters.valid_values)
        self._without = parameters.allows_no_label

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        return [self.reason(ask.labels(candidate)) for candidate in candidates]

    def reason(self, labels: Mapping[str, str]) -> str:
        """Why a pod with these labels is dropped; "" if it is not."""
        value = labels.get(self._label)
        if value is None:
            return "" if self._without else f"label {self._label} is not there"
        if value in self._values:
            return ""
        return f"label {self._label} is {value!r}, none of {', '.join(sorted(self._values))}"
