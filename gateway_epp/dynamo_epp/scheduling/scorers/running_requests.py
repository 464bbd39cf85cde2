"""Prefers workers whose engine runs fewer requests."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import NoParameters
from dynamo_epp.scheduling.scorers.scale import fewest_first, figures


class RunningRequestsScorer:
    """``(max − r) / (max − min)``, where ``r`` counts what was sent since the engine told.
    Source of the formula: llm-d."""

    def __init__(self, _: NoParameters) -> None:
        pass

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        return fewest_first(figures(candidates, lambda each: each.running + each.sent_since))
