"""Keeps the endpoints one of whose numbers passes a threshold."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from dynamo_crds.schema import Bool, Number
from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.attributes import Attribute, value
from dynamo_epp.scheduling.parameters import Parameters

Operator = Literal[
    "LessThan", "LessThanOrEqual", "GreaterThan", "GreaterThanOrEqual", "Equal", "NotEqual"
]
COMPARE: Mapping[Operator, Callable[[float, float], bool]] = {
    "LessThan": operator.lt,
    "LessThanOrEqual": operator.le,
    "GreaterThan": operator.gt,
    "GreaterThanOrEqual": operator.ge,
    "Equal": operator.eq,
    "NotEqual": operator.ne,
}


class Threshold(Parameters):
    operator: Operator
    value: Number


class ThresholdAlgorithm(Parameters):
    type: Literal["threshold"]
    threshold: Threshold


class EndpointAttributeParameters(Parameters):
    attribute: Attribute
    producer: str = ""
    """Accepted; each attribute has one source."""
    on_missing: Literal["Pass", "Fail"] = "Pass"
    """What becomes of endpoints whose number is not known."""
    fallback_on_empty: Bool = False
    """Where nobody is left, everybody passes."""
    algorithm: ThresholdAlgorithm


class EndpointAttributeFilter:
    def __init__(self, parameters: EndpointAttributeParameters) -> None:
        threshold = parameters.algorithm.threshold
        self._attribute = parameters.attribute
        self._compare, self._bound = COMPARE[threshold.operator], threshold.value
        self._condition = f"{threshold.operator} {threshold.value:g}"
        self._missing = "" if parameters.on_missing == "Pass" else f"{self._attribute} not known"
        self._fallback = parameters.fallback_on_empty

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        reasons = [self._reason(candidate) for candidate in candidates]
        if self._fallback and all(reasons):
            return [""] * len(candidates)
        return reasons

    def _reason(self, candidate: Candidate) -> str:
        found = value(self._attribute, candidate)
        if found is None:
            return self._missing
        if self._compare(found, self._bound):
            return ""
        return f"{self._attribute} is {found:g}, not {self._condition}"
