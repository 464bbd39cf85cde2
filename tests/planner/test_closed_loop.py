"""The planner around a simulated fleet, in virtual time: the right number, and calm."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dynamo_planner.config import PlannerConfig
from dynamo_planner.execute import Applied
from dynamo_planner.fleet import Component
from dynamo_planner.observe import Counters, Reading
from dynamo_planner.observe.reading import COUNTERS
from dynamo_planner.performance import Profiles
from dynamo_planner.record import replay
from dynamo_planner.state import Inputs, State
from dynamo_planner.step import step

from tests.planner.simulated_fleet import PROFILE, Loop, reversals

LOAD = PlannerConfig(
    mode="agg",
    optimization_target="load",
    decode_scale_up_kv_rate=70,
    decode_scale_down_kv_rate=30,
    max_gpu_budget=20,
)
SLA = PlannerConfig(
    mode="agg",
    optimization_target="sla",
    ttft_ms=400,
    itl_ms=25,
    load_predictor="constant",
    throughput_adjustment_interval_seconds=60,
    max_gpu_budget=20,
)
MEASURED = Profiles(PROFILE, PROFILE)


def test_a_step_of_load_up_and_back_is_followed() -> None:
    loop = Loop(LOAD, lambda now: 60.0 if 300 <= now < 1200 else 6.0, isl=1000, osl=150)
    before = loop.run(300)
    during = loop.run(900)
    after = loop.run(1500)
    assert before[-1] == 1
    assert during[-1] == 9
    assert after[-1] == 1
    assert reversals(before + during + after) == 1


def test_steady_load_is_left_alone() -> None:
    loop = Loop(LOAD, lambda now: 20.0, replicas=2)
    loop.run(600)
    settled = loop.run(1800)
    assert reversals(settled) <= 1
    assert len(set(settled[-120:])) == 1


def test_no_traffic_falls_to_the_least_and_is_zero() -> None:
    loop = Loop(LOAD, lambda now: 0.0, replicas=6)
    asked = loop.run(1800)
    assert asked[-1] == 1
    for decision in loop.decisions[2:]:
        (role,) = decision.roles
        assert role.observed.rps == 0.0
        assert role.observed.ttft_s is None


def test_an_outage_holds_what_there_is_and_says_so() -> None:
    def spoil(now: float, reading: Reading) -> Reading:
        return replace(reading, age_s=now - 600) if now >= 600 else reading

    loop = Loop(LOAD, lambda now: 30.0 if now < 600 else 0.0, replicas=1, spoil=spoil)
    before = loop.run(600)
    blind = loop.run(1200)
    assert before[-1] > 1
    assert set(blind[5:]) == {before[-1]}
    (role,) = loop.decisions[-1].roles
    assert role.held
    assert loop.decisions[-1].blind
    assert "nothing was heard" in role.reason


def test_after_an_outage_it_waits_the_whole_time_before_it_takes_away() -> None:
    def spoil(now: float, reading: Reading) -> Reading:
        return replace(reading, age_s=now - 300) if 300 <= now < 600 else reading

    loop = Loop(LOAD, lambda now: 0.0, replicas=6, spoil=spoil)
    loop.run(600)
    held = loop.desired
    waiting = loop.run(LOAD.scale_down_stabilization_seconds - 10)
    assert set(waiting) == {held}
    assert loop.run(60)[-1] < held


def test_by_prediction_the_targets_are_held_with_few() -> None:
    loop = Loop(SLA, lambda now: 10.0 + now / 120, profiles=MEASURED, start_s=20)
    asked = loop.run(3600)
    assert reversals(asked) == 0
    late = loop.ttfts[len(loop.ttfts) // 2 :]
    assert sum(late) / len(late) < 0.4
    assert asked[-1] < 12


@pytest.mark.parametrize("predictor", ["kalman", "arima", "holt-winters"])
def test_other_predictors_close_the_loop_too(predictor: str) -> None:
    config = SLA.model_copy(update={"load_predictor": predictor})
    loop = Loop(config, lambda now: 10.0 + now / 60 + 10 * (now > 600), profiles=MEASURED)
    asked = loop.run(800)
    assert asked[-1] > asked[20]


def test_without_profile_it_learns_and_then_scales() -> None:
    loop = Loop(SLA, lambda now: 30.0, replicas=1)
    asked = loop.run(1200)
    assert asked[-1] > 1
    assert {role.model for d in loop.decisions[30:] for role in d.roles} == {"live"}


def test_the_check_by_estimate_adds_between_two_predictions() -> None:
    config = SLA.model_copy(
        update={"enable_load_scaling": True, "throughput_adjustment_interval_seconds": 3000.0}
    )
    loop = Loop(config, lambda now: 60.0, replicas=1, profiles=MEASURED)
    assert loop.run(900)[-1] > 1


def test_advisory_mode_changes_nothing_and_tells_everything() -> None:
    loop = Loop(LOAD.model_copy(update={"advisory": True}), lambda now: 60.0)
    assert set(loop.run(600)) == {1}
    (role,) = loop.decisions[-1].roles
    assert role.replicas > 1
    assert loop.decisions[-1].advisory


def test_who_only_advises_follows_what_others_set() -> None:
    loop = Loop(LOAD.model_copy(update={"advisory": True}), lambda now: 0.0, replicas=4)
    loop.run(300)
    loop.desired = 6
    loop._scale(0)
    loop.run(300)
    (role,) = loop.decisions[-1].roles
    assert (role.desired, role.held) == (6, False)
    assert role.replicas < 6


def test_somebody_else_is_respected_and_reported() -> None:
    loop = Loop(LOAD, lambda now: 0.0, replicas=1)
    loop.run(600)
    loop.desired = 5
    loop._scale(0)
    kept = loop.run(LOAD.scale_down_stabilization_seconds)
    assert set(kept) == {5}
    told = [role.reason for d in loop.decisions for role in d.roles]
    assert any("somebody else scaled Worker from 1 to 5" in reason for reason in told)


def test_a_run_replays_bit_for_bit() -> None:
    loop = Loop(SLA, lambda now: 10.0 + now / 60, profiles=MEASURED)
    loop.run(900)
    again = list(replay(loop.recording))
    assert len(again) == len(loop.decisions)
    assert all(each.same for each in again)
    assert [each.decision for each in again] == loop.decisions


def test_prefill_and_decode_are_scaled_each_by_its_own() -> None:
    """Prompts grow longer, answers stay: prefill workers come, decode workers do not."""
    config = SLA.model_copy(update={"mode": "disagg", "max_gpu_budget": 20})
    state, replicas, applied = State.begin(MEASURED), {"prefill": 1, "decode": 1}, ()
    totals = {role: dict.fromkeys(COUNTERS, 0.0) for role in replicas}
    for number in range(200):
        prompt = 500.0 if number < 60 else 4000.0
        for role, sums in totals.items():
            grown = {
                "first_tokens": 50.0,
                "ttft_seconds": 5.0,
                "finished": 50.0,
                "finished_seconds": 100.0,
                "prompt_tokens": 50 * prompt,
                "prefill_tokens": 50 * prompt if role == "prefill" else 50.0,
                "prefill_seconds": 50 * PROFILE.prefill_seconds(prompt),
                "output_tokens": 50.0 if role == "prefill" else 5000.0,
                "itl_tokens": 0.0 if role == "prefill" else 4950.0,
                "itl_seconds": 0.0 if role == "prefill" else 60.0,
            }
            for name, value in grown.items():
                sums[name] += value
        readings = tuple(
            Reading(
                f"{role}{n}",
                role,
                age_s=0.0,
                running=2.0,
                waiting=0.0,
                kv_usage=0.2,
                counters=Counters(**{k: v / count for k, v in totals[role].items()}),
            )
            for role, count in replicas.items()
            for n in range(count)
        )
        fleet = (
            Component("decode", "decode", replicas["decode"], ready=replicas["decode"]),
            Component("prefill", "prefill", replicas["prefill"], ready=replicas["prefill"]),
        )
        state, decision = step(state, Inputs(5.0 * number, fleet, readings, applied), config)
        applied = tuple(Applied(o.component, o.replicas) for o in decision.orders)
        for order in decision.orders:
            for name in COUNTERS:  # new pods count from zero: each has its share of what was
                totals[order.component][name] *= order.replicas / replicas[order.component]
            replicas[order.component] = order.replicas
        if number == 59:
            before = dict(replicas)
    assert before["prefill"] <= 2
    assert replicas["prefill"] > before["prefill"] + 2
    assert replicas["decode"] <= before["decode"] + 1
