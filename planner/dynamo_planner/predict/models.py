"""The predictors: thin over statsmodels, each a function from a series to its next value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.linalg import LinAlgError
from statsmodels.tsa.arima.model import ARIMA
from statsmodels.tsa.holtwinters import ExponentialSmoothing
from statsmodels.tsa.statespace.structural import UnobservedComponents

from dynamo_planner.config.model import PlannerConfig
from dynamo_planner.predict.forecast import CannotPredict

ARIMA_LOOKS_BACK = 120
"""Intervals that ARIMA is fitted to: what is older says little of the next one."""
ORDERS = tuple(itertools.product(range(3), range(2)))
"""(p, q) that are tried."""
DAY_S = 86_400.0


def arima(series: Sequence[float], config: PlannerConfig) -> float:
    """ARIMA of the order with the least AICc.

    Fitted by regressions (Hannan and Rissanen, 1982), not by a search: a tenth of a second for all
    orders instead of several, and no optimizer that may stop elsewhere on another machine. Orders
    whose estimate is not stationary are left out. Differenced once where that leaves less variance
    than there is: the usual rule of thumb, needed because information criteria can't be compared
    across differencing.
    """
    recent = np.asarray(series[-ARIMA_LOOKS_BACK:], dtype=float)
    d = int(np.var(np.diff(recent)) < np.var(recent))
    best: tuple[float, float] | None = None
    reasons = []
    for p, q in ORDERS:
        if p + q + 2 >= len(recent) - d:
            continue
        try:
            trend = "n" if d else "c"
            model = ARIMA(recent, order=(p, d, q), trend=trend)
            fitted = model.fit(method="hannan_rissanen")
            found = float(fitted.aicc), float(fitted.forecast(1)[0])
        except (ValueError, LinAlgError) as error:
            reasons.append(str(error))
            continue
        if np.isfinite(found).all() and (best is None or found < best):
            best = found
    if best is None:
        raise CannotPredict(reasons[0] if reasons else "no order fits so short a series")
    return best[1]


def kalman(series: Sequence[float], config: PlannerConfig) -> float:
    """Local linear trend with given variances (no fit): level and slope, filtered."""
    model = UnobservedComponents(np.asarray(series, dtype=float), level="local linear trend")
    variances = [config.kalman_r, config.kalman_q_level, config.kalman_q_trend]
    try:
        return float(model.filter(variances).forecast(1)[0])
    except LinAlgError as error:
        raise CannotPredict(str(error)) from error


def holt_winters(series: Sequence[float], config: PlannerConfig) -> float:
    """Damped trend, and a season once two of them have been seen."""
    values = np.asarray(series, dtype=float)
    season = config.load_predictor_season or round(
        DAY_S / config.throughput_adjustment_interval_seconds
    )
    seasonal = len(values) >= 2 * season >= 4
    try:
        fitted = ExponentialSmoothing(
            values,
            trend="add",
            damped_trend=True,
            seasonal="add" if seasonal else None,
            seasonal_periods=season if seasonal else None,
            initialization_method="estimated",
        ).fit()
        return float(fitted.forecast(1)[0])
    except LinAlgError as error:
        raise CannotPredict(str(error)) from error
