"""Drops workers that are busier than configured bounds allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

from dynamo_crds.schema import Bool, Number
from dynamo_kv_router.choice import Candidate
from pydantic import Field

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.parameters import Parameters, must

Metric = Literal["active-requests", "running-requests", "waiting-queue", "kv-cache-utilization"]

READ: Mapping[Metric, Callable[[Candidate], float]] = {
    "active-requests": lambda candidate: candidate.active_requests,
    "running-requests": lambda candidate: candidate.running,
    "waiting-queue": lambda candidate: candidate.waiting,
    "kv-cache-utilization": lambda candidate: candidate.kv_usage,
}


class Condition(Parameters):
    metric: Metric
    max_value: Annotated[Number, Field(ge=0)]
    """The most that a worker may have."""
    rules = (
        must(
            "maxValue",
            lambda at: at.get("metric") != "kv-cache-utilization" or at["maxValue"] <= 1,
            "the cache's utilization is a share",
            "at most 1",
        ),
    )


class UtilizationParameters(Parameters):
    conditions: list[Condition] = Field(default_factory=list)
    """All must hold."""
    fallback_on_empty: Bool = False
    """Where nobody is left, everybody passes."""
    in_flight_load_producer_name: str = ""
    """Accepted; there is one count of requests in hand."""


class Utilization:
    """An engine whose figures are not known or too old passes the conditions on them (fails
    open); requests in hand are always known."""

    def __init__(self, parameters: UtilizationParameters) -> None:
        self._conditions = [
            (each.metric, READ[each.metric], each.max_value) for each in parameters.conditions
        ]
        self._fallback = parameters.fallback_on_empty

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        reasons = [self._reason(candidate) for candidate in candidates]
        if self._fallback and all(reasons):
            return [""] * len(candidates)
        return reasons

    def _reason(self, candidate: Candidate) -> str:
        for metric, read, most in self._conditions:
            if not candidate.figures_known and metric != "active-requests":
                continue
            if (value := read(candidate)) > most:
                return f"{metric} is {value:g}, above {most:g}"
        return ""
