"""Prefers the pods whose label has the value that a request header asks for."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_crds.schema import Text
from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters


class HeaderLabelParameters(Parameters):
    header_name: Text
    label_key: Text


class HeaderLabelAffinityScorer:
    """1.0 where label and header are equal, else 0; 0 for all without the header. Source: llm-d."""

    def __init__(self, parameters: HeaderLabelParameters) -> None:
        self._header = parameters.header_name.lower()
        self._label = parameters.label_key

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        wanted = ask.headers.get(self._header)
        if not wanted:
            return [0.0] * len(candidates)
        return [
            1.0 if ask.labels(candidate).get(self._label) == wanted else 0.0
            for candidate in candidates
        ]
