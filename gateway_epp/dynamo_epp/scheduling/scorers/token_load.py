"""Prefers workers with fewer tokens in hand, this request's uncached ones included."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_crds.schema import Positive
from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters


class TokenLoadParameters(Parameters):
    queue_threshold_tokens: Positive = 4_194_304
    """Tokens at which the score is 0: 128 requests of 32 Ki tokens."""
    in_flight_load_producer_name: str = ""
    """Accepted; there is one count of tokens in hand."""


class TokenLoadScorer:
    """``1 − min(tokens, threshold) / threshold``, where ``tokens`` are those that running requests
    hold in blocks, and the request's own that are not cached there. Source: llm-d."""

    def __init__(self, parameters: TokenLoadParameters) -> None:
        self._threshold = parameters.queue_threshold_tokens

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        cached, most = ask.cached(), self._threshold
        return [
            1.0 - min(most, self._held(ask, each) + self._own(ask, cached.tokens(each))) / most
            for each in candidates
        ]

    def _held(self, ask: Ask, candidate: Candidate) -> float:
        block = ask.worker(candidate).block_size or ask.size.block_size
        return candidate.active_decode_blocks * block

    def _own(self, ask: Ask, cached: int) -> int:
        return max(0, ask.size.prompt_tokens - cached)
