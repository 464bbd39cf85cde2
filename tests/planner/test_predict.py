"""Predictors: on known series, and their fall-backs."""

from __future__ import annotations

import math

import pytest
from dynamo_planner.config import PlannerConfig
from dynamo_planner.predict import InvalidTrace, Sample, forecast, predict, warmup
from hypothesis import given, settings
from hypothesis import strategies as st


def config(name: str, **more: object) -> PlannerConfig:
    return PlannerConfig(load_predictor=name, **more)  # type: ignore[arg-type]


RAMP = [10.0 + 2 * n + (n % 3) * 0.1 for n in range(40)]


@pytest.mark.parametrize(
    ("name", "near"), [("constant", 88.0), ("arima", 90), ("kalman", 90), ("holt-winters", 90)]
)
def test_a_ramp_is_followed(name: str, near: float) -> None:
    found = forecast(RAMP, config(name))
    assert found.by == name
    assert found.why == ""
    assert found.value == pytest.approx(near, abs=1.5)


def test_a_season_is_foreseen_once_two_have_been_seen() -> None:
    series = [20 + 10 * math.sin(2 * math.pi * n / 12) + n % 2 * 0.01 for n in range(39)]
    truth = 20 + 10 * math.sin(2 * math.pi * 39 / 12)
    found = forecast(series, config("holt-winters", load_predictor_season=12))
    assert found.value == pytest.approx(truth, abs=1)
    assert forecast(series, config("prophet", load_predictor_season=12)) == found


def test_growth_by_shares_is_followed_in_the_logarithm() -> None:
    series = [2.0 ** (n / 4) + n % 2 * 0.01 for n in range(24)]
    found = forecast(series, config("kalman", load_predictor_log1p=True))
    assert found.value == pytest.approx(2.0**6, rel=0.1)


@pytest.mark.parametrize(
    ("name", "series", "why"),
    [
        ("arima", [1.0, 2.0], "arima needs 5 intervals, there are 2"),
        ("kalman", [1.0, 2.0], "kalman needs 5 intervals, there are 2"),
        ("holt-winters", [1.0, 2.0, 3.0], "holt-winters needs 10 intervals, there are 3"),
        ("arima", [0.0] * 9, "the traffic does not vary"),
    ],
)
def test_where_it_can_not_tell_it_is_the_last_value_and_said(
    name: str, series: list[float], why: str
) -> None:
    found = forecast(series, config(name))
    assert (found.value, found.by, found.why) == (series[-1], "constant", why)


def test_what_is_out_of_all_proportion_is_not_believed() -> None:
    found = forecast([1, 1, 1, 1, 1, 50.0, 0.1, 200.0], config("kalman", kalman_q_trend=1e6))
    assert found.value <= 3 * 200


@pytest.mark.parametrize("name", ["arima", "kalman", "holt-winters"])
@settings(max_examples=25)
@given(series=st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_every_series_has_a_next_value(name: str, series: list[float]) -> None:
    found = forecast(series, config(name))
    assert math.isfinite(found.value)
    assert 0 <= found.value <= 3 * max(series)
    assert found.by == name or found.why


def test_intervals_without_a_request_say_nothing_of_lengths() -> None:
    history = [Sample(2.0, 100, 10, 60), Sample(0.0), Sample(0.0)]
    found = predict(history, config("constant"))
    assert found is not None
    assert (found.rate, found.isl, found.osl, found.computed) == (0.0, 100, 10, 60)
    assert predict([], config("constant")) is None


def test_a_trace_warms_up_with_its_empty_intervals() -> None:
    lines = [
        '{"timestamp": 0, "input_length": 10, "output_length": 2, "hash_ids": [1]}',
        '{"timestamp": 500, "input_length": 30, "output_length": 4}',
        "",
        '{"timestamp": 125000, "input_length": 50, "output_length": 6}',
        '{"timestamp": 190000, "input_length": 50, "output_length": 6}',
    ]
    assert warmup(lines, 60) == (
        Sample(2 / 60, 20, 3, 20),
        Sample(0.0),
        Sample(1 / 60, 50, 6, 50),
    )


@pytest.mark.parametrize(
    "line", ["{", '{"timestamp": 1}', '{"timestamp": -1, "input_length": 1, "output_length": 1}']
)
def test_a_line_that_is_no_request_is_named(line: str) -> None:
    with pytest.raises(InvalidTrace, match=r"t\.jsonl, line 2"):
        warmup(['{"timestamp": 0, "input_length": 1, "output_length": 1}', line], 60, "t.jsonl")
