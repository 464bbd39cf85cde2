"""Prefers workers with fewer requests in hand, by the picker's own count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from dynamo_crds.schema import Count, Number
from dynamo_kv_router.choice import Candidate
from pydantic import Field

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters


class ActiveRequestParameters(Parameters):
    idle_threshold: Count = 0
    """Workers with at most so many requests count as idle."""
    max_busy_score: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """The most that a worker gets which is not idle."""
    request_timeout: str = ""
    """Accepted; a request counts until it has ended."""
    in_flight_load_producer_name: str = ""
    """Accepted; there is one count of requests in hand."""


class ActiveRequestScorer:
    """1.0 for the idle, ``(max − n) / max · maxBusyScore`` for the others. Source: llm-d."""

    def __init__(self, parameters: ActiveRequestParameters) -> None:
        self._idle = parameters.idle_threshold
        self._busy_score = parameters.max_busy_score

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        most = max(candidate.active_requests for candidate in candidates)
        return [
            1.0
            if candidate.active_requests <= self._idle
            else (most - candidate.active_requests) / most * self._busy_score
            for candidate in candidates
        ]
