"""Readings: what counts, what is zero, and what is not known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from dynamo_planner.config import PlannerConfig
from dynamo_planner.fleet import Component
from dynamo_planner.observe import Counters, Reading, RoleView, Seen, observe
from dynamo_planner.observe.page import figures

CONFIG = PlannerConfig(mode="agg")
FLEET = (Component("W", "worker", 2, ready=2),)


def count(requests: float) -> Counters:
    """An engine that has served so many requests of 100 + 10 tokens, each in 1 s, TTFT 0.1 s."""
    return Counters(
        first_tokens=requests,
        ttft_seconds=0.1 * requests,
        itl_seconds=0.9 * requests,
        itl_tokens=9 * requests,
        finished=requests,
        finished_seconds=requests,
        prompt_tokens=100 * requests,
        output_tokens=10 * requests,
        prefill_tokens=50 * requests,
        prefill_seconds=0.05 * requests,
    )


def reading(worker: str, requests: float, **fields: object) -> Reading:
    given = {"age_s": 0.0, "running": 1.0, "waiting": 0.0, "kv_usage": 0.5} | fields
    return Reading(worker, "W", counters=count(requests), **given)  # type: ignore[arg-type]


def look(*pairs: tuple[Reading, ...], gap: float = 5.0) -> tuple[RoleView, dict[str, Seen], bool]:
    """Looks ``gap`` seconds apart; the last view."""
    seen: dict[str, Seen] = {}
    last: float | None = None
    at = 100.0
    for readings in pairs:
        observation, seen = observe(seen, last, at, readings, FLEET, CONFIG)
        last, at = at, at + gap
    return observation.of("worker"), seen, observation.clock_jumped


def test_rates_and_means_come_from_two_looks() -> None:
    view, _, _ = look((reading("a", 10), reading("b", 0)), (reading("a", 20), reading("b", 5)))
    traffic = view.traffic
    assert traffic.rate(0.5) == pytest.approx(3.0)
    assert (traffic.isl, traffic.osl, traffic.computed) == (100, 10, 50)
    assert traffic.ttft_s == pytest.approx(0.1)
    assert traffic.itl_s == pytest.approx(0.1)
    assert (view.seen, view.ready, view.whole) == (2, 2, True)


def test_what_waits_has_arrived_too() -> None:
    view, _, _ = look((reading("a", 10),), (reading("a", 10, waiting=20.0),))
    assert view.traffic.rate(0.5) == pytest.approx(4.0)


def test_zero_is_zero_and_means_of_nothing_are_nothing() -> None:
    idle = reading("a", 10, running=0.0)
    view, _, _ = look((idle,), (idle,))
    assert view.traffic.rate(0.5) == 0.0
    assert (view.traffic.ttft_s, view.traffic.isl) == (None, None)
    assert not view.busy


def test_no_workers_at_all_are_a_rate_of_zero() -> None:
    view, _, _ = look((), ())
    assert view.traffic.rate(0.5) == 0.0
    assert not view.blind


def test_a_restarted_engine_counts_from_zero() -> None:
    view, _, _ = look((reading("a", 1000),), (reading("a", 10),))
    assert view.traffic.rate(0.5) == pytest.approx(2.0)


def test_those_that_are_not_seen_did_as_the_others() -> None:
    first = (reading("a", 0), reading("b", 0))
    view, _, _ = look(first, (reading("a", 10), reading("b", 0, age_s=None)))
    assert view.traffic.rate(0.5) == pytest.approx(4.0)
    assert view.traffic.rate(0.6) is None
    assert view.note == "1 of 2 workers give no figures"
    assert not view.whole


def test_the_last_good_scrape_again_says_nothing_new() -> None:
    view, _, _ = look((reading("a", 10),), (reading("a", 10, age_s=5.0),))
    assert view.traffic.rate(0.5) is None
    assert view.seen == 1
    assert view.age_s == 5


def test_a_scrape_after_a_gap_covers_the_gap() -> None:
    missed = reading("a", 0, age_s=5.0)
    view, _, _ = look((reading("a", 0),), (missed,), (reading("a", 20),))
    assert view.traffic.arrived == 20
    assert view.traffic.worker_seconds == 10


def test_stale_readings_count_as_none() -> None:
    view, _, _ = look((reading("a", 10, age_s=16.0), reading("b", 10, age_s=16.0)))
    assert view.blind
    assert view.note == "2 of 2 readings are stale"


@pytest.mark.parametrize("gap", [0.0, -5.0, 1e5])
def test_a_clock_that_jumps_gives_no_rate(gap: float) -> None:
    view, seen, jumped = look((reading("a", 0),), (reading("a", 10),), gap=gap)
    assert jumped
    assert view.traffic.worker_seconds == 0
    assert set(seen) == {"a"}


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1.0, None])
def test_what_is_no_figure_is_not_known(odd: float | None) -> None:
    broken = reading("a", 10, running=odd)
    assert look((broken,), (broken,))[0].blind
    counters = replace(count(20), ttft_seconds=odd)
    view, _, _ = look((reading("a", 10),), (replace(reading("a", 20), counters=counters),))
    assert view.traffic.rate(0.5) is None
    assert view.seen == 1


def test_pods_that_come_or_go_are_not_judged() -> None:
    gone = reading("a", 10, terminating=True)
    starting = reading("b", 10, ready=False)
    assert look((gone, starting))[0].ready == 0


def test_what_waits_fills_the_cache_in_advance() -> None:
    told = reading("a", 10, queued_tokens=600.0, waiting=2.0, kv_tokens=1000.0)
    guessed = reading("b", 10, waiting=2.0)
    view, _, _ = look((told, guessed))
    assert [load.kv_load for load in view.loads] == [pytest.approx(1.1), pytest.approx(1.5)]
    assert view.loads[1].queued_tokens == 200


PAGE = """\
# HELP vllm:num_requests_running Requests.
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.1
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="100"} 1.0
vllm:time_to_first_token_seconds_count{engine="0"} 7
vllm:time_to_first_token_seconds_sum{engine="0"} NaN
dynamo_worker_active_prefill_tokens 640.0
"""


def test_a_page_of_two_ranks_and_a_launcher() -> None:
    found = figures(PAGE)
    assert found is not None
    assert (found.running, found.waiting, found.kv_usage) == (4, 2, pytest.approx(0.3))
    assert (found.kv_tokens, found.queued_tokens) == (3200, 640)
    assert (found.counters.first_tokens, found.counters.ttft_seconds) == (7, None)


@pytest.mark.parametrize(
    "page", ["", "up 1\n", "vllm:num_requests_running\n", "vllm:num_requests_running x\n", "{}\n"]
)
def test_a_page_without_load_is_no_figures(page: str) -> None:
    assert figures(page) is None
