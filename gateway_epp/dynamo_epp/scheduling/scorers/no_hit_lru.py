"""Spreads prompts that nobody caches: the worker that got none for the longest time comes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo_crds.schema import Positive
from dynamo_kv_router.choice import Candidate, Decision

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters


class NoHitLruParameters(Parameters):
    lru_size: Positive = 1024
    """Workers that are remembered."""
    prefix_plugin_type: str = ""
    """Accepted, as the next two: there is one knowledge of what is cached."""
    prefix_plugin_name: str = ""
    prefix_match_info_producer_name: str = ""


class NoHitLruScorer:
    """For a prompt that nobody caches ``1 − rank / (n − 1)``, where workers that never got such a
    prompt come first, then those that got one the longest ago. For others 0.5. Source: llm-d."""

    def __init__(self, parameters: NoHitLruParameters) -> None:
        self._size = parameters.lru_size
        self._got: OrderedDict[str, None] = OrderedDict()  # names, the longest ago first

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        if not self._cold(ask, candidates):
            return [0.5] * len(candidates)
        if len(candidates) == 1:
            return [1.0]
        age = {name: rank for rank, name in enumerate(self._got)}
        order = sorted(range(len(candidates)), key=lambda at: age.get(candidates[at].name, -1))
        scores = [0.0] * len(candidates)
        for rank, at in enumerate(order):
            scores[at] = 1.0 - rank / (len(candidates) - 1)
        return scores

    def picked(self, ask: Ask, decision: Decision) -> None:
        assert decision.chosen is not None
        if self._cold(ask, [scored.candidate for scored in decision.ranked]):
            name = decision.chosen.candidate.name
            self._got[name] = None
            self._got.move_to_end(name)
            if len(self._got) > self._size:
                self._got.popitem(last=False)

    def _cold(self, ask: Ask, candidates: Sequence[Candidate]) -> bool:
        cached = ask.cached()
        return not any(cached.tokens(candidate) for candidate in candidates)
