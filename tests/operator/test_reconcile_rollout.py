"""Rollouts by generations: the steps keep what serves, and end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from dynamo_operator.reconcile import progress, rollout
from dynamo_operator.reconcile.rollout import Bounds, Workload, step
from dynamo_operator.render.deployments import DEADLINE_SECONDS
from dynamo_operator.status import facts
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operator import objects


@dataclass
class World:
    """Workloads of several generations; pods become ready when the world says so."""

    wanted: dict[str, int]
    bounds: dict[str, Bounds]
    # (generation, component) -> [replicas, ready]
    workloads: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def turn(self, current: str, old: list[str]) -> None:
        """One reconcile towards generation `current`."""
        new = {
            name: Workload(f"{current}/{name}", name, *self.workloads[current, name])
            for name in self.wanted
            if (current, name) in self.workloads
        }
        olds = [
            Workload(f"{generation}/{name}", name, *self.workloads[generation, name])
            for generation in old
            for name in self.wanted
            if (generation, name) in self.workloads
        ]
        result = step(self.wanted, new, olds, self.bounds)
        for name, number in result.new.items():
            self.set(current, name, number)
        for workload, number in result.old.items():
            generation, name = workload.split("/")
            self.set(generation, name, number)

    def set(self, generation: str, name: str, number: int) -> None:
        entry = self.workloads.setdefault((generation, name), [0, 0])
        entry[0] = number
        entry[1] = min(entry[1], number)

    def grow(self, generation: str, name: str) -> None:
        entry = self.workloads.get((generation, name))
        if entry and entry[1] < entry[0]:
            entry[1] += 1

    def serving(self, generation: str) -> float:
        """Share of a generation that counts: that of its scarcest role."""
        return min(
            self.workloads.get((generation, name), [0, 0])[1] / number
            for name, number in self.wanted.items()
        )

    def total(self, name: str) -> int:
        return sum(entry[0] for (_, other), entry in self.workloads.items() if other == name)


SIZES = st.integers(1, 9)
BOUNDS = st.builds(
    Bounds,
    st.sampled_from([0, 1, 2, "25%", "50%", "100%"]),
    st.sampled_from([0, 1, 2, "25%", "50%"]),
)


@settings(max_examples=200, deadline=None)
@given(st.data(), SIZES, SIZES, BOUNDS, BOUNDS)
def test_a_rollout_never_serves_too_little_and_ends(
    data: st.DataObject, prefill: int, decode: int, one: Bounds, other: Bounds
) -> None:
    wanted = {"prefill": prefill, "decode": decode}
    world = World(wanted, {"prefill": one, "decode": other})
    for name, number in wanted.items():
        world.workloads["a", name] = [number, number]
    for _ in range(400):
        world.turn("b", ["a"])
        for name, number in wanted.items():
            surge, unavailable = world.bounds[name].of(number)
            assert world.total(name) <= number + surge
            counted = math.floor(world.serving("b") * number)
            old = world.workloads["a", name][1]
            assert old + counted >= number - unavailable
        growing = data.draw(st.sampled_from(["prefill", "decode", "both"]))
        for name in wanted:
            if growing in (name, "both"):
                world.grow("b", name)
        if world.workloads["a", "prefill"][0] == world.workloads["a", "decode"][0] == 0:
            break
    while any(world.workloads["b", name][1] < number for name, number in wanted.items()):
        world.turn("b", ["a"])
        for name in wanted:
            world.grow("b", name)
    world.turn("b", ["a"])
    for name, number in wanted.items():
        assert world.workloads["b", name] == [number, number]
        assert world.workloads["a", name][0] == 0


@settings(max_examples=100, deadline=None)
@given(st.data(), SIZES, SIZES, BOUNDS)
def test_old_pods_that_are_not_ready_for_a_moment_are_not_given_up(
    data: st.DataObject, prefill: int, decode: int, bounds: Bounds
) -> None:
    wanted = {"prefill": prefill, "decode": decode}
    world = World(wanted, dict.fromkeys(wanted, bounds))
    for name, number in wanted.items():
        world.workloads["a", name] = [number, number]
    for _ in range(60):
        for name in wanted:
            entry = world.workloads["a", name]
            entry[1] = data.draw(st.sampled_from([0, entry[0]]))
            world.grow("b", name)
        world.turn("b", ["a"])
        for name, number in wanted.items():
            _, unavailable = bounds.of(number)
            counted = math.floor(world.serving("b") * number)
            assert world.workloads["a", name][0] + counted >= number - unavailable
    for name, number in wanted.items():
        assert world.workloads["b", name] == [number, number]


@settings(max_examples=100, deadline=None)
@given(st.data(), SIZES, SIZES)
def test_turning_back_in_the_middle_keeps_what_serves(
    data: st.DataObject, prefill: int, decode: int
) -> None:
    wanted = {"prefill": prefill, "decode": decode}
    world = World(wanted, {})
    for name, number in wanted.items():
        world.workloads["a", name] = [number, number]
    for _ in range(data.draw(st.integers(0, 10))):
        world.turn("b", ["a"])
        world.grow("b", data.draw(st.sampled_from(["prefill", "decode"])))
    before = {name: world.workloads["a", name][1] for name in wanted}
    for _ in range(60):
        world.turn("a", ["b"])
        for name in wanted:
            assert world.workloads["a", name][1] >= before[name]
            world.grow("a", name)
            before[name] = world.workloads["a", name][1]
    for name, number in wanted.items():
        assert world.workloads["a", name] == [number, number]
        assert world.workloads.get(("b", name), [0, 0])[0] == 0


def test_an_incomplete_generation_counts_as_its_scarcest_role() -> None:
    wanted = {"prefill": 4, "decode": 4}
    new = {
        "prefill": Workload("p-new", "prefill", 4, 4),
        "decode": Workload("d-new", "decode", 1, 0),
    }
    old = [Workload("p-old", "prefill", 1, 1), Workload("d-old", "decode", 4, 4)]
    result = step(wanted, new, old, {})
    # All prefill workers are there, but no decode worker they could be paired with.
    assert result.old == {"p-old": 1, "d-old": 3}


def test_a_generation_of_which_less_is_ready_goes_first() -> None:
    old = [Workload("half", "worker", 2, 1), Workload("whole", "worker", 4, 4)]
    result = step({"worker": 4}, {}, old, {"worker": Bounds(1, 0)})
    assert result.old == {"half": 0, "whole": 4}


def test_a_role_that_is_no_more_serves_until_the_new_generation_does() -> None:
    old = [Workload("old", "worker", 2, 2)]
    new = {"decode": Workload("new", "decode", 2, 1)}
    assert step({"decode": 2}, new, old, {}).old == {"old": 2}
    new = {"decode": Workload("new", "decode", 2, 2)}
    assert step({"decode": 2}, new, old, {}).old == {"old": 0}


@pytest.mark.parametrize(
    ("bounds", "replicas", "expected"),
    [
        (Bounds(), 1, (1, 0)),
        (Bounds(), 8, (2, 2)),
        (Bounds("0", "0"), 3, (1, 0)),
        (Bounds(0, 1), 3, (0, 1)),
        (Bounds("30%", "30%"), 10, (3, 3)),
        (Bounds("x", "?"), 4, (1, 1)),
        (Bounds(0, 5), 2, (0, 2)),
    ],
)
def test_bounds_round_as_deployments_do(
    bounds: Bounds, replicas: int, expected: tuple[int, int]
) -> None:
    assert bounds.of(replicas) == expected


def test_only_what_is_in_the_pods_counts_as_failing() -> None:
    def why(*pods: objects.Json, of: str = objects.HASH) -> str:
        return rollout.failing(objects.observed(pods=pods), of, ["worker"]).why

    crashing = objects.pod_crashing()
    assert why(crashing) == (
        "component worker: CrashLoopBackOff: container main ended with exit code 1:"
        " loading | RuntimeError: CUDA out of memory"
    )
    assert "ImagePullBackOff" in why(objects.pod_unpullable())
    assert why(objects.pod_unschedulable()) == ""
    assert why(objects.pod_crashing(restarts=1)) == ""  # it may yet recover
    assert why(crashing, objects.pod_ready(number=1)) == ""  # where one works, it can work
    assert why(crashing, of="another") == ""


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("pods", "why"),
    [
        ([objects.pod_starting()], "Starting: container main has not passed its startup probe yet"),
        ([objects.pod_ready(), objects.pod_crashing(number=1, restarts=1)], "CrashLoopBackOff: "),
        ([objects.pod_ready(), objects.pod_unready(number=1)], "NotReady: container main runs"),
        ([objects.pod_starting(), objects.pod_unschedulable(number=1)], ""),
        ([objects.pod_waiting()], ""),  # its volumes, say
        ([objects.pod_ready()], ""),
        ([], ""),
    ],
)
@pytest.mark.parametrize("kind", ["Deployment", "LeaderWorkerSet"])
def test_a_rollout_that_stands_still_fails_if_its_containers_are_to_blame(
    kind: str, pods: list[objects.Json], why: str
) -> None:
    long_ago = (NOON - timedelta(seconds=DEADLINE_SECONDS)).isoformat()
    stuck, moving = {
        "Deployment": (objects.deployment(stalled=True), objects.deployment()),
        "LeaderWorkerSet": (
            objects.leader_worker_set(progressing=long_ago),
            objects.leader_worker_set(progressing=(NOON - timedelta(hours=1)).isoformat()),
        ),
    }[kind]

    def found(child: objects.Json, of: str = objects.HASH) -> str:
        seen = replace(objects.observed(child, pods=pods), at=NOON)
        return rollout.failing(seen, of, ["worker"]).why

    expected = f"component worker: no progress within its deadline: {why}" if why else ""
    assert found(stuck).startswith(expected)
    assert bool(found(stuck)) is bool(why)
    assert found(moving) == ""
    assert found(stuck, of="another") == ""


def test_a_quota_is_no_fault_of_what_is_in_the_pods() -> None:
    stuck = objects.deployment(stalled=True, refused="exceeded quota: gpus")
    seen = objects.observed(stuck, pods=[objects.pod_starting()])
    assert rollout.failing(seen, objects.HASH, ["worker"]).why == ""


def test_groups_are_looked_at_again_when_their_deadline_passes() -> None:
    groups = objects.leader_worker_set(progressing=(NOON - timedelta(hours=2)).isoformat())
    assert progress.look_again_s(groups, NOON) == DEADLINE_SECONDS - 7200
    assert progress.look_again_s(groups, NOON + timedelta(hours=1)) is None
    assert progress.look_again_s(objects.leader_worker_set(), NOON) is None
    assert progress.look_again_s(objects.deployment(), NOON) is None
    later = replace(objects.observed(groups), at=NOON + timedelta(hours=1))
    assert (
        facts.workload("LeaderWorkerSet", "g-worker", groups, later).stalled == "groups are missing"
    )
