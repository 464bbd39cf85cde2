"""Prefers workers that are labelled for prompts of this length; can drop the others."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dynamo_crds.schema import Bool, Text
from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters

_RANGE = re.compile(r"\s*(\d+)\s*-\s*(\d+)\s*")
NEUTRAL = 0.5
OUTSIDE = 0.3
"""The most for a worker whose range does not hold the prompt."""


class ContextLengthParameters(Parameters):
    label: Text = "llm-d.ai/context-length-range"
    """Holds ``MIN-MAX`` in tokens, both included."""
    enable_filtering: Bool = False
    """As a filter: drop workers whose range does not hold the prompt."""


class ContextLength:
    """Within the range ``0.3 + 0.7 · (0.7 · narrow + 0.3 · headroom)``, where ``narrow = 1 / (1 +
    width / 10000)`` and ``headroom = (max − n) / width``; 1.0 for a range of one length. Outside
    ``0.3 / (1 + distance / 1000)``. Without the label 0.5, with a malformed one 0. Source: llm-d.
    """

    def __init__(self, parameters: ContextLengthParameters) -> None:
        self._label = parameters.label
        self._filters = parameters.enable_filtering

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        return [self._reason(ask, candidate) if self._filters else "" for candidate in candidates]

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        return [
            _score(ask.size.prompt_tokens, ask.labels(candidate).get(self._label))
            for candidate in candidates
        ]

    def _reason(self, ask: Ask, candidate: Candidate) -> str:
        text, length = ask.labels(candidate).get(self._label), ask.size.prompt_tokens
        if text is None:
            return ""
        bounds = _bounds(text)
        if bounds is None:
            return f"label {self._label} is {text!r}, not MIN-MAX"
        low, high = bounds
        return "" if low <= length <= high else f"{length} tokens are outside {low}-{high}"


def _bounds(text: str) -> tuple[int, int] | None:
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    low, high = int(match[1]), int(match[2])
    return (low, high) if low <= high else None


def _score(length: int, text: str | None) -> float:
    if text is None:
        return NEUTRAL
    bounds = _bounds(text)
    if bounds is None:
        return 0.0
    low, high = bounds
    if not low <= length <= high:
        return OUTSIDE / (1.0 + (max(low, length) - min(length, high)) / 1000.0)
    width = high - low
    if width == 0:
        return 1.0
    fit = 0.7 / (1.0 + width / 10_000.0) + 0.3 * (high - length) / width
    return OUTSIDE + fit * (1.0 - OUTSIDE)
