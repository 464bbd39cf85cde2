"""Patience: when nothing is decided, and how loops and limits are merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dynamo_planner.config import ComponentLimits, PlannerConfig
from dynamo_planner.constrain import constrain
from dynamo_planner.execute import Applied, Order, orders, others, remembered
from dynamo_planner.fleet import Component
from dynamo_planner.observe import RoleView, WorkerLoad
from dynamo_planner.propose import Proposal
from dynamo_planner.reconcile import RoleMemory, Verdict, reconcile

CONFIG = PlannerConfig(
    mode="agg",
    load_min_observations=1,
    scale_down_stabilization_seconds=60,
    scale_up_stabilization_seconds=0,
    scale_up_cooldown_seconds=15,
    scaling_timeout_seconds=600,
)


def seen(ready: int, of: int | None = None) -> RoleView:
    loads = tuple(WorkerLoad(f"w{n}", 1, 0, 0, 0.5, None) for n in range(ready))
    return RoleView("worker", ready if of is None else of, len(loads), loads=loads)


def asked(replicas: int, state: str = "scale_up") -> Proposal:
    return Proposal("worker", replicas, state, f"{replicas} would be right")


class Role:
    """One role and its memory, look by look, five seconds apart."""

    def __init__(self, replicas: int = 2, config: PlannerConfig = CONFIG) -> None:
        self.memory, self.config = RoleMemory(), config
        self.at, self.component = 0.0, Component("W", "worker", replicas, ready=replicas)

    def look(
        self,
        wants: int | None = None,
        *,
        floor: int | None = None,
        view: RoleView | None = None,
        others: str = "",
        jumped: bool = False,
    ) -> Verdict:
        self.at += 5.0
        verdict, self.memory = reconcile(
            self.memory,
            self.at,
            view or seen(self.component.ready),
            (self.component,),
            None if wants is None else asked(wants),
            None if floor is None else asked(floor, "set_lower_bound"),
            self.config,
            clock_jumped=jumped,
            scaled_by_others=others,
        )
        return verdict

    def scale(self, replicas: int, *, ready: int | None = None) -> None:
        ready = replicas if ready is None else ready
        self.component = replace(self.component, desired=replicas, ready=ready)


def test_up_is_at_once_and_down_waits_for_the_window() -> None:
    role = Role(2)
    assert role.look(4).replicas == 4
    role.scale(4)
    verdicts = [role.look(1) for _ in range(14)]
    assert [verdict.replicas for verdict in verdicts].index(1) * 5 >= 55
    assert "too much for less than 60 s" in verdicts[0].reason


def test_the_highest_in_the_window_counts() -> None:
    role = Role(6)
    for wants in [2] * 6 + [4] + [2] * 6:
        verdict = role.look(wants)
    assert verdict.replicas == 4


def test_more_must_be_right_for_a_while_and_the_least_of_it_counts() -> None:
    role = Role(2, CONFIG.model_copy(update={"scale_up_stabilization_seconds": 5.0}))
    assert role.look(6).replicas == 2
    assert role.look(2).replicas == 2
    verdict = role.look(6)
    assert verdict.replicas == 2
    assert "for less than 5 s" in verdict.reason
    assert role.look(4).replicas == 4
    foreseen = Role(2, CONFIG.model_copy(update={"scale_up_stabilization_seconds": 60.0}))
    assert foreseen.look(2, floor=5).replicas == 5


def test_a_second_step_up_waits_for_the_cool_down() -> None:
    role = Role(2)
    role.look(3)
    role.scale(3)
    assert role.look(5).replicas == 3
    assert "too recent" in role.look(5).reason
    role.look(5)
    assert role.look(5).replicas == 5


def test_a_change_in_progress_is_waited_for_but_not_for_ever() -> None:
    role = Role(2)
    role.look(4)
    role.scale(4, ready=2)
    verdict = role.look(9)
    assert (verdict.replicas, verdict.state, verdict.held) == (4, "scaling_in_progress", True)
    role.at += 600
    assert role.look(9).replicas == 9


def test_a_pod_that_fails_by_itself_is_no_change_in_progress() -> None:
    role = Role(3)
    role.look(3)
    role.scale(3, ready=2)
    assert role.look(5).replicas == 5


def test_prediction_may_ask_for_more_while_a_change_is_in_progress() -> None:
    role = Role(2)
    role.look(2, floor=4)
    role.scale(4, ready=2)
    assert role.look(2).held
    assert role.look(2, floor=6).replicas == 6


def test_the_predictive_loop_sets_the_least() -> None:
    role = Role(4)
    role.look(4, floor=3)
    for _ in range(14):
        verdict = role.look(2)
    assert verdict.replicas == 3
    assert role.look(5).replicas == 5


def test_the_predictive_loop_alone_moves_both_ways() -> None:
    role = Role(4)
    assert role.look(floor=6).replicas == 6
    role.scale(6)
    role.look(floor=2)
    for _ in range(14):
        verdict = role.look()
    assert verdict.replicas == 2


def test_blind_holds_and_counts_the_seconds() -> None:
    role = Role(3)
    role.look(3)
    role.look(1, view=seen(0, of=3))
    verdict = role.look(9, view=seen(0, of=3))
    assert (verdict.replicas, verdict.held, verdict.state) == (3, True, "no_fpm_data")
    assert verdict.reason == "nothing was heard of any of 3 workers for 5 s; 3 replicas are kept"


def test_somebody_else_is_given_the_whole_time() -> None:
    role = Role(3)
    role.look(3)
    role.scale(7)
    assert role.look(1, others="somebody else scaled W").reason.startswith("somebody else scaled W")
    while (verdict := role.look(1)).held:
        assert verdict.replicas == 7
    assert role.at >= 70


@pytest.mark.parametrize("looks", [1, 3])
def test_too_few_looks_decide_nothing(looks: int) -> None:
    role = Role(2, CONFIG.model_copy(update={"load_min_observations": looks + 1}))
    for _ in range(looks):
        assert role.look(5).state == "insufficient_data"
    assert role.look(5).replicas == 5


def test_after_a_jump_of_the_clock_every_wait_begins_anew() -> None:
    role = Role(4)
    for _ in range(20):
        role.look(4)
    role.look(2, jumped=True)
    assert all(role.look(2).replicas == 4 for _ in range(11))


# --- constrain


def split(target: int, config: PlannerConfig, *fleet: Component) -> dict[str, int]:
    return dict(constrain({"worker": target}, {"worker": 0}, [], fleet, config).replicas)


def test_the_cheapest_grows_first_and_the_dearest_shrinks_first() -> None:
    config = PlannerConfig(
        mode="agg",
        max_gpu_budget=-1,
        components={"Big": ComponentLimits(cost=3), "Small": ComponentLimits(max_endpoint=4)},
    )
    big, small = Component("Big", "worker", 2), Component("Small", "worker", 2)
    assert split(7, config, big, small) == {"Big": 3, "Small": 4}
    assert split(3, config, big, small) == {"Big": 1, "Small": 2}
    assert split(4, config, big, small) == {"Big": 2, "Small": 2}


def test_what_is_in_hand_is_not_taken_from() -> None:
    fleet = (Component("W", "worker", 5),)
    config = PlannerConfig(mode="agg")
    assert constrain({"worker": 1}, {"worker": 3}, [], fleet, config).replicas == {"W": 3}


def test_the_budget_takes_growth_back_and_says_so() -> None:
    fleet = (Component("D", "decode", 2, gpus=2), Component("P", "prefill", 2))
    found = constrain({"prefill": 3, "decode": 6}, {}, [], fleet, PlannerConfig(max_gpu_budget=8))
    assert found.replicas == {"D": 2, "P": 3} or found.replicas == {"D": 3, "P": 2}
    assert found.notes == ("15 GPUs are wanted, max_gpu_budget is 8",)


def test_a_role_that_is_held_is_moved_by_no_limit() -> None:
    fleet = (Component("D", "decode", 9), Component("P", "prefill", 2))
    config = PlannerConfig(max_gpu_budget=8, max_endpoint=5)
    found = constrain({"prefill": 4, "decode": 9}, {}, ["decode"], fleet, config)
    assert found.replicas == {"D": 9, "P": 1}
    assert found.notes == (
        "13 GPUs are wanted, max_gpu_budget is 8; 10 run, and can't be fewer now",
    )


def test_the_least_budget_is_filled_up() -> None:
    config = PlannerConfig(mode="agg", min_gpu_budget=6, max_gpu_budget=6)
    assert split(1, config, Component("W", "worker", 1, gpus=2)) == {"W": 3}


def test_the_ratio_stops_who_would_break_it() -> None:
    fleet = (Component("D", "decode", 2), Component("P", "prefill", 2))
    config = PlannerConfig(max_gpu_budget=-1, max_prefill_decode_ratio=1.5)
    found = constrain({"prefill": 8, "decode": 2}, {}, [], fleet, config)
    assert found.replicas == {"D": 2, "P": 3}
    assert found.notes == ("prefill: the prefill:decode ratio makes 3 of 8",)


# --- execute


def test_orders_are_for_what_differs_and_none_in_advisory_mode() -> None:
    fleet = (Component("A", "worker", 1), Component("B", "worker", 2))
    found = constrain({"worker": 5}, {}, [], fleet, PlannerConfig(mode="agg"))
    wanted = orders(found, fleet, {"worker": "why"}, advisory=False)
    assert wanted == (Order("A", 3, 1, "why"),)
    assert orders(found, fleet, {"worker": "why"}, advisory=True) == ()


def test_others_are_told_from_orders_that_failed() -> None:
    fleet = (Component("A", "worker", 3),)
    taken = remembered({"A": 1}, [Applied("A", 3)], fleet)
    assert others(taken, fleet) == {}
    unknown = remembered({"A": 1}, [Applied("A", 3, "no answer")], fleet)
    assert others(unknown, fleet) == {}
    refused = remembered({"A": 1}, [Applied("A", 2, "refused")], fleet)
    assert others(refused, fleet) == {"worker": "somebody else scaled A from 1 to 3"}
