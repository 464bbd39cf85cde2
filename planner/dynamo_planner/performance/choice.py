"""Which model is reckoned with: measured ones first, while they hold against what is observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_runtime.timing_profile import TimingProfile

from dynamo_planner.config.model import PlannerConfig, Role
from dynamo_planner.performance.live import Point, learn
from dynamo_planner.performance.model import Model, ProfileModel, RooflineModel

GOOD = 0.25
"""Mean relative error up to which a model is kept although another may be nearer."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The model of a role, and how it did."""

    model: Model
    error: float | None  # mean relative error over the last hour; None: nothing to compare with
    points: int  # that it was compared with
    passed_over: tuple[tuple[str, float], ...] = ()  # (name, error) of those that did worse

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.model.name} (not compared with anything yet)"
        text = f"{self.model.name} (off by {100 * self.error:.0f}% over the last hour"
        return text + "".join(f", {n} by {100 * e:.0f}%" for n, e in self.passed_over) + ")"


def error(model: Model, points: Sequence[Point], context: float) -> tuple[float | None, int]:
    """Mean relative error of ``model`` against ``points``, and how many figures it is of."""
    errors = []
    for p in points:
        if p.prefill_tokens is not None and p.prefill_s:
            errors.append(abs(model.prefill_s(p.prefill_tokens) - p.prefill_s) / p.prefill_s)
        if p.batch is not None and p.step_s:
            errors.append(abs(model.step_s(p.batch, context) - p.step_s) / p.step_s)
    return (sum(errors) / len(errors) if errors else None), len(errors)


def choose_model(
    role: Role,
    profile: TimingProfile | None,
    points: Sequence[Point],
    context: float,
    config: PlannerConfig,
) -> Chosen | None:
    """The first of profile, roofline and live that is off by at most a quarter, else the nearest.

    None if there is no profile, no roofline, and too little was observed.
    """
    live = learn(
        points,
        config.load_min_observations,
        prefill=role in ("prefill", "worker"),
        decode=role in ("decode", "worker"),
    )
    models: list[Model] = []
    if profile is not None:
        models.append(ProfileModel(profile))
    if config.roofline is not None:
        models.append(RooflineModel(config.roofline))
    if live is not None:
        models.append(live)
    judged = [(model, *error(model, points, context)) for model in models]
    best = next((each for each in judged if each[1] is None or each[1] <= GOOD), None)
    best = best or min(judged, key=lambda each: each[1] or 0.0, default=None)
    if best is None:
        return None
    worse = tuple((m.name, e) for m, e, _ in judged if m is not best[0] and e is not None)
    return Chosen(best[0], best[1], best[2], worse)
