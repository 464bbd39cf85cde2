"""The queue of due graphs, in virtual time."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from dynamo_operator.reconcile.queue import LONGEST_BACKOFF_S, Closed, WorkQueue, backoff, rest
from hypothesis import given, settings
from hypothesis import strategies as st


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def queue(clock: Clock | None = None) -> WorkQueue[str]:
    return WorkQueue(clock=clock or Clock(), rng=random.Random(0))


async def test_a_key_is_worked_on_once_however_often_it_is_due() -> None:
    due = queue()
    for _ in range(3):
        due.add("a")
    due.add("b")
    assert await due.get() == "a"
    assert await due.get() == "b"
    assert len(due) == 0


async def test_what_happens_meanwhile_makes_it_due_again_afterwards() -> None:
    due = queue()
    due.add("a")
    await due.get()
    due.add("a")
    assert len(due) == 0  # never by two at a time
    due.done("a")
    assert await due.get() == "a"


async def test_failures_wait_longer_each_time_and_alone() -> None:
    clock = Clock()
    due = queue(clock)
    waits = []
    for _ in range(4):
        due.add("bad", urgent=True)
        await due.get()
        due.done("bad", failed=True)
        started = clock.now
        while not len(due):
            clock.now += 0.05
        waits.append(clock.now - started)
        assert await due.get() == "bad"
        due.done("bad", failed=True)
        due.add("good")
        assert await due.get() == "good"  # at once, whatever the other does
        due.done("good")
    assert waits == sorted(waits)
    assert due.failing == 1


async def fail(due: WorkQueue[str], clock: Clock, took: float, times: int = 1) -> None:
    for _ in range(times):
        due.add("a", urgent=True)
        await due.get()
        clock.now += took
        due.done("a", failed=True)


async def test_what_is_urgent_ends_the_wait() -> None:
    due = queue(clock := Clock())
    await fail(due, clock, took=30.0, times=9)
    assert len(due) == 0
    due.add("a", urgent=True)
    assert await due.get() == "a"


@pytest.mark.parametrize(("took", "rests"), [(0.0, 5.0), (0.1, 5.0), (3.0, 30.0)])
@pytest.mark.parametrize("meanwhile", [True, False])
async def test_an_event_shortens_the_wait_to_many_times_the_attempt(
    took: float, rests: float, meanwhile: bool
) -> None:
    due = queue(clock := Clock())
    await fail(due, clock, took, times=9)  # by itself it would wait for minutes
    due.add("a", urgent=True)
    await due.get()
    clock.now += took
    if meanwhile:
        due.add("a")
    due.done("a", failed=True)
    ended = clock.now
    for _ in range(50):  # a pod that crashes over and over
        clock.now += rests / 51
        due.add("a")
        assert len(due) == 0
    clock.now = ended + rests
    assert len(due) == 1


async def test_an_event_does_not_lengthen_the_wait() -> None:
    due = queue(clock := Clock())
    await fail(due, clock, took=10.0)
    due.add("a")
    clock.now += backoff(1, random.Random(0))
    assert len(due) == 1


class Model:
    """What a queue of one share promises, by key: when it is due, and who works on it."""

    def __init__(self) -> None:
        self.rng = random.Random(0)
        self.when: dict[str, float] = {}
        self.failures: dict[str, int] = {}
        self.rests: dict[str, float] = {}
        self.began: dict[str, float] = {}
        self.again: dict[str, bool] = {}  # whether that is urgent

    def due(self, now: float) -> set[str]:
        return {key for key, when in self.when.items() if when <= now}

    def add(self, key: str, urgent: bool, now: float) -> None:
        if key in self.began:
            self.again[key] = urgent or self.again.get(key, False)
        elif key in self.failures and not urgent:
            self.when[key] = min(self.when[key], max(now, self.rests[key]))
        else:
            self.when[key] = now

    def get(self, key: str, now: float) -> None:
        del self.when[key]
        self.began[key] = now

    def done(self, key: str, failed: bool, again_after: float | None, now: float) -> None:
        took = now - self.began.pop(key)
        if failed:
            self.failures[key] = self.failures.get(key, 0) + 1
            self.rests[key] = now + rest(took)
            self.when[key] = now + backoff(self.failures[key], self.rng)
        else:
            self.failures.pop(key, None)
            if again_after is not None:
                self.when[key] = now + again_after
        if key in self.again:
            self.add(key, self.again.pop(key), now)


KEYS = st.sampled_from("abc")
STEPS = st.one_of(
    st.tuples(st.just("add"), KEYS, st.booleans()),
    st.tuples(st.just("get")),
    st.tuples(st.just("done"), KEYS, st.booleans(), st.sampled_from((None, 1.0, 20.0))),
    st.tuples(st.just("wait"), st.sampled_from((0.1, 0.5, 1.0, 5.0, 60.0))),
)


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=60))
def test_any_history_leaves_due_what_the_model_says(steps: list[Any]) -> None:
    async def play() -> None:
        due, model = queue(clock := Clock()), Model()
        for what, *details in steps:
            match what, details:
                case "add", (key, urgent):
                    due.add(key, urgent)
                    model.add(key, urgent, clock.now)
                case "get", _ if len(due):
                    key = await due.get()
                    assert key in model.due(clock.now)
                    model.get(key, clock.now)
                case "done", (key, failed, again_after) if key in model.began:
                    due.done(key, failed=failed, again_after=again_after)
                    model.done(key, failed, again_after, clock.now)
                case "wait", (seconds,):
                    clock.now += seconds
            assert len(due) == len(model.due(clock.now))
            assert due.failing == len(model.failures)

    asyncio.run(play())


async def test_get_waits_for_the_first_key() -> None:
    due = queue()
    waiting = asyncio.create_task(due.get())
    await asyncio.sleep(0)
    due.add("a")
    assert await waiting == "a"


async def test_the_earliest_time_counts() -> None:
    clock = Clock()
    due = queue(clock)
    due.add_after("a", 10)
    due.add_after("a", 5)
    due.add_after("a", 20)
    clock.now = 5
    assert len(due) == 1
    await due.get()
    due.done("a")
    clock.now = 100
    assert len(due) == 0


async def test_a_share_never_has_all_workers_and_shares_take_turns() -> None:
    due: WorkQueue[str] = WorkQueue(
        clock=Clock(), rng=random.Random(0), share=lambda key: key[0], most=2
    )
    for key in ("a1", "a2", "a3", "a4", "b1", "b2"):
        due.add(key)
    assert [await due.get() for _ in range(4)] == ["a1", "b1", "a2", "b2"]
    waiting = asyncio.create_task(due.get())
    await asyncio.sleep(0)
    assert not waiting.done(), "two of a are being worked on"
    due.add("c1")
    assert await waiting == "c1"
    waiting = asyncio.create_task(due.get())
    await asyncio.sleep(0)
    due.done("b1")
    await asyncio.sleep(0)
    assert not waiting.done()
    due.done("a2", failed=True)
    assert await waiting == "a3"


@given(st.integers(1, 1000), st.integers())
def test_backoff_is_bounded(failures: int, seed: int) -> None:
    assert 0.3 < backoff(failures, random.Random(seed)) <= LONGEST_BACKOFF_S


async def test_what_is_urgent_does_not_wait_for_the_backoff() -> None:
    due = queue()
    due.add("a")
    await due.get()
    due.add("a", urgent=True)
    due.done("a", failed=True)
    assert await due.get() == "a"


async def test_a_closed_queue_gives_out_nothing() -> None:
    due = queue()
    waiting = asyncio.create_task(due.get())
    await asyncio.sleep(0)
    due.close()
    with pytest.raises(Closed):
        await waiting
    due.add("a")
    with pytest.raises(Closed):
        await due.get()
