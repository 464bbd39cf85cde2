"""One step ahead of a series, by the predictor asked for or, said so, by the last value.

The models are statsmodels'. A fit that fails, that is not a number, or that goes where the series
never was is not believed: the last value is used instead, and the reason is kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo_planner.config.model import PlannerConfig

Series = Sequence[float]
Predictor = Callable[[Series, PlannerConfig], float]
"""The next value after a series; raises ``CannotPredict`` or ValueError if it can't tell."""

BELIEVED = 3.0
"""A forecast above so many times the highest value there was is not believed."""
LEAST = {"arima": 5, "holt-winters": 10}
"""Values that a predictor needs; the Kalman filter's are configured."""


class CannotPredict(Exception):
    """A series that a predictor can make nothing of; the message says why."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The next value, and which predictor it is from."""

    value: float
    by: str
    why: str = ""  # why it is not by the predictor asked for; "" if it is


def forecast(series: Series, config: PlannerConfig) -> Forecast:
    """The value after ``series`` (not empty, ≥ 0), by ``config.load_predictor``."""
    last = float(series[-1])
    name = {"prophet": "holt-winters"}.get(config.load_predictor, config.load_predictor)
    if name == "constant":
        return Forecast(last, name)
    least = config.kalman_min_points if name == "kalman" else LEAST[name]
    if len(series) < least:
        return Forecast(
            last, "constant", f"{name} needs {least} intervals, there are {len(series)}"
        )
    if min(series) == max(series):
        return Forecast(last, "constant", "the traffic does not vary")
    predictor = _predictor(name)
    given = [math.log1p(value) for value in series] if config.load_predictor_log1p else series
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that did not converge: judged by the result
            value = float(predictor(given, config))
            if config.load_predictor_log1p:
                value = math.expm1(value)
    except (CannotPredict, ValueError, ArithmeticError, IndexError) as error:
        return Forecast(last, "constant", f"{name} failed: {error}")
    if not math.isfinite(value) or value > BELIEVED * max(series):
        return Forecast(last, "constant", f"{name} foresees {value:.4g}, which is not believed")
    return Forecast(max(0.0, value), name)


def _predictor(name: str) -> Predictor:
    """Imported when used: statsmodels takes a second, and no reactive planner needs it."""
    from dynamo_planner.predict import models

    return {
        "arima": models.arima,
        "kalman": models.kalman,
        "holt-winters": models.holt_winters,
    }[name]
