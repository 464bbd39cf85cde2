"""Scores one number of an endpoint, higher or lower being better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dynamo_crds.schema import Number
from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.attributes import Attribute, value
from dynamo_epp.scheduling.parameters import Parameters, must


class FixedRange(Parameters):
    min: Number
    max: Number
    rules = (must("max", lambda at: at["min"] < at["max"], "the range is empty", "more than min"),)


class AdaptiveRange(Parameters):
    """From the lowest to the highest of the candidates'; it has nothing to set."""


class Normalization(Parameters):
    fixed_range: FixedRange | None = None
    adaptive_range: AdaptiveRange | None = None
    rules = (
        must(
            "adaptiveRange",
            lambda at: not ("fixedRange" in at and "adaptiveRange" in at),
            "two normalizations",
            "either fixedRange or adaptiveRange",
        ),
    )


class Linear(Parameters):
    type: Literal["linear_lower_is_better", "linear_higher_is_better"]
    normalization: Normalization = Normalization()


class EndpointAttributeScorerParameters(Parameters):
    attribute_key: Attribute
    producer: str = ""
    """Accepted; each attribute has one source."""
    algorithm: Linear


class EndpointAttributeScorer:
    """``(v − min) / (max − min)``, clamped, and turned round where lower is better; all 1.0 where
    the candidates' range is empty. 0 where the number is not known. Source: llm-d."""

    def __init__(self, parameters: EndpointAttributeScorerParameters) -> None:
        self._attribute = parameters.attribute_key
        self._lower = parameters.algorithm.type == "linear_lower_is_better"
        self._fixed = parameters.algorithm.normalization.fixed_range

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        values = [value(self._attribute, candidate) for candidate in candidates]
        known = [found for found in values if found is not None]
        if not known:
            return [0.0] * len(candidates)
        low, high = min(known), max(known)
        if self._fixed is not None:
            low, high = self._fixed.min, self._fixed.max
        return [0.0 if found is None else self._score(found, low, high) for found in values]

    def _score(self, found: float, low: float, high: float) -> float:
        if low == high:
            return 1.0
        share = min(1.0, max(0.0, (found - low) / (high - low)))
        return 1.0 - share if self._lower else share
