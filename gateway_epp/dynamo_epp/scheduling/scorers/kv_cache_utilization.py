"""Prefers workers whose engine has more of its KV cache free."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import NoParameters
from dynamo_epp.scheduling.scorers.scale import figures


class KvCacheUtilizationScorer:
    """``1 − utilization``. Source: llm-d."""

    def __init__(self, _: NoParameters) -> None:
        pass

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        return [1.0 - usage for usage in figures(candidates, lambda each: each.kv_usage)]
