"""Prefers workers whose engine has the request's LoRA adapter in its batch already."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import NoParameters

RUNS, HAS_ROOM, WAITS, FULL = 1.0, 0.8, 0.6, 0.0


class LoraAffinityScorer:
    """1.0 where the adapter runs, 0.8 where another one fits in, 0.6 where requests for it wait,
    else 0. Where the engine tells nothing of adapters, and for the base model: 0.8, as there is
    nothing to load. Source: llm-d."""

    def __init__(self, _: NoParameters) -> None:
        pass

    def scores(self, ask: Ask, candidates: Sequence[Candidate]) -> list[float]:
        return [self._score(ask, candidate) for candidate in candidates]

    def _score(self, ask: Ask, candidate: Candidate) -> float:
        worker = ask.worker(candidate)
        told = worker.load.figures
        if ask.model not in worker.loras or not told.max_loras or not candidate.figures_known:
            return HAS_ROOM
        if ask.model in told.loras_running:
            return RUNS
        if len(told.loras_running | told.loras_waiting) < told.max_loras:
            return HAS_ROOM
        return WAITS if ask.model in told.loras_waiting else FULL
