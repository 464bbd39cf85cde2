"""Prefers workers that cache more of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from dynamo_crds.schema import Number, Positive
from dynamo_kv_router.choice import Candidate
from pydantic import Field

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters


class PrefixCacheParameters(Parameters):
    match_length_weight: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Share of the score that depends on the cached length alone, whatever the prompt's."""
    match_length_scale_tokens: Positive = 8192
    """Cached tokens for which that share is full."""
    prefix_match_info_producer_name: str = ""
    """Accepted; exact knowledge is taken where there is some, and estimates elsewhere."""


class PrefixCacheScorer:
    """``w · min(1, cached / scale)² + (1 − w) · cached share``. Source: llm-d."""

    def __init__(self, parameters: PrefixCacheParameters) -> None:
        self._weight = parameters.match_length_weight
        self._scale = parameters.match_length_scale_tokens

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        cached, weight = ask.cached(), self._weight
        shares = [cached.share(candidate) for candidate in candidates]
        if not weight:
            return shares
        lengths = [min(1.0, cached.tokens(candidate) / self._scale) for candidate in candidates]
        return [
            weight * length * length + (1.0 - weight) * share
            for length, share in zip(lengths, shares, strict=True)
        ]
