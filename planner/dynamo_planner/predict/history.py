"""Past intervals of a role's traffic, and what they foretell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_planner.config.model import PlannerConfig
from dynamo_planner.observe import Traffic
from dynamo_planner.predict.forecast import forecast

MOST = 1_000
"""Intervals that are remembered: two days of three minutes each."""
TYPICAL_ISL, TYPICAL_OSL = 512.0, 128.0
"""Lengths as long as no request has told its own, tokens."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One interval. Lengths are None where no request ended in it: that is no length of zero."""

    rate: float  # requests a second
    isl: float | None = None  # mean prompt, tokens
    osl: float | None = None  # mean answer, tokens
    computed: float | None = None  # mean prompt tokens that no cache held

    @classmethod
    def of(cls, traffic: Traffic, least_coverage: float) -> Sample | None:
        """None if too little was seen to say anything."""
        rate = traffic.rate(least_coverage)
        if rate is None:
            return None
        return cls(rate, traffic.isl, traffic.osl, traffic.computed)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The next interval."""

    rate: float  # requests a second
    isl: float
    osl: float
    computed: float
    by: str  # the predictor of the rate
    notes: tuple[str, ...] = ()  # where another one was asked for, a sentence each


def predict(history: Sequence[Sample], config: PlannerConfig) -> Prediction | None:
    """What follows ``history``; None if there is none."""
    if not history:
        return None
    rate = forecast([each.rate for each in history], config)
    notes = [f"requests: {rate.why}"] if rate.why else []

    def length(name: str, otherwise: float) -> float:
        known = [value for each in history if (value := getattr(each, name)) is not None]
        if not known:
            return otherwise
        found = forecast(known, config)
        if found.why and not rate.why:
            notes.append(f"{name}: {found.why}")
        return found.value

    isl = length("isl", TYPICAL_ISL)
    return Prediction(
        rate=rate.value,
        isl=isl,
        osl=length("osl", TYPICAL_OSL),
        computed=min(isl, length("computed", isl)),
        by=rate.by,
        notes=tuple(notes),
    )
