"""Dynamo's KV cost as a scorer, to be weighed against others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from dynamo_crds.schema import Number
from dynamo_kv_router.choice import Candidate, Policy, kv_costs
from pydantic import Field

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters
from dynamo_epp.scheduling.scorers.scale import fewest_first

NotNegative = Annotated[Number, Field(ge=0)]


class KvCostParameters(Parameters):
    """Names, meanings and defaults are those of ``dynamo frontend --router-…``."""

    overlap_score_credit: NotNegative = 1.0
    overlap_score_credit_decay: NotNegative = 0.0
    prefill_load_scale: NotNegative = 1.0
    decode_active_request_weight: NotNegative = 0.0


class KvCostScorer:
    """``(max − cost) / (max − min)`` over the costs of ``dynamo_kv_router.choice``."""

    def __init__(self, parameters: KvCostParameters) -> None:
        self._policy = Policy(**parameters.model_dump())

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        cached = ask.cached()
        cached.estimated |= not all(cached.exact(candidate) for candidate in candidates)
        overlapping = cached.estimated_overlaps(candidates)
        return fewest_first(kv_costs(ask.size, overlapping, self._policy))
