"""The queue of due graphs, in virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest
from dynamo_operator.reconcile.queue import LONGEST_BACKOFF_S, Closed, WorkQueue, backoff
from hypothesis import given
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
        due.add("bad")
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


async def test_a_change_ends_the_wait() -> None:
    due = queue()
    due.add("a")
    await due.get()
    due.done("a", failed=True)
    assert len(due) == 0
    due.add("a")
    assert await due.get() == "a"


async def test_a_change_during_a_failing_attempt_does_not_skip_the_wait() -> None:
    due = queue()
    due.add("a")
    await due.get()
    due.add("a")
    due.done("a", failed=True)
    assert len(due) == 0


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
