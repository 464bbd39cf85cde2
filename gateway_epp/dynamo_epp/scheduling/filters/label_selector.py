"""Keeps the pods whose labels a Kubernetes label selector picks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from dynamo_crds.schema import StringMap, Text
from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters


class Requirement(Parameters):
    key: Text
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []  # noqa: RUF012

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
    match_labels: StringMap = {}  # noqa: RUF012
    match_expressions: list[Requirement] = []  # noqa: RUF012


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
