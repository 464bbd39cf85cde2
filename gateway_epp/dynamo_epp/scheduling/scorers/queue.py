"""Prefers workers with fewer requests in the engine's queue."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import NoParameters
from dynamo_epp.scheduling.scorers.scale import fewest_first, figures


class QueueScorer:
    """``(max − q) / (max − min)``. ``q`` counts what was sent since the engine told, so that the
    requests between two scrapes don't all go to the same one. Source of the formula: llm-d."""

    def __init__(self, _: NoParameters) -> None:
        pass

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        return fewest_first(figures(candidates, lambda each: each.waiting + each.sent_since))
