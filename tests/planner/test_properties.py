"""What holds whatever comes in: bounds, calm, monotony, and that there always is an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from dynamo_planner.config import PlannerConfig, given_config
from dynamo_planner.config.model import Role
from dynamo_planner.constrain import constrain
from dynamo_planner.decision import Decision
from dynamo_planner.execute import Applied
from dynamo_planner.fleet import Component, desired, of_role
from dynamo_planner.metrics import PlannerMetrics
from dynamo_planner.observe import Counters, Reading, RoleView, WorkerLoad
from dynamo_planner.observe.reading import COUNTERS
from dynamo_planner.performance import Profiles
from dynamo_planner.propose import propose_by_estimate, propose_by_load
from dynamo_planner.record import Head, Look, head_line, look_line, replay
from dynamo_planner.state import Inputs, State
from dynamo_planner.step import step
from dynamo_runtime.timing_profile import TimingProfile
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

DISAGG = given_config(
    '{"optimization_target": "load", "max_gpu_budget": 12, "max_endpoint": 6,'
    ' "prefill_scale_up_queue_tokens": 2000, "prefill_scale_down_queue_tokens": 200,'
    ' "decode_scale_up_kv_rate": 80, "decode_scale_down_kv_rate": 40,'
    ' "scale_down_stabilization_seconds": 60, "load_min_observations": 2}'
).config
AGG_SLA = given_config(
    '{"mode": "agg", "optimization_target": "sla", "enable_load_scaling": true,'
    ' "throughput_adjustment_interval_seconds": 20, "load_predictor": "kalman",'
    ' "max_gpu_budget": 10, "scale_down_stabilization_seconds": 60}'
).config
PROFILES = Profiles(TimingProfile(), TimingProfile())

odd = st.one_of(
    st.none(),
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300]),
    st.floats(0, 1e6),
)
counters = st.builds(Counters, *(odd for _ in COUNTERS))


@st.composite
def looks(draw: st.DrawFn, config: PlannerConfig) -> list[tuple[float, list[Reading], list[bool]]]:
    """(seconds since the last look, readings, for each component whether its pods come up)."""
    found = []
    for _ in range(draw(st.integers(1, 12))):
        gap = draw(st.sampled_from([5.0, 5.0, 5.0, 5.0, 0.0, -100.0, 1.0, 4000.0]))
        readings = [
            Reading(
                worker=f"{role}-{number}",
                component=role,
                ready=draw(st.booleans()),
                terminating=draw(st.booleans()),
                age_s=draw(odd),
                running=draw(odd),
                waiting=draw(odd),
                kv_usage=draw(odd),
                kv_tokens=draw(odd),
                queued_tokens=draw(odd),
                context_tokens=draw(odd),
                counters=draw(counters),
            )
            for role in config.roles
            for number in range(draw(st.integers(0, 3)))
        ]
        found.append((gap, readings, [draw(st.booleans()) for _ in config.roles]))
    return found


def run(
    config: PlannerConfig, given_looks: Sequence[tuple[float, list[Reading], list[bool]]]
) -> tuple[list[Decision], list[bytes]]:
    """The decisions, with a fleet that does what it is told; and the recording."""
    state = State.begin(PROFILES)
    lines = [head_line(Head.of(config, state))]
    replicas = dict.fromkeys(config.roles, 2)
    at, applied, decisions = 1000.0, (), []
    for gap, readings, up in given_looks:
        at += gap
        fleet = tuple(
            Component(role, role, replicas[role], ready=replicas[role] if comes else 0)
            for role, comes in zip(config.roles, up, strict=True)
        )
        inputs = Inputs(at, fleet, tuple(readings), applied)
        state, decision = step(state, inputs, config)
        lines.append(look_line(Look(inputs, decision)))
        for order in decision.orders:
            replicas[order.component] = order.replicas  # type: ignore[index]
        applied = tuple(Applied(o.component, o.replicas) for o in decision.orders)
        decisions.append(decision)
    return decisions, lines


@pytest.mark.parametrize("config", [DISAGG, AGG_SLA], ids=["load", "sla"])
@settings(max_examples=60)
@given(data=st.data())
def test_there_always_is_an_answer_within_bounds_and_it_can_be_replayed(
    config: PlannerConfig, data: st.DataObject
) -> None:
    decisions, lines = run(config, data.draw(looks(config)))
    metrics = PlannerMetrics(CollectorRegistry())
    for decision in decisions:
        metrics.show(decision)
        assert sum(each.replicas for each in decision.roles) <= config.max_gpu_budget
        for each in decision.roles:
            most = config.most(each.role)
            assert config.fewest(each.role) <= each.replicas
            assert most is None or each.replicas <= most
            assert each.reason
        msgspec.json.encode(decision)
        assert b"NaN" not in msgspec.json.encode(decision)
    assert all(each.same for each in replay(lines))


def busy(kind: str, waiting: float, usage: float) -> Reading:
    return Reading(kind, kind, age_s=0.0, running=4.0, waiting=waiting, kv_usage=usage)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.95]), min_size=30, max_size=120))
def test_no_down_follows_an_up_within_the_stabilization(usages: list[float]) -> None:
    """The stated rate of flapping, under the wildest load."""
    config = PlannerConfig(
        mode="agg",
        optimization_target="load",
        decode_scale_up_kv_rate=80,
        decode_scale_down_kv_rate=40,
        scale_down_stabilization_seconds=60,
        load_min_observations=1,
        max_gpu_budget=-1,
    )
    state, replicas, applied = State(), 2, ()
    moves: list[tuple[float, int]] = []
    for number, usage in enumerate(usages):
        at = 5.0 * number
        readings = tuple(
            Reading(f"w{n}", "W", age_s=0.0, running=8.0, waiting=0.0, kv_usage=usage)
            for n in range(replicas)
        )
        fleet = (Component("W", "worker", replicas, ready=replicas),)
        state, decision = step(state, Inputs(at, fleet, readings, applied), config)
        applied = tuple(Applied(o.component, o.replicas) for o in decision.orders)
        for order in decision.orders:
            moves.append((at, order.replicas - replicas))
            replicas = order.replicas
    for (before, first), (after, second) in pairwise(moves):
        if first > 0 > second:
            assert after - before >= config.scale_down_stabilization_seconds
        if first > 0 and second > 0:
            assert after - before >= config.scale_up_cooldown_seconds


loads = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0, 50), st.floats(0, 20_000), st.floats(0, 3)),
    min_size=1,
    max_size=6,
)
more = st.floats(1, 4)


def view(
    role: Role, figures: Sequence[tuple[float, float, float, float]], factor: float
) -> RoleView:
    found = tuple(
        WorkerLoad(f"w{n}", r * factor, w * factor, q * factor, kv * factor, 8192.0)
        for n, (r, w, q, kv) in enumerate(figures)
    )
    return RoleView(role, ready=len(found), seen=len(found), loads=found)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@given(figures=loads, factor=more)
def test_more_load_never_proposes_fewer(
    role: Role, figures: list[tuple[float, float, float, float]], factor: float
) -> None:
    n = len(figures)
    less = propose_by_load(view(role, figures, 1.0), n, DISAGG)
    lots = propose_by_load(view(role, figures, factor), n, DISAGG)
    assert less.replicas <= lots.replicas


@given(figures=loads, factor=more)
def test_more_load_never_estimates_fewer(
    figures: list[tuple[float, float, float, float]], factor: float
) -> None:
    from dynamo_planner.performance import choose_model

    chosen = choose_model("worker", TimingProfile(), (), 600, AGG_SLA)
    n = len(figures)
    less, _ = propose_by_estimate(view("worker", figures, 1.0), n, chosen, 500, 600, AGG_SLA)
    lots, _ = propose_by_estimate(view("worker", figures, factor), n, chosen, 500, 600, AGG_SLA)
    assert less.replicas <= lots.replicas


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Component, ...]:
    return tuple(
        Component(f"{role}{n}", role, draw(st.integers(0, 9)), gpus=draw(st.integers(1, 4)))
        for role in ("prefill", "decode")
        for n in range(draw(st.integers(1, 2)))
    )


@given(
    fleet=fleets(),
    wanted=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    carried=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    budget=st.integers(2, 40),
    ratio=st.none() | st.floats(0.25, 4),
)
def test_limits_hold_together(
    fleet: tuple[Component, ...],
    wanted: tuple[int, int],
    carried: tuple[int, int],
    budget: int,
    ratio: float | None,
) -> None:
    config = PlannerConfig(max_gpu_budget=budget, max_endpoint=9, min_prefill_decode_ratio=ratio)
    roles: tuple[Role, Role] = ("prefill", "decode")
    in_hand = dict(zip(roles, carried, strict=True))
    found = constrain(dict(zip(roles, wanted, strict=True)), in_hand, [], fleet, config)
    before = sum(each.gpus * each.desired for each in fleet)
    after = sum(each.gpus * found.replicas[each.name] for each in fleet)
    least = {
        role: max(config.fewest(role), min(in_hand[role], desired(of_role(fleet, role))))
        for role in roles
    }
    floor = sum(least[role] * max(each.gpus for each in of_role(fleet, role)) for role in roles)
    assert after <= max(budget, before, floor)
    for role in roles:
        total = sum(found.replicas[each.name] for each in of_role(fleet, role))
        now = desired(of_role(fleet, role))
        assert total <= max(9, min(now, in_hand[role]))
        if floor <= budget:
            assert total >= least[role]
        assert total >= min(least[role], now)
    assert all(count >= 0 for count in found.replicas.values())
