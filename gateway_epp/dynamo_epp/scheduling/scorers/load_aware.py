"""Scores a worker's queue by itself, not against the others' queues."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_crds.schema import Positive
from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters
from dynamo_epp.scheduling.scorers.scale import figures


class LoadAwareParameters(Parameters):
    threshold: Positive = 128
    """Requests in the queue at which the score is 0."""


class LoadAwareScorer:
    """``0.5 · (1 − min(q, threshold) / threshold)``: 0.5 for an empty queue. Source: llm-d."""

    def __init__(self, parameters: LoadAwareParameters) -> None:
        self._threshold = parameters.threshold

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        most = self._threshold
        queues = figures(candidates, lambda each: each.waiting + each.sent_since)
        return [0.5 * (1.0 - min(queue, most) / most) for queue in queues]
