"""The faults one by one: what is done, how long routing was wrong, which requests were lost."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from e2e.faults.deployment import HUNG_S, START_S, Deployment, Node, eventually
from e2e.faults.traffic import Attempt, Conversations

LOSS = 0.05
WARM_S = 2.0
"""From the moment that a picker calls itself ready, it decides as well as before."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one fault. Times are seconds."""

    fault: str
    correct_after: float
    """From the fault to the first request from which on all went right."""
    sent: int
    """Requests while it lasted."""
    cut: int
    """Lost for good: a part of the answer was there."""
    sent_again: int
    """Failed before the first byte, and were answered when they were sent again."""
    unanswered: int
    """Were sent again and again and never answered."""
    wrong: Counter[str]
    told: dict[str, float | str] = field(default_factory=dict)
    """What else is worth knowing of this one."""


def found(
    fault: str, traffic: Conversations, began: float, correct_after: float, **told: float | str
) -> Found:
    attempts = traffic.since(began)
    requests = {one.request for one in attempts}
    answered = {one.request for one in attempts if one.ended and not one.problem}
    cut = {one.request for one in attempts if one.lost}
    failed = {one.request for one in attempts if one.problem and not one.lost}
    return Found(
        fault,
        correct_after,
        len(requests),
        len(cut),
        len(failed & answered),
        len(failed - answered - cut),
        Counter(_kind(one) for one in attempts if one.wrong),
        told,
    )


def _kind(attempt: Attempt) -> str:
    """Without the figures."""
    wrong = attempt.wrong
    for kind in ("said", "late", "the engine had", "another engine"):
        if wrong.startswith(kind):
            return kind
    return wrong[:60]


Story = Callable[[Deployment, Conversations], Awaitable[Found]]


async def killed_picker(it: Deployment, traffic: Conversations) -> Found:
    """SIGKILL, and started again at once."""
    began = time.monotonic()
    await it.picker.kill()
    await it.restart_picker()
    ready = time.monotonic() - began
    seconds = await traffic.until_right(began, limit_s=START_S)
    after = [one for one in traffic.attempts if one.sent >= began and one.routing]
    first = min(after, key=lambda one: one.sent)
    assert not first.wrong, f"the first decision of the new picker was no good: {first}"
    assert seconds <= ready + WARM_S
    return found("picker killed", traffic, began, seconds, ready_after_s=round(ready, 2))


def lost_events(for_s: float) -> Story:
    async def story(it: Deployment, traffic: Conversations) -> Found:
        """Some of what engines say does not arrive, and then everything does again."""
        began = time.monotonic()
        before = sum(node.wire.passed for node in it.nodes)
        for node in it.nodes:
            node.wire.loss = LOSS
        await asyncio.sleep(for_s)

        async def all_lost_some() -> bool:
            return all(node.wire.lost for node in it.nodes)

        await eventually(all_lost_some, 30.0)
        for node in it.nodes:
            node.wire.loss = 0.0
        ended = time.monotonic()
        if it.replay:
            seconds = await traffic.until_right(ended)
        else:
            await traffic.until_answered(20)
            seconds = math.inf  # what was lost is lost: approximate until the engine begins anew
        wires = {node.engine(): node.wire for node in it.nodes}
        for one in traffic.since(began):
            if one.wrong.startswith("said") and one.routing.startswith("exact"):
                # Slack for a machine with much else to do.
                seen = wires[one.engine].is_blind(one.sent - 0.3, one.first + 0.1)
                assert seen, f"{one.wrong}, called exact though the loss could be known: {one}"
        lost = sum(node.wire.lost for node in it.nodes)
        passed = sum(node.wire.passed for node in it.nodes) - before
        blind = [known - at for node in it.nodes for at, known in node.wire.blind]
        exact = sum(one.routing.startswith("exact") for one in traffic.since(began))
        return found(
            f"{LOSS:.0%} of KV events lost",
            traffic,
            began,
            seconds,
            messages=f"{lost} of {lost + passed}",
            exact=f"{exact} of {len(traffic.since(began))}",
            longest_unnoticed_s=round(max(blind), 2),
        )

    return story


async def emptied_engine(it: Deployment, traffic: Conversations) -> Found:
    """The engine that has most is killed, and begins anew at the same address."""
    node = fullest(it, traffic)
    old = node.engine()
    began = time.monotonic()
    await node.kill()
    traffic.ledger.forget(old)
    await node.restarted()
    used = await traffic.until_served_by(node.engine(), began)
    seconds = await traffic.until_right(began)
    return found("engine restarted empty", traffic, began, seconds, used_again_s=round(used, 2))


async def hung_engine(it: Deployment, traffic: Conversations) -> Found:
    """SIGSTOP. A launcher ends its engine after a while; without one it goes on in the end."""
    await it.until(len(it.nodes), "dynamo_epp_circuits", 30.0, state="closed")
    node = fullest(it, traffic)
    engine = node.engine()
    began = time.monotonic()
    node.signal(signal.SIGSTOP)
    traffic.ledger.away.add(engine)
    await it.until(1, "dynamo_epp_circuits", 20.0, state="open")
    given_up = time.monotonic() - began
    seconds = await traffic.until_right(began)
    waiting = [one for one in traffic.since(began) if not one.ended and not one.engine]
    if it.stock:
        node.signal(signal.SIGCONT)
        traffic.ledger.away.discard(engine)
        continued = time.monotonic()
        used = await traffic.until_served_by(engine, continued)
        how = "went on"
    else:
        await node.ended(HUNG_S + 30)
        traffic.ledger.forget(engine)
        how = f"ended by its launcher after {time.monotonic() - began:.1f} s"
        await node.restarted()
        continued = time.monotonic()
        used = await traffic.until_served_by(node.engine(), continued)
    await traffic.until_right(continued)
    async with asyncio.timeout(30):
        while any(not one.ended for one in waiting):
            await traffic.changed(1.0)
    assert not any(one.problem for one in waiting), [one.problem for one in waiting]
    return found(
        f"engine hung, {how.split(' after')[0]}",
        traffic,
        began,
        seconds,
        given_up_after_s=round(given_up, 2),
        waited=f"{len(waiting)}, all answered",
        how=how,
        used_again_s=round(used, 2),
    )


def lost_metrics(how: str) -> Story:
    async def story(it: Deployment, traffic: Conversations) -> Found:
        """The engine answers requests, and its metrics can't be had."""
        node = fullest(it, traffic)
        began = time.monotonic()
        node.fail_metrics(how)
        await it.until(1, "dynamo_epp_workers_without_figures", 20.0)
        told = time.monotonic() - began
        seconds = await traffic.until_right(began, limit_s=5.0)
        served = [one for one in traffic.since(began) if one.engine == node.engine() and one.first]
        assert served, "an engine without metrics got nothing"
        node.fail_metrics("")
        await it.until(0, "dynamo_epp_workers_without_figures", 10.0)
        return found(
            f"metrics lost ({how})",
            traffic,
            began,
            seconds,
            called_stale_after_s=round(told, 2),
            served_meanwhile=len(served),
        )

    return story


def fullest(it: Deployment, traffic: Conversations) -> Node:
    counts = traffic.ledger.engines()
    return max(it.nodes, key=lambda node: counts.get(node.engine(), 0))
