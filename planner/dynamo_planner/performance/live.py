"""A model learned from what the workers themselves tell: two lines, fitted by least squares.

Closed form in plain arithmetic, so that a replay gives the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo_planner.observe import RoleView

REMEMBERED_S = 3_600.0
"""Points older than this are forgotten: models and traffic change."""


@dataclass(frozen=True, slots=True)
class Point:
    """Means of one role over one look. A half that was not seen is None."""

    at: float
    prefill_tokens: float | None = None  # computed for a request
    prefill_s: float | None = None  # its time in prefill
    batch: float | None = None  # requests in a worker's batch
    step_s: float | None = None  # between two tokens


def point(at: float, view: RoleView) -> Point | None:
    """What a look teaches; None if nothing was computed in it."""
    traffic = view.traffic
    prefill = traffic.mean("prefill_seconds", "finished")
    step, batch = traffic.itl_s, traffic.batch
    learned = Point(
        at,
        *((traffic.computed, prefill) if prefill and traffic.computed else (None, None)),
        *((batch, step) if step and batch else (None, None)),
    )
    if learned.prefill_s is None and learned.step_s is None:
        return None
    return learned


@dataclass(frozen=True, slots=True)
class Line:
    """``intercept + slope × x``, neither negative."""

    intercept: float
    slope: float

    def __call__(self, x: float) -> float:
        return self.intercept + self.slope * max(0.0, x)


def fit(pairs: Sequence[tuple[float, float]]) -> Line | None:
    """Least squares with both coefficients ≥ 0; None for no pairs.

    Where all x are about the same a slope can't be told: then the line goes through the origin,
    which errs towards more replicas.
    """
    if not pairs:
        return None
    n = len(pairs)
    mean_x, mean_y = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    spread = sum((x - mean_x) ** 2 for x, _ in pairs)
    if spread > (0.05 * mean_x) ** 2 * n:
        slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
        intercept = mean_y - slope * mean_x
        if slope < 0:
            return Line(mean_y, 0.0)
        if intercept >= 0:
            return Line(intercept, slope)
    return Line(0.0, mean_y / mean_x) if mean_x > 0 else Line(mean_y, 0.0)


@dataclass(frozen=True, slots=True)
class LiveModel:
    """The two lines; the context is in them as it was on average."""

    prefill: Line
    step: Line
    name: str = "live"

    def prefill_s(self, tokens: float) -> float:
        return self.prefill(tokens) if tokens > 0 else 0.0

    def step_s(self, batch: float, context: float) -> float:
        return self.step(batch) if batch > 0 else 0.0


def learn(points: Iterable[Point], least: int, *, prefill: bool, decode: bool) -> LiveModel | None:
    """The model of ``points``; None with fewer than ``least`` of what the role does."""
    given = list(points)
    prefills = [
        (p.prefill_tokens, p.prefill_s)
        for p in given
        if p.prefill_tokens is not None and p.prefill_s is not None
    ]
    steps = [(p.batch, p.step_s) for p in given if p.batch is not None and p.step_s is not None]
    if (prefill and len(prefills) < least) or (decode and len(steps) < least):
        return None
    nothing = Line(0.0, 0.0)
    return LiveModel(fit(prefills) or nothing, fit(steps) or nothing)
