"""Prefers the worker that the request's session belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.sessions import Sessions


class SessionAffinityScorer(Sessions):
    """1.0 for the session's worker, 0 for the others. Source: llm-d."""

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        scores = [0.0] * len(candidates)
        place = self.place(ask, candidates)
        if place is not None:
            scores[place] = 1.0
        return scores
